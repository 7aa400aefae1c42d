"""The gradient of a tile with softmax.

`softmax` has the mathematics.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import function, inlined, pasted
from fastseg_kernels.cpu.elementary import Real
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    fma,
    is_same,
    pointer_to,
    select,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.points import Variant
from fastseg_kernels.cpu.softmax_stage import LONGEST_TILE
from fastseg_kernels.cpu.softmax_walk import Tops, make_end_group, make_slope, make_walk


def make_tile_gradient(variant: Variant, real: Real) -> Any:
    """Return the function that writes the gradient of a tile."""
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    zero, one = T(0), T(1)
    indexed = "indexed" in variant.targets
    walk, end_group = make_walk(variant, real, True), make_end_group(real)
    slope = make_slope(variant, real)

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
            return (a, zero) if is_target else (zero, pull)
        here = a * share
        if here == strongest:
            return here, pull + (equal - one) * strongest
        return here, (pull + equal * strongest) - here

    @function
    def tile_gradient(x, x_step, p, e, tile, classes, target, weight, k, out, out_step):  # type: ignore[no-untyped-def]
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
        rest_of_all = pointer_to(address_of(k) + 4 * classes * size, T)
        if indexed:
            for i in range(tile):
                mean[i], pull[i] = zero, zero
        else:
            for i in range(tile):
                mean[i] = zero
            find_pulls(p, tile, classes, mine, pull, group, strongest, equal)
        walk(x, x_step, p, tile, classes, target, weight, e, tops, ties, left, group, own,
             on, off, h_top)  # fmt: skip
        for i in range(tile):
            left[i] = fma(ties[i] - one, largest[i], left[i] + group[i])
            group[i] = zero
        for c in range(classes):
            e_row, share = pointer_to(e + c * tile * size, T), pointer_to(p + c * tile * size, T)
            steep, flat, a, label = on[c], off[c], mine[c], I(c)
            for i in range(tile):
                is_target = is_same(target[i], label)
                below = slope(is_target, share, i, steep, flat) - h_top[i]
                group[i] = fma(e_row[i], below, group[i])
                if indexed:
                    pull[i] = select(is_target, a, pull[i])
            end_group(c, classes, tile, group, mean)
        for i in range(tile):
            scaled[i] = one / (left[i] + largest[i])
            mean[i] = (mean[i] + group[i]) * scaled[i]
        for c in range(classes):
            e_row, share = pointer_to(e + c * tile * size, T), pointer_to(p + c * tile * size, T)
            steep, flat, a, b, others_b = on[c], off[c], mine[c], everyone[c], rest_of_all[c]
            g, label = pointer_to(out + c * out_step, T), I(c)
            for i in range(tile):
                is_target = is_same(target[i], label)
                part = zero if indexed else share[i]
                region = (slope(is_target, share, i, steep, flat) - h_top[i]) - mean[i]
                here, there = pulls_of(is_target, part, a, pull[i], strongest[i], equal[i])
                q = e_row[i] * scaled[i]
                rest = (left[i] + (largest[i] - e_row[i])) * scaled[i]
                value = q * (region + (there + others_b)) - (here + b) * rest
                g[i] = weight[i] * value if weight[i] != zero else zero

    return tile_gradient
