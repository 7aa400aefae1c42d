"""One stage of a row: predictions, targets and weights in buffers, excluded voxels neutralised.

A voxel that is left out (mask, ignore_index, or padding at the end of a row) becomes a voxel whose
loss, sums and gradient are exactly 0 whatever was stored there, NaN included: the loops that
compute need no branch for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import MAX_DIMS, TARGETS_AS_STORED
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.intrinsics import carray, pointer_to, select, wide_vectors
from fastseg_kernels.cpu.label_codes import load_codes
from fastseg_kernels.cpu.operands import (
    BOOL,
    EXCLUDED,
    F32,
    F64,
    I8,
    OPERAND,
    STAGE,
    U8,
    is_contiguous,
    load_raw,
    make_load_reals,
    make_store_reals,
    store_raw,
    voxel_address,
)

EXCLUDED_INPUT = {"sigmoid": -3e38, "probs": 0.0}
"""Prediction of a voxel that is left out: with target 0 its loss and gradient are exactly 0. (With
target 1 they are not: the flipped sums of `points` know it by this number.)"""

MOST_TALLIES = 2
TALLY = np.dtype(
    [
        ("kernel", np.int64),  # address of one of `histograms`
        ("bins", np.int64),
        ("octave_bits", np.int64),  # of errors: 2^octave_bits bins in an octave
        ("lowest", np.int64),  # of errors: exponent of the first octave
        ("first_word", np.int64),  # among those of a row in a task
        ("first_column", np.int64),  # among those of a row's counts
    ]
)
"""What counts voxels in a histogram, or looks their slopes up."""

JOB = np.dtype(
    [
        ("logits", OPERAND),
        ("targets", OPERAND),
        ("mask", OPERAND),
        ("weights", OPERAND),
        ("out", OPERAND),
        ("ndim", np.int64),
        ("sizes", np.int64, (MAX_DIMS,)),
        ("classes", np.int64),
        ("voxels", np.int64),  # of one row
        ("block", np.int64),  # voxels of one block
        ("blocks", np.int64),  # of one row
        ("inner_classes", np.int64),  # classes of one task: 1, or all
        ("direct", np.int64),  # 1: logits and targets are read where they lie
        ("labelled", np.int64),  # 1: targets are labels, also where the loop wants reals
        ("target_mode", np.int64),
        ("has_ignore", np.int64),
        ("ignore_label", np.int64),
        ("ignore_real", np.float64),
        ("positive_label", np.int64),
        ("positive_real", np.float64),
        ("threshold", np.float64),
        ("gamma", np.float64),  # of the focal sums
        ("excluded_input", np.float64),
        ("load", np.int64),  # address of the load kernel; only called unless direct
        ("store", np.int64),  # address of the store kernel; only called unless in_place
        ("in_place", np.int64),  # 1: the gradient is computed where out lies
        ("sums", np.int64),  # address of float64 (samples, classes, blocks, columns)
        ("tallied", np.int64),  # how many of the tallies there are
        ("tallies", TALLY, (MOST_TALLIES,)),
        ("curve", np.int64),  # 1: one counts the largest class of soft targets
        ("row_words", np.int64),  # that a task counts a row in
        ("counted_columns", np.int64),
        ("counts", np.int64),  # address of int64 (samples, classes, counted columns)
        ("words", np.int64),  # address of int64 (parts, rows of a task, words), zeros
        ("parts", np.int64),  # how many calls of the kernel have taken their part of the words
        ("signed", np.int64),  # address of (samples, classes, words): slopes of a histogram
        ("slopes", np.int64),  # address of (samples, classes, voxels), of the type computed in
        ("coefficients", np.int64),  # address of float64 (samples, classes, coefficients)
        ("coefficient_width", np.int64),
    ]
)
"""What the kernels of the overlap family are told; addresses are of the caller's memory."""

PARTS = JOB.fields["parts"][1]  # type: ignore[index]
"""Where in a job the number of its parts lies that have begun."""


LOAD_REQUEST = np.dtype(
    [
        ("n", np.int64),
        ("c", np.int64),
        ("voxel", np.int64),  # of row (n, c), the first one
        ("count", np.int64),
        ("padded", np.int64),  # what is brought goes up to here, with excluded voxels
        ("x", np.int64),  # addresses of the buffers
        ("p", np.int64),
        ("w", np.int64),
        ("excluded", np.int64),
        ("scratch", np.int64),  # address of `SCRATCH_WORDS` words
        ("x_at", np.int64),  # answer: where predictions and targets are, if not in the buffers
        ("p_at", np.int64),
        ("left_out", np.int64),  # answer: how many of the ``count`` voxels are excluded
    ]
)
"""What a load kernel is asked, and its answer. ``excluded`` is filled only if a voxel is."""


def _make_load_excluded(real: Real) -> tuple[Any, Any]:
    """Return how a mask, and how many voxels are left out, come to bytes of 0 and 1."""
    T = real.scalar
    load_reals = make_load_reals(real)
    yes, no, zero = np.uint8(1), np.uint8(0), T(0)

    @function
    def load_mask(job, ask, excluded):  # type: ignore[no-untyped-def]
        wide_vectors()
        count = ask.count
        raw = load_raw(job.mask, job, ask.n, ask.c, ask.voxel, count, ask.scratch)
        if job.mask.code in (BOOL, U8, I8):
            keep = pointer_to(raw, np.uint8)
            for i in range(count):
                excluded[i] = select(keep[i] == no, yes, no)
        else:
            wide = pointer_to(ask.scratch + 8 * STAGE, T)
            load_reals(raw, job.mask.code, count, wide)
            for i in range(count):
                excluded[i] = select(wide[i] == zero, yes, no)

    @function
    def count_excluded(excluded, count):  # type: ignore[no-untyped-def]
        wide_vectors()
        found, total = no, np.int32(0)
        for i in range(count):  # mostly none: looking for one is much faster than counting
            found = np.uint8(found | excluded[i])
        if found != no:
            for i in range(count):
                total = np.int32(total + np.int32(excluded[i]))
        return np.int64(total)

    return load_mask, count_excluded


