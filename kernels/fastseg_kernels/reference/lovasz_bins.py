"""The Lovász extension of errors that were counted in bins, and how far it may be from sorting."""

import numpy as np
from numpy.typing import ArrayLike

from .lovasz import Counts, _divided, group_weight_bounds, group_weights


def _descending(*columns: ArrayLike) -> list[Counts]:
    """Return the columns of a histogram with the bin of the largest errors first."""
    return [np.asarray(column, dtype=np.float64)[::-1] for column in columns]


def lovasz_from_histogram(
    lower_edges: ArrayLike,
    foreground_counts: ArrayLike,
    background_counts: ArrayLike,
    foreground_sums: ArrayLike,
    background_sums: ArrayLike,
) -> tuple[float, float, float]:
    r"""Return the Lovász extension of a histogram's errors as if a bin were a group, and bounds.

    .. math:: V = \sum_\mathrm{bins} w_1 S_1 + w_0 S_0

    Parameters
    ----------
    lower_edges : array_like
        a, (B,), ascending: a bin's errors are at least a, and at most the next bin's a. Of losses
        that clip errors at 0 all voxels count, in the first bin with sums of 0.
    foreground_counts, background_counts : array_like
        n1 and n0, (B,).
    foreground_sums, background_sums : array_like
        S1 and S0, (B,): the sums of the bin's errors.

    Returns
    -------
    value, low, high : float
        V, and bounds of the extension L of the errors themselves; low <= V <= L <= high.

    Notes
    -----
    *The bounds hold.* In whatever order a bin's voxels come, their weights add up to J' - J. So
    with r = e - a >= 0 the bin's part of L is a (J' - J) + sum w r, and with R = S - n a >= 0 it is
    between a (J' - J) + R1 low1 + R0 low0 and the same with the largest weights
    (`group_weight_bounds`). The part of V is a (J' - J) + R1 w1 + R0 w0, with weights between the
    same bounds, because they are means of such weights. So both bounds are written as V and a
    multiple of R, which shows V between them and does not cancel.

    *V is not above L.* The Jaccard loss is submodular, so L is the largest of sum w e over all
    orders of the row, and V is a mean over orders: in each bin over the two extreme ones, with the
    voxels of a class permuted in all ways.

    Examples
    --------
    >>> bounds = lovasz_from_histogram([0.0, 0.5], [1, 0], [0, 1], [0.25, 0.0], [0.0, 0.75])
    >>> bounds  # a voxel a bin: exact
    (0.5, 0.5, 0.5)
    """
    a, n1, n0, S1, S0 = _descending(
        lower_edges, foreground_counts, background_counts, foreground_sums, background_sums
    )
    counts = np.cumsum(n1) - n1, np.cumsum(n0) - n0, n1, n0, n1.sum()
    w1, w0 = group_weights(*counts)
    (low1, high1), (low0, high0) = group_weight_bounds(*counts)
    R1, R0 = np.maximum(S1 - n1 * a, 0), np.maximum(S0 - n0 * a, 0)  # not below 0 by rounding
    value = float(np.sum(w1 * S1 + w0 * S0))
    below = float(np.sum((w1 - low1) * R1 + (w0 - low0) * R0))
    above = float(np.sum((high1 - w1) * R1 + (high0 - w0) * R0))
    return value, value - below, value + above


def _extension_of_levels(*parts: tuple[Counts, Counts, Counts]) -> float:
    """Return the extension of errors given as levels with their numbers n1 and n0 of voxels."""
    levels, n1, n0 = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(-levels, kind="stable")
    levels, n1, n0 = levels[order], n1[order], n0[order]
    w1, w0 = group_weights(np.cumsum(n1) - n1, np.cumsum(n0) - n0, n1, n0, n1.sum())
    return float(np.sum(levels * (w1 * n1 + w0 * n0)))


def _most_spread(
    a: Counts, width: Counts, n: Counts, S: Counts
) -> tuple[tuple[Counts, Counts], ...]:
    """Return n errors in [a, a + width] with the sum S, all but one at an edge, as (level, n)."""
    above = np.maximum(S - n * a, 0)
    at_top = np.minimum(np.floor(_divided(above, width)), n)
    top = np.where(at_top > 0, width, 0.0)  # not infinity times 0
    one = np.minimum(n - at_top, 1)
    return (a + top, at_top), (a + above - at_top * top, one), (a, n - at_top - one)


def lovasz_range_of_histogram(
    lower_edges: ArrayLike,
    foreground_counts: ArrayLike,
    background_counts: ArrayLike,
    foreground_sums: ArrayLike,
    background_sums: ArrayLike,
) -> tuple[float, float]:
    r"""Return the smallest and the largest Lovász extension of errors with this histogram.

    Parameters as in `lovasz_from_histogram`.

    Returns
    -------
    low, high : float
        Within the bounds of `lovasz_from_histogram`; low is not below its value.

    Notes
    -----
    L is convex, and does not ask for the order of the voxels of a class. The mean over all orders
    of a class within a bin puts each error at their mean, and cannot have a larger L (Jensen), so
    the smallest is L of the means. The largest is at a vertex of what the histogram allows: all
    errors of a class at an edge of the bin but one, which makes up the sum. The last bin has no
    upper edge: there one voxel has all that is above the lower.

    Examples
    --------
    >>> lovasz_range_of_histogram([0.0, 1.0], [1, 0], [2, 0], [0.5, 0.0], [1.0, 0.0])
    (0.5, 0.75)
    """
    a, n1, n0, S1, S0 = _descending(
        lower_edges, foreground_counts, background_counts, foreground_sums, background_sums
    )
    width, none = np.concatenate([[np.inf], a[:-1]]) - a, np.zeros_like(a)
    low = _extension_of_levels((_divided(S1, n1), n1, none), (_divided(S0, n0), none, n0))
    high = _extension_of_levels(
        *((level, n, none) for level, n in _most_spread(a, width, n1, S1)),
        *((level, none, n) for level, n in _most_spread(a, width, n0, S0)),
    )
    return low, high
