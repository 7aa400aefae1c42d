r"""The softmax over the classes of a voxel, its cross-entropy, and their gradients, in float64.

Logits x and targets p, (N, C, \*spatial): the classes are axis 1, and a voxel's targets add up to 1
(one of them is 1 for a class index). With m = max_c x_c no exponential overflows:

    q_c = exp(x_c - m) / sum_k exp(x_k - m),    -log q_c = log(sum_k exp(x_k - m)) - (x_c - m)
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def one_hot(indices: ArrayLike, classes: int) -> NDArray[np.float64]:
    r"""Return class indices (N, \*spatial) as targets (N, C, \*spatial).

    An index that is no class is 0 for all classes.

    Examples
    --------
    >>> one_hot([[2, 0]], 3)[0].tolist()
    [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    """
    y = np.asarray(indices)
    hot: NDArray[np.float64] = np.stack([y == c for c in range(classes)], axis=1).astype(np.float64)
    return hot


def _shifted(logits: ArrayLike) -> NDArray[np.float64]:
    """Return x - m; the classes of one infinite logit are at 0 and minus infinity."""
    x = np.asarray(logits, dtype=np.float64)
    m = x.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(x == m, 0.0, x - m)


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    r"""Return the probabilities of the classes of every voxel, (N, C, \*spatial).

    Examples
    --------
    >>> softmax([[[0.0], [np.log(3.0)]]])[0, :, 0].round(6).tolist()
    [0.25, 0.75]
    """
    e = np.exp(_shifted(logits))
    q: NDArray[np.float64] = e / e.sum(axis=1, keepdims=True)
    return q


def softmax_nll(logits: ArrayLike) -> NDArray[np.float64]:
    r"""Return the negative log-likelihood -log q_c of every class, (N, C, \*spatial).

    .. math:: -\log q_c = (m - x_c) + \mathrm{log1p}\Big(\sum_k e^{x_k - m} - 1\Big)

    The sum is taken without one of its largest terms, which is 1: nothing is lost where it is near
    1, that is where the network is sure.

    Examples
    --------
    >>> softmax_nll([[[0.0], [0.0]]])[0, :, 0].round(6).tolist()
    [0.693147, 0.693147]
    """
    shifted = _shifted(logits)
    others = np.exp(shifted)
    first = np.expand_dims(np.argmax(shifted, axis=1), 1)
    np.put_along_axis(
        others, first, np.where(np.isnan(shifted).any(1, keepdims=True), np.nan, 0), 1
    )
    nll: NDArray[np.float64] = np.log1p(others.sum(axis=1, keepdims=True)) - shifted
    return nll


def softmax_gradient(dprobs: ArrayLike, logits: ArrayLike) -> NDArray[np.float64]:
    r"""Return the gradient with respect to the logits from that with respect to the probabilities.

    .. math:: \frac{dL}{dx_c} = q_c \Big(\frac{dL}{dq_c} - \sum_k q_k \frac{dL}{dq_k}\Big)
                              = q_c \sum_k q_k \Big(\frac{dL}{dq_c} - \frac{dL}{dq_k}\Big)

    The second form, in which nothing cancels that is not in the result, is what is computed.

    Examples
    --------
    >>> softmax_gradient([[[1.0], [0.0]]], [[[0.0], [0.0]]])[0, :, 0].tolist()
    [0.25, -0.25]
    """
    dq, q = np.asarray(dprobs, dtype=np.float64), softmax(logits)
    grad = np.zeros_like(q)
    for k in range(q.shape[1]):
        grad += q * q[:, k : k + 1] * (dq - dq[:, k : k + 1])
    return grad


def focal_nll(logits: ArrayLike, gamma: float = 2.0) -> NDArray[np.float64]:
    r"""Return the focal loss of every class of a voxel, if it were the target.

    .. math:: (1 - q_c)^\gamma (-\log q_c)

    Examples
    --------
    >>> focal_nll([[[0.0], [0.0]]])[0, :, 0].round(6).tolist()
    [0.173287, 0.173287]
    """
    rest, nll = _rest(logits), softmax_nll(logits)
    result: NDArray[np.float64] = np.where(rest == 0, 0.0, np.power(rest, gamma) * nll)
    return result


def focal_steepness(logits: ArrayLike, gamma: float = 2.0) -> NDArray[np.float64]:
    r"""Return what the cross-entropy of a class is weighted by in the gradient of its focal loss.

    With L(q) = (1 - q)^\gamma (-\log q) that is -q L'(q), as 1 = -q d(-\log q)/dq:

    .. math:: (1 - q_c)^{\gamma - 1} (\gamma q_c (-\log q_c) + 1 - q_c)

    and the gradient is `cross_entropy_gradient` of the targets times it. It is 0 where 1 - q_c is.

    Examples
    --------
    >>> focal_steepness([[[0.0], [0.0]]], gamma=0.0)[0, :, 0].tolist()
    [1.0, 1.0]
    """
    rest, nll, q = _rest(logits), softmax_nll(logits), softmax(logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = gamma * np.where(q == 0, 0.0, q * nll)
        value = np.power(rest, gamma - 1) * (moved + rest)
    result: NDArray[np.float64] = np.where(rest == 0, 0.0, value)
    return result


def _rest(logits: ArrayLike) -> NDArray[np.float64]:
    """Return 1 - q of every class, as the sum of the others."""
    q = softmax(logits)
    rest: NDArray[np.float64] = np.stack(
        [np.delete(q, c, axis=1).sum(axis=1) for c in range(q.shape[1])], axis=1
    )
    return rest


def cross_entropy_gradient(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    r"""Return the gradient of every voxel's cross-entropy, (N, C, \*spatial).

    .. math:: \frac{d}{dx_c} \sum_k -T_k \log q_k = q_c \sum_{k \ne c} T_k - T_c (1 - q_c)

    Parameters
    ----------
    logits, targets : array_like
        x and T, (N, C, \*spatial): targets, with whatever weights and smoothing there are.

    Examples
    --------
    >>> cross_entropy_gradient([[[0.0], [0.0]]], [[[1.0], [0.0]]])[0, :, 0].tolist()
    [-0.5, 0.5]
    """
    T, q = np.asarray(targets, dtype=np.float64), softmax(logits)
    others = np.stack([np.delete(T, c, axis=1).sum(axis=1) for c in range(T.shape[1])], axis=1)
    grad: NDArray[np.float64] = q * others - T * _rest(logits)
    return grad
