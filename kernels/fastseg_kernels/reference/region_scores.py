r"""Region scores and their gradients, in float64: quotients of the sums of ``overlap.py``.

References
----------
Soft Jaccard index: M. A. Rahman and Y. Wang, "Optimizing Intersection-Over-Union in Deep Neural
Networks for Image Segmentation", ISVC 2016. Tversky index, of which the soft Dice score is the case
alpha = beta = 1/2: S. S. M. Salehi, D. Erdogmus and A. Gholipour, "Tversky loss function for image
segmentation using 3D fully convolutional deep networks", MLMI 2017. The form "squared" of the soft
Dice score: F. Milletari, N. Navab and S. Ahmadi, "V-Net", 3DV 2016. The smoothing terms and `eps`
are not in these papers; at their defaults of 0 the formulas are the papers'.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .overlap import _chain, _quotient, _quotient_rule, _voxels, overlap_sums


def soft_jaccard_index(
    intersection: ArrayLike,
    targets_sum: ArrayLike,
    probs_sum: ArrayLike,
    *,
    smooth_num: float = 0.0,
    smooth_den: float = 0.0,
    eps: float = 0.0,
) -> NDArray[np.float64]:
    r"""Return the soft Jaccard index of every row (Rahman and Wang 2016).

    .. math:: \tilde J = \frac{I + n_0}{\max(P + Q - I + d_0,\ \epsilon)}

    Parameters
    ----------
    intersection, targets_sum, probs_sum : array_like
        I, P and Q of `overlap_sums`, (N, C).
    smooth_num, smooth_den, eps : float
        n_0, d_0 and the floor of the denominator.

    Returns
    -------
    ndarray of float64
        (N, C).

    Examples
    --------
    >>> float(soft_jaccard_index(1, 2, 2)) == 1 / 3
    True
    """
    I_ = np.asarray(intersection, dtype=np.float64)
    P = np.asarray(targets_sum, dtype=np.float64)
    Q = np.asarray(probs_sum, dtype=np.float64)
    return _quotient(I_ + smooth_num, P + Q - I_ + smooth_den, eps)


def soft_jaccard_index_gradient(
    probs: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    smooth_num: float = 0.0,
    smooth_den: float = 0.0,
    eps: float = 0.0,
    form: str = "product",
) -> NDArray[np.float64]:
    r"""Return the gradient of the soft Jaccard index with respect to the probabilities.

    .. math:: \frac{dJ}{dI} = \frac{U + N}{U^2}, \quad \frac{dJ}{dQ} = -\frac{N}{U^2}
              \quad\text{with}\quad N = I + n_0,\ U = P + Q - I + d_0 \ge \epsilon

    Parameters as in `overlap_sums` and `soft_jaccard_index`; returns (N, C, \*spatial) float64.
    """
    I_, P, Q = overlap_sums(probs, targets, weights, form)
    numerator = I_ + smooth_num  # d/dI = 1, d/dQ = 0
    denominator = P + Q - I_ + smooth_den  # d/dI = -1, d/dQ = 1
    dI = _quotient_rule(numerator, 1, denominator, -1, eps)
    dQ = _quotient_rule(numerator, 0, denominator, 1, eps)
    return _chain(dI, dQ, _voxels(probs, targets, weights), form)


def soft_dice_score(
    intersection: ArrayLike,
    targets_sum: ArrayLike,
    probs_sum: ArrayLike,
    *,
    smooth_num: float = 0.0,
    smooth_den: float = 0.0,
    eps: float = 0.0,
) -> NDArray[np.float64]:
    r"""Return the soft Dice score of every row, with plain (not squared) sums below.

    .. math:: \tilde D = \frac{2 I + n_0}{\max(P + Q + d_0,\ \epsilon)}

    Parameters and return value as in `soft_jaccard_index`.

    Examples
    --------
    >>> float(soft_dice_score(1, 2, 2))
    0.5
    """
    I_ = np.asarray(intersection, dtype=np.float64)
    P = np.asarray(targets_sum, dtype=np.float64)
    Q = np.asarray(probs_sum, dtype=np.float64)
    return _quotient(2 * I_ + smooth_num, P + Q + smooth_den, eps)


def soft_dice_score_gradient(
    probs: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    smooth_num: float = 0.0,
    smooth_den: float = 0.0,
    eps: float = 0.0,
    form: str = "product",
) -> NDArray[np.float64]:
    r"""Return the gradient of the soft Dice score with respect to the probabilities.

    .. math:: \frac{dD}{dI} = \frac{2}{S}, \quad \frac{dD}{dQ} = -\frac{N}{S^2}
              \quad\text{with}\quad N = 2 I + n_0,\ S = P + Q + d_0 \ge \epsilon

    Parameters as in `overlap_sums` and `soft_jaccard_index`; returns (N, C, \*spatial) float64.
    """
    I_, P, Q = overlap_sums(probs, targets, weights, form)
    numerator = 2 * I_ + smooth_num  # d/dI = 2, d/dQ = 0
    denominator = P + Q + smooth_den  # d/dI = 0, d/dQ = 1
    dI = _quotient_rule(numerator, 2, denominator, 0, eps)
    dQ = _quotient_rule(numerator, 0, denominator, 1, eps)
    return _chain(dI, dQ, _voxels(probs, targets, weights), form)


def tversky_index(
    intersection: ArrayLike,
    targets_sum: ArrayLike,
    probs_sum: ArrayLike,
    alpha: float,
    beta: float,
    *,
    smooth_num: float = 0.0,
    smooth_den: float = 0.0,
    eps: float = 0.0,
) -> NDArray[np.float64]:
    r"""Return the Tversky index of every row (Salehi et al. 2017).

    .. math:: T = \frac{I + n_0}{\max(I + \alpha (Q - I) + \beta (P - I) + d_0,\ \epsilon)}

    `alpha` weighs the false positives Q - I, `beta` the false negatives P - I. The Jaccard index is
    alpha = beta = 1, the Dice score alpha = beta = 1/2 (and half its smoothing terms). Other
    parameters and return value as in `soft_jaccard_index`.

    Examples
    --------
    >>> float(tversky_index(1, 2, 2, alpha=0.3, beta=0.7))
    0.5
    """
    I_ = np.asarray(intersection, dtype=np.float64)
    P = np.asarray(targets_sum, dtype=np.float64)
    Q = np.asarray(probs_sum, dtype=np.float64)
    return _quotient(I_ + smooth_num, I_ + alpha * (Q - I_) + beta * (P - I_) + smooth_den, eps)


def tversky_index_gradient(
    probs: ArrayLike,
    targets: ArrayLike,
    alpha: float,
    beta: float,
    weights: ArrayLike | None = None,
    *,
    smooth_num: float = 0.0,
    smooth_den: float = 0.0,
    eps: float = 0.0,
    form: str = "product",
) -> NDArray[np.float64]:
    r"""Return the gradient of the Tversky index with respect to the probabilities.

    .. math:: \frac{dT}{dI} = \frac{D - (1 - \alpha - \beta) N}{D^2}, \quad
              \frac{dT}{dQ} = -\frac{\alpha N}{D^2} \quad\text{with}\quad
              N = I + n_0,\ D = I + \alpha (Q - I) + \beta (P - I) + d_0 \ge \epsilon

    Parameters as in `overlap_sums` and `tversky_index`; returns (N, C, \*spatial) float64.
    """
    I_, P, Q = overlap_sums(probs, targets, weights, form)
    numerator = I_ + smooth_num  # d/dI = 1, d/dQ = 0
    denominator = I_ + alpha * (Q - I_) + beta * (P - I_) + smooth_den
    dI = _quotient_rule(numerator, 1, denominator, 1 - alpha - beta, eps)
    dQ = _quotient_rule(numerator, 0, denominator, alpha, eps)
    return _chain(dI, dQ, _voxels(probs, targets, weights), form)
