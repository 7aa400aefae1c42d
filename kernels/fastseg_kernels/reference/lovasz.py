r"""The Lovász extension of the Jaccard loss, its weights, hinge and softmax, in float64.

A row has voxels with errors e and of foreground or background, P of them foreground. A set with f
foreground and b background voxels, taken as the wrong ones, has the Jaccard loss

    J(f, b) = 1 - (P - f) / (P + b) = (f + b) / (P + b),    J = 0 for the empty set

(so J = 1 for every other set of a row without foreground). The extension sorts the errors,
descending, and gives each the weight by which its voxel raises the loss of those before it:

    L(e) = sum_k e_(k) (J_k - J_(k-1))

Weights are made of integer counts, U = P + b and I = P - f: a difference of J at P = 1e7 has lost
half of its digits, and for small I all. A foreground voxel raises J by 1 / U and a background voxel
by I / (U (U + 1)), with U and I from before the step; where U = 0 (P = 0 and b = 0) by 1.

Equal errors form a group from (f, b) to (f + n1, b + n0), and any order within it gives a
subgradient. Its weights are the mean of the two extreme orders, each class sharing its total:

    foreground first:  1 / U for foreground,   I' / (U U') for background
    background first:  1 / U' for foreground,  I / (U U') for background

with U' = U + n0 and I' = I - n1, hence (1 / U + 1 / U') / 2 and (I + I') / (2 U U'). The first
group of a row without foreground has U = 0, n1 = 0 and the total 1: each voxel gets 1 / n0.

References
----------
M. Berman, A. R. Triki and M. B. Blaschko, "The Lovász-Softmax loss", CVPR 2018: (8) the hinge, (11)
softmax, algorithm 1 the weights without ties. The treatment of ties is not in the paper.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .multiclass import softmax

Counts = NDArray[np.float64]
"""Numbers of voxels: float64 holds integers to 2^53, and products beyond that do not overflow."""


def _divided(numerator: ArrayLike, denominator: ArrayLike, otherwise: ArrayLike = 0.0) -> Counts:
    """Return n / d, and `otherwise` where d is 0."""
    d = np.asarray(denominator, dtype=np.float64)
    return np.where(d == 0, otherwise, numerator / np.where(d == 0, 1.0, d))


def jaccard_loss_of_counts(f: ArrayLike, b: ArrayLike, P: ArrayLike) -> NDArray[np.float64]:
    r"""Return the Jaccard loss of a set of wrong voxels.

    .. math:: J(f, b) = 1 - \frac{P - f}{P + b} = \frac{f + b}{P + b}, \quad J(0, 0) = 0

    Parameters
    ----------
    f, b, P : array_like
        Numbers of wrong foreground voxels, of wrong background voxels and of foreground voxels.

    Returns
    -------
    ndarray of float64
        Of their shape.

    Examples
    --------
    >>> jaccard_loss_of_counts([0, 1, 0, 0], [0, 1, 0, 3], [2, 2, 0, 0]).round(6).tolist()
    [0.0, 0.666667, 0.0, 1.0]
    """
    f, b, P = (np.asarray(count, dtype=np.float64) for count in (f, b, P))
    return _divided(f + b, P + b)


def _before_and_after(
    f: ArrayLike, b: ArrayLike, n1: ArrayLike, n0: ArrayLike, P: ArrayLike
) -> tuple[Counts, Counts, Counts, Counts]:
    """Return the union and the intersection before a group, U and I, and after it, U' and I'."""
    f, b, n1, n0, P = np.broadcast_arrays(
        *(np.asarray(count, dtype=np.float64) for count in (f, b, n1, n0, P))
    )
    return P + b, P - f, P + b + n0, P - f - n1


def group_weights(
    f: ArrayLike, b: ArrayLike, n1: ArrayLike, n0: ArrayLike, P: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the weights of a foreground and of a background voxel in a group of equal errors.

    .. math:: \frac{1}{2} \Big(\frac{1}{U} + \frac{1}{U'}\Big), \quad \frac{I + I'}{2 U U'}

    Parameters
    ----------
    f, b : array_like
        Numbers of foreground and background voxels of larger error.
    n1, n0 : array_like
        Numbers of foreground and background voxels in the group.
    P : array_like
        Number of foreground voxels in the row.

    Returns
    -------
    foreground_weight, background_weight : ndarray of float64
        n1 and n0 times them add up to J(f + n1, b + n0) - J(f, b).

    Examples
    --------
    >>> foreground_weight, background_weight = group_weights(0, 0, 1, 1, 2)
    >>> float(foreground_weight) == (1 / 2 + 1 / 3) / 2
    True
    >>> float(background_weight) == (2 + 1) / (2 * 2 * 3)
    True
    """
    U, inter, U_after, inter_after = _before_and_after(f, b, n1, n0, P)
    foreground = (_divided(1.0, U) + _divided(1.0, U_after)) / 2
    # U = 0 is the start of a row without foreground, whose U' is n0
    background = np.where(
        U == 0, _divided(1.0, U_after), _divided(inter + inter_after, 2 * U * U_after)
    )
    return foreground, background


