"""From any array to short contiguous buffers and back: what every kernel does around its loop.

The loops that compute know two element types (float32 or float64, and one byte per binary target)
and nothing of strides, byte order, labels or masks. A kernel walks a row in stages of `STAGE`
voxels; what is not already stored as the loop wants it is brought into a buffer of that length,
which stays in the first-level cache. So every dtype and layout runs the same machine code for the
mathematics, and no copy of a volume is ever made.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseg_kernels.constants import ITEM_SIZES, MAX_DIMS
from fastseg_kernels.cpu.compiled import function
from fastseg_kernels.cpu.intrinsics import call_kernel, pointer_to, wide_vectors
from fastseg_kernels.views import Layout

STAGE = 2048
"""Voxels brought into buffers at a time: all of them together are under 100 KB of stack."""
SCRATCH_WORDS = 2 * STAGE
"""Eight-byte words of scratch that staging needs: two elements of the widest type per voxel."""

# Codes of a staged binary target beside 0 and 1.
INVALID, EXCLUDED = 2, 3

OPERAND = np.dtype(
    [
        ("address", np.int64),
        ("convert", np.int64),  # address of one of `conversions`; 0: stored as it is wanted
        ("item_size", np.int64),
        ("swapped", np.int64),
        ("stride_n", np.int64),
        ("stride_c", np.int64),
        ("strides", np.int64, (MAX_DIMS,)),
    ]
)
"""One array in a job record; an address of 0 says that there is none."""


def fill_operand(record: Any, layout: Layout, strides: tuple[int, ...]) -> None:
    """Write ``layout`` (N, C, *spatial) with its merged spatial ``strides`` into an operand.

    What converts its elements is the caller's to say.
    """
    record["item_size"] = ITEM_SIZES[layout.dtype]
    record["swapped"] = layout.swapped
    record["stride_n"], record["stride_c"] = layout.strides[:2]
    record["strides"][: len(strides)] = strides


@function
def swap_bytes(address, item_size, count):  # type: ignore[no-untyped-def]
    """Reverse the bytes of each of ``count`` elements in place."""
    data = pointer_to(address, np.uint8)
    for i in range(count):
        start = i * item_size
        for k in range(item_size // 2):
            low, high = data[start + k], data[start + item_size - 1 - k]
            data[start + k], data[start + item_size - 1 - k] = high, low


def _make_gather(dtype: Any) -> tuple[Any, Any]:
    """Return (gather, scatter) between a strided run of ``dtype`` and a contiguous buffer."""

    @function
    def gather(source, stride, count, destination):  # type: ignore[no-untyped-def]
        out = pointer_to(destination, dtype)
        for i in range(count):
            out[i] = pointer_to(source + i * stride, dtype)[0]

    @function
    def scatter(source, stride, count, destination):  # type: ignore[no-untyped-def]
        data = pointer_to(source, dtype)
        for i in range(count):
            pointer_to(destination + i * stride, dtype)[0] = data[i]

    return gather, scatter


_gather1, _scatter1 = _make_gather(np.uint8)
_gather2, _scatter2 = _make_gather(np.uint16)
_gather4, _scatter4 = _make_gather(np.uint32)
_gather8, _scatter8 = _make_gather(np.uint64)


@function
def _gather(item_size, source, stride, count, destination):  # type: ignore[no-untyped-def]
    if item_size == 1:
        _gather1(source, stride, count, destination)
    elif item_size == 2:
        _gather2(source, stride, count, destination)
    elif item_size == 4:
        _gather4(source, stride, count, destination)
    else:
        _gather8(source, stride, count, destination)


@function
def _scatter(item_size, source, stride, count, destination):  # type: ignore[no-untyped-def]
    if item_size == 1:
        _scatter1(source, stride, count, destination)
    elif item_size == 2:
        _scatter2(source, stride, count, destination)
    elif item_size == 4:
        _scatter4(source, stride, count, destination)
    else:
        _scatter8(source, stride, count, destination)


@function
def is_contiguous(operand, job):  # type: ignore[no-untyped-def]
    """Tell whether a row of the operand is one run of memory in native byte order."""
    return (
        job.ndim == 1
        and operand.swapped == 0
        and (operand.strides[0] == operand.item_size or job.sizes[0] == 1)
    )


@function
def row_address(operand, n, c):  # type: ignore[no-untyped-def]
    """Return the address of the first voxel of row (n, c)."""
    return operand.address + n * operand.stride_n + c * operand.stride_c


@function
def voxel_address(operand, n, c, voxel):  # type: ignore[no-untyped-def]
    """Return the address of one voxel of row (n, c), which `is_contiguous`."""
    return row_address(operand, n, c) + voxel * operand.item_size


@function
def _run(operand, job, row, voxel, count):  # type: ignore[no-untyped-def]
    """Return where the voxels from ``voxel`` lie: address, stride, and how many lie in line."""
    last = job.ndim - 1
    rest = voxel
    address = row
    in_line = count
    for axis in range(last, -1, -1):
        index = rest % job.sizes[axis]
        rest //= job.sizes[axis]
        address += index * operand.strides[axis]
        if axis == last:
            in_line = min(count, job.sizes[axis] - index)
    return address, operand.strides[last], in_line


@function
def load_raw(operand, job, n, c, voxel, count, buffer):  # type: ignore[no-untyped-def]
    """Return the address of ``count`` contiguous native elements: in place, or in ``buffer``."""
    row = row_address(operand, n, c)
    size = operand.item_size
    if is_contiguous(operand, job):
        return row + voxel * size
    done = 0
    while done < count:
        source, stride, in_line = _run(operand, job, row, voxel + done, count - done)
        _gather(size, source, stride, in_line, buffer + done * size)
        done += in_line
    if operand.swapped != 0:
        swap_bytes(buffer, size, count)
    return buffer


@function
def load_converted(operand, job, n, c, voxel, count, scratch, buffer):  # type: ignore[no-untyped-def]
    """Return the address of ``count`` elements as they are wanted, maybe in one of the buffers."""
    raw = load_raw(operand, job, n, c, voxel, count, scratch)
    if operand.convert == 0:
        return raw
    call_kernel(operand.convert, raw, count, buffer)
    return buffer


def make_copy(dtype: Any) -> Any:
    """Return ``copy(source, count, destination)``, between two addresses."""

    @function
    def copy(source, count, destination):  # type: ignore[no-untyped-def]
        wide_vectors()
        data, out = pointer_to(source, dtype), pointer_to(destination, dtype)
        for i in range(count):
            out[i] = data[i]

    return copy


_copy_bytes = make_copy(np.uint8)


@function
def _store_raw(operand, job, n, c, voxel, count, buffer):  # type: ignore[no-untyped-def]
    """Write ``count`` native elements of ``buffer`` to where the operand's voxels lie."""
    row = row_address(operand, n, c)
    size = operand.item_size
    if operand.swapped != 0:
        swap_bytes(buffer, size, count)
    done = 0
    while done < count:
        target, stride, in_line = _run(operand, job, row, voxel + done, count - done)
        _scatter(size, buffer + done * size, stride, in_line, target)
        done += in_line


@function
def store_converted(operand, job, n, c, voxel, count, values, scratch):  # type: ignore[no-untyped-def]
    """Write ``count`` elements at the address ``values``, which it may change, to the operand."""
    converts, size = operand.convert != 0, operand.item_size
    if is_contiguous(operand, job):
        here = voxel_address(operand, n, c, voxel)
        if converts:
            call_kernel(operand.convert, values, count, here)
        else:
            _copy_bytes(values, count * size, here)
        return
    if converts:
        call_kernel(operand.convert, values, count, scratch)
        values = scratch
    _store_raw(operand, job, n, c, voxel, count, values)
