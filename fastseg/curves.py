"""Hard scores at every threshold, from a histogram of predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.scores import dice_from_counts, jaccard_from_counts
from fastseg_kernels.constants import CURVES, HISTOGRAMS, family_columns

if TYPE_CHECKING:
    from fastseg.statistics import Statistics


class JaccardCurve(NamedTuple):
    """Hard scores at every threshold: a prediction is foreground from the threshold on.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> probs = np.array([[[0.9, 0.6, 0.2, 0.1]]])
    >>> targets = np.array([[[1, 1, 1, 0]]])
    >>> loss = fs.SoftJaccard().replace(activation=None)
    >>> curve = loss.statistics(probs, targets, track=("curve",)).jaccard_curve()
    >>> threshold, score = curve.best()
    >>> 0.1 < threshold < 0.2, score
    (True, 1.0)
    """

    thresholds: NDArray[np.float64]
    """(T,), ascending, in units of the predictions: logits, or (softmax) probabilities."""
    probabilities: NDArray[np.float64]
    """(T,): the thresholds as probabilities, as `fastseg.jaccard_index` takes them."""
    jaccard_index: NDArray[np.float64]
    """(N, C, T); NaN where neither prediction nor target has foreground."""
    dice_score: NDArray[np.float64]
    """(N, C, T), likewise."""
    counts: dict[str, NDArray[np.int64]]
    """tp, fp, fn and tn, each (N, C, T)."""

    def best(self) -> tuple[float, float]:
        """Return the threshold with the largest mean Jaccard index over rows, and that mean.

        Rows that are NaN at a threshold have no part in its mean. Of equal ones the middle one.
        """
        rows = self.jaccard_index.reshape(-1, len(self.thresholds))
        known = ~np.isnan(rows)
        count = known.sum(axis=0)
        means = np.where(known, rows, 0.0).sum(axis=0) / np.maximum(count, 1)
        means[count == 0] = -1.0
        largest = np.flatnonzero(means == means.max())
        if means[largest[0]] < 0:
            return float("nan"), float("nan")
        middle = largest[len(largest) // 2]
        return float(self.thresholds[middle]), float(means[middle])


def first_column(names: tuple[str, ...], family: str) -> int:
    """Return where the columns of a histogram begin, which lie one after the other."""
    members = family_columns(family)
    first = names.index(members[0])
    if names[first : first + len(members)] != members:
        raise ValueError(f"the columns of {family} must lie in their order in the statistics")
    return first


def curve_of(s: Statistics) -> JaccardCurve:
    """Return the curve of statistics that hold a histogram of predictions, on the host."""
    family = next((f for f in CURVES if f"{f}_undefined" in s.names), None)
    if family is None:
        raise ValueError("these statistics hold no curve: ask for track=('curve',)")
    bins, first = HISTOGRAMS[family].bins, first_column(s.names, family)
    counts = s.array[:, :, first : first + len(family_columns(family))]
    foreground, background = counts[:, :, 1 : 1 + bins], counts[:, :, 1 + bins :]
    above = [np.cumsum(part[:, :, ::-1], axis=2)[:, :, ::-1] for part in (foreground, background)]
    tp, fp = (part[:, :, 1:].astype(np.int64) for part in above)
    fn = above[0][:, :, :1].astype(np.int64) - tp
    every = counts[:, :, 1:].sum(axis=2, keepdims=True).astype(np.int64)
    scores = {"tp": tp, "fp": fp, "fn": fn, "tn": every - tp - fp - fn}
    undefined = counts[:, :, :1] > 0
    jaccard, dice = (
        np.where(undefined, np.nan, of_counts(scores, float("nan")))
        for of_counts in (jaccard_from_counts, dice_from_counts)
    )
    edges = np.arange(1, bins)
    if family == "prob_curve":
        return JaccardCurve(edges / bins, edges / bins, jaccard, dice, scores)
    logits = (edges - bins // 2) / 32.0
    return JaccardCurve(logits, 1.0 / (1.0 + np.exp(-logits)), jaccard, dice, scores)
