"""The sums of contiguous voxels: the loop in which statistics spend their time.

The order of every addition is fixed:

1. a lane adds sixteen voxels in the computing type, in pairs, fours and eights, and shares one
   logarithm among them (one after the other, equal voxels drift: by 3 units in the last place over
   eight, which a score's slope feels twice; and past 1e-6 over 64),
2. `LANES` lanes are widened to float64 at the end of each tile, and added up over the block,
3. then over the lanes in order.

No step is left for the compiler to reorder, so the bits depend neither on the threads nor on how
wide the CPU's vectors are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import BASE_COLUMNS, columns
from fastseg_kernels.cpu.compiled import function, inlined
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.points import (
    HALF_WORD,
    HAS_MASKS,
    Variant,
    bce_needed,
    make_point,
    sums_needed,
)

LANES = 16
"""One vector of float32 where vectors are widest."""
HALF = 8 * LANES
TILE = 2 * HALF
BYTES = TILE // 4
"""Labels are counted as bytes, four times so many at once."""
FILLED = frozenset(
    {
        *BASE_COLUMNS, "true_positive_sum", "false_negative_sum", "false_positive_sum",
        "l1_true_positive_sum", "l1_false_negative_sum", "l1_false_positive_sum",
        "product_sum", "squared_error_sum", "bce_sum", "bce_pos_sum", "bce_neg_sum",
        "bce_flipped_pos_sum", "bce_flipped_neg_sum", "focal_bce_pos_sum", "focal_bce_neg_sum",
        "hard_true_positives", "hard_false_positives", "hard_false_negatives", "undefined",
    }
)  # fmt: skip
"""The columns that the loop below fills, and its caller's base columns; others it refuses."""


def counts_undefined(variant: Variant) -> bool:
    """Tell whether the loop says only that there is NaN, and leaves counting it to its caller."""
    bce, split, _, _ = bce_needed(variant.families)
    overlap, _, _ = sums_needed(variant.families, binary=True)
    told = (bce and not split) or overlap
    return variant.of_binary_logits and "hard" in variant.families and told


class Voxels(NamedTuple):
    """Where a tile's voxels are, and what was computed of them."""

    x: Any
    p: Any
    w: Any
    e: Any  # of `points.Point.masses_of`
    small: Any
    keep: Any


