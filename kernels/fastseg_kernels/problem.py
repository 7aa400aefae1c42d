"""What a loss asks of a backend, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastseg_kernels.views import Layout


def compute_type(dtype: str) -> str:
    """Return the type that logits of ``dtype`` are computed in."""
    return "float64" if dtype == "float64" else "float32"


@dataclass(frozen=True, eq=False, slots=True)
class Arrangement:
    """What of a call depends on layouts and options alone.

    All layouts have the shape (N, C, *spatial) of ``logits``; an axis that an operand lacks has
    stride 0. Calls that are arranged alike share one object, which compares by identity: a backend
    remembers by it what it has worked out.
    """

    logits: Layout
    targets: Layout
    mask: Layout | None = None
    weights: Layout | None = None
    activation: str = "sigmoid"  # or "softmax", or "probs": the predictions are probabilities
    target_mode: int = 0  # one of the TARGETS_ constants
    positive: int = 0  # the label of TARGETS_EQUAL
    ignore_index: int | None = None
    threshold: float = 0.0  # of a hard prediction, in the units of ``logits``
    double: bool = False  # compute in float64 whatever the logits are
    indexed: bool = False  # with softmax: targets are class indices, and have class stride 0

    @property
    def real(self) -> str:
        """Return the type that is computed in: "float32" or "float64"."""
        return "float64" if self.double else compute_type(self.logits.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, C, *spatial)."""
        return self.logits.shape

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        """Return the layouts in the order of `Problem.addresses`."""
        return (self.logits, self.targets, self.mask, self.weights)


class Problem(NamedTuple):
    """Predictions and targets of one call."""

    arrangement: Arrangement
    addresses: tuple[int, int, int, int]  # of logits, targets, mask, weights; 0: absent
    owners: tuple[object, ...]  # keep the memory alive

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, C, *spatial)."""
        return self.arrangement.logits.shape


class Evaluation(NamedTuple):
    """A loss evaluated: ``value`` (N, C) or (1, 1); ``terms`` one value per term and row.

    Arrays are the backend's; without an axis of rows a backend may leave out the axes of length 1.
    """

    value: Any  # float64, unless asked for otherwise
    terms: Any  # float64 (T, N, C), or (T, 1, 1): before their weights
    coefficients: Any  # float64 (N, C, COEFFICIENTS), and those of the bins of a Lovasz term
