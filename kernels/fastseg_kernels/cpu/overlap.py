"""Statistics and gradient of the overlap family: the two passes over a volume.

A task is one block of one row (one sample and class; where the channels lie innermost in memory,
the rows of all classes together, so that each cache line is read once). Blocks are fixed by the
length of a row, never by the number of threads, and sums are combined in a fixed order: those of a
block by `tiles.py`, blocks by their index.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import BASE_COLUMNS, COEFFICIENTS, columns
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.histograms import PIECE, VOXELS, flush_rows, is_full, tally
from fastseg_kernels.cpu.intrinsics import (
    add_atomically,
    address_of,
    call_kernel,
    carray,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.operands import SCRATCH_WORDS, STAGE, voxel_address
from fastseg_kernels.cpu.points import Coefficients, Settings, Variant, make_is_allowed, make_point
from fastseg_kernels.cpu.stage import EXCLUDED_INPUT, JOB, LOAD_REQUEST, PARTS
from fastseg_kernels.cpu.tiles import TILE, counts_undefined, make_tile_sums

SHORTEST_BLOCK = 8192
"""Voxels of a block: large enough that its float64 epilogue (5 sums of 16 lanes) is below 1%."""
MOST_BLOCKS = 256
"""Blocks per row at the most, so that partial sums stay small (16 KB per row of 8 columns)."""

VOXELS_COLUMN, COUNT_COLUMN, INVALID_COLUMN = (
    BASE_COLUMNS.index(name) for name in ("voxels", "count", "invalid")
)


def block_length(voxels: int) -> int:
    """Return the voxels per block for a row of ``voxels``."""
    length = max(SHORTEST_BLOCK, -(-voxels // MOST_BLOCKS))
    return -(-length // TILE) * TILE


def _make_count_invalid(variant: Variant) -> Any:
    """Return the second look at a block that holds an invalid target, prediction or weight."""
    T = REALS[variant.real].scalar
    binary, probs = variant.targets == "binary", variant.activation == "probs"
    weighted = variant.targets == "weighted"
    zero, one, is_allowed = T(0), T(1), make_is_allowed(variant, REALS[variant.real])

    @function
    def count_invalid(x, p, w, count):  # type: ignore[no-untyped-def]
        invalid = 0
        for i in range(count):
            wrong = p[i] > np.uint8(1) if binary else not is_allowed(p[i])
            if probs:
                wrong = wrong or x[i] < zero or x[i] > one
            if weighted:
                wrong = wrong or not (w[i] >= zero)
            invalid += wrong
        return invalid

    return count_invalid


@function
def count_nan(x, count):  # type: ignore[no-untyped-def]
    """Return how many predictions are NaN."""
    found = 0
    for i in range(count):
        found += x[i] != x[i]
    return found


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
    kept, names = variant.kept, columns(variant.families, counts=False)
    width = len(names)
    probs, smallest = variant.activation == "probs", np.finfo(T).smallest_subnormal
    tile_sums, direct_tail = make_tile_sums(variant), _make_direct_tail(variant)
    count_invalid, later = _make_count_invalid(variant), counts_undefined(variant)
    at_undefined = names.index("undefined") if later else 0

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
        settings = Settings(threshold, T(job.gamma))
        groups = job.classes // job.inner_classes
        voxels_pointer = stack_array(1, VOXELS)
        voxels = carray(voxels_pointer, 1)[0]
        piece = PIECE if job.tallied != 0 else job.voxels
        counted_row, in_words, words = -1, 0, 0  # the words' first row, and voxels of each row
        if job.tallied != 0:
            part = add_atomically(job_address + PARTS, 1)
            words = job.words + 8 * job.row_words * job.inner_classes * part
        for task in range(first, last):
            row, block = task // job.blocks, task % job.blocks
            n, first_class = row // groups, (row % groups) * job.inner_classes
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            for c in range(first_class, first_class + job.inner_classes):
                index = (n * job.classes + c) * job.blocks + block
                out = pointer_to(job.sums + 8 * width * index, np.float64)
                for k in range(width):
                    out[k] = 0.0
            while job.direct != 0 and voxel < end:
                this_row = n * job.classes + first_class
                index = this_row * job.blocks + block
                out = pointer_to(job.sums + 8 * width * index, np.float64)
                x_here = pointer_to(voxel_address(job.logits, n, first_class, voxel), T)
                p_here = pointer_to(voxel_address(job.targets, n, first_class, voxel), Target)
                count = min(piece, end - voxel)
                keep = w  # nothing is written there
                if kept:
                    keep = pointer_to(voxel_address(job.out, n, first_class, voxel), T)
                bad = tile_sums(x_here, p_here, w, count // TILE, settings, out, keep)
                if count % TILE != 0:
                    done = count - count % TILE
                    x_rest = pointer_to(voxel_address(job.logits, n, first_class, voxel + done), T)
                    p_rest = pointer_to(
                        voxel_address(job.targets, n, first_class, voxel + done), Target
                    )
                    direct_tail(x_rest, p_rest, count % TILE, x, p)
                    bad |= tile_sums(x, p, w, 1, settings, out, w)
                    if kept:
                        for i in range(count % TILE):
                            keep[done + i] = w[i]
                if bad != 0:
                    out[INVALID_COLUMN] += count_invalid(x_here, p_here, w, count)
                    if later:
                        out[at_undefined] += count_nan(x_here, count)
                if job.tallied != 0:
                    full = is_full(this_row, counted_row, in_words, count)
                    voxels.x, voxels.p = address_of(x_here), address_of(p_here)
                    voxels.count, voxels.left_out = count, 0
                    voxels.words, voxels.flush_row = words, counted_row if full else -1
                    tally(job, job_address, address_of(voxels_pointer))
                    counted_row, in_words = this_row, count if full else in_words + count
                out[VOXELS_COLUMN] += count
                out[COUNT_COLUMN] += count
                voxel += count
            while voxel < end:
                count = min(STAGE, end - voxel)
                tiles = (count + TILE - 1) // TILE
                first_row = n * job.classes + first_class
                full = is_full(first_row, counted_row, in_words, count)
                for c in range(first_class, first_class + job.inner_classes):
                    index = (n * job.classes + c) * job.blocks + block
                    out = pointer_to(job.sums + 8 * width * index, np.float64)
                    ask.n, ask.c, ask.voxel, ask.count = n, c, voxel, count
                    ask.padded = tiles * TILE
                    call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                    x_here, p_here = pointer_to(ask.x_at, T), pointer_to(ask.p_at, Target)
                    if tile_sums(x_here, p_here, w, tiles, settings, out, w) != 0:
                        out[INVALID_COLUMN] += count_invalid(x_here, p_here, w, count)
                        if later:
                            out[at_undefined] += count_nan(x_here, count)
                    if job.tallied != 0:
                        k = c - first_class
                        voxels.x, voxels.p = ask.x_at, ask.p_at
                        voxels.count, voxels.left_out = count, ask.left_out
                        voxels.words = words + 8 * job.row_words * k
                        voxels.flush_row = counted_row + k if full else -1
                        tally(job, job_address, address_of(voxels_pointer))
                    out[VOXELS_COLUMN] += count
                    out[COUNT_COLUMN] += count - ask.left_out
                counted_row, in_words = first_row, count if full else in_words + count
                voxel += count
        if job.tallied != 0 and counted_row >= 0:
            ask_address = address_of(voxels_pointer)
            flush_rows(job, job_address, ask_address, words, counted_row, job.inner_classes)

    return Kernel(statistics, variant.name("statistics"))


@cache
def gradient_kernel(variant: Variant) -> Kernel:
    """Compile the kernel that writes ``job.out`` from ``job.coefficients`` for a variant."""
    return _second_pass(variant, "gradient")


@cache
def errors_kernel(variant: Variant) -> Kernel:
    """Compile the kernel that writes the errors of the Lovasz hinge to ``job.out``.

    Those of the foreground have the sign bit; 0 stands for no error, and for what is left out.
    """
    return _second_pass(variant, "errors")


def _make_errors(variant: Variant, real: Real) -> Any:
    """Return the loop over voxels of `errors_kernel`."""
    T = real.scalar
    zero, one = T(0), T(1)

    @function
    def errors(x, p, w, count, coefficients, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            positive = p[i] != 0
            error = one - (x[i] if positive else -x[i])
            error = zero if error < zero else error  # NaN stays
            out[i] = -error if positive else error

    return errors


def _second_pass(variant: Variant, verb: str) -> Kernel:
    """Compile a kernel that writes a number for each voxel."""
    real = REALS[variant.real]
    T = real.scalar
    binary, weighted = variant.targets == "binary", variant.targets == "weighted"
    folded = variant.of_binary_logits and "overlap_l1" in variant.families
    Target = np.uint8 if binary else T
    zero = T(0)
    point, size, kept = make_point(variant, real), np.dtype(T).itemsize, variant.kept
    slope, slope_of_kept = point.slope, point.slope_of_kept

    @function
    def slopes(x, p, w, count, coefficients, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        k = Coefficients(
            coefficients[0], coefficients[1], coefficients[2], coefficients[3], coefficients[4],
            coefficients[5], coefficients[6], coefficients[7], coefficients[8], coefficients[9],
            coefficients[10], coefficients[11],
        )  # fmt: skip
        if kept:
            for i in range(count):  # through one pointer, or LLVM would see two that overlap
                out[i] = slope_of_kept(out[i], p[i], zero, k)
        else:
            for i in range(count):
                out[i] = slope(x[i], p[i], w[i] if weighted else zero, k)

    @function
    def add_slopes(count, given, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            out[i] += given[i]

    if verb == "errors":
        slopes = _make_errors(variant, real)

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
        voxels_pointer = stack_array(1, VOXELS)
        voxels = carray(voxels_pointer, 1)[0]
        for task in range(first, last):
            row, block = task // job.blocks, task % job.blocks
            n, first_class = row // groups, (row % groups) * job.inner_classes
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            while voxel < end:
                count = min(STAGE, end - voxel)
                for c in range(first_class, first_class + job.inner_classes):
                    voxels.row = n * job.classes + c
                    of_row = job.coefficients + 8 * job.coefficient_width * voxels.row
                    exact = pointer_to(of_row, np.float64)
                    for i in range(COEFFICIENTS):
                        k[i] = T(exact[i])
                    if folded:
                        k[0], k[1] = T(exact[0] + exact[4]), T(exact[1] + exact[5])
                    g_here = g
                    if job.in_place != 0:
                        g_here = pointer_to(voxel_address(job.out, n, c, voxel), T)
                    ask.n, ask.c, ask.voxel, ask.count, ask.padded = n, c, voxel, count, count
                    ask.x, ask.left_out = address_of(x), 0
                    x_here, p_here = x, p
                    if job.direct != 0:
                        x_here = pointer_to(voxel_address(job.logits, n, c, voxel), T)
                        p_here = pointer_to(voxel_address(job.targets, n, c, voxel), Target)
                    else:
                        call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                        x_here, p_here = pointer_to(ask.x_at, T), pointer_to(ask.p_at, Target)
                    slopes(x_here, p_here, w, count, k, g_here)
                    if job.tallied != 0:
                        voxels.x, voxels.p = address_of(x_here), address_of(p_here)
                        voxels.count, voxels.out = count, address_of(g_here)
                        tally(job, job_address, address_of(voxels_pointer))
                    if ask.left_out > 0:  # exactly 0, also where a coefficient is not finite
                        for i in range(count):
                            if excluded[i] != 0:
                                g_here[i] = zero
                    if job.slopes != 0:
                        place = voxels.row * job.voxels + voxel
                        add_slopes(count, pointer_to(job.slopes + size * place, T), g_here)
                    if job.in_place == 0:
                        ask.x = address_of(g)
                        call_kernel(job.store, job_address, address_of(ask_pointer), 0)
                voxel += count

    return Kernel(gradient, variant.name(verb))
