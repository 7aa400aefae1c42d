"""Which backend computes: one Protocol that every backend satisfies, and the choice between them.

A backend is a package under ``fastseg_kernels`` that exports the functions of `Backend`; the
dispatcher hands back the package itself, so a type checker fails where one is missing. It is
imported on the first call that needs it: ``import fastseg`` imports neither Numba nor CuPy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastseg_kernels.problem import Evaluation, Problem
    from fastseg_kernels.views import View


class Backend(Protocol):
    """What ``fastseg_kernels.cpu`` exports, and what a backend for another device must."""

    def statistics(self, problem: Problem, families: frozenset[str]) -> NDArray[np.float64]:
        """Return the sums of every row, float64 (N, C, K)."""

    def gradient(self, problem: Problem, coefficients: NDArray[np.float64], out: View) -> None:
        """Write the gradient to ``out``."""

    def evaluate(
        self,
        terms: NDArray[np.float64],
        class_weights: NDArray[np.float64],
        sums: NDArray[np.float64],
        reduction: int,
        scale: NDArray[np.float64],
    ) -> Evaluation:
        """Return the value of a table of terms and the coefficients of its gradient."""

    def sigmoid(self, x: View, out: View) -> None:
        """Write the logistic function of ``x`` to ``out``."""

    def count_labels(self, problem: Problem, num_classes: int) -> NDArray[np.float64]:
        """Return (true positives, predicted, true, valid) of label volumes, (N, num_classes, 4)."""

    def set_num_threads(self, count: int | None) -> None:
        """Set how many threads a call may use; None returns to the default."""

    def get_num_threads(self) -> int:
        """Return how many threads a call may use."""

    def describe(self) -> dict[str, Any]:
        """Return what ``fastseg info`` prints of the backend."""


@cache
def cpu() -> Backend:
    """Return the CPU backend (Numba)."""
    import fastseg_kernels.cpu as backend

    return backend


def backend_of(device: str) -> Backend:
    """Return the backend that computes on ``device``, the name that `Library.device` gives."""
    if device != "cpu":
        raise TypeError(f"this version computes on the CPU only, got an array on {device}")
    return cpu()