def _make_load_targets(real: Real, binary: bool) -> Any:
    """Return how targets come to a buffer, and those that are ignored to ``excluded``."""
    T = real.scalar
    load_reals = make_load_reals(real)
    yes, no, code_excluded = np.uint8(1), np.uint8(0), np.uint8(EXCLUDED)

    @function
    def load_targets(job, ask, p, excluded):  # type: ignore[no-untyped-def]
        wide_vectors()
        n, c, voxel, count = ask.n, ask.c, ask.voxel, ask.count
        masked, of_codes = job.mask.address != 0, binary or job.labelled != 0
        if of_codes:
            codes = p if binary else pointer_to(ask.scratch, np.uint8)
            raw = load_raw(job.targets, job, n, c, voxel, count, ask.scratch + 8 * STAGE)
            load_codes(raw, job.targets.code, count, job, ask.scratch + 4 * STAGE, codes)
            if job.has_ignore != 0:
                for i in range(count):
                    was = excluded[i] if masked else no
                    excluded[i] = select(codes[i] == code_excluded, yes, was)
            if not binary:
                for i in range(count):
                    p[i] = T(codes[i])
        else:
            raw = load_raw(job.targets, job, n, c, voxel, count, ask.scratch)
            load_reals(raw, job.targets.code, count, p)
            if job.has_ignore != 0:
                ignored = T(job.ignore_real)
                for i in range(count):
                    was = excluded[i] if masked else no
                    excluded[i] = select(p[i] == ignored, yes, was)

    return load_targets


@cache
def load_kernel(real_name: str, binary: bool) -> Kernel:
    """Compile ``load(job, request, unused)``: bring voxels of one row into the buffers.

    Apart from the loops that compute, and called through its address: it is compiled once for all
    of them, and not at all where every array can be read in place. What is stored as the loops want
    it is not copied, unless voxels are left out or the end of the row is padded.
    """
    real = REALS[real_name]
    T = real.scalar
    Target = np.uint8 if binary else T
    as_stored = F32 if T is np.float32 else F64
    load_reals, load_targets = make_load_reals(real), _make_load_targets(real, binary)
    load_mask, count_excluded = _make_load_excluded(real)
    no = np.uint8(0)

    @function
    def are_codes(job):  # type: ignore[no-untyped-def]
        """Tell whether targets are stored as the codes that the loops want."""
        if not binary or job.has_ignore != 0 or not is_contiguous(job.targets, job):
            return False
        return job.target_mode == TARGETS_AS_STORED and job.targets.code in (BOOL, U8)

    @function
    def put(values, excluded, count, nothing):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            values[i] = select(excluded[i] != no, nothing, values[i])

    def load(job_address, request_address, unused):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        ask = carray(pointer_to(request_address, LOAD_REQUEST), 1)[0]
        n, c, voxel, count, padded = ask.n, ask.c, ask.voxel, ask.count, ask.padded
        x, w = pointer_to(ask.x, T), pointer_to(ask.w, T)
        p, excluded = pointer_to(ask.p, Target), pointer_to(ask.excluded, np.uint8)
        nothing, weighted = T(job.excluded_input), job.weights.address != 0
        ask.x_at, ask.p_at, ask.left_out = ask.x, ask.p, 0
        if job.mask.address != 0:
            load_mask(job, ask, excluded)
            ask.left_out = count_excluded(excluded, count)
        if ask.left_out == 0 and count == padded and are_codes(job):
            ask.p_at = voxel_address(job.targets, n, c, voxel)
        else:
            load_targets(job, ask, p, excluded)
            if job.has_ignore != 0:
                ask.left_out = count_excluded(excluded, count)
        if weighted:
            raw = load_raw(job.weights, job, n, c, voxel, count, ask.scratch)
            load_reals(raw, job.weights.code, count, w)
        raw = load_raw(job.logits, job, n, c, voxel, count, ask.scratch)
        if ask.left_out == 0 and count == padded and job.logits.code == as_stored:
            ask.x_at = raw  # maybe in scratch
        else:
            load_reals(raw, job.logits.code, count, x)
        if ask.left_out != 0:
            put(x, excluded, count, nothing)
            put(p, excluded, count, Target(0))
            if weighted:
                put(w, excluded, count, T(0))
        for i in range(count, padded):
            x[i], p[i] = nothing, Target(0)
            if weighted:
                w[i] = T(0)

    return Kernel(load, f"load-{real_name}-{'binary' if binary else 'soft'}")


@cache
def store_kernel(real_name: str) -> Kernel:
    """Compile ``store(job, request, unused)``: write buffer ``x`` of the request to ``job.out``."""
    real = REALS[real_name]
    T = real.scalar
    store_reals = make_store_reals(real)

    def store(job_address, request_address, unused):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        ask = carray(pointer_to(request_address, LOAD_REQUEST), 1)[0]
        values = pointer_to(ask.x, T)
        if is_contiguous(job.out, job):
            here = voxel_address(job.out, ask.n, ask.c, ask.voxel)
            store_reals(values, ask.count, job.out.code, here)
        else:
            store_reals(values, ask.count, job.out.code, ask.scratch)
            store_raw(job.out, job, ask.n, ask.c, ask.voxel, ask.count, ask.scratch)

    return Kernel(store, f"store-{real_name}")
