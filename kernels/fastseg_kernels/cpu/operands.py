"""From any array to short contiguous buffers and back: what every kernel does around its loop.

The loops that compute know two element types (float32 or float64, and one byte per binary target)
and nothing of strides, byte order, labels or masks. A kernel walks a row in stages of `STAGE`
voxels; what is not already stored as the loop wants it is brought into a buffer of that length,
which stays in the first-level cache. So every dtype and layout runs the same machine code for the
mathematics, and no copy of a volume is ever made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import (
    DTYPE_CODES,
    ITEM_SIZES,
    MAX_DIMS,
)
from fastseg_kernels.cpu.compiled import compile_target, function
from fastseg_kernels.cpu.elementary import Real
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    bits_of,
    from_bits,
    pointer_to,
    round_to_half_bits,
    wide_vectors,
    widen_half_bits,
)
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
        ("code", np.int64),
        ("item_size", np.int64),
        ("swapped", np.int64),
        ("stride_n", np.int64),
        ("stride_c", np.int64),
        ("strides", np.int64, (MAX_DIMS,)),
    ]
)
"""One array in a job record; an address of 0 says that there is none."""

BOOL, U8, I8 = DTYPE_CODES["bool"], DTYPE_CODES["uint8"], DTYPE_CODES["int8"]
U16, I16 = DTYPE_CODES["uint16"], DTYPE_CODES["int16"]
U32, I32 = DTYPE_CODES["uint32"], DTYPE_CODES["int32"]
U64, I64 = DTYPE_CODES["uint64"], DTYPE_CODES["int64"]
F16, BF16 = DTYPE_CODES["float16"], DTYPE_CODES["bfloat16"]
F32, F64 = DTYPE_CODES["float32"], DTYPE_CODES["float64"]
FIRST_FLOAT = F16


def fill_operand(record: Any, layout: Layout, strides: tuple[int, ...]) -> None:
    """Write ``layout`` (N, C, *spatial) with its merged spatial ``strides`` into an operand."""
    record["code"] = DTYPE_CODES[layout.dtype]
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
def store_raw(operand, job, n, c, voxel, count, buffer):  # type: ignore[no-untyped-def]
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


def _make_widen(source_type: Any, target_type: Any) -> Any:
    @function
    def widen(source, count, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        data = pointer_to(source, source_type)
        for i in range(count):
            out[i] = target_type(data[i])

    return widen


# Half and bfloat16 have no type in Numba: they are widened as bits, exactly.
HAS_HALF = bool(compile_target()["features"].get("f16c"))
_HALF_EXPONENT_SHIFT = np.float32(2.0**112)  # from half's exponent bias, 15, to float32's, 127
_HALF_INFINITY = np.int32(0x7C00 << 13)
_FLOAT_INFINITY = np.int32(0x7F800000)


@function
def half_to_float(half):  # type: ignore[no-untyped-def]
    """Widen the bits of a float16."""
    if HAS_HALF:
        return widen_half_bits(half)
    bits = np.int32(half)
    magnitude = np.int32(np.int32(bits & np.int32(0x7FFF)) << np.int32(13))
    scaled = bits_of(from_bits(magnitude) * _HALF_EXPONENT_SHIFT)  # subnormal halves included
    infinite = np.int32(magnitude | _FLOAT_INFINITY)
    value = infinite if magnitude >= _HALF_INFINITY else scaled
    return from_bits(np.int32(value | np.int32(np.int32(bits & np.int32(0x8000)) << np.int32(16))))


@function
def bfloat16_to_float(bits):  # type: ignore[no-untyped-def]
    """Widen the bits of a bfloat16."""
    return from_bits(np.int32(np.int32(bits) << np.int32(16)))


_HALF_OVERFLOW = np.int32(0x477FF000)  # 65520: the first float32 that rounds to infinity
_HALF_SUBNORMAL_LIMIT = np.int32(0x38800000)  # 2^-14
_HALF_SUBNORMAL_ROUNDER = np.float32(0.5)  # its unit in the last place is 2^-24, half's smallest
_QUIET_NAN = np.int32(0x7E00)


@function
def float_to_half(x):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even; in integers where the CPU cannot."""
    if HAS_HALF:
        return round_to_half_bits(x)
    bits = bits_of(x)
    sign = np.int32(np.int32(bits >> np.int32(16)) & np.int32(0x8000))
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    odd = np.int32(np.int32(magnitude >> np.int32(13)) & np.int32(1))
    rounded = np.int32(
        np.int32(magnitude + np.int32(np.int32(0xFFF - (112 << 23)) + odd)) >> np.int32(13)
    )
    subnormal = np.int32(
        bits_of(from_bits(magnitude) + _HALF_SUBNORMAL_ROUNDER) - bits_of(_HALF_SUBNORMAL_ROUNDER)
    )
    value = subnormal if magnitude < _HALF_SUBNORMAL_LIMIT else rounded
    value = np.int32(0x7C00) if magnitude >= _HALF_OVERFLOW else value
    value = _QUIET_NAN if magnitude > _FLOAT_INFINITY else value
    return np.uint16(np.int32(value | sign))


