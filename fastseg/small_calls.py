"""What a loss remembers of calls on small volumes, where checking takes longer than computing.

What of a check depends on layouts alone holds of every call whose arrays lie as those of an earlier
one did. The rest of it depends on addresses, and is asked again each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastseg.dispatch import Backend, SmallCall
from fastseg.libraries.base import Library
from fastseg.libraries.numpy_arrays import numpy_address
from fastseg.outputs import Place, reached
from fastseg_kernels.problem import Problem
from fastseg_kernels.views import View

MOST_SMALL_CALLS = 64
"""Arrangements that a loss remembers; each has a few kilobytes."""


class Known(NamedTuple):
    """A call that went well, of NumPy's arrays without mask, weights and further options."""

    small: SmallCall
    place: Place | None  # of ``out``; None: it is made by the call, and overlaps nothing
    library: Library
    dtype: str  # of the value
    names: tuple[str, ...]  # of the sums
    backend: Backend


def _arranged(logits: Any, targets: Any, out: Any) -> tuple[Any, ...] | None:
    """Return how plain NumPy arrays lie (``out`` may be None); None for any others."""
    plain = np.ndarray
    if not type(logits) is type(targets) is plain:
        return None
    its = logits.dtype, logits.shape, logits.strides, targets.dtype, targets.shape, targets.strides
    if type(out) is plain:
        return *its, out.dtype, out.shape, out.strides
    return its if out is None else None


class SmallCalls:
    """The small calls of one loss, by how arrays are arranged, and by how NumPy's arrays lie."""

    def __init__(self) -> None:
        self._by_arrangement: dict[Any, SmallCall | None] = {}
        self._by_arrays: dict[Any, Known] = {}

    def find(
        self,
        backend: Backend,
        problem: Problem,
        out: View,
        families: frozenset[str],
        own: frozenset[str],
        make_table: Callable[[], Any],
    ) -> SmallCall | None:
        """Return what does all steps of this call at once, if there is something that does.

        ``families`` are added up, the loss is made of ``own``.
        """
        known = self._by_arrangement
        key = backend, problem.arrangement, out.layout, families
        try:
            small = known[key]
        except KeyError:
            if len(known) >= MOST_SMALL_CALLS:
                known.clear()
            small = known[key] = backend.small_call(problem, out, make_table(), families, own)
        same = small is not None and small.kept and out.address == problem.addresses[0]
        return None if same else small

    def remember(self, logits: Any, targets: Any, out: Any, known: Known) -> None:
        """Remember a call for `repeat`, if its arrays are NumPy's."""
        arranged = _arranged(logits, targets, out)
        if arranged is not None:
            if len(self._by_arrays) >= MOST_SMALL_CALLS:
                self._by_arrays.clear()
            self._by_arrays[arranged] = known

    def repeat(
        self, logits: Any, targets: Any, out: Any, factor: float
    ) -> tuple[Known, Any, Any, Any] | None:
        """Take all steps of a call like one that is remembered: what was, sums, value, gradient.

        None where none is, and where something is to be said against this one: the way that all
        other calls take says it.
        """
        if not self._by_arrays:
            return None
        arranged = _arranged(logits, targets, out)
        known = None if arranged is None else self._by_arrays.get(arranged)
        if known is None:
            return None
        grad = known.library.empty_like(logits) if out is None else out
        addresses, address = (
            (numpy_address(logits), numpy_address(targets), 0, 0),
            numpy_address(grad),
        )
        if known.place is not None and (
            not out.flags.writeable or reached(known.place, addresses, address)
        ):
            return None
        sums, value = known.small(addresses, address, factor)
        return None if value is None else (known, sums, value, grad)
