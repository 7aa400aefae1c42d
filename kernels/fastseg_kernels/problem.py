"""What a loss asks of a backend, and what it gets back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.views import View


class Problem(NamedTuple):
    """Predictions and targets of one call.

    All views have the shape (N, C, *spatial) of ``logits``; an axis that an operand lacks has
    stride 0. ``activation`` is "sigmoid" (logits) or "probs" (probabilities).
    """

    logits: View
    targets: View
    mask: View | None = None
    weights: View | None = None
    activation: str = "sigmoid"
    target_mode: int = 0  # one of the TARGETS_ constants
    positive: int = 0  # the label of TARGETS_EQUAL
    ignore_index: int | None = None
    threshold: float = 0.0  # of a hard prediction, in the units of ``logits``

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, C, *spatial)."""
        return self.logits.shape


class Evaluation(NamedTuple):
    """A loss evaluated: ``value`` (N, C) or (1, 1); ``terms`` one value per term and row."""

    value: NDArray[np.float64]
    terms: NDArray[np.float64]  # (T, N, C), or (T, 1, 1): before their weights
    coefficients: NDArray[np.float64]  # (N, C, COEFFICIENTS)