@function
def float_to_bfloat16(x):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even, in integers."""
    bits = bits_of(x)
    odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
    rounded = np.int32(np.int32(bits + np.int32(np.int32(0x7FFF) + odd)) >> np.int32(16))
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    quiet = np.int32(np.int32(bits >> np.int32(16)) | np.int32(0x40))
    return np.uint16(
        np.int32((quiet if magnitude > _FLOAT_INFINITY else rounded) & np.int32(0xFFFF))
    )


@cache
def make_widen_small(real: Real) -> tuple[Any, Any]:
    """Return ``widen(address, count, out)`` for float16, and for bfloat16."""
    T = real.scalar

    @function
    def widen_half(source, count, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        data = pointer_to(source, np.uint16)
        for i in range(count):
            out[i] = T(half_to_float(data[i]))

    @function
    def widen_bfloat16(source, count, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        data = pointer_to(source, np.uint16)
        for i in range(count):
            out[i] = T(bfloat16_to_float(data[i]))

    return widen_half, widen_bfloat16


@cache  # or each of its users would have it compiled anew
def make_load_reals(real: Real) -> Any:
    """Return ``load_reals(address, code, count, out)``: widen contiguous elements of any dtype."""
    T = real.scalar
    widen_half, widen_bfloat16 = make_widen_small(real)
    widen_u8, widen_i8 = _make_widen(np.uint8, T), _make_widen(np.int8, T)
    widen_u16, widen_i16 = _make_widen(np.uint16, T), _make_widen(np.int16, T)
    widen_u32, widen_i32 = _make_widen(np.uint32, T), _make_widen(np.int32, T)
    widen_u64, widen_i64 = _make_widen(np.uint64, T), _make_widen(np.int64, T)
    widen_f32, widen_f64 = _make_widen(np.float32, T), _make_widen(np.float64, T)

    @function
    def load_reals(source, code, count, out):  # type: ignore[no-untyped-def]
        if code == F32:
            widen_f32(source, count, out)
        elif code == BF16:
            widen_bfloat16(source, count, out)
        elif code == F16:
            widen_half(source, count, out)
        elif code == F64:
            widen_f64(source, count, out)
        elif code in (U8, BOOL):
            widen_u8(source, count, out)
        elif code == I8:
            widen_i8(source, count, out)
        elif code == U16:
            widen_u16(source, count, out)
        elif code == I16:
            widen_i16(source, count, out)
        elif code == U32:
            widen_u32(source, count, out)
        elif code == I32:
            widen_i32(source, count, out)
        elif code == U64:
            widen_u64(source, count, out)
        else:
            widen_i64(source, count, out)

    return load_reals


@cache
def make_store_reals(real: Real) -> Any:
    """Return ``store_reals(values, count, code, out)``: round once to a floating-point dtype."""
    T = real.scalar

    @function
    def store_reals(values, count, code, destination):  # type: ignore[no-untyped-def]
        wide_vectors()
        if code == F32:
            singles = pointer_to(destination, np.float32)
            for i in range(count):
                singles[i] = np.float32(values[i])
        elif code == F64:
            doubles = pointer_to(destination, np.float64)
            for i in range(count):
                doubles[i] = np.float64(values[i])
        elif code == F16:
            halves = pointer_to(destination, np.uint16)
            for i in range(count):
                halves[i] = float_to_half(np.float32(values[i]))
        else:
            brains = pointer_to(destination, np.uint16)
            for i in range(count):
                brains[i] = float_to_bfloat16(np.float32(values[i]))

    assert T in (np.float32, np.float64)
    return store_reals


_widen_to_double = make_load_reals(Real(np.float64, np.int64, 52, 1023, 0.0, (), 0))
_EXACT_INTEGERS = 2.0**53
NO_LABEL = -(2**63)
"""Stands for 0.5, NaN and the like: no class, and nothing that one would ignore."""
_int64_from = {
    dtype: _make_widen(dtype, np.int64)
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
}
_from_u8, _from_i8 = _int64_from[np.uint8], _int64_from[np.int8]
_from_u16, _from_i16 = _int64_from[np.uint16], _int64_from[np.int16]
_from_u32, _from_i32 = _int64_from[np.uint32], _int64_from[np.int32]
_from_i64 = _int64_from[np.int64]


@function
def _load_integers(source, code, count, out):  # type: ignore[no-untyped-def]
    """Widen labels to int64. uint64 is read as int64: labels past 2^63 come out negative."""
    if code in (U8, BOOL):
        _from_u8(source, count, out)
    elif code == I8:
        _from_i8(source, count, out)
    elif code == U16:
        _from_u16(source, count, out)
    elif code == I16:
        _from_i16(source, count, out)
    elif code == U32:
        _from_u32(source, count, out)
    elif code == I32:
        _from_i32(source, count, out)
    else:
        _from_i64(source, count, out)


@function
def load_labels(source, code, count, out):  # type: ignore[no-untyped-def]
    """Widen labels of any dtype to int64; what is not an integer becomes `NO_LABEL`."""
    if code < FIRST_FLOAT:
        _load_integers(source, code, count, out)
        return
    values = pointer_to(address_of(out), np.float64)
    _widen_to_double(source, code, count, values)
    for i in range(count):
        value = values[i]
        whole = abs(value) < _EXACT_INTEGERS
        label = np.int64(value) if whole else np.int64(NO_LABEL)
        out[i] = label if whole and np.float64(label) == value else np.int64(NO_LABEL)
