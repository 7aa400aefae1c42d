"""The logistic function, its derivative and its integral, in float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def sigmoid(x: ArrayLike) -> NDArray[np.float64]:
    r"""Return the logistic function of every element.

    .. math:: \sigma(x) = \frac{1}{1 + \exp(-x)}

    Parameters
    ----------
    x : array_like
        Logits, of any shape.

    Returns
    -------
    ndarray of float64
        Probabilities q, with the shape of `x`.

    Notes
    -----
    With e = exp(-\|x\|), which cannot overflow: 1 / (1 + e) for x >= 0, and e / (1 + e) for x < 0,
    where numerator and denominator of the formula have been multiplied by exp(x).

    Examples
    --------
    >>> sigmoid([-np.inf, 0.0, np.inf]).tolist()
    [0.0, 0.5, 1.0]
    """
    x = np.asarray(x, dtype=np.float64)
    e: NDArray[np.float64] = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def softplus(x: ArrayLike) -> NDArray[np.float64]:
    r"""Return the softplus of every element, the integral of the logistic function.

    .. math:: \mathrm{softplus}(x) = \log(1 + \exp(x)) = \max(x, 0) + \log(1 + \exp(-|x|))

    Parameters
    ----------
    x : array_like
        Logits, of any shape.

    Returns
    -------
    ndarray of float64
        With the shape of `x`.

    Notes
    -----
    softplus(x) = -log sigma(-x) and softplus(-x) = -log sigma(x): the two logarithms of the binary
    cross-entropy. For x << 0 the value is about exp(x), and log1p keeps its relative accuracy.

    Examples
    --------
    >>> softplus([-np.inf, 1000.0]).tolist()
    [0.0, 1000.0]
    >>> bool(softplus(0.0) == np.log(2.0))
    True
    """
    x = np.asarray(x, dtype=np.float64)
    value: NDArray[np.float64] = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return value


def sigmoid_gradient(x: ArrayLike) -> NDArray[np.float64]:
    r"""Return the derivative of the logistic function at every element.

    .. math:: \sigma'(x) = q (1 - q) = \sigma(x) \, \sigma(-x)

    Parameters
    ----------
    x : array_like
        Logits (not probabilities), of any shape.

    Returns
    -------
    ndarray of float64
        With the shape of `x`.

    Notes
    -----
    1 - q is evaluated as sigma(-x): the subtraction would give 0 from x = 37 on.

    Examples
    --------
    >>> float(sigmoid_gradient(0.0))
    0.25
    >>> float(sigmoid_gradient(700.0)) > 0
    True
    """
    x = np.asarray(x, dtype=np.float64)
    return sigmoid(-x) * sigmoid(x)
