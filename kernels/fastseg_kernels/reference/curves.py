"""Hard scores of a prediction as functions of the threshold, in float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hard import confusion_counts, hard_dice_score, hard_jaccard_index


def jaccard_curve(
    predictions: ArrayLike,
    targets: ArrayLike,
    thresholds: ArrayLike,
    valid: ArrayLike | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the hard Jaccard index and the hard Dice score of every row at every threshold.

    .. math:: J(t) = \frac{tp}{tp + fp + fn}, \quad D(t) = \frac{2\,tp}{2\,tp + fp + fn},
              \quad \text{foreground predicted where } x_i \ge t

    Parameters
    ----------
    predictions : array_like
        x, logits or probabilities, (N, C, \*spatial). A NaN counts as background.
    targets : array_like
        p in {0, 1}, (N, C, \*spatial).
    thresholds : array_like
        t, (T,), in the units of the predictions and in any order.
    valid : array_like, optional
        Non-zero where a voxel counts; broadcast to (N, C, \*spatial). All of them if not given.

    Returns
    -------
    jaccard, dice : ndarray of float64
        Each (N, C, T); NaN where nothing is foreground, predicted or true.

    Examples
    --------
    >>> jaccard, dice = jaccard_curve([[[0.9, 0.6, 0.2]]], [[[1, 0, 0]]], [0.0, 0.5, 0.9])
    >>> jaccard[0, 0].round(6).tolist(), dice[0, 0].round(6).tolist()
    ([0.333333, 0.5, 1.0], [0.5, 0.666667, 1.0])
    """
    x = np.asarray(predictions, dtype=np.float64)
    levels = np.asarray(thresholds, dtype=np.float64)
    jaccard, dice = np.empty((2, *x.shape[:2], levels.size))
    for k, t in enumerate(levels):
        # A comparison with t, not the sign of x - t: that is NaN for two infinities
        tp, fp, fn, _ = confusion_counts(np.where(x >= t, 0.5, -0.5), targets, valid)
        jaccard[..., k], dice[..., k] = hard_jaccard_index(tp, fp, fn), hard_dice_score(tp, fp, fn)
    return jaccard, dice
