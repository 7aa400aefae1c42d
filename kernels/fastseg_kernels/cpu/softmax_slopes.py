"""The gradient of a tile with softmax.

`softmax` has the mathematics.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseg_kernels.constants import COEFFICIENT_NAMES, COEFFICIENTS
from fastseg_kernels.cpu.compiled import function, inlined, pasted
from fastseg_kernels.cpu.elementary import Real, make_log1p
from fastseg_kernels.cpu.histograms import VOXELS, tally
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    carray,
    fma,
    is_same,
    pointer_to,
    select,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.point_parts import make_bent as make_bent_point
from fastseg_kernels.cpu.point_parts import make_focal
from fastseg_kernels.cpu.softmax_stage import LONGEST_TILE, MOST_CLASSES
from fastseg_kernels.cpu.softmax_walk import (
    Tops,
    make_end_group,
    make_exponential,
    make_slope,
    make_walk,
)
from fastseg_kernels.cpu.variants import Variant

BELOW, ABOVE, SQUARE, FOCAL, GAMMA = (
    COEFFICIENT_NAMES.index(name) for name in ("below", "above", "square", "focal_target", "gamma")
)


def has_shares(variant: Variant) -> bool:
    """Tell whether the weights T_c of the classes depend on q_c, and have a buffer of their own."""
    return "focal_ce" in variant.families and "indexed" not in variant.targets


def has_slopes(variant: Variant) -> bool:
    """Tell whether h_c depends on q_c. With class indices, p in {0, 1}, the l1 form's does not."""
    l1, squared = (f"overlap_{form}" in variant.families for form in ("l1", "squared"))
    return squared or "given" in variant.families or (l1 and "indexed" not in variant.targets)


def make_bent(variant: Variant, real: Real) -> Any:
    """Return what the l1 and squared forms add to h_c; ``rest`` is 1 - q."""
    zero, one = real.scalar(0), real.scalar(1)
    indexed, bent = "indexed" in variant.targets, make_bent_point(variant, real)

    @inlined
    def bent_class(is_target, p, q, rest, below, above, square):  # type: ignore[no-untyped-def]
        if indexed:  # below and above are in on and off
            return bent(rest if is_target else -q, zero, zero, square)
        return bent(p * rest - (one - p) * q, below, above, square)

    return bent_class


