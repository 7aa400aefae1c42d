"""The walk over the classes of a tile with which every softmax kernel starts.

`softmax` has the mathematics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.cpu.compiled import inlined, pasted
from fastseg_kernels.cpu.elementary import Real, make_exp_ratio
from fastseg_kernels.cpu.intrinsics import is_same, pointer_to, prefetch, select
from fastseg_kernels.cpu.memory import CACHE_LINE
from fastseg_kernels.cpu.variants import Variant

GROUP = 16
"""Classes whose exponentials are added up before they are added to those of the others: one chain
of 256 additions misses the promised accuracy."""

LARGE, FAR = 256.0, -2048.0
"""Where m is taken from the logits; a logit so far below it is as good as infinitely far."""


class Tops(NamedTuple):
    """Pointers to what the exponentials of a tile's voxels are taken by."""

    top: Any  # m
    base: Any  # what is taken from the logits: m or 0
    near: Any  # m - base
    reference: Any  # the power of two
    largest: Any  # e_m


def make_exponential(real: Real) -> tuple[Any, Any]:
    """Return ``refer``, which fills the tops but for m, and ``exponential``, which gives e_c."""
    T = real.scalar
    zero, large, far = T(0), T(LARGE), T(FAR)
    reference_of, exp_ratio = make_exp_ratio(real)

    @pasted
    def refer(tops, tile):  # type: ignore[no-untyped-def]
        for i in range(tile):
            is_large = abs(tops.top[i]) > large
            tops.base[i] = tops.top[i] if is_large else zero
            tops.near[i] = zero if is_large else tops.top[i]
            tops.reference[i] = reference_of(tops.near[i])
            tops.largest[i] = exp_ratio(tops.near[i], tops.reference[i])

    @inlined
    def exponential(x, is_top, tops, i):  # type: ignore[no-untyped-def]
        below = tops.near[i] if is_top else x - tops.base[i]  # inf - inf is 0 here
        below = far if below < far else below
        return exp_ratio(below, tops.reference[i])

    return refer, exponential


def make_end_group(real: Real) -> Any:
    """Return what adds a group's sums to those of the groups before, unless it is the last one."""
    zero = real.scalar(0)

    @pasted
    def end_group(c, classes, tile, group, total):  # type: ignore[no-untyped-def]
        if c % GROUP == GROUP - 1 and c < classes - 1:
            for i in range(tile):
                total[i] += group[i]
                group[i] = zero

    return end_group


def make_slope(variant: Variant, real: Real) -> Any:
    """Return ``slope(is_target, p, i, on, off) = h_c`` of voxel i."""
    one, indexed = real.scalar(1), "indexed" in variant.targets

    @inlined
    def slope(is_target, p, i, on, off):  # type: ignore[no-untyped-def]
        if indexed:
            return on if is_target else off
        return on * p[i] + off * (one - p[i])

    return slope


def make_walk(variant: Variant, real: Real, with_slopes: bool) -> Any:
    """Return the walk over the classes of a tile with which every kernel starts.

    It fills e_c, and for each voxel its ``tops``, t, the sum of the e_c that do not reach m and, if
    ``indexed``, the logit of the target's class; ``with_slopes`` also h_r.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    zero, one = T(0), T(1)
    refer, exponential = make_exponential(real)
    end_group, slope = make_end_group(real), make_slope(variant, real)
    indexed, weighted = "indexed" in variant.targets, "weighted" in variant.targets

    @inlined
    def at(row, weight, i):  # type: ignore[no-untyped-def]
        """Return a logit; weight 0 leaves out whatever is stored there."""
        return (row[i] if weight[i] != zero else zero) if weighted else row[i]

    @pasted
    def walk(  # type: ignore[no-untyped-def]
        x, x_step, p, tile, classes, target, weight, e, tops, ties, rest, group, own, on, off, h_top
    ):
        row, top = pointer_to(x, T), tops.top
        for i in range(tile):
            top[i] = at(row, weight, i)
        for c in range(1, classes - 1, 2):  # two at a time: half as many loads and stores of m
            row, next_row = pointer_to(x + c * x_step, T), pointer_to(x + (c + 1) * x_step, T)
            for i in range(tile):
                value, other = at(row, weight, i), at(next_row, weight, i)
                value = value if value > other else other
                top[i] = select(value > top[i], value, top[i])
        if classes % 2 == 0:
            row = pointer_to(x + (classes - 1) * x_step, T)
            for i in range(tile):
                value = at(row, weight, i)
                top[i] = select(value > top[i], value, top[i])
        refer(tops, tile)
        for i in range(tile):
            own[i] = tops.top[i]
            ties[i], rest[i], group[i], h_top[i] = zero, zero, zero, zero
        for c in range(classes):
            row, share = pointer_to(x + c * x_step, T), pointer_to(p + c * tile * size, T)
            out = pointer_to(e + c * tile * size, T)
            steep, flat, label = on[c], off[c], I(c)
            following = x + c * x_step + tile * size  # of the next tile, while this one is computed
            for line in range(0, tile * size, CACHE_LINE):
                prefetch(following + line)
            for i in range(tile):
                logit = at(row, weight, i)
                is_top = logit == top[i]
                value = exponential(logit, is_top, tops, i)
                out[i] = value
                group[i] += zero if is_top else value
                ties[i] += one if is_top else zero
                is_target = is_same(target[i], label)
                if indexed:
                    own[i] = select(is_target, logit, own[i])
                if with_slopes:
                    h = slope(is_target, share, i, steep, flat)
                    h_top[i] = select(is_top, h, h_top[i])
            end_group(c, classes, tile, group, rest)

    return walk


def make_largest(real: Real) -> Any:
    """Return ``largest(values, step, tile, classes, best, which)``: the class of the maximum."""
    T, I = real.scalar, real.integer  # noqa: E741

    @pasted
    def largest(values, step, tile, classes, best, which):  # type: ignore[no-untyped-def]
        """``best`` is NaN where any class is."""
        row = pointer_to(values, T)
        for i in range(tile):
            best[i], which[i] = row[i], I(0)
        for c in range(1, classes):
            row, label = pointer_to(values + c * step, T), I(c)
            for i in range(tile):
                above = row[i] > best[i] or row[i] != row[i]
                best[i] = select(above, row[i], best[i])
                which[i] = select(above, label, which[i])

    return largest
