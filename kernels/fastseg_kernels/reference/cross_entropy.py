"""The binary cross-entropy (negative log-likelihood), per voxel and summed, in float64.

Targets p, logits x, probabilities q = sigma(x). The likelihood of a voxel is q^p (1 - q)^(1 - p);
with log q = -softplus(-x) and log(1 - q) = -softplus(x) no logarithm of a rounded q is taken.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .logistic import sigmoid, softplus

LOG_FLOOR = -100.0
"""Logarithms of probabilities are clamped here, as torch's binary_cross_entropy does."""

DENOMINATOR_FLOOR = 1e-12
"""q (1 - q) is clamped here in the gradient with respect to probabilities, as torch does."""


def _times(factor: NDArray[np.float64], term: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return factor * term, and 0 where the factor is 0, also for an infinite term."""
    return factor * np.where(factor == 0, 0, term)


def _logs(q: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log q and log(1 - q), clamped."""
    with np.errstate(divide="ignore"):  # log 0 = -inf
        return np.maximum(np.log(q), LOG_FLOOR), np.maximum(np.log1p(-q), LOG_FLOOR)


def _both(alpha: float | None) -> tuple[float, float]:
    """Return the factors of the foreground and of the background."""
    return (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)


def bce_with_logits(
    logits: ArrayLike, targets: ArrayLike, pos_weight: ArrayLike = 1.0
) -> NDArray[np.float64]:
    r"""Return the binary cross-entropy of every voxel, from logits.

    .. math:: w\,p\,\mathrm{softplus}(-x) + (1 - p)\,\mathrm{softplus}(x)

    Parameters
    ----------
    logits, targets : array_like
        x and p, (N, C, \*spatial); targets in [0, 1].
    pos_weight : array_like
        w, the weight of the foreground, broadcast against the voxels: (C, 1, 1) for 2-D images.

    Returns
    -------
    ndarray of float64
        (N, C, \*spatial). An infinite logit gives the limit: 0 if it is right, inf if wrong.

    Examples
    --------
    >>> bce_with_logits([np.inf, -np.inf], [1, 1]).tolist()
    [0.0, inf]
    """
    x = np.asarray(logits, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    w = np.asarray(pos_weight, dtype=np.float64)
    return _times(w * p, softplus(-x)) + _times(1 - p, softplus(x))


def bce_with_logits_gradient(
    logits: ArrayLike, targets: ArrayLike, pos_weight: ArrayLike = 1.0
) -> NDArray[np.float64]:
    r"""Return the derivative of every voxel's cross-entropy with respect to its logit.

    .. math:: -w\,p\,\sigma(-x) + (1 - p)\,\sigma(x)

    which is q - p for w = 1. Parameters and shapes as in `bce_with_logits`.

    Examples
    --------
    >>> bce_with_logits_gradient([0.0, 0.0], [1, 0]).tolist()
    [-0.5, 0.5]
    """
    x = np.asarray(logits, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    w = np.asarray(pos_weight, dtype=np.float64)
    return -w * p * sigmoid(-x) + (1 - p) * sigmoid(x)


def bce(probs: ArrayLike, targets: ArrayLike, pos_weight: ArrayLike = 1.0) -> NDArray[np.float64]:
    r"""Return the binary cross-entropy of every voxel, from probabilities.

    .. math:: -w\,p\,\max(\log q, -100) - (1 - p)\,\max(\log(1 - q), -100)

    Parameters
    ----------
    probs, targets : array_like
        q and p in [0, 1], (N, C, \*spatial).
    pos_weight : array_like
        w, broadcast against the voxels.

    Returns
    -------
    ndarray of float64
        (N, C, \*spatial), at most 100 where `pos_weight` is 1.

    Examples
    --------
    >>> bce([1.0, 0.0], [1, 1]).tolist()
    [0.0, 100.0]
    """
    q = np.asarray(probs, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    w = np.asarray(pos_weight, dtype=np.float64)
    log_q, log_1_minus_q = _logs(q)
    return w * p * -log_q + (1 - p) * -log_1_minus_q


def bce_gradient(
    probs: ArrayLike, targets: ArrayLike, pos_weight: ArrayLike = 1.0
) -> NDArray[np.float64]:
    r"""Return the derivative of every voxel's cross-entropy with respect to its probability.

    .. math:: \frac{-w\,p\,(1 - q) + (1 - p)\,q}{\max(q (1 - q),\ 10^{-12})}

    which is (q - p) / (q (1 - q)) for w = 1. Parameters and shapes as in `bce`.

    Notes
    -----
    torch's convention: the denominator is clamped, and the clamp of the logarithms in `bce` is not
    differentiated. At q = 0 and p = 1 the gradient is -1e12, although the clamped loss is flat.

    Examples
    --------
    >>> bce_gradient([0.5, 0.5], [1, 0]).tolist()
    [-2.0, 2.0]
    """
    q = np.asarray(probs, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    w = np.asarray(pos_weight, dtype=np.float64)
    return (-w * p * (1 - q) + (1 - p) * q) / np.maximum(q * (1 - q), DENOMINATOR_FLOOR)


def focal_bce_with_logits(
    logits: ArrayLike, targets: ArrayLike, gamma: float = 2.0, alpha: float | None = None
) -> NDArray[np.float64]:
    r"""Return the focal loss of every voxel, from logits.

    .. math:: \alpha\, p\, \sigma(-x)^\gamma\, \mathrm{softplus}(-x)
              + (1 - \alpha) (1 - p)\, \sigma(x)^\gamma\, \mathrm{softplus}(x)

    Parameters
    ----------
    logits, targets : array_like
        x and p, (N, C, \*spatial); targets in [0, 1].
    gamma : float
        At least 0; with 0 it is the cross-entropy.
    alpha : float, optional
        Both factors are 1 unless it is given.

    Returns
    -------
    ndarray of float64
        (N, C, \*spatial).

    References
    ----------
    T.-Y. Lin, P. Goyal, R. Girshick, K. He and P. Dollar, "Focal loss for dense object detection",
    ICCV 2017, equation 5. For soft targets it is extended linearly.

    Examples
    --------
    >>> focal_bce_with_logits([0.0], [1]).round(6).tolist()
    [0.173287]
    """
    x = np.asarray(logits, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    on, off = _both(alpha)
    right, wrong = sigmoid(x), sigmoid(-x)
    of_target = np.power(wrong, gamma) * np.where(wrong == 0, 0, softplus(-x))
    of_other = np.power(right, gamma) * np.where(right == 0, 0, softplus(x))
    return _times(on * p, of_target) + _times(off * (1 - p), of_other)


def focal_bce_with_logits_gradient(
    logits: ArrayLike, targets: ArrayLike, gamma: float = 2.0, alpha: float | None = None
) -> NDArray[np.float64]:
    r"""Return the derivative of every voxel's focal loss with respect to its logit.

    With w = sigma(z), z = -x on the foreground and x off it, that of w^gamma softplus(z) is

    .. math:: \frac{d}{dz} = \gamma\, w^{\gamma} (1 - w)\, \mathrm{softplus}(z) + w^{\gamma + 1}

    Parameters and shapes as in `focal_bce_with_logits`.

    Examples
    --------
    >>> focal_bce_with_logits_gradient([0.0], [1], gamma=0.0).tolist()
    [-0.5]
    """
    x = np.asarray(logits, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    on, off = _both(alpha)

    def slope(z: NDArray[np.float64]) -> NDArray[np.float64]:
        wrong, right = sigmoid(z), sigmoid(-z)
        moved = gamma * _times(right, softplus(z))
        return np.power(wrong, gamma) * (moved + wrong)

    return off * (1 - p) * slope(x) - on * p * slope(-x)


def focal_bce(
    probs: ArrayLike, targets: ArrayLike, gamma: float = 2.0, alpha: float | None = None
) -> NDArray[np.float64]:
    r"""Return the focal loss of every voxel, from probabilities; logarithms as in `bce`.

    Examples
    --------
    >>> focal_bce([0.5], [1]).round(6).tolist()
    [0.173287]
    """
    q = np.asarray(probs, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    on, off = _both(alpha)
    low, high = _logs(q)
    return on * p * np.power(1 - q, gamma) * -low + off * (1 - p) * np.power(q, gamma) * -high


def focal_bce_gradient(
    probs: ArrayLike, targets: ArrayLike, gamma: float = 2.0, alpha: float | None = None
) -> NDArray[np.float64]:
    r"""Return the derivative of every voxel's focal loss with respect to its probability.

    The derivative with respect to the logit over max(q (1 - q), 1e-12), as in `bce_gradient`.

    Examples
    --------
    >>> focal_bce_gradient([0.5], [1], gamma=0.0).tolist()
    [-2.0]
    """
    q = np.asarray(probs, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    on, off = _both(alpha)
    low, high = _logs(q)
    of_target = np.power(1 - q, gamma) * (gamma * q * -low + (1 - q))
    of_other = np.power(q, gamma) * (gamma * (1 - q) * -high + q)
    of_logit = off * (1 - p) * of_other - on * p * of_target
    return of_logit / np.maximum(q * (1 - q), DENOMINATOR_FLOOR)


def bce_per_image(
    logits: ArrayLike,
    targets: ArrayLike,
    pos_weight: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
) -> NDArray[np.float64]:
    r"""Return the negative log-likelihood of every row: the sum over its voxels.

    .. math:: -\sum_i p_i \log q_i + (1 - p_i) \log(1 - q_i)
              = \sum_i \mathrm{softplus}(x_i) - p_i x_i

    Parameters
    ----------
    logits, targets, pos_weight : array_like
        As in `bce_with_logits`.
    weights : array_like, optional
        Multiplies every voxel's contribution; broadcast to (N, C, \*spatial). A voxel of weight 0
        is left out, whatever it holds.

    Returns
    -------
    ndarray of float64
        (N, C).

    Examples
    --------
    >>> bool(bce_per_image(np.zeros((1, 1, 3)), np.ones((1, 1, 3)))[0, 0] == 3 * np.log(2))
    True
    """
    x = np.asarray(logits, dtype=np.float64)
    p = np.asarray(targets, dtype=np.float64)
    v = np.asarray(1.0 if weights is None else weights, dtype=np.float64)
    x = np.where(v == 0, 0, x)
    p = np.where(v == 0, 0, p)
    values = v * bce_with_logits(x, p, pos_weight)
    rows: NDArray[np.float64] = np.sum(values, axis=tuple(range(2, values.ndim)))
    return rows


def bce_mean(
    logits: ArrayLike,
    targets: ArrayLike,
    pos_weight: ArrayLike = 1.0,
    valid: ArrayLike | None = None,
) -> float:
    r"""Return the mean of the binary cross-entropy over the valid voxels of the whole batch.

    .. math:: \frac{1}{\#\mathrm{valid}} \sum_{i\ \mathrm{valid}} \mathrm{bce}_i

    Parameters
    ----------
    logits, targets, pos_weight : array_like
        As in `bce_with_logits`.
    valid : array_like, optional
        Non-zero where a voxel counts; broadcast to (N, C, \*spatial). All of them if not given.

    Returns
    -------
    float
        NaN where no voxel is valid.

    Examples
    --------
    >>> bool(bce_mean(np.zeros((1, 1, 3)), np.ones((1, 1, 3))) == np.log(2))
    True
    """
    x = np.asarray(logits, dtype=np.float64)
    keep = np.broadcast_to(np.asarray(True if valid is None else valid) != 0, x.shape)
    count = np.count_nonzero(keep)
    total = float(np.sum(bce_per_image(x, targets, pos_weight, weights=keep)))
    return total / count if count else float("nan")
