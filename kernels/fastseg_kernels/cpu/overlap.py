"""Statistics and gradient of the overlap family: the two passes over a volume.

A task is one block of one row (one sample and class; where the channels lie innermost in memory,
the rows of all classes together, so that each cache line is read once). Blocks are fixed by the
length of a row, never by the number of threads, and sums are combined in a fixed order:

1. a lane adds `GROUP` voxels in the computing type (8 float32 additions; without this limit a
   float32 sum over constant logits drifts past 1e-6),
2. `LANES` lanes are widened to float64 and added up over the block, then over the lanes in order,
3. blocks are added up in order by the caller.

No step is left for the compiler to reorder, so the bits depend neither on the threads nor on how
wide the CPU's vectors are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import (
    BASE_COLUMNS,
    COEFFICIENTS,
    FAMILY_COLUMNS,
    columns,
)
from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    call_kernel,
    carray,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.operands import SCRATCH_WORDS, STAGE, voxel_address
from fastseg_kernels.cpu.points import Variant, make_point, no_voxels
from fastseg_kernels.cpu.stage import EXCLUDED_INPUT, JOB, LOAD_REQUEST

GROUP = 16
LANES = 16
TILE = GROUP * LANES
BYTES = TILE // 4
SHORTEST_BLOCK = 8192
"""Voxels of a block: large enough that its float64 epilogue (5 sums of 32 lanes) is below 1%."""
MOST_BLOCKS = 256
"""Blocks per row at the most, so that partial sums stay small (16 KB per row of 8 columns)."""

VOXELS_COLUMN, COUNT_COLUMN, INVALID_COLUMN = (
    BASE_COLUMNS.index(name) for name in ("voxels", "count", "invalid")
)
_ALL_COLUMNS = BASE_COLUMNS + tuple(name for names in FAMILY_COLUMNS.values() for name in names)


def block_length(voxels: int) -> int:
    """Return the voxels per block for a row of ``voxels``."""
    length = max(SHORTEST_BLOCK, -(-voxels // MOST_BLOCKS))
    return -(-length // TILE) * TILE


def _make_tile_sums(variant: Variant) -> Any:
    """Return the loop that adds whole tiles of contiguous voxels to the sums of a block."""
    real = REALS[variant.real]
    T, I = real.scalar, real.integer  # noqa: E741
    point = make_point(variant, real)
    add, join, log_sum = point.add, point.join, point.log_sum
    binary, weighted = variant.targets == "binary", variant.targets == "weighted"
    counted = binary and variant.activation == "sigmoid"  # targets are added up as integers
    names = columns(variant.families)
    at = {name: names.index(name) if name in names else -1 for name in _ALL_COLUMNS}
    at_target = at["targets_sum"]
    at_inner, at_missed = at["true_positive_sum"], at["false_negative_sum"]
    at_false_alarm = at["false_positive_sum"]
    at_bce, at_pos, at_neg = at["bce_sum"], at["bce_pos_sum"], at["bce_neg_sum"]
    at_hits, at_undefined = at["hard_true_positives"], at["undefined"]
    at_over, at_under = at["hard_false_positives"], at["hard_false_negatives"]
    overlap, hard, split = at_missed >= 0, at_hits >= 0, at_pos >= 0
    bce = split or at_bce >= 0
    zero, nothing = T(0), I(0)
    none = no_voxels(real)

    @inlined
    def at_voxel(x, p, w, i, threshold, sums):  # type: ignore[no-untyped-def]
        return add(x[i], p[i], w[i] if weighted else zero, threshold, sums)

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
    def tile_sums(x, p, w, tiles, threshold, out):  # type: ignore[no-untyped-def]
        """Add ``tiles`` tiles to ``out``; return not 0 if a target or prediction is invalid."""
        wide_vectors()
        group_pos, group_neg = stack_array(LANES, T), stack_array(LANES, T)
        group_inner, group_missed = stack_array(LANES, T), stack_array(LANES, T)
        group_false, group_target = stack_array(LANES, T), stack_array(LANES, T)
        group_hits, group_over = stack_array(LANES, I), stack_array(LANES, I)
        group_true, group_undefined = stack_array(LANES, I), stack_array(LANES, I)
        all_bad = stack_array(LANES, I)
        group_label = stack_array(BYTES, np.uint8)
        label_sums, label_bits = stack_array(BYTES, np.int32), stack_array(BYTES, np.uint8)
        lane_pos, lane_neg = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_inner, lane_missed = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_false, lane_target = stack_array(LANES, np.float64), stack_array(LANES, np.float64)
        lane_hits, lane_over = stack_array(LANES, np.int64), stack_array(LANES, np.int64)
        lane_true, lane_undefined = stack_array(LANES, np.int64), stack_array(LANES, np.int64)
        for j in range(BYTES):
            label_sums[j], label_bits[j] = np.int32(0), np.uint8(0)
        for j in range(LANES):
            lane_pos[j] = lane_neg[j] = lane_inner[j] = lane_missed[j] = 0.0
            lane_false[j] = lane_target[j] = 0.0
            lane_hits[j] = lane_over[j] = lane_true[j] = lane_undefined[j] = 0
            all_bad[j] = nothing
        for tile in range(tiles):
            start = tile * TILE
            for j in range(LANES):  # vectorised: one lane each
                # Unrolled by hand: only then does LLVM vectorise over the lanes. Two chains of
                # eight additions round less than one of sixteen.
                i = start + j
                sums = at_voxel(x, p, w, i, threshold, none)
                sums = at_voxel(x, p, w, i + LANES, threshold, sums)
                sums = at_voxel(x, p, w, i + 2 * LANES, threshold, sums)
                sums = at_voxel(x, p, w, i + 3 * LANES, threshold, sums)
                sums = at_voxel(x, p, w, i + 4 * LANES, threshold, sums)
                sums = at_voxel(x, p, w, i + 5 * LANES, threshold, sums)
                sums = at_voxel(x, p, w, i + 6 * LANES, threshold, sums)
                sums = at_voxel(x, p, w, i + 7 * LANES, threshold, sums)
                i += 8 * LANES
                more = at_voxel(x, p, w, i, threshold, none)
                more = at_voxel(x, p, w, i + LANES, threshold, more)
                more = at_voxel(x, p, w, i + 2 * LANES, threshold, more)
                more = at_voxel(x, p, w, i + 3 * LANES, threshold, more)
                more = at_voxel(x, p, w, i + 4 * LANES, threshold, more)
                more = at_voxel(x, p, w, i + 5 * LANES, threshold, more)
                more = at_voxel(x, p, w, i + 6 * LANES, threshold, more)
                more = at_voxel(x, p, w, i + 7 * LANES, threshold, more)
                sums = join(sums, more)
                if bce:
                    group_pos[j] = log_sum(sums.product_pos, sums.bce_pos)
                if split:
                    group_neg[j] = log_sum(sums.product_neg, sums.bce_neg)
                if overlap:
                    group_inner[j], group_missed[j] = sums.inner, sums.missed
                    group_false[j] = sums.false_alarm
                if hard:
                    group_hits[j], group_over[j] = sums.hits, sums.predicted
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
                if overlap:
                    lane_inner[j] += np.float64(group_inner[j])
                    lane_missed[j] += np.float64(group_missed[j])
                    lane_false[j] += np.float64(group_false[j])
                if not counted:
                    lane_target[j] += np.float64(group_target[j])
                if hard:
                    lane_hits[j] += np.int64(group_hits[j])
                    lane_over[j] += np.int64(group_over[j])
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
            if split:
                out[at_pos] += lane_pos[j]
                out[at_neg] += lane_neg[j]
            elif bce:
                out[at_bce] += lane_pos[j]
            if overlap:
                out[at_inner] += lane_inner[j]
                out[at_missed] += lane_missed[j]
                out[at_false_alarm] += lane_false[j]
            if hard:
                true = lane_target[j] if counted else np.float64(lane_true[j])
                out[at_hits] += np.float64(lane_hits[j])
                out[at_over] += np.float64(lane_over[j] - lane_hits[j])
                out[at_under] += true - np.float64(lane_hits[j])
                out[at_undefined] += np.float64(lane_undefined[j])
        return bad

    return tile_sums


def _make_count_invalid(variant: Variant) -> Any:
    """Return the second look at a block that holds an invalid target or prediction."""
    T = REALS[variant.real].scalar
    binary, probs = variant.targets == "binary", variant.activation == "probs"
    zero, one = T(0), T(1)

    @function
    def count_invalid(x, p, count):  # type: ignore[no-untyped-def]
        invalid = 0
        for i in range(count):
            wrong = p[i] > np.uint8(1) if binary else not (zero <= p[i] <= one)
            if probs:
                wrong = wrong or x[i] < zero or x[i] > one
            invalid += wrong
        return invalid

    return count_invalid


def _make_direct_tail(variant: Variant) -> Any:
    """Return the copy of a row's last voxels, less than a tile, into padded buffers."""
    T = REALS[variant.real].scalar
    Target = np.uint8 if variant.targets == "binary" else T
    excluded_input = T(EXCLUDED_INPUT[variant.activation])

    @function
    def direct_tail(x, p, count, x_buffer, p_buffer):  # type: ignore[no-untyped-def]
        for i in range(count):
            x_buffer[i], p_buffer[i] = x[i], p[i]
        for i in range(count, TILE):
            x_buffer[i], p_buffer[i] = excluded_input, Target(0)

    return direct_tail


