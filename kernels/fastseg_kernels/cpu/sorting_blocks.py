"""Sorting errors, the passes over all of them: into buckets by their largest bits, and back.

A block is a part of a group, in one or more runs of memory. It has a stretch of the storage for its
elements that are not 0, and puts them there bucket by bucket, so a bucket is one piece of every
block. Both passes walk a block in the same order, so no element's place is ever written down, and a
task needs no more than its block: 64K elements from the second cache to the second cache, where one
scatter of the whole group would write to as many pages as there are buckets.

An element's magnitude, its bits without the sign, is an integer in the order of the errors. Bucket
0 has the largest. The last bucket has the NaNs, which stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.intrinsics import (
    carray,
    from_bits,
    pointer_to,
    select,
    stack_array,
    wide_vectors,
)

CHUNK = 1024
"""Elements that are looked at by vectors, before they are moved one by one."""
ROOM = CHUNK + 1
MOST_BUCKETS = 4096
PIECES = MOST_BUCKETS + 1
PIECE = 2**20
"""Elements whose counts an int32 holds."""

JOB = np.dtype(
    [
        ("runs", np.int64),  # addresses of records
        ("blocks", np.int64),
        ("groups", np.int64),
        ("table", np.int64),  # of int32 (blocks, buckets + 1): where a bucket's piece ends
        ("labels", np.int64),  # of int32 (blocks, buckets + 1): how many in it are foreground
        ("buckets", np.int64),  # of each group, without that of the NaNs
        ("raw", np.int64),  # 1: the rows themselves are pieces, with zeros and NaNs among them
        ("listed", np.int64),  # address of the buckets that are sorted
        ("items", np.int64),  # of int64: where a task's part of the list begins
        ("scratch", np.int64),  # address of ``parts`` times ``scratch_size`` bytes
        ("scratch_size", np.int64),
        ("capacity", np.int64),  # elements of the largest bucket, rounded up
        ("parts", np.int64),  # how many calls of the kernel have taken their part of the scratch
    ]
)
RUN = np.dtype([("address", np.int64), ("count", np.int64)])
BLOCK = np.dtype(
    [
        ("group", np.int64),
        ("first_run", np.int64),
        ("last_run", np.int64),
        ("factor", np.float64),
        ("storage", np.int64),  # address
        ("least", np.int64),  # magnitude of what is neither 0 nor NaN
        ("most", np.int64),
        ("filled", np.int64),  # how many are neither 0 nor NaN
        ("foreground", np.int64),  # and how many of those are foreground
        ("nans", np.int64),
    ]
)
GROUP = np.dtype(
    [
        ("first_block", np.int64),
        ("last_block", np.int64),
        ("top", np.int64),  # largest magnitude
        ("shift", np.int64),  # bucket = (top - magnitude) >> shift
        ("foreground", np.int64),  # P of the whole row
        ("f", np.int64),  # voxels before the group
        ("b", np.int64),
        ("constant", np.int64),  # 1: all are equal, and there are no buckets
        ("foreground_weight", np.float64),  # of a constant group
        ("background_weight", np.float64),
    ]
)
BUCKET = np.dtype(
    [
        ("group", np.int64),
        ("index", np.int64),
        ("f", np.int64),  # voxels before the bucket
        ("b", np.int64),
        ("value", np.float64),  # answer: its part of the sum
    ]
)
RUN_SIZE, BLOCK_SIZE, GROUP_SIZE, BUCKET_SIZE = (d.itemsize for d in (RUN, BLOCK, GROUP, BUCKET))


def bits_of_infinity(real: Real) -> int:
    """Return the magnitude of infinity: that of a NaN is larger."""
    return (2 * real.exponent_bias + 1) << real.fraction_bits


def _make_compact(real: Real) -> Any:
    """Return ``compact(x, count, found)``: copy what is not 0, return how many that are."""
    I = real.integer  # noqa: E741
    magnitude = I(np.iinfo(I).max)

    @function
    def compact(x, count, found):  # type: ignore[no-untyped-def]
        wide_vectors()
        seen = I(0)
        for i in range(count):
            seen = I(seen | x[i])
        if seen & magnitude == 0:
            return 0
        k = 0
        for i in range(count):  # without a branch, which would often be guessed wrong
            bits = x[i]
            found[k] = bits
            k += (bits & magnitude) != 0
        return k

    return compact


def _make_place(real: Real) -> Any:
    """Return ``place(found, count, group, buckets, places)``: the bucket of every element."""
    I = real.integer  # noqa: E741
    magnitude, infinity = I(np.iinfo(I).max), I(bits_of_infinity(real))

    @function
    def place(found, count, group, buckets, places):  # type: ignore[no-untyped-def]
        wide_vectors()
        top, shift, of_nans = I(group.top), I(group.shift), I(buckets)
        for i in range(count):
            m = I(found[i] & magnitude)
            places[i] = select(m > infinity, of_nans, I(I(top - m) >> shift))

    return place


@cache
def survey_kernel(real_name: str) -> Kernel:
    """Compile the kernel that finds the extremes and the counts of each block."""
    I = REALS[real_name].integer  # noqa: E741
    size = np.dtype(I).itemsize
    magnitude, infinity = I(np.iinfo(I).max), I(bits_of_infinity(REALS[real_name]))
    zero, one = I(0), I(1)

    @function
    def look(x, count, block):  # type: ignore[no-untyped-def]
        wide_vectors()
        least, most, filled, foreground, nans = infinity, zero, zero, zero, zero
        for i in range(count):
            m = I(x[i] & magnitude)
            is_nan, is_filled = m > infinity, (m != zero) & (m <= infinity)
            low, high = select(is_filled, m, infinity), select(is_filled, m, zero)
            least = select(low < least, low, least)
            most = select(high > most, high, most)
            filled = I(filled + select(is_filled, one, zero))
            foreground = I(foreground + select(is_filled & (x[i] < zero), one, zero))
            nans = I(nans + select(is_nan, one, zero))
        block.least, block.most = min(block.least, least), max(block.most, most)
        block.filled += filled
        block.foreground += foreground
        block.nans += nans

    def survey(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        for task in range(first, last):
            block = carray(pointer_to(job.blocks + BLOCK_SIZE * task, BLOCK), 1)[0]
            block.least = infinity
            for r in range(block.first_run, block.last_run):
                run = carray(pointer_to(job.runs + RUN_SIZE * r, RUN), 1)[0]
                for start in range(0, run.count, PIECE):
                    x = pointer_to(run.address + size * start, I)
                    look(x, min(PIECE, run.count - start), block)

    return Kernel(survey, f"sorting-survey-{real_name}")


@cache
def partition_kernel(real_name: str) -> Kernel:
    """Compile the kernel that moves the elements of each block to its storage, by buckets."""
    real = REALS[real_name]
    I = real.integer  # noqa: E741
    size, low = np.dtype(I).itemsize, 2**32 - 1
    compact, place = _make_compact(real), _make_place(real)

    @function
    def count_run(run, group, buckets, found, places, words):  # type: ignore[no-untyped-def]
        for start in range(0, run.count, CHUNK):
            x = pointer_to(run.address + size * start, I)
            count = compact(x, min(CHUNK, run.count - start), found)
            place(found, count, group, buckets, places)
            for i in range(count):  # the count below, and that of foreground above
                words[places[i]] += 1 + ((found[i] < 0) << 32)

    @function
    def move_run(run, group, buckets, found, places, ends, storage):  # type: ignore[no-untyped-def]
        for start in range(0, run.count, CHUNK):
            x = pointer_to(run.address + size * start, I)
            count = compact(x, min(CHUNK, run.count - start), found)
            place(found, count, group, buckets, places)
            for i in range(count):
                j = places[i]
                at = ends[j]
                storage[at] = found[i]
                ends[j] = at + 1

    def partition(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        found, places = stack_array(ROOM, I), stack_array(CHUNK, I)
        words = stack_array(PIECES, np.int64)
        buckets = job.buckets
        for task in range(first, last):
            block = carray(pointer_to(job.blocks + BLOCK_SIZE * task, BLOCK), 1)[0]
            group = carray(pointer_to(job.groups + GROUP_SIZE * block.group, GROUP), 1)[0]
            if group.constant != 0:
                continue
            ends = pointer_to(job.table + 4 * (buckets + 1) * task, np.int32)
            labels = pointer_to(job.labels + 4 * (buckets + 1) * task, np.int32)
            for j in range(buckets + 1):
                words[j] = 0
            for r in range(block.first_run, block.last_run):
                run = carray(pointer_to(job.runs + RUN_SIZE * r, RUN), 1)[0]
                count_run(run, group, buckets, found, places, words)
            at = 0
            for j in range(buckets + 1):
                ends[j], labels[j] = at, words[j] >> 32
                at += words[j] & low
            storage = pointer_to(block.storage, I)
            for r in range(block.first_run, block.last_run):
                run = carray(pointer_to(job.runs + RUN_SIZE * r, RUN), 1)[0]
                move_run(run, group, buckets, found, places, ends, storage)

    return Kernel(partition, f"sorting-partition-{real_name}")


def make_slope(real: Real) -> Any:
    """Return ``slope(weight, factor)``, rounded once.

    A voxel of weight 0 has the slope 0, also where the factor is infinite.
    """
    T = real.scalar
    zero = T(0)

    @inlined
    def slope(weight, factor):  # type: ignore[no-untyped-def]
        return zero if weight == 0.0 else T(weight * factor)

    return slope


@cache
def restore_kernel(real_name: str) -> Kernel:
    """Compile the kernel that brings the slopes of each block from its storage to its runs."""
    real = REALS[real_name]
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(I).itemsize
    magnitude, infinity = I(np.iinfo(I).max), I(bits_of_infinity(real))
    zero = I(0)
    compact, place, slope = _make_compact(real), _make_place(real), make_slope(real)

    @function
    def fill_run(run, factor, group):  # type: ignore[no-untyped-def]
        wide_vectors()
        x, out = pointer_to(run.address, I), pointer_to(run.address, T)
        of_foreground = slope(-group.foreground_weight, factor)
        of_background = slope(group.background_weight, factor)
        for i in range(run.count):
            bits = x[i]
            m = I(bits & magnitude)
            value = select(bits < zero, of_foreground, of_background)
            value = select(m == zero, T(0), value)
            out[i] = select(m > infinity, from_bits(bits), value)

    @function
    def bring_run(run, group, buckets, found, places, at, storage):  # type: ignore[no-untyped-def]
        for start in range(0, run.count, CHUNK):
            x = pointer_to(run.address + size * start, I)
            here = min(CHUNK, run.count - start)
            count = compact(x, here, found)
            place(found, count, group, buckets, places)
            for i in range(count):
                j = places[i]
                k = at[j]
                found[i] = storage[k]
                at[j] = k + 1
            if count == here:
                for i in range(here):
                    x[i] = found[i]
            elif count == 0:
                for i in range(here):
                    x[i] = zero
            else:
                found[CHUNK] = zero
                k = 0
                for i in range(here):  # of indices: if loaded or not, it is a branch, and 2 ns more
                    is_filled = (x[i] & magnitude) != 0
                    x[i] = found[select(is_filled, k, CHUNK)]
                    k += is_filled

    def restore(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        found, places = stack_array(ROOM, I), stack_array(CHUNK, I)
        at = stack_array(PIECES, np.int32)
        buckets = job.buckets
        for task in range(first, last):
            block = carray(pointer_to(job.blocks + BLOCK_SIZE * task, BLOCK), 1)[0]
            group = carray(pointer_to(job.groups + GROUP_SIZE * block.group, GROUP), 1)[0]
            if group.constant == 0:
                ends = pointer_to(job.table + 4 * (buckets + 1) * task, np.int32)
                at[0] = 0
                for j in range(buckets):
                    at[j + 1] = ends[j]
            storage = pointer_to(block.storage, I)
            for r in range(block.first_run, block.last_run):
                run = carray(pointer_to(job.runs + RUN_SIZE * r, RUN), 1)[0]
                if group.constant != 0:
                    fill_run(run, block.factor, group)
                else:
                    bring_run(run, group, buckets, found, places, at, storage)

    return Kernel(restore, f"sorting-restore-{real_name}")
