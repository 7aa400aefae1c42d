"""Statistics and gradient where the classes of a voxel share one softmax.

A task is one block of voxels of one sample, with all of its classes. It is walked in tiles, short
enough that the exponentials of a tile stay in the first two levels of cache: each logit is read
from memory once. Tiles of 256 voxels hold up to 64 classes; with more classes they are shorter,
down to 64 voxels, and what is done once per tile weighs more.

With m = max_c x_c, e_c = exp(x_c) over a power of two near exp(m), e_m the largest of them, t the
number of classes that reach it (one, but for ties) and left = (t - 1) e_m + the sum of the others:

    q_c = e_c / (left + e_m),    1 - q_c = (left + (e_m - e_c)) / (left + e_m),
    -log q_c = (m - x_c) + log1p(left / e_m)

No exponential is that of a rounded difference, and no small number is the difference of large ones:
where the network is right and sure, the mass on the wrong side keeps its relative accuracy, as in
`points`. Where abs(m) > 256, m is taken from the logits first; of those that matter that is exact.

With h_c = dL/dq_c = on_c p_c + off_c (1 - p_c), r a class that reaches m, and T_c = a_c p_c + b_c
the weight of -log q_c in the cross-entropy (a_c for the target's class, b_c for every class):

    dL/dx_c = q_c ((h_c - h_r) - sum_k q_k (h_k - h_r)) + q_c sum_{k != c} T_k - T_c (1 - q_c)

The difference to r makes the sum as small as the gradient is where q_r is near 1. The coefficients
of a row are (on, off, a, b, below, above, square, ...): h_c also has what the l1 and squared forms
add, as in `points`, and is then kept for a tile as e_c is. A focal loss adds focal_c p_c u_c to
T_c, with

    u_c = (1 - q_c)^(gamma - 1) (gamma q_c (-log q_c) + 1 - q_c)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import COEFFICIENTS, columns
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.histograms import VOXELS, flush_rows, is_full
from fastseg_kernels.cpu.intrinsics import (
    add_atomically,
    address_of,
    call_kernel,
    carray,
    pointer_to,
    stack_array,
)
from fastseg_kernels.cpu.jobs import JOB, LOAD_REQUEST, PARTS
from fastseg_kernels.cpu.operands import voxel_address
from fastseg_kernels.cpu.point_parts import make_is_allowed
from fastseg_kernels.cpu.softmax_slopes import has_shares, has_slopes, make_tile_gradient
from fastseg_kernels.cpu.softmax_stage import (
    BUFFER,
    LONGEST_TILE,
    MOST_CLASSES,
    TILE_REQUEST,
    UNIT,
)
from fastseg_kernels.cpu.softmax_sums import FILLED, make_tile_statistics
from fastseg_kernels.cpu.variants import Variant

SHORTEST_BLOCK = 8192
"""Logits of a block; as in `overlap`."""
MOST_BLOCKS = 256


def tile_length(classes: int) -> int:
    """Return the voxels of a tile."""
    return min(LONGEST_TILE, BUFFER // classes // UNIT * UNIT)


def block_length(voxels: int, classes: int) -> int:
    """Return the voxels per block for samples of ``voxels``."""
    tile = tile_length(classes)
    length = max(SHORTEST_BLOCK // classes, -(-voxels // MOST_BLOCKS))
    return max(1, -(-length // tile)) * tile


def statistics_kernel(job: Any, variant: Variant) -> Kernel:
    """Return the kernel that fills ``job.sums``, as that of `overlap`; the job is told nothing."""
    return _statistics(variant)


def gradient_kernel(job: Any, variant: Variant) -> Kernel:
    """Return the kernel that writes ``job.out`` from ``job.coefficients``."""
    return _second_pass(variant, "gradient")


def errors_kernel(job: Any, variant: Variant) -> Kernel:
    """Return the kernel that writes abs(p - q) to ``job.out``, as that of `overlap`."""
    return _second_pass(variant, "errors")


@cache
def _statistics(variant: Variant) -> Kernel:
    """Compile the kernel that fills ``job.sums`` for a variant; once per process."""
    real = REALS[variant.real]
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    names = columns(variant.families, counts=False)
    if not FILLED.issuperset(names):
        raise NotImplementedError(f"no lane adds up {', '.join(sorted({*names} - FILLED))}")
    width, soft = len(names), "soft" in variant.targets
    p_length = BUFFER if soft else 1
    at_voxels, at_count, at_invalid = (names.index(n) for n in ("voxels", "count", "invalid"))
    tile_statistics = make_tile_statistics(variant, real)
    zero, is_allowed = T(0), make_is_allowed(variant, real)

    @function
    def count_invalid(p, keep, tile, count):  # type: ignore[no-untyped-def]
        """Return how many soft targets of one class are not allowed."""
        invalid = 0
        for i in range(count):
            invalid += keep[i] != zero and not is_allowed(p[i])
        return invalid

    def statistics(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, e, p = stack_array(BUFFER, T), stack_array(BUFFER, T), stack_array(p_length, T)
        target, keep = stack_array(LONGEST_TILE, I), stack_array(LONGEST_TILE, T)
        weight = stack_array(LONGEST_TILE, T)
        ask_pointer = stack_array(1, TILE_REQUEST)
        ask = carray(ask_pointer, 1)[0]
        ask.p, ask.target = address_of(p), address_of(target)
        ask.keep, ask.weight = address_of(keep), address_of(weight)
        ask.tile = job.inner_classes  # how long a tile is, see `passes`
        step = 8 * width * job.blocks
        voxels_pointer = stack_array(1, VOXELS)
        voxels = carray(voxels_pointer, 1)[0]
        counted_row, in_words, words = -1, 0, 0  # the words' first row, and voxels of each row
        if job.tallied != 0:
            part = add_atomically(job_address + PARTS, 1)
            words = job.words + 8 * job.row_words * job.classes * part
        for task in range(first, last):
            n, block = task // job.blocks, task % job.blocks
            out = job.sums + 8 * width * (n * job.classes * job.blocks + block)
            for c in range(job.classes):
                sums = pointer_to(out + c * step, np.float64)
                for k in range(width):
                    sums[k] = 0.0
            end = min(job.voxels, (block + 1) * job.block)
            for voxel in range(block * job.block, end, ask.tile):
                ask.n, ask.voxel, ask.count = n, voxel, min(ask.tile, end - voxel)
                here, here_step = address_of(x), ask.tile * size
                if job.direct != 0 and ask.count == ask.tile:
                    here, here_step = voxel_address(job.logits, n, 0, voxel), job.logits.stride_c
                ask.x = address_of(x) if here == address_of(x) else 0
                call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                full = is_full(n * job.classes, counted_row, in_words, ask.count)
                voxels.count, voxels.left_out = ask.count, ask.left_out
                voxels.words, voxels.flush_row = words, counted_row if full else -1
                counted_row, in_words = n * job.classes, ask.count if full else in_words + ask.count
                tile_statistics(
                    here, here_step, ask.p, address_of(e), ask.tile, job.classes, target, keep,
                    weight, out, step, job, job_address, address_of(voxels_pointer),
                )  # fmt: skip
                pointer_to(out, np.float64)[at_invalid] += ask.invalid
                for c in range(job.classes):
                    sums = pointer_to(out + c * step, np.float64)
                    sums[at_voxels] += ask.count
                    sums[at_count] += ask.count - ask.left_out
                    if soft:
                        row = pointer_to(ask.p + c * ask.tile * size, T)
                        sums[at_invalid] += count_invalid(row, keep, ask.tile, ask.count)
        if job.tallied != 0 and counted_row >= 0:
            ask_address = address_of(voxels_pointer)
            flush_rows(job, job_address, ask_address, words, counted_row, job.classes)

    return Kernel(statistics, variant.name("statistics"))


@cache
def _second_pass(variant: Variant, verb: str) -> Kernel:
    """Compile a kernel that writes a number for each class of each voxel."""
    real = REALS[variant.real]
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    p_length = BUFFER if "soft" in variant.targets else 1
    k_length = (COEFFICIENTS + 1) * MOST_CLASSES
    h_length = BUFFER if has_slopes(variant) else 1
    shares_length = BUFFER if has_shares(variant) else 1
    folded = "overlap_l1" in variant.families and "soft" not in variant.targets
    tile_gradient = make_tile_gradient(variant, real, verb == "errors")

    def gradient(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, e, p = stack_array(BUFFER, T), stack_array(BUFFER, T), stack_array(p_length, T)
        h, k = stack_array(h_length, T), stack_array(k_length, T)
        shares = address_of(stack_array(shares_length, T))
        target, keep = stack_array(LONGEST_TILE, I), stack_array(LONGEST_TILE, T)
        weight, scratch = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, np.int64)
        ask_pointer, put_pointer = stack_array(1, TILE_REQUEST), stack_array(1, LOAD_REQUEST)
        ask, put = carray(ask_pointer, 1)[0], carray(put_pointer, 1)[0]
        ask.p, ask.target = address_of(p), address_of(target)
        ask.keep, ask.weight = address_of(keep), address_of(weight)
        ask.tile, put.scratch = job.inner_classes, address_of(scratch)
        voxels_pointer = stack_array(1, VOXELS)
        for task in range(first, last):
            n, block = task // job.blocks, task % job.blocks
            given, given_step = 0, size * job.voxels
            width = job.coefficient_width
            exact = pointer_to(job.coefficients + 8 * width * n * job.classes, np.float64)
            of_all = 0.0
            for c in range(job.classes):
                of_all += exact[width * c + 3]
                for j in range(COEFFICIENTS):
                    k[j * job.classes + c] = T(exact[width * c + j])
                if folded:  # targets are 0 and 1
                    k[c] = T(exact[width * c] + exact[width * c + 4])
                    k[job.classes + c] = T(exact[width * c + 1] + exact[width * c + 5])
            for c in range(job.classes):
                k[COEFFICIENTS * job.classes + c] = T(of_all - exact[width * c + 3])
            end = min(job.voxels, (block + 1) * job.block)
            for voxel in range(block * job.block, end, ask.tile):
                ask.n, ask.voxel, ask.count = n, voxel, min(ask.tile, end - voxel)
                whole = ask.count == ask.tile
                here, here_step = address_of(x), ask.tile * size
                if job.direct != 0 and whole:
                    here, here_step = voxel_address(job.logits, n, 0, voxel), job.logits.stride_c
                ask.x = address_of(x) if here == address_of(x) else 0
                call_kernel(job.load, job_address, address_of(ask_pointer), 0)
                if job.slopes != 0:
                    given = job.slopes + size * (n * job.classes * job.voxels + voxel)
                there, there_step = address_of(x), ask.tile * size
                in_place = job.in_place != 0 and whole
                if in_place:
                    there, there_step = voxel_address(job.out, n, 0, voxel), job.out.stride_c
                tile_gradient(
                    here, here_step, ask.p, address_of(e), address_of(h), shares, ask.tile,
                    job.classes, target, weight, k, given, given_step, ask.count, there,
                    there_step, job, job_address, address_of(voxels_pointer), n * job.classes,
                )  # fmt: skip
                if not in_place:
                    put.n, put.voxel, put.count = n, voxel, ask.count
                    for c in range(job.classes):
                        put.c, put.x = c, address_of(x) + c * ask.tile * size
                        call_kernel(job.store, job_address, address_of(put_pointer), 0)

    return Kernel(gradient, variant.name(verb))