def make_tile_gradient(variant: Variant, real: Real, of_errors: bool = False) -> Any:
    """Return the function that writes the gradient of a tile, or its errors."""
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    zero, one = T(0), T(1)
    indexed = "indexed" in variant.targets
    is_bent, with_given = has_slopes(variant), "given" in variant.families
    walk, end_group = make_walk(variant, real, not is_bent), make_end_group(real)
    slope, bent = make_slope(variant, real), make_bent(variant, real)
    focal, with_shares = "focal_ce" in variant.families, has_shares(variant)
    focal_slope, log1p = make_focal(real)[1], make_log1p(real)
    _, exponential = make_exponential(real)

    @inlined
    def steepness(wrong, right, nll, gamma):  # type: ignore[no-untyped-def]
        """Return u, by which a focal loss outweighs a cross-entropy; 0 where no other class is."""
        if wrong == zero:
            return zero
        return focal_slope(wrong, right, nll, gamma) / wrong

    @pasted
    def fill_shares(  # type: ignore[no-untyped-def]
        x, x_step, e, p, shares, tile, classes, weight, k, scaled, left, tops
    ):
        """Fill T_c = p_c (a_c + focal_c u_c), of soft targets."""
        gamma = k[GAMMA * classes]
        for c in range(classes):
            row, e_row = pointer_to(x + c * x_step, T), pointer_to(e + c * tile * size, T)
            share, out = pointer_to(p + c * tile * size, T), pointer_to(shares + c * tile * size, T)
            a, of_focal = k[2 * classes + c], k[FOCAL * classes + c]
            for i in range(tile):
                logit = row[i] if weight[i] != zero else zero
                below = zero if logit == tops.top[i] else tops.top[i] - logit
                nll = below + log1p(left[i] / tops.largest[i])
                wrong = (left[i] + (tops.largest[i] - e_row[i])) * scaled[i]
                u = steepness(wrong, e_row[i] * scaled[i], nll, gamma)
                out[i] = share[i] * (a + of_focal * u) if share[i] != zero else zero

    @pasted
    def sharpen(own, pull, focal_pull, tile, classes, k, scaled, left, tops):  # type: ignore[no-untyped-def]
        """Add focal_t u_t to the weight of the target's class, where targets are indices."""
        gamma = k[GAMMA * classes]
        for i in range(tile):
            e_own = exponential(own[i], own[i] == tops.top[i], tops, i)
            below = zero if own[i] == tops.top[i] else tops.top[i] - own[i]
            nll = below + log1p(left[i] / tops.largest[i])
            wrong = (left[i] + (tops.largest[i] - e_own)) * scaled[i]
            pull[i] += focal_pull[i] * steepness(wrong, e_own * scaled[i], nll, gamma)

    @pasted
    def find_pulls(p, tile, classes, mine, pull, group, strongest, equal):  # type: ignore[no-untyped-def]
        """Fill the sum of a_k p_k without the largest; that, and how many have it."""
        for i in range(tile):
            pull[i], group[i], strongest[i], equal[i] = zero, zero, zero, zero
        for c in range(classes):
            share, a = pointer_to(p + c * tile * size, T), mine[c]
            for i in range(tile):
                pulled = a * share[i]
                strongest[i] = select(pulled > strongest[i], pulled, strongest[i])
        for c in range(classes):
            share, a = pointer_to(p + c * tile * size, T), mine[c]
            for i in range(tile):
                is_strongest = a * share[i] == strongest[i]
                group[i] += zero if is_strongest else a * share[i]
                equal[i] += one if is_strongest else zero
            end_group(c, classes, tile, group, pull)
        for i in range(tile):
            pull[i] += group[i]

    @inlined
    def pulls_of(is_target, share, a, pull, strongest, equal):  # type: ignore[no-untyped-def]
        """Return a_c p_c, and the sum of a_k p_k over the other classes."""
        if indexed:
            return (pull, zero) if is_target else (zero, pull)
        here = a * share
        if here == strongest:
            return here, pull + (equal - one) * strongest
        return here, (pull + equal * strongest) - here

    @pasted
    def fill_slopes(  # type: ignore[no-untyped-def]
        e, p, h, tile, classes, target, weight, k, given, given_step, count, left, scaled,
        largest, h_top, job, job_address, voxels_address, first_row,
    ):  # fmt: skip
        """Fill h_c where it depends on q_c, and that of a class that reaches m."""
        if with_given:
            voxels = carray(pointer_to(voxels_address, VOXELS), 1)[0]
            voxels.count, voxels.inverse, voxels.left = count, address_of(scaled), address_of(left)
            voxels.largest, voxels.keep = address_of(largest), address_of(weight)
            voxels.target = address_of(target)
        for c in range(classes):
            e_row, share = pointer_to(e + c * tile * size, T), pointer_to(p + c * tile * size, T)
            h_row, label = pointer_to(h + c * tile * size, T), I(c)
            steep, flat = k[c], k[classes + c]
            below, above, square = (
                k[BELOW * classes + c],
                k[ABOVE * classes + c],
                k[SQUARE * classes + c],
            )
            for i in range(tile):
                is_target = is_same(target[i], label)
                part = zero if indexed else share[i]
                q = e_row[i] * scaled[i]
                rest = (left[i] + (largest[i] - e_row[i])) * scaled[i]
                linear = slope(is_target, share, i, steep, flat)
                value = linear + bent(is_target, part, q, rest, below, above, square)
                h_row[i] = value
            if with_given:
                if job.tallied != 0:
                    voxels.x, voxels.p, voxels.c = address_of(e_row), address_of(share), c
                    voxels.row, voxels.out = first_row + c, address_of(h_row)
                    tally(job, job_address, voxels_address)
                if given != 0:
                    own = pointer_to(given + c * given_step, T)
                    for i in range(count):
                        h_row[i] += own[i]
            for i in range(tile):
                h_top[i] = select(e_row[i] == largest[i], h_row[i], h_top[i])

    @pasted
    def write_errors(  # type: ignore[no-untyped-def]
        e, p, tile, classes, target, weight, scaled, left, largest, out, out_step
    ):
        """Write abs(p - q), negative for the foreground, and 0 for what is left out."""
        for c in range(classes):
            e_row, share = pointer_to(e + c * tile * size, T), pointer_to(p + c * tile * size, T)
            row, label = pointer_to(out + c * out_step, T), I(c)
            for i in range(tile):
                is_target = is_same(target[i], label) if indexed else share[i] != zero
                q = e_row[i] * scaled[i]
                rest = (left[i] + (largest[i] - e_row[i])) * scaled[i]
                value = -rest if is_target else q
                row[i] = value if weight[i] != zero else zero

    @inlined
    def slope_at(h_row, is_target, share, i, steep, flat):  # type: ignore[no-untyped-def]
        return h_row[i] if is_bent else slope(is_target, share, i, steep, flat)

    @function
    def tile_gradient(  # type: ignore[no-untyped-def]
        x, x_step, p, e, h, shares, tile, classes, target, weight, k, given, given_step, count,
        out, out_step, job, job_address, voxels_address, first_row,
    ):  # fmt: skip
        wide_vectors()
        scaled, left = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        mean = stack_array(LONGEST_TILE, T)
        pull, h_top = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        top, ties = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        base, near = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        reference, largest = stack_array(LONGEST_TILE, I), stack_array(LONGEST_TILE, T)
        own, strongest = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        equal, group = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        tops = Tops(top, base, near, reference, largest)
        on, off = k, pointer_to(address_of(k) + classes * size, T)
        mine = pointer_to(address_of(k) + 2 * classes * size, T)
        everyone = pointer_to(address_of(k) + 3 * classes * size, T)
        rest_of_all = pointer_to(address_of(k) + COEFFICIENTS * classes * size, T)
        of_focal_ce = pointer_to(address_of(k) + FOCAL * classes * size, T)
        units = stack_array(MOST_CLASSES, T)
        if with_shares:
            for c in range(classes):
                units[c] = one
        for i in range(tile):
            mean[i], pull[i], strongest[i] = zero, zero, zero
        pulled, pullers = p, mine
        if not indexed and not with_shares:
            find_pulls(p, tile, classes, mine, pull, group, strongest, equal)
        walk(x, x_step, p, tile, classes, target, weight, e, tops, ties, left, group, own,
             on, off, h_top)  # fmt: skip
        for i in range(tile):
            left[i] = fma(ties[i] - one, largest[i], left[i] + group[i])
            group[i] = zero
            scaled[i] = one / (left[i] + largest[i])
        if with_shares:
            pulled, pullers = shares, units
            fill_shares(x, x_step, e, p, shares, tile, classes, weight, k, scaled, left, tops)
            find_pulls(shares, tile, classes, units, pull, group, strongest, equal)
            for i in range(tile):
                group[i] = zero
        if of_errors:
            write_errors(e, p, tile, classes, target, weight, scaled, left, largest, out, out_step)
            return
        if is_bent:
            fill_slopes(e, p, h, tile, classes, target, weight, k, given, given_step, count, left,
                        scaled, largest, h_top, job, job_address, voxels_address,
                        first_row)  # fmt: skip
        for c in range(classes):
            e_row, share = pointer_to(e + c * tile * size, T), pointer_to(p + c * tile * size, T)
            steep, flat, a, label = on[c], off[c], mine[c], I(c)
            of_focal = of_focal_ce[c]
            h_row = pointer_to(h + c * tile * size, T)
            for i in range(tile):
                is_target = is_same(target[i], label)
                below = slope_at(h_row, is_target, share, i, steep, flat) - h_top[i]
                group[i] = fma(e_row[i], below, group[i])
                if indexed:
                    pull[i] = select(is_target, a, pull[i])
                    if focal:
                        strongest[i] = select(is_target, of_focal, strongest[i])
            end_group(c, classes, tile, group, mean)
        if focal and indexed:
            sharpen(own, pull, strongest, tile, classes, k, scaled, left, tops)
        for i in range(tile):
            mean[i] = (mean[i] + group[i]) * scaled[i]
        for c in range(classes):
            e_row, share = pointer_to(e + c * tile * size, T), pointer_to(p + c * tile * size, T)
            steep, flat, a, b, others_b = on[c], off[c], pullers[c], everyone[c], rest_of_all[c]
            own_pull = pointer_to(pulled + c * tile * size, T)
            g, label = pointer_to(out + c * out_step, T), I(c)
            h_row = pointer_to(h + c * tile * size, T)
            for i in range(tile):
                is_target = is_same(target[i], label)
                region = (slope_at(h_row, is_target, share, i, steep, flat) - h_top[i]) - mean[i]
                weighed = zero if indexed else own_pull[i]
                here, there = pulls_of(is_target, weighed, a, pull[i], strongest[i], equal[i])
                q = e_row[i] * scaled[i]
                rest = (left[i] + (largest[i] - e_row[i])) * scaled[i]
                value = q * (region + (there + others_b)) - (here + b) * rest
                g[i] = weight[i] * value if weight[i] != zero else zero

    return tile_gradient
