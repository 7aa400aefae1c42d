"""exp and log as polynomials that the compiler can vectorise, for float32 and float64.

LLVM as Numba ships it has no vector math library: ``math.exp`` in a loop is one scalar call per
voxel. Everything here is straight-line code without a table, a branch or a call.

The largest errors below are those of ``tests/test_elementary.py``, which compares with float64
(float32) and with mpmath (float64).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.cpu.compiled import inlined
from fastseg_kernels.cpu.intrinsics import bits_of, fma, from_bits


class Real(NamedTuple):
    """What the elementary functions must know of a floating-point type."""

    scalar: Any
    integer: Any
    fraction_bits: int
    exponent_bias: int
    exp_limit: float  # exp(-a) is 0 beyond
    exp_coefficients: tuple[float, ...]  # of r^2, r^3, ... in exp(r), |r| <= ln(2) / 2
    atanh_terms: int  # of the series 2 (s + s^3/3 + s^5/5 + ...), |s| <= 0.172


# Relative minimax fits, printed by tools/fit_exp.py. float64 uses the Taylor series: its terms
# beyond r^13 are below 2^-57.
FLOAT32 = Real(
    np.float32, np.int32, 23, 127, 88.0,
    (0.49999994, 0.16666521, 0.04166839, 0.008368717, 0.0013814599), 6,
)  # fmt: skip
FLOAT64 = Real(
    np.float64, np.int64, 52, 1023, 709.0,
    tuple(1.0 / math.factorial(k) for k in range(2, 14)), 12,
)  # fmt: skip
REALS = {"float32": FLOAT32, "float64": FLOAT64}


def _log_constants(real: Real) -> tuple[Any, Any, Any]:
    """Return log2(e), and ln 2 as the sum of two numbers, the first of them ln 2 rounded."""
    T = real.scalar
    high = T(math.log(2))
    # For float64 the remainder is beyond math.log.
    low = T(math.log(2) - float(high)) if T is np.float32 else T(2.3190468138462996e-17)
    return T(1 / math.log(2)), high, low


def _horner(coefficients: tuple[Any, ...]) -> Any:
    """Return a function of x for c0 + c1 x + c2 x^2 + ..., unrolled at compile time."""
    last = coefficients[-1]

    @inlined
    def innermost(x):  # type: ignore[no-untyped-def]
        return last

    def wrap(inner: Any, constant: Any) -> Any:
        @inlined
        def outer(x):  # type: ignore[no-untyped-def]
            return fma(inner(x), x, constant)

        return outer

    evaluate = innermost
    for coefficient in reversed(coefficients[:-1]):
        evaluate = wrap(evaluate, coefficient)
    return evaluate


def make_exp_negative(real: Real) -> Any:
    """Return ``exp_negative(a) = exp(-a)`` for a >= 0.

    Maximum error: 0.89 ulp on [0, 87.683] in float32, 1.01 on [0, 708.742] in float64. Beyond,
    where the result would be subnormal, it is 0; NaN for NaN.

    exp(-a) = 2^n exp(r) with n = round(-a / ln 2) and r = -a - n ln 2 in two steps. n is rounded by
    adding 1.5 * 2^fraction_bits, which leaves n + bias in the low bits: shifted into place they are
    2^n, and 0 where 2^n would no longer be a normal number.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    log2_e, ln2_high, ln2_low = _log_constants(real)
    rounder = T(1.5 * 2.0**real.fraction_bits + real.exponent_bias)
    limit, one = T(real.exp_limit), T(1)
    shift = I(real.fraction_bits)
    polynomial = _horner(tuple(T(c) for c in real.exp_coefficients))

    @inlined
    def exp_negative(a):  # type: ignore[no-untyped-def]
        a = limit if limit < a else a  # in this order NaN stays
        shifted = fma(a, -log2_e, rounder)
        n = shifted - rounder
        r = fma(n, -ln2_low, fma(n, -ln2_high, -a))
        scale = from_bits(I(bits_of(shifted) << shift))
        return fma(fma(polynomial(r), r, one), r, one) * scale

    return exp_negative


