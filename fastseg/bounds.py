"""By how much a Lovász loss of counted errors may differ from that of the errors themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastseg.curves import first_column
from fastseg_kernels.constants import EMPTY, FRACTION_BITS, HISTOGRAMS, OCTAVES, Histogram

if TYPE_CHECKING:
    from fastseg.lovasz import LovaszTerm
    from fastseg.statistics import Statistics

Numbers = NDArray[np.float64]


def _group_weights(
    f: Numbers, b: Numbers, n1: Numbers, n0: Numbers, P: float
) -> tuple[Numbers, Numbers]:
    """Return the weights of a group's foreground and background; see the reference's formulas."""
    united, inside = P + b, P - f
    after = united + n0
    with np.errstate(divide="ignore", invalid="ignore"):
        w1: Numbers = (1 / united + 1 / after) / 2
        w0: Numbers = (inside + (inside - n1)) / 2 / united / after
    start = united == 0
    shared = np.asarray(1.0 / np.maximum(n0, 1.0), np.float64)
    w1[start], w0[start] = 1.0, shared[start]
    return w1, w0


def _extension(levels: Numbers, n1: Numbers, n0: Numbers, P: float) -> float:
    """Return the Lovász extension of errors given as levels, with how many voxels have each."""
    order = np.argsort(-levels, kind="stable")
    levels, n1, n0 = levels[order], n1[order], n0[order]
    w1, w0 = _group_weights(np.cumsum(n1) - n1, np.cumsum(n0) - n0, n1, n0, P)
    return float(np.sum(levels * (w1 * n1 + w0 * n0)))


def _edges(histogram: Histogram) -> tuple[Numbers, Numbers, Numbers]:
    """Return lower edge, width and unit of the sum of each bin."""
    k, per_octave = np.arange(histogram.bins), histogram.bins // OCTAVES
    octave: Numbers = np.exp2((histogram.lowest + k // per_octave).astype(np.float64))
    edge = octave * (1 + (k % per_octave) / per_octave)
    width, unit = octave / per_octave, octave * 2.0**-FRACTION_BITS
    edge[0], width[0] = 0.0, edge[0] + width[0]
    return edge, width, unit


def counted_lovasz(counts: Numbers, histogram: Histogram, P: float) -> float:
    """Return what a loss takes for the extension: a bin's errors as if they were equal."""
    bins = histogram.bins
    edge, _, unit = _edges(histogram)
    n1, n0, s1, s0 = (counts[1 + k * bins :][:bins][::-1] for k in range(4))
    edge, unit = edge[::-1], unit[::-1]
    w1, w0 = _group_weights(np.cumsum(n1) - n1, np.cumsum(n0) - n0, n1, n0, P)
    return float(np.sum(w1 * (n1 * edge + unit * s1) + w0 * (n0 * edge + unit * s0)))


def largest_lovasz(counts: Numbers, histogram: Histogram, P: float) -> float:
    """Return the largest Lovász extension of errors that have a histogram.

    The extension is convex in the errors and does not ask for their order within a label, so it is
    largest where all errors of a bin and label but one are at the bin's edges
    (``reference/lovasz.py``). Errors below the first octave may be anywhere in the first bin, and
    those of the last bin at the upper edge may be anything.

    Parameters
    ----------
    counts
        One row's columns of the histogram, (histogram.width,).
    P
        Number of foreground voxels.
    """
    bins = histogram.bins
    edge, width, unit = _edges(histogram)
    levels: list[Numbers] = []
    all_n1: list[Numbers] = []
    all_n0: list[Numbers] = []
    for label in (0, 1):
        n = counts[1 + label * bins : 1 + (label + 1) * bins]
        # The sums have lost what is below their unit, less than one for each voxel.
        above = unit * (counts[1 + (2 + label) * bins :][:bins] + n)
        above[0] = n[0] * width[0]
        if histogram.measure == "hinge" and n[-1] > 0:
            return float("inf")
        above = np.minimum(above, n * width)
        at_top = np.minimum(np.floor(above / width), n)
        one = np.minimum(n - at_top, 1)
        for level, count in (
            (edge + width, at_top),
            (edge + above - at_top * width, one),
            (edge, n - at_top - one),
        ):
            levels.append(level)
            all_n1.append(count if label == 0 else np.zeros(bins))
            all_n0.append(count if label == 1 else np.zeros(bins))
    return _extension(np.concatenate(levels), np.concatenate(all_n1), np.concatenate(all_n0), P)


def excess(term: LovaszTerm, s: Statistics, reduction: str) -> Numbers:
    """Return by how much the exact value of a term may be above that of its histogram.

    (), or (N, C) for reduction "none".
    """
    assert term.histogram is not None
    histogram = HISTOGRAMS[term.histogram]
    batch = term.scope == "batch"
    array = s.array.sum(axis=0, keepdims=True) if batch else s.array
    first = first_column(s.names, term.histogram)
    foreground = array[:, :, s.names.index("targets_sum")]
    rule = EMPTY[int(term.row()["empty"])]
    weights = term.weights_of_classes(array.shape[1])
    kept = (array[:, :, s.names.index("count")] > 0) & ~np.isnan(weights)
    above = np.zeros(kept.shape)
    for n, c in zip(*np.nonzero(kept), strict=True):
        if foreground[n, c] == 0 and rule != "formula":
            kept[n, c] = rule != "skip"
            continue
        counts, P = array[n, c, first : first + histogram.width], float(foreground[n, c])
        above[n, c] = largest_lovasz(counts, histogram, P) - counted_lovasz(counts, histogram, P)
    counts_at_all = kept & (weights != 0)  # 0 times an infinite excess is 0
    above = np.where(counts_at_all, np.where(counts_at_all, above, 0.0) * weights, 0.0)
    if reduction == "none":
        return above
    if reduction == "sum":
        return np.asarray(above.sum())
    if term.scope in ("image", "class"):
        axis = 1 if term.scope == "image" else 0
        lines = kept.sum(axis=axis)
        of_lines = above.sum(axis=axis) / np.maximum(lines, 1)
        return np.asarray(of_lines.sum() / max(1, np.count_nonzero(lines)))
    return np.asarray(above.sum() / max(1, np.count_nonzero(kept)))