@cache
def statistics_kernel(variant: Variant) -> Kernel:
    """Compile the kernel that fills ``job.sums`` for a variant; once per process."""
    T = REALS[variant.real].scalar
    Target = np.uint8 if variant.targets == "binary" else T
    width = len(columns(variant.families))
    probs, smallest = variant.activation == "probs", np.finfo(T).smallest_subnormal
    tile_sums, direct_tail = _make_tile_sums(variant), _make_direct_tail(variant)
    count_invalid = _make_count_invalid(variant)

    def statistics(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, p, w = stack_array(STAGE, T), stack_array(STAGE, Target), stack_array(STAGE, T)
        excluded, scratch = stack_array(STAGE, np.uint8), stack_array(SCRATCH_WORDS, np.int64)
        ask_pointer = stack_array(1, LOAD_REQUEST)
        ask = carray(ask_pointer, 1)[0]
        ask.x, ask.p, ask.w = address_of(x), address_of(p), address_of(w)
        ask.excluded, ask.scratch = address_of(excluded), address_of(scratch)
        # Padding is probability 0, and must not reach a threshold that is 0 as a float32.
        threshold = max(T(job.threshold), smallest) if probs else T(job.threshold)
        groups = job.classes // job.inner_classes
        for task in range(first, last):
            row, block = task // job.blocks, task % job.blocks
            n, first_class = row // groups, (row % groups) * job.inner_classes
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            for c in range(first_class, first_class + job.inner_classes):
                index = (n * job.classes + c) * job.blocks + block
                out = pointer_to(job.sums + 8 * width * index, np.float64)
                for k in range(width):
                    out[k] = 0.0
            if job.direct != 0:
                index = (n * job.classes + first_class) * job.blocks + block
                out = pointer_to(job.sums + 8 * width * index, np.float64)
                x_here = pointer_to(voxel_address(job.logits, n, first_class, voxel), T)
                p_here = pointer_to(voxel_address(job.targets, n, first_class, voxel), Target)
                count = end - voxel
                bad = tile_sums(x_here, p_here, w, count // TILE, threshold, out)
                if count % TILE != 0:
                    done = count - count % TILE
                    x_rest = pointer_to(voxel_address(job.logits, n, first_class, voxel + done), T)
                    p_rest = pointer_to(
                        voxel_address(job.targets, n, first_class, voxel + done), Target
                    )
                    direct_tail(x_rest, p_rest, count % TILE, x, p)
                    bad |= tile_sums(x, p, w, 1, threshold, out)
                if bad != 0:
                    out[INVALID_COLUMN] += count_invalid(x_here, p_here, count)
                out[VOXELS_COLUMN] += count
                out[COUNT_COLUMN] += count
                continue
            while voxel < end:
                count = min(STAGE, end - voxel)
                tiles = (count + TILE - 1) // TILE
                for c in range(first_class, first_class + job.inner_classes):
                    index = (n * job.classes + c) * job.blocks + block
                    out = pointer_to(job.sums + 8 * width * index, np.float64)
                    ask.n, ask.c, ask.voxel, ask.count = n, c, voxel, count
                    ask.padded = tiles * TILE
                    call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                    if tile_sums(x, p, w, tiles, threshold, out) != 0:
                        out[INVALID_COLUMN] += count_invalid(x, p, count)
                    out[VOXELS_COLUMN] += count
                    out[COUNT_COLUMN] += count - ask.left_out
                voxel += count

    return Kernel(statistics, variant.name("statistics"))


@cache
def gradient_kernel(variant: Variant) -> Kernel:
    """Compile the kernel that writes ``job.out`` from ``job.coefficients`` for a variant."""
    real = REALS[variant.real]
    T = real.scalar
    binary, weighted = variant.targets == "binary", variant.targets == "weighted"
    Target = np.uint8 if binary else T
    zero = T(0)
    slope = make_point(variant, real).slope

    @function
    def slopes(x, p, w, count, coefficients, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        a, b, c, d = coefficients[0], coefficients[1], coefficients[2], coefficients[3]
        for i in range(count):
            out[i] = slope(x[i], p[i], w[i] if weighted else zero, a, b, c, d)

    def gradient(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, p, w = stack_array(STAGE, T), stack_array(STAGE, Target), stack_array(STAGE, T)
        g, k = stack_array(STAGE, T), stack_array(COEFFICIENTS, T)
        excluded, scratch = stack_array(STAGE, np.uint8), stack_array(SCRATCH_WORDS, np.int64)
        ask_pointer = stack_array(1, LOAD_REQUEST)
        ask = carray(ask_pointer, 1)[0]
        ask.p, ask.w = address_of(p), address_of(w)
        ask.excluded, ask.scratch = address_of(excluded), address_of(scratch)
        groups = job.classes // job.inner_classes
        for task in range(first, last):
            row, block = task // job.blocks, task % job.blocks
            n, first_class = row // groups, (row % groups) * job.inner_classes
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            while voxel < end:
                count = min(STAGE, end - voxel)
                for c in range(first_class, first_class + job.inner_classes):
                    exact = pointer_to(
                        job.coefficients + 8 * COEFFICIENTS * (n * job.classes + c), np.float64
                    )
                    for i in range(COEFFICIENTS):
                        k[i] = T(exact[i])
                    g_here = g
                    if job.in_place != 0:
                        g_here = pointer_to(voxel_address(job.out, n, c, voxel), T)
                    ask.n, ask.c, ask.voxel, ask.count, ask.padded = n, c, voxel, count, count
                    if job.direct != 0:
                        x_here = pointer_to(voxel_address(job.logits, n, c, voxel), T)
                        p_here = pointer_to(voxel_address(job.targets, n, c, voxel), Target)
                        slopes(x_here, p_here, w, count, k, g_here)
                    else:
                        ask.x = address_of(x)
                        call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                        slopes(x, p, w, count, k, g_here)
                        if ask.left_out > 0:  # exactly 0, also where a coefficient is not finite
                            for i in range(count):
                                if excluded[i] != 0:
                                    g_here[i] = zero
                    if job.in_place == 0:
                        ask.x = address_of(g)
                        call_kernel(job.store, job_address, address_of(ask_pointer), 0)
                voxel += count

    return Kernel(gradient, variant.name("gradient"))
