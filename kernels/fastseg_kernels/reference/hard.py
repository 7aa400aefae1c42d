"""Counts of a thresholded prediction, and the scores made of them.

A voxel is predicted as foreground where q >= 0.5. Because sigma(0) = 1/2 and sigma increases, that
is x >= 0, and the comparison is made there: the float64 sigma of a logit just below 0 rounds to
one half.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _row_count(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count the true voxels of every row: (N, C, *spatial) to (N, C)."""
    rows: NDArray[np.int64] = np.sum(mask, axis=tuple(range(2, mask.ndim)), dtype=np.int64)
    return rows


def confusion_counts(
    logits: ArrayLike, targets: ArrayLike, valid: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    r"""Return the true and false positives and negatives of every row.

    .. math:: tp = \#\{p = 1, x \ge 0\}, \quad fp = \#\{p \ne 1, x \ge 0\}, \quad
              fn = \#\{p = 1, x < 0\}, \quad tn = \#\{p \ne 1, x < 0\}

    Parameters
    ----------
    logits : array_like
        x, (N, C, \*spatial). For probabilities pass q - 0.5, whose sign is exact; for a mask of 0
        and 1, mask - 0.5. A NaN is not x >= 0 and counts as background.
    targets : array_like
        p in {0, 1}, (N, C, \*spatial).
    valid : array_like, optional
        Non-zero where a voxel counts; broadcast to (N, C, \*spatial). All of them if not given.

    Returns
    -------
    tp, fp, fn, tn : ndarray of int64
        Each (N, C); their sum is the number of valid voxels.

    Examples
    --------
    >>> counts = confusion_counts([[[3.0, 0.0, -1.0, -2.0]]], [[[1, 0, 1, 0]]])
    >>> [int(c[0, 0]) for c in counts]
    [1, 1, 1, 1]
    """
    x = np.asarray(logits, dtype=np.float64)
    predicted = x >= 0
    positive = np.asarray(targets, dtype=np.float64) == 1
    keep = np.broadcast_to(np.asarray(True if valid is None else valid) != 0, x.shape)
    tp = _row_count(keep & positive & predicted)
    fp = _row_count(keep & ~positive & predicted)
    fn = _row_count(keep & positive & ~predicted)
    tn = _row_count(keep & ~positive & ~predicted)
    return tp, fp, fn, tn


def hard_jaccard_index(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike) -> NDArray[np.float64]:
    r"""Return the hard Jaccard index of every row, intersection over union.

    .. math:: J = \frac{\#\{p = 1 \text{ and } q \ge 0.5\}}{\#\{p = 1 \text{ or } q \ge 0.5\}}
                = \frac{tp}{tp + fp + fn}

    Parameters
    ----------
    tp, fp, fn : array_like
        Counts, (N, C).

    Returns
    -------
    ndarray of float64
        (N, C); NaN where the union is empty.

    Examples
    --------
    >>> hard_jaccard_index([1, 0], [1, 0], [0, 0]).tolist()
    [0.5, nan]
    """
    tp = np.asarray(tp, dtype=np.float64)
    fp = np.asarray(fp, dtype=np.float64)
    fn = np.asarray(fn, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0/0 is NaN, and is meant to be
        score: NDArray[np.float64] = tp / (tp + fp + fn)
    return score


def hard_dice_score(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike) -> NDArray[np.float64]:
    r"""Return the hard Dice score of every row.

    .. math:: D = \frac{2\,tp}{2\,tp + fp + fn}

    Parameters and return value as in `hard_jaccard_index`.

    Examples
    --------
    >>> hard_dice_score([1, 0], [1, 0], [1, 0]).tolist()
    [0.5, nan]
    """
    tp = np.asarray(tp, dtype=np.float64)
    fp = np.asarray(fp, dtype=np.float64)
    fn = np.asarray(fn, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        score: NDArray[np.float64] = 2 * tp / (2 * tp + fp + fn)
    return score
