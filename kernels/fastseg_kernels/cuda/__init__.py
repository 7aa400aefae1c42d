"""The CUDA backend: kernels in CUDA C++, launched through CuPy.

`Backend` exports what ``fastseg.dispatch.Backend`` types, as the CPU's package does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastseg_kernels.cuda import evaluation, labels, logistic, overlap, sorting, updates
from fastseg_kernels.cuda.runtime import CuPyDriver, CuPyMemory, Device, Memory, TorchMemory

MEMORIES: dict[str, Callable[[int], Memory]] = {"cupy": CuPyMemory, "torch": TorchMemory}
"""Whose allocator and stream are used, by the name of the array library."""


class Backend(Device):
    """The verbs on one device: functions whose first argument is the device are its methods."""

    keeps = overlap.keeps
    small_call = overlap.small_call
    statistics = overlap.statistics
    gradient = overlap.gradient
    prepare = evaluation.prepare
    evaluate = evaluation.evaluate
    sorted_slopes = sorting.sorted_slopes
    sigmoid = logistic.sigmoid
    count_labels = labels.count_labels
    state_like = updates.state_like

    def update_table(
        self, params: Any, states: Any, masters: Any, small_states: bool
    ) -> updates.Table:
        """Make the table of an optimiser's arrays."""
        return updates.Table(self, params, states, masters, small_states)


def backend(library: str, index: int) -> Backend:
    """Return the backend for arrays of a library ("cupy" or "torch") on a device."""
    return Backend(CuPyDriver(index), MEMORIES[library](index))


__all__ = ["Backend", "backend"]