def make_tile_sums(variant: Variant) -> Any:
    """Return the loop that adds whole tiles of contiguous voxels to the sums of a block."""
    real = REALS[variant.real]
    T, I = real.scalar, real.integer  # noqa: E741
    point = make_point(variant, real)
    sums_of, join, log_sum = point.sums_of, point.join, point.log_sum
    binary, weighted = variant.targets == "binary", variant.targets == "weighted"
    kept, kept_of, masses_of = variant.kept, point.kept_of, point.masses_of
    # Sixteen vectors hold either the numbers of exp or the sums of the tree below, not both.
    has_masses = point.has_masses
    two_loops = has_masses and not HAS_MASKS
    Target = np.uint8 if binary else T
    size, label_size = np.dtype(T).itemsize, np.dtype(Target).itemsize
    counted = variant.of_binary_logits  # targets are added up as integers
    names = columns(variant.families, counts=False)
    if not FILLED.issuperset(names):
        raise NotImplementedError(f"no lane adds up {', '.join(sorted({*names} - FILLED))}")
    at = {name: names.index(name) if name in names else -1 for name in FILLED}
    at_target = at["targets_sum"]
    at_inner, at_missed = at["true_positive_sum"], at["false_negative_sum"]
    at_false_alarm = at["false_positive_sum"]
    at_bce, at_pos, at_neg = at["bce_sum"], at["bce_pos_sum"], at["bce_neg_sum"]
    at_hits, at_undefined = at["hard_true_positives"], at["undefined"]
    at_over, at_under = at["hard_false_positives"], at["hard_false_negatives"]
    at_common, at_short, at_excess = (
        at[f"l1_{name}_sum"] for name in ("true_positive", "false_negative", "false_positive")
    )
    at_product, at_square = at["product_sum"], at["squared_error_sum"]
    overlap, l1, squared = sums_needed(variant.families, counted)
    at_flipped, at_focal = at["bce_flipped_pos_sum"], at["focal_bce_pos_sum"]
    bce, split, flipped, focal = bce_needed(variant.families)
    hard = at_hits >= 0
    told, told_by_bce = counts_undefined(variant), bce and not split
    half_word, low_half = I(HALF_WORD), I(2**HALF_WORD - 1)
    zero, unit, nothing, none = T(0), I(1), I(0), (T(0), T(0))

    @inlined
    def at_voxel(v, i, settings):  # type: ignore[no-untyped-def]
        x, p = v.x[i], v.p[i]
        masses = none
        if two_loops:
            masses = v.e[i], v.small[i]
        elif has_masses:
            masses = masses_of(x)
        if kept:
            v.keep[i] = kept_of(x, p, masses)
        return sums_of(x, p, v.w[i] if weighted else zero, masses, settings)

    @inlined
    def two(v, i, settings):  # type: ignore[no-untyped-def]
        return join(at_voxel(v, i, settings), at_voxel(v, i + LANES, settings))

    @inlined
    def four(v, i, settings):  # type: ignore[no-untyped-def]
        return join(two(v, i, settings), two(v, i + 2 * LANES, settings))

    @inlined
    def sixteen(v, i, settings):  # type: ignore[no-untyped-def]
        """Return the sums of every LANES-th voxel of a tile from i on."""
        # Unrolled by hand: only then does LLVM vectorise over the lanes.
        sums = join(four(v, i, settings), four(v, i + 4 * LANES, settings))
        i += HALF
        more = join(four(v, i, settings), four(v, i + 4 * LANES, settings))
        return join(sums, more)

    @inlined
    def count_tile(p, start, group, label_sums, label_bits):  # type: ignore[no-untyped-def]
        """Add labels of one byte up, four at a time; invalid ones set a bit beyond the first."""
        for j in range(BYTES):
            i = start + j
            a, b = np.uint8(p[i] + p[i + BYTES]), np.uint8(p[i + 2 * BYTES] + p[i + 3 * BYTES])
            group[j] = np.uint8(a + b)
            c, d = np.uint8(p[i] | p[i + BYTES]), np.uint8(p[i + 2 * BYTES] | p[i + 3 * BYTES])
            label_bits[j] = np.uint8(label_bits[j] | np.uint8(c | d))
        for j in range(BYTES):
            label_sums[j] = np.int32(label_sums[j] + np.int32(group[j]))

    @function
    def tile_sums(x, p, w, tiles, settings, out, keep):  # type: ignore[no-untyped-def]
        """Add ``tiles`` tiles to ``out``; return not 0 if something in them is to be counted.

        That is what is invalid, and NaN where `counts_undefined` says so.

        ``keep``: where a variant that keeps something writes it, a number for each voxel.
        """
        wide_vectors()
        e, small = stack_array(TILE, T), stack_array(TILE, T)
        group_pos, group_neg = stack_array(LANES, T), stack_array(LANES, T)
        group_flipped_pos, group_flipped_neg = stack_array(LANES, T), stack_array(LANES, T)
        group_focal_pos, group_focal_neg = stack_array(LANES, T), stack_array(LANES, T)
        group_inner, group_missed = stack_array(LANES, T), stack_array(LANES, T)
        group_false, group_target = stack_array(LANES, T), stack_array(LANES, T)
        group_common, group_short = stack_array(LANES, T), stack_array(LANES, T)
        group_excess, group_square = stack_array(LANES, T), stack_array(LANES, T)
        group_hits, group_over = stack_array(LANES, I), stack_array(LANES, I)
        group_true, group_undefined = stack_array(LANES, I), stack_array(LANES, I)
        all_bad = stack_array(LANES, I)
        group_label = stack_array(BYTES, np.uint8)
        label_sums, label_bits = stack_array(BYTES, np.int32), stack_array(BYTES, np.uint8)
        lane_pos, lane_neg = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_flipped_pos = stack_array(LANES, np.float64)
        lane_flipped_neg = stack_array(LANES, np.float64)
        lane_focal_pos = stack_array(LANES, np.float64)
        lane_focal_neg = stack_array(LANES, np.float64)
        lane_inner, lane_missed = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_false, lane_target = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_common, lane_short = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_excess, lane_square = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_hits, lane_over = stack_array(LANES, np.int64), stack_array(LANES, np.int64)
        lane_true, lane_undefined = stack_array(LANES, np.int64), stack_array(LANES, np.int64)
        for j in range(BYTES):
            label_sums[j], label_bits[j] = np.int32(0), np.uint8(0)
        for j in range(LANES):
            lane_pos[j] = lane_neg[j] = lane_inner[j] = lane_missed[j] = 0.0
            lane_false[j] = lane_target[j] = 0.0
            lane_flipped_pos[j] = lane_flipped_neg[j] = 0.0
            lane_focal_pos[j] = lane_focal_neg[j] = 0.0
            lane_common[j] = lane_short[j] = lane_excess[j] = lane_square[j] = 0.0
            lane_hits[j] = lane_over[j] = lane_true[j] = lane_undefined[j] = 0
            all_bad[j] = nothing
        for tile in range(tiles):
            start = tile * TILE
            v = Voxels(
                pointer_to(address_of(x) + size * start, T),
                pointer_to(address_of(p) + label_size * start, Target),
                pointer_to(address_of(w) + size * start, T),
                e,
                small,
                pointer_to(address_of(keep) + size * start, T),
            )
            if two_loops:
                for j in range(TILE):
                    e[j], small[j] = masses_of(v.x[j])
            for j in range(LANES):  # vectorised: one lane each
                sums = sixteen(v, j, settings)
                if bce:
                    group_pos[j] = log_sum(sums.product_pos, sums.bce_pos)
                if split:
                    group_neg[j] = log_sum(sums.product_neg, sums.bce_neg)
                if flipped:
                    group_flipped_pos[j] = log_sum(sums.product_pos, sums.flipped_pos)
                    group_flipped_neg[j] = log_sum(sums.product_neg, sums.flipped_neg)
                if focal:
                    group_focal_pos[j], group_focal_neg[j] = sums.focal_pos, sums.focal_neg
                if overlap:
                    group_inner[j], group_missed[j] = sums.inner, sums.missed
                    group_false[j] = sums.false_alarm
                if l1:
                    group_common[j], group_short[j] = sums.common, sums.short
                    group_excess[j] = sums.excess
                if squared:
                    group_square[j] = sums.square
                if hard and counted:
                    group_hits[j] = I(sums.predicted >> half_word)
                    group_over[j] = I(sums.predicted & low_half)
                elif hard:
                    group_hits[j], group_over[j] = sums.hits, sums.predicted
                if told:
                    of_all = sums.bce_pos + sums.product_pos
                    if not told_by_bce:
                        of_all = sums.inner + sums.missed + sums.false_alarm
                    all_bad[j] = I(all_bad[j] | (nothing if of_all == of_all else unit))
                elif hard:
                    group_undefined[j] = sums.undefined
                if not counted:
                    group_target[j] = sums.target
                    all_bad[j] = I(all_bad[j] | sums.bad)
                    if hard:
                        group_true[j] = sums.true
            if counted:
                count_tile(p, start, group_label, label_sums, label_bits)
            for j in range(LANES):  # apart, or LLVM would vectorise all of it by float64's width
                if bce:
                    lane_pos[j] += np.float64(group_pos[j])
                if split:
                    lane_neg[j] += np.float64(group_neg[j])
                if flipped:
                    lane_flipped_pos[j] += np.float64(group_flipped_pos[j])
                    lane_flipped_neg[j] += np.float64(group_flipped_neg[j])
                if focal:
                    lane_focal_pos[j] += np.float64(group_focal_pos[j])
                    lane_focal_neg[j] += np.float64(group_focal_neg[j])
                if overlap:
                    lane_inner[j] += np.float64(group_inner[j])
                    lane_missed[j] += np.float64(group_missed[j])
                    lane_false[j] += np.float64(group_false[j])
                if l1:
                    lane_common[j] += np.float64(group_common[j])
                    lane_short[j] += np.float64(group_short[j])
                    lane_excess[j] += np.float64(group_excess[j])
                if squared:
                    lane_square[j] += np.float64(group_square[j])
                if not counted:
                    lane_target[j] += np.float64(group_target[j])
                if hard:
                    lane_hits[j] += np.int64(group_hits[j])
                    lane_over[j] += np.int64(group_over[j])
                    if not told:
                        lane_undefined[j] += np.int64(group_undefined[j])
                    if not counted:
                        lane_true[j] += np.int64(group_true[j])
        bad = nothing
        if counted:
            for j in range(BYTES):
                lane_target[j % LANES] += np.float64(label_sums[j])
                bad = I(bad | I(label_bits[j] >> np.uint8(1)))
        for j in range(LANES):
            bad = I(bad | all_bad[j])
            out[at_target] += lane_target[j]
            if at_pos >= 0:
                out[at_pos] += lane_pos[j]
                out[at_neg] += lane_neg[j]
            elif at_bce >= 0:
                out[at_bce] += lane_pos[j]
            if flipped:
                out[at_flipped] += lane_flipped_pos[j]
                out[at_flipped + 1] += lane_flipped_neg[j]
            if focal:
                out[at_focal] += lane_focal_pos[j]
                out[at_focal + 1] += lane_focal_neg[j]
            if at_inner >= 0:
                out[at_inner] += lane_inner[j]
                out[at_missed] += lane_missed[j]
                out[at_false_alarm] += lane_false[j]
            if at_common >= 0:
                out[at_common] += lane_common[j] if l1 else lane_inner[j]
                out[at_short] += lane_short[j] if l1 else lane_missed[j]
                out[at_excess] += lane_excess[j] if l1 else lane_false[j]
            if squared:
                out[at_product] += lane_inner[j]
                out[at_square] += lane_square[j]
            if hard:
                true = lane_target[j] if counted else np.float64(lane_true[j])
                out[at_hits] += np.float64(lane_hits[j])
                out[at_over] += np.float64(lane_over[j] - lane_hits[j])
                out[at_under] += true - np.float64(lane_hits[j])
                if not told:
                    out[at_undefined] += np.float64(lane_undefined[j])
        return bad

    return tile_sums