def make_exp_ratio(real: Real) -> tuple[Any, Any]:
    """Return ``reference_of(m)`` and ``exp_ratio(x, reference) = exp(x) / 2^round(m / ln 2)``.

    For m and x of at most 2^12; 0 where the result would be subnormal, NaN for NaN. Maximum error:
    1.05 ulp. The ratio of two such numbers is exp of a difference that was never rounded:
    exp(-(m - x)) itself errs by (m - x) / 2 ulp.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    log2_e, ln2_high, ln2_low = _log_constants(real)
    rounder, one = T(1.5 * 2.0**real.fraction_bits), T(1)
    bias, shift, zero = I(real.exponent_bias), I(real.fraction_bits), I(0)
    polynomial = _horner(tuple(T(c) for c in real.exp_coefficients))

    @inlined
    def reference_of(m):  # type: ignore[no-untyped-def]
        return I(bits_of(fma(m, log2_e, rounder)) - bias)

    @inlined
    def exp_ratio(x, reference):  # type: ignore[no-untyped-def]
        shifted = fma(x, log2_e, rounder)
        n = shifted - rounder
        r = fma(n, -ln2_low, fma(n, -ln2_high, x))
        exponent = I(bits_of(shifted) - reference)
        exponent = exponent if exponent > zero else zero
        return fma(fma(polynomial(r), r, one), r, one) * from_bits(I(exponent << shift))

    return reference_of, exp_ratio


def make_log1p(real: Real) -> Any:
    """Return ``log1p(s) = log(1 + s)`` for s > -1; it keeps the relative accuracy of small s.

    Maximum error: 3.16 ulp on (-1, 65535] in float32, 3.6 in float64; NaN for NaN.

    1 + s = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and log(1 + f) = 2 atanh(f / (2 + f)) by
    its series. Where n = 0, f is s itself, unrounded.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    one, two, zero, ln2 = T(1), T(2), T(0), T(math.log(2))
    shift = I(real.fraction_bits)
    sqrt_half = I(np.array(math.sqrt(0.5), T).view(I))
    series = _horner(tuple(T(2 / (2 * k + 1)) for k in range(real.atanh_terms)))

    @inlined
    def log1p(s):  # type: ignore[no-untyped-def]
        bits = bits_of(one + s)
        n = I(I(bits - sqrt_half) >> shift)
        f = s if n == 0 else from_bits(I(bits - I(n << shift))) - one
        ratio = f / (two + f)
        tail = fma(T(n), ln2, zero * s)  # zero * s: NaN stays NaN
        return fma(ratio, series(ratio * ratio), tail)

    return log1p


def _make_split(real: Real) -> Any:
    """Return ``split(u) = (n, s)``: u = 2^n (1 + s) / (1 - s) for u in [0, 1], abs(s) <= 0.172.

    Of 0 and of NaN they are numbers of no meaning.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    one, two, shift = T(1), T(2), I(real.fraction_bits)
    sqrt_half = I(np.array(math.sqrt(0.5), T).view(I))
    smallest_normal = T(np.finfo(T).tiny)
    lift, lifted_by = T(2.0 ** (real.fraction_bits + 1)), T(real.fraction_bits + 1)

    @inlined
    def split(u):  # type: ignore[no-untyped-def]
        subnormal = u < smallest_normal
        bits = bits_of(u * lift if subnormal else u)
        n = I(I(bits - sqrt_half) >> shift)
        f = from_bits(I(bits - I(n << shift))) - one
        return T(n) - lifted_by if subnormal else T(n), f / (two + f)

    return split


def make_power(real: Real) -> Any:
    """Return ``power(w, r) = w^r`` for w in [0, 1] and r >= 0; 1 for r = 0, NaN for a NaN of w.

    Maximum error: 1.5 ulp and r more in float32 and float64. Where the result would be subnormal it
    is 0.

    With w = 2^n m, m from sqrt(1/2) to sqrt(2), the exponent r (n + log2 m) is split into a whole
    number and a rest below 1/2 before anything of it is rounded that the rest would miss: exp of a
    rounded r log(w) errs by as many units as that has.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    one, zero, ln2 = T(1), T(0), T(math.log(2))
    shift, bias, nothing = I(real.fraction_bits), I(real.exponent_bias), I(0)
    rounder, least = T(1.5 * 2.0**real.fraction_bits), T(-2 * real.exponent_bias)
    split = _make_split(real)
    series = _horner(tuple(T(2 / (2 * k + 1) / math.log(2)) for k in range(real.atanh_terms)))
    polynomial = _horner(tuple(T(c) for c in real.exp_coefficients))

    @inlined
    def power(w, r):  # type: ignore[no-untyped-def]
        n, s = split(w)
        of_m = r * (s * series(s * s))  # log2 of m, times r
        high = r * n
        low = fma(r, n, -high)
        total = high + of_m
        bounded = total if total > least else least
        whole = (bounded + rounder) - rounder
        rest = (((high - whole) + of_m) + low) * ln2
        scale = I(I(whole) + bias)
        scale = scale if scale > nothing else nothing
        value = fma(fma(polynomial(rest), rest, one), rest, one) * from_bits(I(scale << shift))
        value = zero if total <= least or (w == zero and r > zero) else value
        return value + zero * w

    return power


def make_log(real: Real) -> Any:
    """Return ``log(u)`` for u in [0, 1], -inf at 0, NaN for NaN; as `make_log1p` otherwise.

    Maximum error: 2.51 ulp on (0, 1] in float32, 2.8 in float64.
    """
    T = real.scalar
    zero, ln2, minus_infinity = T(0), T(math.log(2)), T(-np.inf)
    split = _make_split(real)
    series = _horner(tuple(T(2 / (2 * k + 1)) for k in range(real.atanh_terms)))

    @inlined
    def log(u):  # type: ignore[no-untyped-def]
        n, s = split(u)
        value = fma(s, series(s * s), fma(n, ln2, zero * u))
        return minus_infinity if u == zero else value

    return log
