"""What a loss asks of a backend: one volume with its targets, checked and brought to (N, C, ...)."""

from __future__ import annotations

from typing import NamedTuple

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
