"""Statistics and gradient of the overlap family: the two passes over a volume.

A task is one block of one row (one sample and class; where the channels lie innermost in memory,
the rows of all classes together, so that each cache line is read once). Blocks are fixed by the
length of a row, never by the number of threads, and sums are combined in a fixed order: those of a
block by `tiles.py`, blocks by their index.

The walk over the blocks is compiled once for a type and a kind of targets. What is computed of a
run of voxels is a kernel of its own, called through its address: another loss compiles that alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import BASE_COLUMNS, COEFFICIENTS, columns
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.elementary import REALS
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
from fastseg_kernels.cpu.jobs import JOB, LOAD_REQUEST, PARTS, RUN
from fastseg_kernels.cpu.operands import SCRATCH_WORDS, STAGE, voxel_address
from fastseg_kernels.cpu.point_parts import Coefficients
from fastseg_kernels.cpu.points import make_point
from fastseg_kernels.cpu.tiles import TILE, counts_undefined, sums_kernel
from fastseg_kernels.cpu.variants import Variant

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


def _make_count_invalid(T: Any, Target: Any) -> Any:
    """Return the second look at a run that holds an invalid target, prediction or weight."""
    binary = Target is np.uint8
    zero, one = T(0), T(1)

    @function
    def count_invalid(job, x, p, w, count):  # type: ignore[no-untyped-def]
        probs, weighted, only_labels = job.probs, job.weights.address != 0, job.only_labels != 0
        invalid = 0
        for i in range(count):
            if binary:
                wrong = p[i] > np.uint8(1)
            elif only_labels:
                wrong = (p[i] != zero) & (p[i] != one)
            else:
                wrong = not (zero <= p[i] <= one)
            if probs != 0:
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


def _make_direct_tail(T: Any, Target: Any) -> Any:
    """Return the copy of a row's last voxels, less than a tile, into padded buffers."""

    @function
    def direct_tail(job, x, p, count, x_buffer, p_buffer):  # type: ignore[no-untyped-def]
        for i in range(count):
            x_buffer[i], p_buffer[i] = x[i], p[i]
        for i in range(count, TILE):
            x_buffer[i], p_buffer[i] = T(job.excluded_input), Target(0)

    return direct_tail


def _types(real_name: str, binary: bool) -> tuple[Any, Any, str]:
    """Return the types of predictions and targets in the buffers, and what names a kernel."""
    T = REALS[real_name].scalar
    return T, np.uint8 if binary else T, f"{real_name}-{'binary' if binary else 'real'}"


