r"""The sums that region scores are made of, and how a score becomes a gradient, in float64.

Targets p and probabilities q, (N, C, \*spatial). A row is one (sample, class); every score is a
function of three sums over the row, I = sum p q, P = sum p and Q = sum q, and so its gradient is

    ds/dq_i = ds/dI dI/dq_i + ds/dQ dQ/dq_i,    dI/dq_i = w_i p_i,    dQ/dq_i = w_i

with the voxels' weights w (1 unless given). That is the form "product"; in the form "l1" I is sum
min(p, q), and in the form "squared" P and Q are the sums of squares (see `overlap_sums`). The
denominator is clamped below at `eps`; where the clamp holds the denominator is constant. A row at
0/0 has the score NaN.

References
----------
The form "l1": Z. Wang, T. Popordanoska, J. Bertels, R. Lemmens and M. B. Blaschko, "Dice Semimetric
Losses", MICCAI 2023, and Z. Wang, X. Ning and M. B. Blaschko, "Jaccard Metric Losses", NeurIPS
2023. The scores themselves, with their sources, are in ``region_scores.py``.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .logistic import sigmoid, sigmoid_gradient


def _voxels(
    volume: ArrayLike, targets: ArrayLike, weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return volume, targets and weights; the first two hold 0 where the weight is 0."""
    v = np.asarray(volume, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    w = np.broadcast_to(np.asarray(1.0 if weights is None else weights, dtype=np.float64), v.shape)
    return np.where(w == 0, 0, v), np.where(w == 0, 0, p), w


def _row_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the spatial axes: (N, C, *spatial) to (N, C)."""
    rows: NDArray[np.float64] = np.sum(values, axis=tuple(range(2, values.ndim)))
    return rows


def overlap_sums(
    probs: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    form: str = "product",
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the three sums of every row, in the order that the scores take.

    .. math:: I = \sum_i w_i p_i q_i, \quad P = \sum_i w_i p_i, \quad Q = \sum_i w_i q_i

    In the form "l1" I = (P + Q - \sum_i w_i |p_i - q_i|) / 2, which is the sum of min(p, q); in the
    form "squared" P and Q are the sums of w p^2 and w q^2.

    Parameters
    ----------
    probs, targets : array_like
        q and p, (N, C, \*spatial).
    weights : array_like, optional
        w, broadcast to (N, C, \*spatial). A voxel of weight 0 is left out, whatever it holds.
    form : str
        "product", "l1" or "squared".

    Returns
    -------
    intersection, targets_sum, probs_sum : ndarray of float64
        I, P and Q, each (N, C).

    Examples
    --------
    >>> sums = overlap_sums([[[1, 1, 0, 0]]], [[[1, 0, 1, 0]]])
    >>> [float(s[0, 0]) for s in sums]
    [1.0, 2.0, 2.0]
    """
    q, p, w = _voxels(probs, targets, weights)
    if form == "squared":
        return _row_sum(w * p * q), _row_sum(w * p**2), _row_sum(w * q**2)
    P, Q = _row_sum(w * p), _row_sum(w * q)
    if form == "l1":
        return (P + Q - _row_sum(w * np.abs(p - q))) / 2, P, Q
    return _row_sum(w * p * q), P, Q


def error_sums(
    logits: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the soft false negatives and false positives of every row, from logits.

    .. math:: fn = P - I = \sum_i w_i p_i \sigma(-x_i), \quad
              fp = Q - I = \sum_i w_i (1 - p_i) \sigma(x_i)

    Parameters
    ----------
    logits, targets, weights : array_like
        x, p and w, as in `overlap_sums`.

    Returns
    -------
    false_negative_sum, false_positive_sum : ndarray of float64
        Each (N, C).

    Notes
    -----
    1 - J = (fn + fp) / (P + fp) keeps its digits where the prediction is confidently right; the
    difference 1 - I / (P + Q - I) does not.

    Examples
    --------
    >>> fn, fp = error_sums([[[0.0, 0.0, 0.0]]], [[[1, 0, 0]]])
    >>> float(fn[0, 0]), float(fp[0, 0])
    (0.5, 1.0)
    """
    x, p, w = _voxels(logits, targets, weights)
    return _row_sum(w * p * sigmoid(-x)), _row_sum(w * (1 - p) * sigmoid(x))


def _quotient(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], eps: float
) -> NDArray[np.float64]:
    """Return n / max(d, eps)."""
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 is NaN, and is meant to be
        return numerator / np.maximum(denominator, eps)


def _quotient_rule(
    n: NDArray[np.float64], dn: float, d: NDArray[np.float64], dd: float, eps: float
) -> NDArray[np.float64]:
    """Return the derivative (n' d - n d') / d^2 of n / max(d, eps) from n' and d'."""
    slope = np.where(d < eps, 0, dd)
    d = np.maximum(d, eps)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (dn * d - n * slope) / d**2


def _chain(
    d_intersection: NDArray[np.float64],
    d_probs_sum: NDArray[np.float64],
    voxels: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    form: str,
) -> NDArray[np.float64]:
    """Return ds/dq_i = ds/dI dI/dq_i + ds/dQ dQ/dq_i; 0 where w_i is 0, whatever the row's sums.

    The absolute value of the form "l1" has the derivative 0 at 0.
    """
    q, p, w = voxels
    per_row = d_intersection.shape + (1,) * (p.ndim - 2)
    dI, dQ = d_intersection.reshape(per_row), d_probs_sum.reshape(per_row)
    of_intersection = (1 - np.sign(q - p)) / 2 if form == "l1" else p
    of_probs_sum = 2 * q if form == "squared" else 1.0
    with np.errstate(invalid="ignore"):  # infinite slopes of a row whose denominator is 0
        return np.where(w == 0, 0, w * (dI * of_intersection + dQ * of_probs_sum))


def gradient_wrt_logits(
    dprobs: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None
) -> NDArray[np.float64]:
    r"""Return the gradient with respect to the logits from that with respect to the probabilities.

    .. math:: \frac{dL}{dx_i} = \frac{dL}{dq_i} \, q_i (1 - q_i)

    Parameters
    ----------
    dprobs, logits : array_like
        dL/dq and x, (N, C, \*spatial).
    weights : array_like, optional
        As in `overlap_sums`: where it is 0 the gradient is 0, whatever the logit.

    Returns
    -------
    ndarray of float64
        (N, C, \*spatial).

    Examples
    --------
    >>> float(gradient_wrt_logits(2.0, 0.0))
    0.5
    """
    x, dq, w = _voxels(logits, dprobs, weights)
    return np.where(w == 0, 0, dq * sigmoid_gradient(x))
