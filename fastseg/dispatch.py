"""Which backend computes: one Protocol that every backend satisfies, and the choice between them.

A backend is a package under ``fastseg_kernels`` that exports the functions of `Backend`; the
dispatcher hands back the package itself, so a type checker fails where one is missing. It is
imported on the first call that needs it: ``import fastseg`` imports neither Numba nor CuPy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from fastseg_kernels.problem import Evaluation, Problem
    from fastseg_kernels.views import View


class UpdateTable(Protocol):
    """The arrays of an optimiser as a backend keeps them, so that a step costs one launch."""

    def set_params(self, params: Sequence[View]) -> None:
        """Point the table at parameters of the same sizes and dtypes."""

    def set_grads(self, grads: Sequence[View]) -> None:
        """Point the table at the gradients of this step."""


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
        columns: NDArray[np.int64],
        reduction: int,
        scale: NDArray[np.float64],
    ) -> Evaluation:
        """Return the value of a table of terms and the coefficients of its gradient."""

    def sigmoid(self, x: View, out: View) -> None:
        """Write the logistic function of ``x`` to ``out``."""

    def count_labels(self, problem: Problem, num_classes: int) -> NDArray[np.float64]:
        """Return (true positives, predicted, true, valid) of label volumes, (N, num_classes, 4)."""

    def update_table(self, params: Sequence[View], states: Sequence[Sequence[View]]) -> UpdateTable:
        """Make the table that the four updates below take."""

    def gradient_descent(
        self,
        table: Any,
        lr: float,
        *,
        weight_decay: float,
        grad_scale: float,
        zero_grads: bool,
    ) -> None:
        """Update the parameters of ``table`` in place."""

    def momentum(
        self,
        table: Any,
        lr: float,
        gamma: float,
        nesterov: bool = False,
        *,
        weight_decay: float,
        grad_scale: float,
        zero_grads: bool,
    ) -> None:
        """Update parameters and velocities in place, in the source's form."""

    def momentum_pytorch(
        self,
        table: Any,
        first: bool,
        lr: float,
        gamma: float,
        dampening: float = 0.0,
        nesterov: bool = False,
        *,
        weight_decay: float,
        grad_scale: float,
        zero_grads: bool,
    ) -> None:
        """Update parameters and buffers in place, in PyTorch's form."""

    def adam(
        self,
        table: Any,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        *,
        weight_decay: float,
        decoupled: bool,
        grad_scale: float,
        zero_grads: bool,
    ) -> None:
        """Update parameters and moments in place."""

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


@cache
def backend_of(device: str) -> Backend:
    """Return the backend that computes on ``device``, the name that `Library.device` gives."""
    if device != "cpu":
        raise TypeError(f"this version computes on the CPU only, got an array on {device}")
    return cpu()
