"""Scores from hard counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import REDUCTIONS


def _quotient(
    numerator: NDArray[np.int64], denominator: NDArray[np.int64], empty: float
) -> NDArray[np.float64]:
    result = np.full(numerator.shape, float(empty))
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def jaccard_from_counts(
    counts: Mapping[str, NDArray[np.int64]], empty: float
) -> NDArray[np.float64]:
    """Return tp / (tp + fp + fn), ``empty`` where the union is 0."""
    tp = counts["tp"]
    return _quotient(tp, tp + counts["fp"] + counts["fn"], empty)


def dice_from_counts(counts: Mapping[str, NDArray[np.int64]], empty: float) -> NDArray[np.float64]:
    """Return 2 tp / (2 tp + fp + fn), ``empty`` where the union is 0."""
    tp = 2 * counts["tp"]
    return _quotient(tp, tp + counts["fp"] + counts["fn"], empty)


def reduce_scores(
    scores: NDArray[np.float64], undefined: NDArray[np.float64], reduction: str
) -> NDArray[np.float64] | np.float64:
    """Reduce the scores of rows; a row with predictions that are NaN is NaN, and so is the result.

    Rows without foreground that score NaN are left out of mean and sum.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    scores = np.where(undefined > 0, np.nan, scores)
    if reduction == "none":
        return scores
    if (undefined > 0).any():
        return np.float64(np.nan)
    kept = scores[~np.isnan(scores)]
    if kept.size == 0:
        return np.float64(np.nan)
    return np.float64(kept.mean() if reduction == "mean" else kept.sum())
