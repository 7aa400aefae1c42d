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

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import BASE_COLUMNS, columns
from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    carray,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.jobs import JOB, RUN
from fastseg_kernels.cpu.point_parts import HALF_WORD, Settings, bce_needed, sums_needed
from fastseg_kernels.cpu.points import make_point
from fastseg_kernels.cpu.variants import HAS_MASKS, Variant

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
    at_common, at_short, at_excess = (
        at[f"l1_{name}_sum"] for name in ("true_positive", "false_negative", "false_positive")
    )
    at_product, at_square = at["product_sum"], at["squared_error_sum"]
    at_flipped, at_focal = at["bce_flipped_pos_sum"], at["focal_bce_pos_sum"]
    at_hits, at_undefined = at["hard_true_positives"], at["undefined"]
    _, l1, squared = sums_needed(variant.families, counted)
    bce, split, flipped, focal = bce_needed(variant.families)
    at_bce, at_neg = at["bce_pos_sum" if split else "bce_sum"], at["bce_neg_sum"]
    region, bent, hard = at_inner >= 0, at_common >= 0, at_hits >= 0
    told, told_by_bce = counts_undefined(variant), bce and not split
    width = len(names)
    # Where the whole numbers of the hard counts are; of those that are not counted, at the first.
    counts = ["hits", "predicted"] + ["true"] * (not counted) + ["undefined"] * (not told)
    of_hits, of_predicted, of_true, of_undefined = (
        LANES * counts.index(name) if name in counts else 0
        for name in ("hits", "predicted", "true", "undefined")
    )
    reals, integers = width * LANES, (len(counts) if hard else 1) * LANES
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
    def put(sums, group, whole, bad, j):  # type: ignore[no-untyped-def]
        """Write what lane j has of a tile: reals by their column, whole numbers, what is bad."""
        if bce:
            group[at_bce * LANES + j] = log_sum(sums.product_pos, sums.bce_pos)
        if split:
            group[at_neg * LANES + j] = log_sum(sums.product_neg, sums.bce_neg)
        if flipped:
            group[at_flipped * LANES + j] = log_sum(sums.product_pos, sums.flipped_pos)
            group[(at_flipped + 1) * LANES + j] = log_sum(sums.product_neg, sums.flipped_neg)
        if focal:
            group[at_focal * LANES + j] = sums.focal_pos
            group[(at_focal + 1) * LANES + j] = sums.focal_neg
        if region:
            group[at_inner * LANES + j] = sums.inner
            group[at_missed * LANES + j] = sums.missed
            group[at_false_alarm * LANES + j] = sums.false_alarm
        if bent:
            group[at_common * LANES + j] = sums.common if l1 else sums.inner
            group[at_short * LANES + j] = sums.short if l1 else sums.missed
            group[at_excess * LANES + j] = sums.excess if l1 else sums.false_alarm
        if squared:
            group[at_product * LANES + j] = sums.inner
            group[at_square * LANES + j] = sums.square
        if hard and counted:
            whole[of_hits + j] = I(sums.predicted >> half_word)
            whole[of_predicted + j] = I(sums.predicted & low_half)
        elif hard:
            whole[of_hits + j], whole[of_predicted + j] = sums.hits, sums.predicted
            whole[of_true + j] = sums.true
        if told:
            of_all = sums.bce_pos + sums.product_pos
            if not told_by_bce:
                of_all = sums.inner + sums.missed + sums.false_alarm
            bad[j] = I(bad[j] | (nothing if of_all == of_all else unit))
        elif hard:
            whole[of_undefined + j] = sums.undefined
        if not counted:
            group[at_target * LANES + j] = sums.target
            bad[j] = I(bad[j] | sums.bad)

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
        group, lanes = stack_array(reals, T), stack_array(reals, np.float64)
        whole, whole_lanes = stack_array(integers, I), stack_array(integers, np.int64)
        all_bad, group_label = stack_array(LANES, I), stack_array(BYTES, np.uint8)
        label_sums, label_bits = stack_array(BYTES, np.int32), stack_array(BYTES, np.uint8)
        for j in range(BYTES):
            label_sums[j], label_bits[j] = np.int32(0), np.uint8(0)
        for j in range(LANES):
            all_bad[j] = nothing
        for k in range(reals):
            group[k], lanes[k] = zero, 0.0
        for k in range(integers):
            whole[k], whole_lanes[k] = nothing, 0
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
                put(sixteen(v, j, settings), group, whole, all_bad, j)
            if counted:
                count_tile(p, start, group_label, label_sums, label_bits)
            for k in range(at_target * LANES, reals):  # apart: it has float64's width
                lanes[k] += np.float64(group[k])
            if hard:
                for k in range(integers):
                    whole_lanes[k] += np.int64(whole[k])
        bad = nothing
        if counted:
            for j in range(BYTES):
                lanes[at_target * LANES + j % LANES] += np.float64(label_sums[j])
                bad = I(bad | I(label_bits[j] >> np.uint8(1)))
        for j in range(LANES):
            bad = I(bad | all_bad[j])
            for k in range(at_target, width):
                out[k] += lanes[k * LANES + j]
            if hard:
                hits = np.float64(whole_lanes[of_hits + j])
                true = np.float64(whole_lanes[of_true + j])
                if counted:
                    true = lanes[at_target * LANES + j]
                out[at_hits] += hits
                out[at_hits + 1] += np.float64(whole_lanes[of_predicted + j]) - hits
                out[at_hits + 2] += true - hits
                if not told:
                    out[at_undefined] += np.float64(whole_lanes[of_undefined + j])
        return bad

    return tile_sums


@cache
def sums_kernel(variant: Variant) -> Kernel:
    """Compile ``sums(job, run, unused)``: the loop, apart from the walk that all variants share."""
    T = REALS[variant.real].scalar
    Target = np.uint8 if variant.targets == "binary" else T
    probs, smallest = variant.activation == "probs", np.finfo(T).smallest_subnormal
    tile_sums = make_tile_sums(variant)

    def sums(job_address, run_address, unused):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        run = carray(pointer_to(run_address, RUN), 1)[0]
        # Padding is probability 0, and must not reach a threshold that is 0 as a float32.
        threshold = max(T(job.threshold), smallest) if probs else T(job.threshold)
        x, p, w = pointer_to(run.x, T), pointer_to(run.p, Target), pointer_to(run.w, T)
        out, keep = pointer_to(run.out, np.float64), pointer_to(run.keep, T)
        settings = Settings(threshold, T(job.gamma))
        run.bad = np.int64(tile_sums(x, p, w, run.count, settings, out, keep))

    return Kernel(sums, variant.name("sums"))
