"""Which backend computes: one Protocol that every backend satisfies, and the choice between them.

A backend is a package under ``fastseg_kernels`` that exports the functions of `Backend`, or an
object that has them as methods, as the CUDA one: there is one for each device and array library.
Either is what the dispatcher hands back, so a type checker fails where a function is missing. It is
imported on the first call that needs it: ``import fastseg`` imports neither Numba nor CuPy.
"""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from fastseg.libraries.base import Library
    from fastseg_kernels.problem import Evaluation, Problem
    from fastseg_kernels.updates import Guard, Rule
    from fastseg_kernels.views import View


class UpdateTable(Protocol):
    """The arrays of an optimiser as a backend keeps them, so that a step costs one launch."""

    def set_params(self, addresses: NDArray[np.int64]) -> None:
        """Point the table at parameters of the same sizes and dtypes."""

    def set_grads(self, addresses: NDArray[np.int64]) -> None:
        """Point the table at the gradients of this step."""

    def norm(self) -> Any:
        """Return the norm of all gradients: a float, or an array of one in the backend's memory."""

    def update(
        self, rule: Rule, step: Any, lr: Any, grad_scale: Any, zero_grads: bool, guard: Guard
    ) -> bool:
        """Update parameters and states in place, unless the guard drops the step.

        ``step`` is 1 at the first, or a `Backend.counter` of the steps before; ``lr``,
        ``grad_scale`` and the guard's are numbers, or views of one number in the backend's memory.
        Returns False if the step is known to be dropped.
        """


class SmallCall(Protocol):
    """All steps of a call in one, for arrays of known layouts and a known loss."""

    kept: bool
    """Whether ``out`` may not be the logits."""

    def __call__(self, addresses: Sequence[int], out: int, factor: float) -> tuple[Any, Any]:
        """Write the gradient to ``out``; return the sums and the value (None: see the sums).

        Addresses are of arrays of these layouts, in the order of `Problem.addresses`.
        """


class Backend(Protocol):
    """What ``fastseg_kernels.cpu`` exports, and what a backend for another device must.

    Arrays that a backend makes (sums, coefficients, states) are its own: NumPy's on the CPU.
    """

    def keeps(self, problem: Problem, families: frozenset[str], out: View) -> bool:
        """Tell whether statistics may keep in ``out`` what the gradient then starts from."""

    def small_call(
        self,
        problem: Problem,
        out: View,
        table: Any,
        families: frozenset[str],
        own: frozenset[str],
    ) -> SmallCall | None:
        """Return all steps in one, for calls arranged as this is, or None where that is no gain.

        ``families`` are added up; the loss is made of ``own``; ``table`` is what `prepare` made.
        """

    def statistics(
        self, problem: Problem, families: frozenset[str], keep: View | None = None
    ) -> Any:
        """Return the sums of every row, float64 (N, C, K); ``keep``: an ``out`` that `keeps`."""

    def gradient(
        self,
        problem: Problem,
        coefficients: Any,
        out: View,
        families: frozenset[str],
        slopes: Any = None,
        kept: bool = False,
    ) -> None:
        """Write the gradient of a loss that is made of ``families`` to ``out``."""

    def sorted_slopes(
        self, problem: Problem, sums: Any, result: Evaluation, batch: bool, with_slopes: bool
    ) -> tuple[Evaluation, Any]:
        """Return an evaluation with the value of a Lovasz term that sorts, and its slopes.

        Slopes, which `gradient` adds, are None unless they are wanted.
        """

    def prepare(
        self,
        terms: NDArray[np.float64],
        class_weights: NDArray[np.float64],
        columns: NDArray[np.int64],
        reduction: int,
    ) -> Any:
        """Return a table of terms as `evaluate` takes it; callers keep it."""

    def evaluate(
        self, table: Any, sums: Any, scale: Any, dtype: str = "float64", by_term: bool = False
    ) -> Evaluation:
        """Return the value of a table of terms and the coefficients of its gradient.

        ``scale`` is a number, float64 (N, C), or a view of either in the backend's memory;
        ``dtype`` is that of the value where it is made for the caller (not on the CPU); the values
        of the terms are there if ``by_term``.
        """

    def sigmoid(self, x: View, out: View) -> None:
        """Write the logistic function of ``x`` to ``out``."""

    def count_labels(self, problem: Problem, num_classes: int) -> NDArray[np.float64]:
        """Return (true positives, predicted, true, valid) of label volumes, (N, num_classes, 4)."""

    def update_table(
        self,
        params: Sequence[View],
        states: Sequence[Sequence[Any]],
        masters: Sequence[Any],
        small_states: bool,
    ) -> UpdateTable:
        """Make the table that updates the parameters.

        States and masters (of parameters of 2 bytes; for others None) are what `state_like` made;
        small states are bfloat16.
        """

    def state_like(self, param: View, k: int, dtype: str) -> Any:
        """Return zeros for an optimiser's state ``k``: (elements,), in memory order."""

    def counter(self, value: int) -> Any:
        """Return an int64 array of one number, which `UpdateTable.update` counts up."""

    def is_recording(self) -> bool:
        """Tell whether what is launched now is recorded into a graph, to be repeated."""

    def current_stream(self) -> Any:
        """Return the stream that what is launched now is launched on, as `to_host` takes it."""

    def to_host(self, array: Any, stream: Any = None) -> NDArray[Any]:
        """Return an array of the backend's as a NumPy array, once ``stream`` has written it."""

    def from_host(self, array: Any, values: NDArray[Any]) -> None:
        """Write values to an array of the backend's."""


class Threads(Protocol):
    """What the CPU backend exports beside that."""

    def set_num_threads(self, count: int | None) -> None:
        """Set how many threads a call may use; None returns to the default."""

    def get_num_threads(self) -> int:
        """Return how many threads a call may use."""

    def are_threads_chosen(self) -> bool:
        """Tell whether somebody chose the number of threads."""

    def limit_threads(self, count: int) -> AbstractContextManager[None]:
        """Let calls of this Python thread use no more threads than ``count``."""

    def describe(self) -> dict[str, Any]:
        """Return what ``fastseg info`` prints of the backend."""


class CPU(Backend, Threads, Protocol):
    """The CPU backend."""


@cache
def cpu() -> CPU:
    """Return the CPU backend (Numba)."""
    import fastseg_kernels.cpu as backend

    return backend


_making = Lock()
_made: dict[tuple[str, str], Backend] = {}


@cache
def _on_device(library: str, device: str) -> Backend:
    if device == "cpu":
        return cpu()
    from fastseg_kernels.cuda import backend

    kind, _, index = device.partition(":")
    assert kind == "cuda", device  # libraries refuse arrays of other devices
    with _making:  # threads may come here at once, and there is one backend for each device
        key = library, device
        if key not in _made:
            _made[key] = backend(library, int(index))
        return _made[key]


def backend_of(library: Library, array: Any) -> Backend:
    """Return the backend that computes where ``array`` is, with the memory of its library."""
    return _on_device(library.allocator, library.device(array))
