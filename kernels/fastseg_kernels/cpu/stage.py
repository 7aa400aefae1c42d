"""One stage of a row: predictions, targets and weights in buffers, excluded voxels neutralised.

A voxel that is left out (mask, ignore_index, or padding at the end of a row) becomes a voxel whose
loss, sums and gradient are exactly 0 whatever was stored there, NaN included: the loops that
compute need no branch for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import TARGETS_AS_STORED
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.conversions import EXCLUDED
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    call_kernel,
    carray,
    pointer_to,
    select,
    wide_vectors,
)
from fastseg_kernels.cpu.jobs import JOB, LOAD_REQUEST
from fastseg_kernels.cpu.operands import (
    STAGE,
    is_contiguous,
    load_converted,
    load_raw,
    make_copy,
    store_converted,
    voxel_address,
)

EXCLUDED_INPUT = {"sigmoid": -3e38, "probs": 0.0}
"""Prediction of a voxel that is left out: with target 0 its loss and gradient are exactly 0. (With
target 1 they are not: the flipped sums of `points` know it by this number.)"""


def _make_load_excluded(real: Real) -> tuple[Any, Any]:
    """Return how a mask, and how many voxels are left out, come to bytes of 0 and 1."""
    T = real.scalar
    yes, no, zero = np.uint8(1), np.uint8(0), T(0)

    @function
    def load_mask(job, ask, excluded):  # type: ignore[no-untyped-def]
        wide_vectors()
        count, buffer = ask.count, ask.scratch + 8 * STAGE
        raw = load_converted(job.mask, job, ask.n, ask.c, ask.voxel, count, ask.scratch, buffer)
        if job.mask.item_size == 1:
            keep = pointer_to(raw, np.uint8)
            for i in range(count):
                excluded[i] = select(keep[i] == no, yes, no)
        else:
            wide = pointer_to(raw, T)
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
    copy = make_copy(T)
    yes, no, code_excluded = np.uint8(1), np.uint8(0), np.uint8(EXCLUDED)

    @function
    def load_targets(job, ask, job_address, request_address, p, excluded):  # type: ignore[no-untyped-def]
        wide_vectors()
        n, c, voxel, count = ask.n, ask.c, ask.voxel, ask.count
        masked, of_codes = job.mask.address != 0, binary or job.labelled != 0
        if of_codes:
            ask.codes = address_of(p) if binary else ask.scratch
            raw = load_raw(job.targets, job, n, c, voxel, count, ask.scratch + 8 * STAGE)
            ask.labels, ask.brief = raw, ask.scratch + 4 * STAGE
            call_kernel(job.classify, job_address, request_address, 0)
            codes = pointer_to(ask.codes, np.uint8)
            if job.has_ignore != 0:
                for i in range(count):
                    was = excluded[i] if masked else no
                    excluded[i] = select(codes[i] == code_excluded, yes, was)
            if not binary:
                for i in range(count):
                    p[i] = T(codes[i])
        else:
            raw = load_converted(job.targets, job, n, c, voxel, count, ask.scratch, address_of(p))
            if raw != address_of(p):
                copy(raw, count, address_of(p))
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
    copy, load_targets = make_copy(T), _make_load_targets(real, binary)
    load_mask, count_excluded = _make_load_excluded(real)
    no = np.uint8(0)

    @function
    def are_codes(job):  # type: ignore[no-untyped-def]
        """Tell whether targets are stored as the codes that the loops want."""
        if not binary or job.has_ignore != 0 or not is_contiguous(job.targets, job):
            return False
        return job.target_mode == TARGETS_AS_STORED and job.targets.item_size == 1

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
            load_targets(job, ask, job_address, request_address, p, excluded)
            if job.has_ignore != 0:
                ask.left_out = count_excluded(excluded, count)
        if weighted:
            raw = load_converted(job.weights, job, n, c, voxel, count, ask.scratch, ask.w)
            if raw != ask.w:
                copy(raw, count, ask.w)
        raw = load_converted(job.logits, job, n, c, voxel, count, ask.scratch, ask.x)
        if ask.left_out == 0 and count == padded:
            ask.x_at = raw  # maybe in scratch
        elif raw != ask.x:
            copy(raw, count, ask.x)
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
def store_kernel() -> Kernel:
    """Compile ``store(job, request, unused)``: write buffer ``x`` of the request to ``job.out``."""

    def store(job_address, request_address, unused):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        ask = carray(pointer_to(request_address, LOAD_REQUEST), 1)[0]
        store_converted(job.out, job, ask.n, ask.c, ask.voxel, ask.count, ask.x, ask.scratch)

    return Kernel(store, "store")
