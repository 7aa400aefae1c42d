"""One tile of a sample for the softmax kernels: logits of all classes, targets, weights.

A voxel that is left out (mask, ignore_index, padding, or a class index that is none) has weight 0,
no class and equal logits, so that its part in every sum, and its gradient, is exactly 0 whatever
was stored there, NaN included.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    carray,
    is_inside,
    is_same,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.operands import load_converted, make_copy
from fastseg_kernels.cpu.tiles import LANES

BUFFER = 16384
"""Elements of a tile, voxels times classes: 64 KB of float32, which the second cache holds."""
LONGEST_TILE = 256
"""Sixteen float32 additions in each lane until sums are widened, as in `tiles`."""
UNIT = 4 * LANES
"""Tiles are multiples of it."""
MOST_CLASSES = BUFFER // UNIT
NOBODY = -1
"""Class of a voxel that is left out."""

TILE_REQUEST = np.dtype(
    [
        ("n", np.int64),
        ("voxel", np.int64),  # of sample n, the first one
        ("count", np.int64),
        ("tile", np.int64),  # buffers are filled up to here with voxels that are left out
        ("x", np.int64),  # address of (classes, tile) reals; 0: logits are read where they lie
        ("p", np.int64),  # address of (classes, tile) reals for soft targets
        ("target", np.int64),  # address of (tile,) classes, in the reals' integer type
        ("keep", np.int64),  # address of (tile,) reals: 1, or 0 for a voxel that is left out
        ("weight", np.int64),  # address of (tile,) reals: that, times the weight map
        ("left_out", np.int64),  # answer: how many of the ``count`` voxels do not count
        ("invalid", np.int64),  # answer: how many have an index or a weight that is not allowed
    ]
)
"""What a load kernel is asked, and its answer."""


@cache
def tile_load_kernel(real_name: str, indexed: bool) -> Kernel:
    """Compile ``load(job, request, unused)``: bring a tile of voxels into the buffers."""
    real = REALS[real_name]
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    copy, zero, one, nobody = make_copy(T), T(0), T(1), I(NOBODY)

    def make_take(kind: Any) -> Any:
        """Return what turns labels of a type into classes."""

        @function
        def take(labels, count, has_ignore, ignore_label, classes, target, keep):  # type: ignore[no-untyped-def]
            """Fill ``target`` and ``keep``; return how many are ignored, and how many none."""
            wide_vectors()
            ignore, end = kind(ignore_label), kind(classes)
            ignored, unknown = kind(0), kind(0)
            for i in range(count):
                label = kind(labels[i])
                is_ignored = has_ignore & is_same(label, ignore)
                is_known = is_inside(label, end)
                use = is_known & (not is_ignored)
                ignored = kind(ignored + (kind(1) if is_ignored else kind(0)))
                unknown = kind(unknown + (kind(0) if is_known | is_ignored else kind(1)))
                target[i] = I(label) if use else nobody
                keep[i] = one if use else zero
            return ignored, unknown

        return take

    take_bytes, take_words = make_take(I), make_take(np.int64)

    @function
    def load_indices(job, ask, labels, scratch, target, keep):  # type: ignore[no-untyped-def]
        """Fill ``target``; leave out voxels whose index is ignored or none."""
        raw = load_converted(
            job.targets, job, ask.n, 0, ask.voxel, ask.count, scratch, address_of(labels)
        )
        has_ignore, ignore = job.has_ignore != 0, job.ignore_label
        if job.targets.convert == 0:
            ignored, unknown = take_bytes(
                pointer_to(raw, np.uint8), ask.count, has_ignore, ignore, job.classes, target, keep
            )
            ask.left_out, ask.invalid = np.int64(ignored), np.int64(unknown)
        else:
            ignored, unknown = take_words(
                labels, ask.count, has_ignore, ignore, job.classes, target, keep
            )
            ask.left_out, ask.invalid = ignored, unknown

    @function
    def load_weights(job, ask, buffer, scratch, keep, weight):  # type: ignore[no-untyped-def]
        """Leave out what the mask says, and fill ``weight``."""
        if job.mask.address != 0:
            raw = load_converted(
                job.mask, job, ask.n, 0, ask.voxel, ask.count, scratch, address_of(buffer)
            )
            values = pointer_to(raw, T)
            for i in range(ask.count):
                if values[i] == zero and keep[i] != zero:
                    ask.left_out += 1
                keep[i] = zero if values[i] == zero else keep[i]
        copy(ask.keep, ask.tile, ask.weight)
        if job.weights.address != 0:
            raw = load_converted(
                job.weights, job, ask.n, 0, ask.voxel, ask.count, scratch, address_of(buffer)
            )
            values = pointer_to(raw, T)
            for i in range(ask.count):
                if keep[i] != zero and not values[i] >= zero:
                    ask.invalid += 1
                weight[i] = zero if keep[i] == zero else values[i]

    @function
    def load_rows(operand, job, ask, scratch, keep, destination):  # type: ignore[no-untyped-def]
        """Widen the rows of all classes; 0 for voxels that are left out."""
        for c in range(job.classes):
            there = destination + c * ask.tile * size
            raw = load_converted(operand, job, ask.n, c, ask.voxel, ask.count, scratch, there)
            row = pointer_to(there, T)
            if raw != there:
                copy(raw, ask.count, there)
            for i in range(ask.tile):
                row[i] = zero if keep[i] == zero else row[i]

    def load(job_address, request_address, unused):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        ask = carray(pointer_to(request_address, TILE_REQUEST), 1)[0]
        labels, values = stack_array(LONGEST_TILE, np.int64), stack_array(LONGEST_TILE, T)
        scratch = address_of(stack_array(LONGEST_TILE, np.int64))
        target = pointer_to(ask.target, I)
        keep, weight = pointer_to(ask.keep, T), pointer_to(ask.weight, T)
        ask.left_out, ask.invalid = 0, 0
        start = ask.count if indexed else 0
        for i in range(start, ask.tile):
            target[i], keep[i] = nobody, (one if i < ask.count else zero)
        if indexed:
            load_indices(job, ask, labels, scratch, target, keep)
        load_weights(job, ask, values, scratch, keep, weight)
        if indexed and job.mask.address != 0:
            for i in range(ask.count):
                target[i] = nobody if keep[i] == zero else target[i]
        if not indexed:
            load_rows(job.targets, job, ask, scratch, keep, ask.p)
        if ask.x != 0:
            load_rows(job.logits, job, ask, scratch, keep, ask.x)

    return Kernel(load, f"tile-load-{real_name}-{'indexed' if indexed else 'soft'}")