def group_weight_bounds(
    f: ArrayLike, b: ArrayLike, n1: ArrayLike, n0: ArrayLike, P: ArrayLike
) -> tuple[tuple[Counts, Counts], tuple[Counts, Counts]]:
    r"""Return the smallest and the largest weight of a voxel over all orders within a group.

    .. math:: \frac{1}{U'} \le w_1 \le \frac{1}{U}, \quad
              \frac{I'}{(U' - 1) U'} \le w_0 \le \frac{I}{U (U + 1)}

    A weight falls as U grows and as I falls, and both only go that way from one voxel to the next.
    So the largest is that of the group's first voxel; the smallest, of its class, that of the last:
    a foreground voxel behind all n0 of background, or the last of background behind all n1 of
    foreground, which finds U' - 1. Where U = 0 the first background voxel has the weight 1 and
    every other 0: the bounds are 1 and 1 for n0 = 1, and 0 and 1 beyond.

    Parameters as in `group_weights`.

    Returns
    -------
    (foreground_low, foreground_high), (background_low, background_high) : ndarray of float64
        Each is the weight of some voxel in some order. Of no meaning for a class that the group
        does not hold.

    Examples
    --------
    >>> _, (low, high) = group_weight_bounds(0, 0, 0, [1, 2], 0)
    >>> low.tolist(), high.tolist()
    ([1.0, 0.0], [1.0, 1.0])
    """
    U, inter, U_after, inter_after = _before_and_after(f, b, n1, n0, P)
    foreground = _divided(1.0, U_after), _divided(1.0, U)
    low = _divided(inter_after, (U_after - 1) * U_after, otherwise=U_after == 1)
    high = _divided(inter, U * (U + 1), otherwise=1.0)
    return foreground, (low, high)


def lovasz_weights(errors: ArrayLike, foreground: ArrayLike) -> NDArray[np.float64]:
    r"""Return the weight of every voxel of a row in the Lovász extension.

    Parameters
    ----------
    errors : array_like
        e, (n,). One that is NaN makes all weights NaN.
    foreground : array_like
        True where a voxel is foreground, (n,).

    Returns
    -------
    ndarray of float64
        (n,), at least 0 and with the sum 1 (where there are voxels), by `group_weights`.

    Examples
    --------
    >>> lovasz_weights([3.0, 1.0, 2.0], [True, True, False]).round(6).tolist()
    [0.5, 0.333333, 0.166667]
    >>> lovasz_weights([3.0, 3.0, 2.0], [False, False, False]).tolist()
    [0.5, 0.5, 0.0]
    """
    e, t = np.asarray(errors, dtype=np.float64), np.asarray(foreground, dtype=bool)
    if np.isnan(e).any():
        return np.full(e.shape, np.nan)
    levels, group = np.unique(-e, return_inverse=True)  # largest error first
    n1 = np.bincount(group[t], minlength=levels.size)
    n0 = np.bincount(group[~t], minlength=levels.size)
    of_foreground, of_background = group_weights(
        np.cumsum(n1) - n1, np.cumsum(n0) - n0, n1, n0, n1.sum()
    )
    return np.where(t, of_foreground[group], of_background[group])


def lovasz_weights_exact(errors: ArrayLike, foreground: ArrayLike) -> list[Fraction]:
    r"""Return the same weights as rational numbers, from their definition.

    That is, from differences of J along the two extreme orders, without a closed form. Slow: for a
    few voxels.

    Parameters as in `lovasz_weights`.

    Returns
    -------
    list of Fraction
        n of them.

    Examples
    --------
    >>> lovasz_weights_exact([3.0, 1.0, 2.0], [True, True, False])
    [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    """
    e, t = np.asarray(errors, dtype=np.float64).tolist(), np.asarray(foreground, bool).tolist()
    P, weights = sum(t), [Fraction(0)] * len(e)

    def loss(f: int, b: int) -> Fraction:
        return 1 - Fraction(P - f, P + b) if f + b > 0 else Fraction(0)

    f = b = 0
    for level in sorted(set(e), reverse=True):
        members = [i for i in range(len(e)) if e[i] == level]
        n1 = sum(t[i] for i in members)
        n0 = len(members) - n1
        foreground_first = loss(f + n1, b) - loss(f, b), loss(f + n1, b + n0) - loss(f + n1, b)
        background_first = loss(f + n1, b + n0) - loss(f, b + n0), loss(f, b + n0) - loss(f, b)
        for i in members:
            of_class, count = (0, n1) if t[i] else (1, n0)
            weights[i] = (foreground_first[of_class] + background_first[of_class]) / (2 * count)
        f, b = f + n1, b + n0
    return weights