@cache
def _statistics_walk(real_name: str, binary: bool) -> Kernel:
    """Compile the kernel that fills ``job.sums``, by the kernel at ``job.of_run``."""
    T, Target, named = _types(real_name, binary)
    direct_tail, count_invalid = _make_direct_tail(T, Target), _make_count_invalid(T, Target)

    @function
    def look_again(job, run, x, p, w, count, out):  # type: ignore[no-untyped-def]
        """Count what the sums of a run only say that there is."""
        if run.bad != 0:
            out[INVALID_COLUMN] += count_invalid(job, x, p, w, count)
            if job.undefined_column != 0:
                out[job.undefined_column] += count_nan(x, count)

    def statistics(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, p, w = stack_array(STAGE, T), stack_array(STAGE, Target), stack_array(STAGE, T)
        excluded, scratch = stack_array(STAGE, np.uint8), stack_array(SCRATCH_WORDS, np.int64)
        ask_pointer, run_pointer = stack_array(1, LOAD_REQUEST), stack_array(1, RUN)
        ask, run = carray(ask_pointer, 1)[0], carray(run_pointer, 1)[0]
        ask.x, ask.p, ask.w = address_of(x), address_of(p), address_of(w)
        ask.excluded, ask.scratch = address_of(excluded), address_of(scratch)
        run.w = run.keep = address_of(w)  # nothing is written there unless something is kept
        width, groups = job.columns, job.classes // job.inner_classes
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
                run.out = job.sums + 8 * width * (this_row * job.blocks + block)
                out = pointer_to(run.out, np.float64)
                count = min(piece, end - voxel)
                run.x = voxel_address(job.logits, n, first_class, voxel)
                run.p = voxel_address(job.targets, n, first_class, voxel)
                x_here, p_here = pointer_to(run.x, T), pointer_to(run.p, Target)
                if job.kept != 0:
                    run.keep = voxel_address(job.out, n, first_class, voxel)
                run.count, rest = count // TILE, count % TILE
                call_kernel(job.of_run, job_address, address_of(run_pointer), 0)
                if rest != 0:
                    done, bad, keep = count - rest, run.bad, pointer_to(run.keep, T)
                    x_rest = pointer_to(voxel_address(job.logits, n, first_class, voxel + done), T)
                    p_rest = pointer_to(
                        voxel_address(job.targets, n, first_class, voxel + done), Target
                    )
                    direct_tail(job, x_rest, p_rest, rest, x, p)
                    run.x, run.p, run.count = address_of(x), address_of(p), 1
                    run.keep = address_of(w)
                    call_kernel(job.of_run, job_address, address_of(run_pointer), 0)
                    run.bad |= bad
                    if job.kept != 0:
                        for i in range(rest):
                            keep[done + i] = w[i]
                look_again(job, run, x_here, p_here, w, count, out)
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
                first_row = n * job.classes + first_class
                full = is_full(first_row, counted_row, in_words, count)
                run.count = (count + TILE - 1) // TILE
                for c in range(first_class, first_class + job.inner_classes):
                    run.out = job.sums + 8 * width * ((n * job.classes + c) * job.blocks + block)
                    out = pointer_to(run.out, np.float64)
                    ask.n, ask.c, ask.voxel, ask.count = n, c, voxel, count
                    ask.padded = run.count * TILE
                    call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                    run.x, run.p = ask.x_at, ask.p_at
                    call_kernel(job.of_run, job_address, address_of(run_pointer), 0)
                    x_here, p_here = pointer_to(ask.x_at, T), pointer_to(ask.p_at, Target)
                    look_again(job, run, x_here, p_here, w, count, out)
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

    return Kernel(statistics, f"statistics-{named}")


def statistics_kernel(job: Any, variant: Variant) -> Kernel:
    """Return the kernel that fills ``job.sums``; write what a variant tells it into the job."""
    names = columns(variant.families, counts=False)
    job["of_run"], job["columns"] = sums_kernel(variant).address, len(names)
    job["kept"], job["probs"] = variant.kept, variant.activation == "probs"
    job["only_labels"] = "labels" in variant.families
    job["undefined_column"] = names.index("undefined") if counts_undefined(variant) else 0
    return _statistics_walk(variant.real, variant.targets == "binary")


def gradient_kernel(job: Any, variant: Variant) -> Kernel:
    """Return the kernel that writes ``job.out`` from ``job.coefficients``, likewise."""
    job["of_run"] = slopes_kernel(variant).address
    return _gradient_walk(variant.real, variant.targets == "binary")


def errors_kernel(job: Any, variant: Variant) -> Kernel:
    """Return the kernel that writes the errors of the Lovasz hinge to ``job.out``.

    Those of the foreground have the sign bit; 0 stands for no error, and for what is left out.
    """
    job["of_run"] = _errors_of_run(variant.real, variant.targets == "binary").address
    return _gradient_walk(variant.real, variant.targets == "binary")


@cache
def _errors_of_run(real_name: str, binary: bool) -> Kernel:
    T, Target, named = _types(real_name, binary)
    zero, one = T(0), T(1)

    @function
    def errors(x, p, count, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            positive = p[i] != 0
            error = one - (x[i] if positive else -x[i])
            error = zero if error < zero else error  # NaN stays
            out[i] = -error if positive else error

    def errors_of_run(job_address, run_address, unused):  # type: ignore[no-untyped-def]
        run = carray(pointer_to(run_address, RUN), 1)[0]
        out = pointer_to(run.out, T)
        errors(pointer_to(run.x, T), pointer_to(run.p, Target), run.count, out)

    return Kernel(errors_of_run, f"errors-{named}")


@cache
def slopes_kernel(variant: Variant) -> Kernel:
    """Compile ``slopes(job, run, unused)``: the gradient of each voxel of a run."""
    real = REALS[variant.real]
    T = real.scalar
    binary, weighted = variant.targets == "binary", variant.targets == "weighted"
    folded = variant.of_binary_logits and "overlap_l1" in variant.families
    Target = np.uint8 if binary else T
    zero = T(0)
    point, kept = make_point(variant, real), variant.kept
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

    def slopes_of_run(job_address, run_address, unused):  # type: ignore[no-untyped-def]
        run = carray(pointer_to(run_address, RUN), 1)[0]
        x, p, w = pointer_to(run.x, T), pointer_to(run.p, Target), pointer_to(run.w, T)
        k, exact = stack_array(COEFFICIENTS, T), pointer_to(run.coefficients, np.float64)
        for i in range(COEFFICIENTS):
            k[i] = T(exact[i])
        if folded:
            k[0], k[1] = T(exact[0] + exact[4]), T(exact[1] + exact[5])
        slopes(x, p, w, run.count, k, pointer_to(run.out, T))

    return Kernel(slopes_of_run, variant.name("slopes"))


@cache
def _gradient_walk(real_name: str, binary: bool) -> Kernel:
    """Compile the kernel that writes a number for each voxel, by the kernel at ``job.of_run``."""
    T, Target, named = _types(real_name, binary)
    zero, size = T(0), np.dtype(T).itemsize

    @function
    def add_slopes(count, given, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            out[i] += given[i]

    def gradient(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, p, w = stack_array(STAGE, T), stack_array(STAGE, Target), stack_array(STAGE, T)
        g = stack_array(STAGE, T)
        excluded, scratch = stack_array(STAGE, np.uint8), stack_array(SCRATCH_WORDS, np.int64)
        ask_pointer, run_pointer = stack_array(1, LOAD_REQUEST), stack_array(1, RUN)
        ask, run = carray(ask_pointer, 1)[0], carray(run_pointer, 1)[0]
        ask.p, ask.w = address_of(p), address_of(w)
        ask.excluded, ask.scratch = address_of(excluded), address_of(scratch)
        run.w, run.out = address_of(w), address_of(g)
        groups = job.classes // job.inner_classes
        voxels_pointer = stack_array(1, VOXELS)
        voxels = carray(voxels_pointer, 1)[0]
        for task in range(first, last):
            row, block = task // job.blocks, task % job.blocks
            n, first_class = row // groups, (row % groups) * job.inner_classes
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            while voxel < end:
                count = min(STAGE, end - voxel)
                run.count = count
                for c in range(first_class, first_class + job.inner_classes):
                    voxels.row = n * job.classes + c
                    run.coefficients = job.coefficients + 8 * job.coefficient_width * voxels.row
                    if job.in_place != 0:
                        run.out = voxel_address(job.out, n, c, voxel)
                    ask.n, ask.c, ask.voxel, ask.count, ask.padded = n, c, voxel, count, count
                    ask.x, ask.left_out = address_of(x), 0
                    if job.direct != 0:
                        run.x = voxel_address(job.logits, n, c, voxel)
                        run.p = voxel_address(job.targets, n, c, voxel)
                    else:
                        call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                        run.x, run.p = ask.x_at, ask.p_at
                    call_kernel(job.of_run, job_address, address_of(run_pointer), 0)
                    g_here = pointer_to(run.out, T)
                    if job.tallied != 0:
                        voxels.x, voxels.p = run.x, run.p
                        voxels.count, voxels.out = count, run.out
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

    return Kernel(gradient, f"gradient-{named}")
