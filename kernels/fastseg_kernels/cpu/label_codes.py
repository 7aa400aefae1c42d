"""From labels of any dtype to one byte per voxel: 0, 1, `INVALID` or `EXCLUDED`.

Labels are compared in their own type, 32 bytes or 4 of int64 to a vector: what they mean is put in
three numbers of that type first, so that one loop serves every rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseg_kernels.constants import TARGETS_AS_STORED, TARGETS_NONZERO
from fastseg_kernels.cpu.compiled import function, inlined
from fastseg_kernels.cpu.elementary import FLOAT32
from fastseg_kernels.cpu.intrinsics import is_same, pointer_to, select, wide_vectors
from fastseg_kernels.cpu.operands import (
    BF16,
    BOOL,
    EXCLUDED,
    F16,
    F32,
    F64,
    I8,
    I16,
    I32,
    INVALID,
    U8,
    U16,
    U32,
    make_widen_small,
)


@function
def _range_of(code):  # type: ignore[no-untyped-def]
    """Return the least and the largest label of an integer type, int64 for those of 64 bits."""
    if code in (U8, BOOL):
        return 0, 255
    if code == I8:
        return -128, 127
    if code == U16:
        return 0, 65535
    if code == I16:
        return -32768, 32767
    if code == U32:
        return 0, 4294967295
    if code == I32:
        return -2147483648, 2147483647
    return -9223372036854775808, 9223372036854775807


def _make_classify(dtype: Any) -> Any:
    """Return ``classify(address, code, count, job, codes)`` for contiguous labels.

    Of one width: integers of either sign are the same if their bits are.
    """
    is_float = np.issubdtype(dtype, np.floating)
    background, foreground = np.uint8(0), np.uint8(1)
    invalid, excluded = np.uint8(INVALID), np.uint8(EXCLUDED)

    @inlined
    def convert(label, real, code):  # type: ignore[no-untyped-def]
        """Return a label as one of ``dtype``, and whether that is the same number."""
        if is_float:
            return dtype(real), np.float64(dtype(real)) == real
        least, largest = _range_of(code)
        return dtype(label), least <= label <= largest

    @inlined
    def equal(a, b):  # type: ignore[no-untyped-def]
        return a == b if is_float else is_same(a, b)

    @function
    def classify(address, code, count, job, codes):  # type: ignore[no-untyped-def]
        wide_vectors()
        labels = pointer_to(address, dtype)
        # A label is `first`, `second` or something else; what is ignored is compared before.
        first, first_code = dtype(0), background
        second, second_code, other = dtype(1), foreground, invalid
        if job.target_mode == TARGETS_NONZERO:
            second, second_code, other = first, first_code, foreground
        elif job.target_mode != TARGETS_AS_STORED:
            first, there = convert(job.positive_label, job.positive_real, code)
            second, other = first, background
            first_code = second_code = foreground if there else background
        ignored, ignored_code = first, first_code
        if job.has_ignore != 0:
            value, there = convert(job.ignore_label, job.ignore_real, code)
            if there:
                ignored, ignored_code = value, excluded
        for i in range(count):
            label = labels[i]
            which = select(equal(label, second), second_code, other)
            which = select(equal(label, first), first_code, which)
            if is_float:
                which = select(label == label, which, invalid)
            codes[i] = select(equal(label, ignored), ignored_code, which)

    return classify


def _make_narrow(dtype: Any) -> Any:
    """Return ``narrow(address, count, out)``: whether all labels fit a byte, which ``out`` gets."""
    nothing = dtype(0)

    @function
    def narrow(address, count, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        labels, seen = pointer_to(address, dtype), nothing
        for i in range(count):
            seen = dtype(seen | labels[i])
            out[i] = np.uint8(labels[i])
        return 0 <= seen <= 255

    return narrow


_of_bytes, _of_16_bits = _make_classify(np.uint8), _make_classify(np.uint16)
_of_32_bits, _of_64_bits = _make_classify(np.int32), _make_classify(np.int64)
_of_singles, _of_doubles = _make_classify(np.float32), _make_classify(np.float64)
_narrow_32_bits, _narrow_64_bits = _make_narrow(np.int32), _make_narrow(np.int64)
_widen_half, _widen_bfloat16 = make_widen_small(FLOAT32)


@function
def load_codes(address, code, count, job, scratch, codes):  # type: ignore[no-untyped-def]
    """Turn ``count`` contiguous labels of any dtype into codes of one byte. NaN is `INVALID`.

    ``scratch``: the address of ``count`` words.
    """
    brief = pointer_to(scratch, np.uint8)
    if code in (U8, BOOL, I8):
        _of_bytes(address, code, count, job, codes)
    elif code in (U16, I16):
        _of_16_bits(address, code, count, job, codes)
    elif code in (U32, I32):
        # Mostly labels are small, and bytes are compared four or eight times as fast.
        if _narrow_32_bits(address, count, brief):
            _of_bytes(scratch, U8, count, job, codes)
        else:
            _of_32_bits(address, code, count, job, codes)
    elif code == F32:
        _of_singles(address, code, count, job, codes)
    elif code == F64:
        _of_doubles(address, code, count, job, codes)
    elif code in (F16, BF16):
        singles = pointer_to(scratch, np.float32)
        if code == F16:
            _widen_half(address, count, singles)
        else:
            _widen_bfloat16(address, count, singles)
        _of_singles(scratch, F32, count, job, codes)
    elif _narrow_64_bits(address, count, brief):
        _of_bytes(scratch, U8, count, job, codes)
    else:
        _of_64_bits(address, code, count, job, codes)
