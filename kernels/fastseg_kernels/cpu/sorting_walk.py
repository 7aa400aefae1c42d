"""Sorting errors, one bucket in the cache: its order, the weights that follow from it, its slopes.

A key is twice the distance of the magnitude below a constant, plus 1 for foreground: keys ascend as
errors descend, equal errors lie together, and nothing else is needed for the sum. A position is
where an element was in its bucket, all pieces after each other.

The sort is one counting pass over about two bins an element, for which a bucket is narrow enough to
be nearly even, and then insertion, which finds nearly all in their place. Bins that hold many are
spread again, over the range that they really have: equal errors cost nothing, and each time at
least six bits of the range are gone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.intrinsics import (
    add_atomically,
    address_of,
    carray,
    from_bits,
    pointer_to,
)
from fastseg_kernels.cpu.sorting_blocks import (
    BLOCK,
    BLOCK_SIZE,
    BUCKET,
    BUCKET_SIZE,
    GROUP,
    GROUP_SIZE,
    JOB,
    bits_of_infinity,
    make_slope,
)

LEAF = 24
"""Elements that insertion sorts, at the most."""
MOST_BINS = 16384
PARTS = JOB.fields["parts"][1]  # type: ignore[index]
"""Where a job's counter of calls lies."""


def scratch_size(real_name: str, capacity: int) -> int:
    """Return the bytes that one thread needs for buckets of ``capacity`` elements (of 16)."""
    keys_and_positions = 2 * (np.dtype(real_name).itemsize + 4)
    pending = 8 * (capacity // LEAF + 8)
    return capacity * (keys_and_positions + 8) + 4 * MOST_BINS + pending


def _make_sort(real: Real, placed: bool) -> Any:
    """Return ``sort(keys, positions, n, ...)``, which sorts keys and, if ``placed``, positions."""
    K = real.integer
    size = np.dtype(K).itemsize

    @function
    def extremes(keys, n):  # type: ignore[no-untyped-def]
        least = most = keys[0]
        for i in range(1, n):
            least, most = min(least, keys[i]), max(most, keys[i])
        return least >> 1, most >> 1

    @function
    def insert(keys, positions, n):  # type: ignore[no-untyped-def]
        last = keys[0]
        for i in range(1, n):
            key = keys[i]
            if key >> 1 >= last >> 1:  # labels do not matter: equal errors stay as they are
                last = key
                continue
            position = positions[i] if placed else 0
            j = i
            while j > 0 and keys[j - 1] >> 1 > key >> 1:
                keys[j] = keys[j - 1]
                if placed:
                    positions[j] = positions[j - 1]
                j -= 1
            keys[j] = key
            if placed:
                positions[j] = position

    @function
    def spread(keys, positions, n, least, most, to_keys, to_positions, bins, pending):  # type: ignore[no-untyped-def]
        """Move elements to their bins; return how many bins, put on ``pending``, are not leaves."""
        count, shift = 64, 0
        while count < 2 * n and count < MOST_BINS:
            count *= 2
        while (most - least) >> shift >= count:
            shift += 1
        for j in range(count):
            bins[j] = 0
        for i in range(n):
            bins[((keys[i] >> 1) - least) >> shift] += 1
        at = large = 0
        for j in range(count):
            here = bins[j]
            bins[j] = at
            if here > LEAF:
                pending[2 * large], pending[2 * large + 1] = at, at + here
                large += 1
            at += here
        for i in range(n):
            key = keys[i]
            j = ((key >> 1) - least) >> shift
            at = bins[j]
            to_keys[at] = key
            if placed:
                to_positions[at] = positions[i]
            bins[j] = at + 1
        return large

    @function
    def sort(keys, positions, n, to_keys, to_positions, bins, pending):  # type: ignore[no-untyped-def]
        """Return whether the result is in the second pair of arrays."""
        least, most = extremes(keys, n)
        if least == most:
            return False
        if n <= LEAF:
            insert(keys, positions, n)
            return False
        left = spread(keys, positions, n, least, most, to_keys, to_positions, bins, pending)
        while left > 0:  # the second arrays have the elements, the first are spare
            left -= 1
            start, end = pending[2 * left], pending[2 * left + 1]
            here = pointer_to(address_of(to_keys) + size * start, K)
            positions_here = pointer_to(address_of(to_positions) + 4 * start, np.int32)
            least, most = extremes(here, end - start)
            if least == most:
                continue
            more = pointer_to(address_of(pending) + 8 * left, np.int32)
            left += spread(
                here, positions_here, end - start, least, most, keys, positions, bins, more
            )
            for i in range(end - start):
                here[i] = keys[i]
                if placed:
                    positions_here[i] = positions[i]
        insert(to_keys, to_positions, n)
        return True

    return sort


def _make_walk(real: Real, placed: bool) -> Any:
    """Return ``walk(keys, positions, n, P, f, b, weights)``, the bucket's part of the sum."""
    I = real.integer  # noqa: E741
    middle = I(bits_of_infinity(real) >> 1)

    @inlined
    def part(weight, key):  # type: ignore[no-untyped-def]
        # Not 0 times infinity: infinite errors are a row's first group, whose weight is not 0.
        return weight * from_bits(I(middle - (key >> 1)))

    @function
    def walk(keys, positions, n, P, f, b, weights):  # type: ignore[no-untyped-def]
        total = 0.0
        union, common = P + b, P - f
        i = 0
        while i < n:
            key = keys[i]
            end = i + 1
            if (end == n or keys[end] >> 1 != key >> 1) and union > 0:  # alone: no branch by label
                label = key & 1
                of_foreground = label != 0
                numerator = 1.0 if of_foreground else np.float64(common)
                weight = numerator / (
                    np.float64(union) * (1.0 if of_foreground else np.float64(union + 1))
                )
                total += part(weight, key)
                if placed:
                    weights[positions[i]] = -weight if of_foreground else weight
                common -= label
                union += 1 - label
                i = end
                continue
            n1 = key & 1
            while end < n and keys[end] >> 1 == key >> 1:
                n1 += keys[end] & 1
                end += 1
            n0 = end - i - n1
            w1, w0 = weights_of_equal(union, common, n1, n0)
            total += part(w1 * n1 + w0 * n0, key)
            if placed:
                for k in range(i, end):
                    weights[positions[k]] = -w1 if keys[k] & 1 != 0 else w0
            common -= n1
            union += n0
            i = end
        return total

    return walk


@function
def weights_of_equal(union, common, n1, n0):  # type: ignore[no-untyped-def]
    """Return the weights in a group of equal errors: `reference.lovasz.group_weights`."""
    U, after = np.float64(union), np.float64(union + n0)
    if union == 0:  # the first of a row without foreground
        return 0.0, (1.0 / after if n0 > 0 else 0.0)
    return (1.0 / U + 1.0 / after) / 2, np.float64(common + common - n1) / (2.0 * U * after)


@cache
def walk_kernel(real_name: str, with_slopes: bool) -> Kernel:
    """Compile the kernel that sorts buckets, and sets their values and, in their place, slopes."""
    real = REALS[real_name]
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(I).itemsize
    magnitude, infinity = I(np.iinfo(I).max), I(bits_of_infinity(real))
    middle = I(bits_of_infinity(real) >> 1)
    sort, walk = _make_sort(real, with_slopes), _make_walk(real, with_slopes)
    slope = make_slope(real)

    @inlined
    def key_of(bits):  # type: ignore[no-untyped-def]
        return I((I(middle - I(bits & magnitude)) << 1) | (bits < 0))

    @function
    def load(x, count, n, keys, positions):  # type: ignore[no-untyped-def]
        for i in range(count):
            keys[n + i] = key_of(x[i])
            if with_slopes:
                positions[n + i] = n + i
        return n + count

    @function
    def load_raw(x, count, n, start, keys, positions, weights):  # type: ignore[no-untyped-def]
        """Load what is neither 0 nor NaN; return the new n, and how many are NaN."""
        nans = 0
        for i in range(count):
            m = I(x[i] & magnitude)
            is_nan = m > infinity
            keys[n] = key_of(x[i])
            if with_slopes:
                positions[n] = start + i
                weights[start + i] = np.nan if is_nan else 0.0
            n += (m != 0) & (m <= infinity)
            nans += is_nan
        return n, nans

    @function
    def store(x, count, factor, weights):  # type: ignore[no-untyped-def]
        for i in range(count):
            x[i] = slope(weights[i], factor)

    @inlined
    def piece(job, block_index, j):  # type: ignore[no-untyped-def]
        """Return the bounds of a bucket in a block's storage."""
        ends = pointer_to(job.table + 4 * (job.buckets + 1) * block_index, np.int32)
        return (np.int64(ends[j - 1]) if j > 0 else np.int64(0)), np.int64(ends[j])

    @function
    def settle(job, group, bucket, scratch):  # type: ignore[no-untyped-def]
        keys = pointer_to(scratch, I)
        to_keys = pointer_to(scratch + size * job.capacity, I)
        weights_address = scratch + 2 * size * job.capacity
        weights = pointer_to(weights_address, np.float64)
        positions = pointer_to(scratch + (2 * size + 8) * job.capacity, np.int32)
        to_positions = pointer_to(scratch + (2 * size + 12) * job.capacity, np.int32)
        bins_address = scratch + (2 * size + 16) * job.capacity
        bins = pointer_to(bins_address, np.int32)
        pending = pointer_to(bins_address + 4 * MOST_BINS, np.int32)
        n = place = nans = 0
        for k in range(group.first_block, group.last_block):
            block = carray(pointer_to(job.blocks + BLOCK_SIZE * k, BLOCK), 1)[0]
            start, end = piece(job, k, bucket.index)
            x = pointer_to(block.storage + size * start, I)
            if job.raw != 0:
                n, more = load_raw(x, end - start, n, place, keys, positions, weights)
                nans += more
            else:
                n = load(x, end - start, n, keys, positions)
            place += end - start
        total, P, f, b = 0.0, group.foreground, bucket.f, bucket.b
        if n > 0:
            if sort(keys, positions, n, to_keys, to_positions, bins, pending):
                total = walk(to_keys, to_positions, n, P, f, b, weights)
            else:
                total = walk(keys, positions, n, P, f, b, weights)
        bucket.value = np.nan if nans > 0 else total
        if with_slopes:
            place = 0
            for k in range(group.first_block, group.last_block):
                block = carray(pointer_to(job.blocks + BLOCK_SIZE * k, BLOCK), 1)[0]
                start, end = piece(job, k, bucket.index)
                out = pointer_to(block.storage + size * start, T)
                here = pointer_to(weights_address + 8 * place, np.float64)
                store(out, end - start, block.factor, here)
                place += end - start

    def sort_and_walk(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        part = add_atomically(job_address + PARTS, 1)
        scratch = job.scratch + part * job.scratch_size
        items = pointer_to(job.items, np.int64)
        for index in range(items[first], items[last]):
            bucket = carray(pointer_to(job.listed + BUCKET_SIZE * index, BUCKET), 1)[0]
            group = carray(pointer_to(job.groups + GROUP_SIZE * bucket.group, GROUP), 1)[0]
            settle(job, group, bucket, scratch)

    return Kernel(sort_and_walk, f"sorting-walk-{real_name}-{'slopes' if with_slopes else 'value'}")