def lovasz_extension(errors: ArrayLike, foreground: ArrayLike) -> tuple[float, NDArray[np.float64]]:
    r"""Return the Lovász extension of a row's Jaccard loss, and a subgradient.

    .. math:: L(e) = \sum_i e_i w_i(e), \quad w \in \partial L(e)

    Parameters
    ----------
    errors, foreground : array_like
        As in `lovasz_weights`.

    Returns
    -------
    value : float
        L(e); 0 without voxels. A voxel of weight 0 adds 0 to it, also where its error is infinite.
    gradient : ndarray of float64
        The weights, (n,): the gradient with respect to the errors where no two of them are equal.

    Examples
    --------
    >>> value, gradient = lovasz_extension([0.0, 0.25, 1.0], [False, False, False])
    >>> value, gradient.tolist()
    (1.0, [0.0, 0.0, 1.0])
    """
    e = np.asarray(errors, dtype=np.float64)
    weights = lovasz_weights(e, foreground)
    with np.errstate(invalid="ignore"):  # 0 times inf
        return float(np.sum(np.where(weights == 0, 0.0, weights * e))), weights


def _extension_of_rows(
    errors: NDArray[np.float64],
    foreground: NDArray[np.bool_],
    valid: ArrayLike | None,
    batch: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the value of every row, (N, C) or (1, C), and the weights, 0 where not valid."""
    keep = np.broadcast_to(np.asarray(True if valid is None else valid) != 0, errors.shape)
    N, C = errors.shape[:2]
    rows = [slice(0, N)] if batch else [slice(n, n + 1) for n in range(N)]
    values, weights = np.zeros((len(rows), C)), np.zeros_like(errors)
    for r, samples in enumerate(rows):
        for c in range(C):
            kept = keep[samples, c]
            values[r, c], weights[samples, c][kept] = lovasz_extension(
                errors[samples, c][kept], foreground[samples, c][kept]
            )
    return values, weights


def lovasz_hinge(
    logits: ArrayLike, targets: ArrayLike, valid: ArrayLike | None = None, *, batch: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the Lovász hinge loss of every row, and the gradient with respect to its logits.

    .. math:: L(\max(e, 0)), \quad e_i = 1 - x_i (2 p_i - 1)

    Parameters
    ----------
    logits : array_like
        x, (N, C, \*spatial).
    targets : array_like
        p in {0, 1}, (N, C, \*spatial); foreground where it is 1.
    valid : array_like, optional
        Non-zero where a voxel counts; broadcast to (N, C, \*spatial). All of them if not given.
    batch : bool
        Whether a class of all samples is one row.

    Returns
    -------
    value : ndarray of float64
        (N, C), or (1, C) for `batch`. A row without foreground has its largest error; one without
        a valid voxel 0.
    gradient : ndarray of float64
        Of each row's value, (N, C, \*spatial): 0 where e is not above 0, and where not valid.

    Examples
    --------
    >>> value, gradient = lovasz_hinge([[[0.5, -3.0, 2.0]]], [[[1, 0, 1]]])
    >>> value.tolist(), gradient.tolist()
    ([[0.25]], [[[-0.5, 0.0, 0.0]]])
    """
    x = np.asarray(logits, dtype=np.float64)
    positive = np.asarray(targets, dtype=np.float64) == 1
    sign = np.where(positive, 1.0, -1.0)
    margins = 1 - x * sign
    values, weights = _extension_of_rows(np.maximum(margins, 0), positive, valid, batch)
    return values, weights * np.where(margins > 0, -sign, 0.0)


def lovasz_softmax(
    logits: ArrayLike,
    targets_onehot: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    batch: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the Lovász softmax loss of every row, and its gradient with respect to probabilities.

    .. math:: L(e), \quad e_i = |p_i - q_i| = p_i (1 - q_i) + (1 - p_i) q_i

    Parameters
    ----------
    logits : array_like
        x, (N, C, \*spatial), of which q is the softmax over axis 1.
    targets_onehot : array_like
        p in {0, 1}, (N, C, \*spatial), as from `one_hot`.
    valid, batch
        As in `lovasz_hinge`.

    Returns
    -------
    value : ndarray of float64
        (N, C), or (1, C) for `batch`. The loss that is called "present" is the mean of those rows
        whose class has a valid voxel, "all" of all rows.
    gradient : ndarray of float64
        Of each row's value with respect to q, (N, C, \*spatial), 0 where not valid. With respect to
        the logits: `softmax_gradient` of what it is in the whole loss.

    Notes
    -----
    1 - q of the true class is the sum of the other classes, not a difference: a confident network's
    errors keep their digits, and so their order. At e = 0 the slope of e is that of the side that
    exists, -1 or 1, where the derivative of an absolute value would be 0.

    Examples
    --------
    >>> value, gradient = lovasz_softmax([[[0.0, 1.0], [0.0, 1.0]]], [[[1, 1], [0, 0]]])
    >>> value.tolist(), gradient.tolist()
    ([[0.5, 0.5]], [[[-0.5, -0.5], [0.5, 0.5]]])
    """
    q = softmax(logits)
    positive = np.asarray(targets_onehot, dtype=np.float64) == 1
    rest = np.stack([np.delete(q, c, axis=1).sum(axis=1) for c in range(q.shape[1])], axis=1)
    values, weights = _extension_of_rows(np.where(positive, rest, q), positive, valid, batch)
    return values, weights * np.where(positive, -1.0, 1.0)
