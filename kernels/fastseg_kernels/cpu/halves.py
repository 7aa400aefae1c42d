"""float16 and bfloat16 as bits: Numba has no type for them. Widening is exact, rounding is once."""

from __future__ import annotations

import numpy as np

from fastseg_kernels.cpu.compiled import compile_target, function
from fastseg_kernels.cpu.intrinsics import bits_of, from_bits, round_to_half_bits, widen_half_bits

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


WIDEN = {"float16": half_to_float, "bfloat16": bfloat16_to_float}
"""From the bits of a dtype to float32."""
NARROW = {"float16": float_to_half, "bfloat16": float_to_bfloat16}
"""From float32 to the bits of a dtype."""
