"""The elementary functions and the conversions, number by number, against exact values.

An error is measured in units in the last place (ulp) of the exact value. float32 is swept with a
prime stride through all bit patterns of a range, and without a stride (every float32) in the tests
marked slow; the bounds are just above what the full sweep gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import mpmath
import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

import fastseg as fs
from fastseg_kernels.cpu.conversions import convert_kernel
from fastseg_kernels.cpu.elementary import (
    FLOAT32,
    FLOAT64,
    make_exp_negative,
    make_exp_ratio,
    make_log,
    make_log1p,
)
from fastseg_kernels.cpu.intrinsics import bits_of, fma, from_bits
from fastseg_kernels.cpu.point_parts import Coefficients, Settings
from fastseg_kernels.cpu.points import make_point
from fastseg_kernels.cpu.variants import Variant

STRIDE = 521
"""Prime; 2 to 4 million of the float32 of a range."""
CHUNK = 1 << 20
strides = pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=pytest.mark.slow)])

# exp(-a) is 0 from here on, where the exact value is subnormal.
EXP_ZERO = {"float32": 126.5 * np.log(2.0), "float64": 1022.5 * np.log(2.0)}


@cache
def looped(function: Any) -> Callable[[np.ndarray, np.ndarray], None]:
    @njit(nogil=True, error_model="numpy")
    def loop(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    return loop


def apply(function: Any, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    looped(function)(x, out)
    return out


def error_ulp(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return the error of float32 results against exact float64 ones."""
    unit = np.maximum(np.spacing(np.abs(exact)) * 2.0**29, 2.0**-149)
    return np.abs(got.astype(np.float64) - exact) / unit


def all_float32(first: float, last: float, stride: int) -> list[range]:
    """Return the bit patterns from ``first`` away from 0 to ``last``, in chunks."""
    start, stop = (int(np.float32(x).view(np.uint32)) for x in (first, last))
    step = CHUNK * stride
    return [range(k, min(k + step, stop + 1), stride) for k in range(start, stop + 1, step)]


def as_float32(bits: range) -> np.ndarray:
    return np.arange(bits.start, bits.stop, bits.step, dtype=np.uint32).view(np.float32)


def largest_over(chunks: list[range], measure: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Return (largest value, where it is) of ``measure`` over chunks of float32."""

    def largest(bits: range) -> tuple[float, float]:
        x = as_float32(bits)
        with np.errstate(all="ignore"):
            values = measure(x)
        values = np.where(np.isnan(values), np.inf, values)
        k = int(np.argmax(values))
        return float(values[k]), float(x[k])

    measure(as_float32(chunks[0][:1]))  # compile before there are threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return max(pool.map(largest, chunks))


def largest_error(
    function: Any, exact: Callable[..., Any], first: float, last: float, stride: int
) -> tuple[float, float]:
    def measure(x: np.ndarray) -> np.ndarray:
        return error_ulp(apply(function, x), exact(x.astype(np.float64)))

    return largest_over(all_float32(first, last, stride), measure)


class Case(NamedTuple):
    """An elementary function, its exact value and its largest error on [first, last]."""

    make: Callable[[Any], Any]
    exact: Callable[..., Any]
    first: float
    last: float
    float32: float
    float64: float


# The docstrings of elementary.py repeat the bounds.
CASES = {
    "exp_negative": Case(make_exp_negative, lambda a: np.exp(-a), 0.0, 87.683, 0.89, 1.01),
    "log1p above 0": Case(make_log1p, np.log1p, 0.0, 65535.0, 3.16, 3.6),
    "log1p below 0": Case(make_log1p, np.log1p, -0.0, -(1 - 2.0**-24), 3.16, 3.6),
    "log": Case(make_log, np.log, 2.0**-149, 1.0, 2.51, 2.8),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
made = cache(lambda make, real: make(real))


@strides
@each_case
def test_float32_error_is_at_most_as_stated(case, stride):
    got = largest_error(
        made(case.make, FLOAT32), case.exact, np.float32(case.first), np.float32(case.last), stride
    )
    assert got[0] <= case.float32, got


def float64_points(case: Case, count: int) -> np.ndarray:
    """Return random points of every magnitude in the case's range, and its edges."""
    rng = np.random.default_rng(5)
    negative = bool(np.signbit(case.first))
    last = EXP_ZERO["float64"] - 1e-9 if case.make is make_exp_negative else abs(case.last)
    last = 1 - 2.0**-53 if negative else last
    smallest = 1 if case.make is make_log else 0
    stop = int(np.float64(last).view(np.int64))
    x = np.concatenate(
        [
            rng.integers(smallest, stop, count, endpoint=True).view(np.float64),  # any magnitude
            rng.uniform(0.0, last, count),
            np.clip(rng.normal(1.0, 0.3, count), 0.0, last),
            np.clip(np.exp(rng.uniform(-40.0, 6.0, count)), 0.0, last),
            np.clip(1 - np.exp(rng.uniform(-36.0, 0.0, count)), 0.0, last),
            np.clip(np.exp2(np.arange(-1074.0, 10.0)), 0.0, last),
            [last, 0.5**0.5, 2**0.5 - 1, 1 - 0.5**0.5, 2.0**-1022, 2.0**-1074],
        ]
    )
    x = np.maximum(x, 2.0**-1074) if smallest else x
    return -x if negative else x


MPMATH = {
    make_exp_negative: lambda a: mpmath.exp(-a),
    make_log1p: lambda s: mpmath.log1p(s),
    make_log: lambda u: mpmath.log(u),
}


def mpmath_error(got: np.ndarray, x: np.ndarray, exact: Callable[..., Any]) -> float:
    """Return the largest error of float64 results, in ulp."""
    worst = 0.0
    with mpmath.workprec(160):
        for y, value in zip(got.tolist(), x.tolist(), strict=True):
            wanted = exact(mpmath.mpf(value))
            if wanted == 0:
                assert y == 0.0
                continue
            unit = mpmath.ldexp(1, max(mpmath.frexp(wanted)[1] - 53, -1074))
            worst = max(worst, float(abs(mpmath.mpf(y) - wanted) / unit))
    return worst


@each_case
def test_float64_error_is_at_most_as_stated(case):
    x = float64_points(case, 2000)
    assert mpmath_error(apply(made(case.make, FLOAT64), x), x, MPMATH[case.make]) <= case.float64


@pytest.mark.slow
@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no longer than that")
@each_case
def test_float64_error_is_at_most_as_stated_at_many_points(case):
    x = float64_points(case, 20_000_000)
    got = apply(made(case.make, FLOAT64), x)
    worst = 0.0
    for part in np.array_split(np.arange(x.size), 200):
        exact = case.exact(x[part].astype(np.longdouble))
        size = np.abs(exact.astype(np.float64))
        # Rounded to float64 a value just below a power of 2 has twice its spacing.
        size = np.where(size > np.abs(exact), np.nextafter(size, 0.0), size)
        unit = np.maximum(np.spacing(size), 2.0**-1074)
        worst = max(worst, float((np.abs(got[part].astype(np.longdouble) - exact) / unit).max()))
    assert worst <= case.float64, worst


@pytest.mark.parametrize("real", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_exp_negative_of_special_values(real):
    T, limits = real.scalar, np.finfo(real.scalar)
    x = np.array([0, limits.smallest_subnormal, limits.tiny, limits.max, np.inf, np.nan], T)
    got = apply(made(make_exp_negative, real), x)
    np.testing.assert_array_equal(got, np.array([1, 1, 1, 0, 0, np.nan], T))


@pytest.mark.parametrize("real", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_exp_ratio_errs_as_exp_does_however_large_its_argument(real):
    """exp(x) over a power of two near exp(m): no rounding of x - m is in it."""
    T = real.scalar
    reference_of, exp_ratio = make_exp_ratio(real)

    @njit(error_model="numpy")
    def ratios(x, m, out, references):
        for i in range(x.size):
            references[i] = reference_of(m[i])
            out[i] = exp_ratio(x[i], references[i])

    rng = np.random.default_rng(0)
    size = 200_000 if T is np.float32 else 2000
    m = rng.uniform(-256, 256, size).astype(T)
    x = (m - rng.uniform(0, 80, size).astype(T)).astype(T)
    x[:9] = m[:9]
    got, references = np.empty_like(x), np.empty(size, real.integer)
    ratios(x, m, got, references)
    rounder = np.array(1.5 * 2.0**real.fraction_bits, T).view(real.integer)
    powers = references.astype(np.int64) + real.exponent_bias - int(rounder)
    assert (np.abs(powers - m.astype(np.float64) / np.log(2.0)) < 0.5001).all()
    with mpmath.workdps(40):
        exact = [mpmath.exp(mpmath.mpf(float(a))) / mpmath.mpf(2) ** int(n)
                 for a, n in zip(x[:2000], powers[:2000], strict=True)]  # fmt: skip
    unit = np.array([float(mpmath.mpf(2) ** (int(mpmath.floor(mpmath.log(v, 2)))
                     - real.fraction_bits)) for v in exact])  # fmt: skip
    errors = np.array([float(abs(mpmath.mpf(float(g)) - v))
                       for g, v in zip(got[:2000], exact, strict=True)]) / unit  # fmt: skip
    assert errors.max() <= 1.05
    if T is np.float32:
        wide = np.exp(x.astype(np.float64) - powers * np.log(2.0))
        assert error_ulp(got, wide).max() <= 1.05
    assert (got[:9] >= 0.7).all() and (got[:9] <= 1.42).all()
    ratios(np.array([-2048.0, np.nan], T), np.zeros(2, T), got[:2], references[:2])
    np.testing.assert_array_equal(got[:2], np.array([0, np.nan], T))


@strides
def test_exp_negative_is_zero_beyond_the_normal_range(stride):
    exp_negative = made(make_exp_negative, FLOAT32)
    chunks = all_float32(EXP_ZERO["float32"] + 1e-4, np.inf, stride)
    assert largest_over(chunks, lambda x: np.abs(apply(exp_negative, x)))[0] == 0.0


def test_exp_negative_becomes_zero_where_stated():
    for real in (FLOAT32, FLOAT64):
        edge = EXP_ZERO[np.dtype(real.scalar).name]
        x = np.array([edge - 1e-3, edge + 1e-3], real.scalar)
        below, above = apply(made(make_exp_negative, real), x)
        assert 0 < below < np.finfo(real.scalar).tiny
        assert above == 0


@pytest.mark.parametrize("real", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_logarithms_of_special_values(real):
    T, limits = real.scalar, np.finfo(real.scalar)
    tiny, eps = limits.smallest_subnormal, limits.eps
    x = np.array([0, -0.0, limits.tiny, -limits.tiny, eps / 4, np.nan, tiny, -tiny], T)
    got = apply(made(make_log1p, real), x)
    np.testing.assert_array_equal(got[:6], x[:6])  # nothing is lost of what is small
    np.testing.assert_allclose(got[6:], 0, atol=tiny)
    x = np.array([0, -0.0, 1, tiny, np.nan], T)
    got = apply(made(make_log, real), x)
    expected = np.array([-np.inf, -np.inf, 0, np.log(np.longdouble(tiny)), np.nan], T)
    np.testing.assert_allclose(got, expected, rtol=eps, equal_nan=True)
    np.testing.assert_array_equal(got[:3], expected[:3])


@pytest.mark.parametrize("real", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@each_case
def test_vectorised_and_scalar_loops_give_the_same_bits(case, real):
    x = float64_points(case, 100).astype(real.scalar)
    function = made(case.make, real)
    one_by_one = np.concatenate([apply(function, x[k : k + 1]) for k in range(x.size)])
    np.testing.assert_array_equal(apply(function, x), one_by_one)


# Sigmoid


def logistic(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


@strides
@pytest.mark.parametrize(("first", "last"), [(0.0, np.inf), (-0.0, -87.683)])
def test_sigmoid_float32_error_is_at_most_3_ulp(first, last, stride):
    chunks = all_float32(first, last, stride)
    got = largest_over(chunks, lambda x: error_ulp(fs.sigmoid(x), logistic(x.astype(np.float64))))
    assert got[0] <= 2.83, got


def test_sigmoid_float64_error_is_at_most_3_ulp():
    x = np.concatenate([np.random.default_rng(0).normal(0, 5, 4000), np.linspace(-708.7, 40, 999)])
    worst = mpmath_error(fs.sigmoid(x), x, lambda v: 1 / (1 + mpmath.exp(-v)))
    assert worst <= 3.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_sigmoid_of_special_values(dtype):
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e4, -1e4]).astype(dtype)
    expected = np.array([0.5, 0.5, 1, 0, np.nan, 1, 0])
    np.testing.assert_array_equal(fs.sigmoid(x).astype(np.float64), expected)


# The point functions, with hard targets: every logit is on one side of a certain answer


def softplus(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def make_quantity(kind: str, target: int, quantity: str) -> Any:
    """Return a function of x for one quantity of a voxel with ``target``."""
    point = make_point(
        Variant("float32", kind, "sigmoid", frozenset({"overlap", "bce_split"})), FLOAT32
    )
    sums_of, log_sum, slope = point.sums_of, point.log_sum, point.slope
    masses_of = point.masses_of
    T = np.float32
    p = np.uint8(target) if kind == "binary" else T(target)
    zero, one = T(0), T(1)
    of_region = Coefficients(one, one, *(zero,) * 10)
    of_bce = Coefficients(zero, zero, one, one, *(zero,) * 8)
    settings = Settings(zero, zero)
    if quantity == "q (1 - q)":
        return njit(error_model="numpy")(lambda x: slope(x, p, zero, of_region))
    if quantity == "gradient of BCE":
        return njit(error_model="numpy")(lambda x: abs(slope(x, p, zero, of_bce)))
    if quantity == "mass":

        @njit(error_model="numpy")
        def mass(x):
            got = sums_of(x, p, zero, masses_of(x), settings)
            return got.missed + got.false_alarm

        return mass

    @njit(error_model="numpy")
    def bce(x):
        got = sums_of(x, p, zero, masses_of(x), settings)
        return log_sum(got.product_pos, got.bce_pos) + log_sum(got.product_neg, got.bce_neg)

    return bce


def spread(z: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(z))
    return e / (1 + e) ** 2


# z is x, turned so that positive is the wrong side.
QUANTITIES = {
    "q (1 - q)": (spread, 2.41),
    "gradient of BCE": (logistic, 2.01),
    "mass": (logistic, 2.01),
    "BCE": (softplus, 3.67),
}


@strides
@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("kind", ["binary", "soft"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_point_error_is_at_most_as_stated(quantity, kind, target, stride):
    exact, bound = QUANTITIES[quantity]
    function = make_quantity(kind, target, quantity)
    for first, last in ((0.0, 87.683), (-0.0, -87.683)):
        got = largest_error(function, lambda x: exact(-x if target else x), first, last, stride)
        assert got[0] <= bound, got


@pytest.mark.parametrize("kind", ["binary", "soft"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_point_keeps_nan_and_is_zero_where_the_network_is_sure_and_right(quantity, kind):
    for target in (0, 1):
        x = np.array([np.nan, 1000.0, np.inf], np.float32)
        got = apply(make_quantity(kind, target, quantity), x if target else -x)
        np.testing.assert_array_equal(got, np.array([np.nan, 0.0, 0.0], np.float32))


# Conversions


def widened(values: np.ndarray, real: Any) -> np.ndarray:
    out = np.empty(values.shape, real.scalar)
    convert = convert_kernel(values.dtype.name, out.dtype.name)
    convert.call(values.ctypes.data, values.size, out.ctypes.data)
    return out


def narrowed(values: np.ndarray, dtype: Any) -> np.ndarray:
    out = np.empty(values.shape, dtype)
    convert = convert_kernel("float32", out.dtype.name)
    convert.call(values.ctypes.data, values.size, out.ctypes.data)
    return out


HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@each_half
@pytest.mark.parametrize("real", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_widening_is_exact_for_every_pattern(dtype, real):
    values = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN
        got, expected = widened(values, real), values.astype(real.scalar)
    np.testing.assert_array_equal(got, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


def wrong_roundings(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Tell which float32 are not rounded to the bits that NumPy and ml_dtypes round them to."""
    got, expected = narrowed(x, dtype), x.astype(dtype)
    different = got.view(np.uint16) != expected.view(np.uint16)
    return np.where(np.isnan(x), ~np.isnan(got.astype(np.float32)), different)


@strides
@each_half
def test_narrowing_rounds_as_numpy_does(dtype, stride):
    chunks = all_float32(0.0, -np.nan, stride)  # all patterns up to the last NaN
    assert sum(map(len, chunks)) > 0.99 * 2**32 / stride
    assert largest_over(chunks, lambda x: wrong_roundings(x, dtype).astype(float))[0] == 0.0


@each_half
def test_narrowing_rounds_ties_to_even(dtype):
    """Half way between two neighbours, and one float32 to either side of it, for all of them."""
    patterns = np.arange(65535, dtype=np.uint16)
    with np.errstate(all="ignore"):
        low, high = (p.view(dtype).astype(np.float64) for p in (patterns, patterns + np.uint16(1)))
        middle = (low + high) / 2
        keep = np.isfinite(middle) & (np.signbit(low) == np.signbit(high))
        middle, even = middle[keep], np.where(patterns % 2 == 0, patterns, patterns + 1)[keep]
        ties = middle.astype(np.float32)
        assert np.array_equal(ties.astype(np.float64), middle)  # float32 holds every tie
        np.testing.assert_array_equal(narrowed(ties, dtype).view(np.uint16), even)
        for side in (np.inf, -np.inf):
            assert not wrong_roundings(np.nextafter(ties, np.float32(side)), dtype).any()


@each_half
def test_narrowing_overflows_to_infinity(dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    step = largest - float(np.nextafter(np.array(largest, dtype), np.array(0, dtype)))
    edge = np.float32(largest + step / 2) if dtype == np.float16 else np.float32(np.inf)
    x = np.array([largest, np.nextafter(edge, np.float32(0)), edge, 3.4028235e38, np.inf], "f4")
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    assert np.isfinite(expected[0].astype(np.float32))
    assert np.isinf(expected[2:].astype(np.float32)).all()
    for sign in (1, -1):
        got = narrowed(sign * x, dtype).astype(np.float32)
        np.testing.assert_array_equal(got, sign * expected.astype(np.float32))


@each_half
def test_narrowing_keeps_every_nan(dtype):
    """Also those whose set bits are all among the ones that are cut off."""
    payload = np.array([1, 0x1FFF, 0xFFFF, 0x10000, 0x400000, 0x7FFFFF], np.uint32)
    x = np.concatenate([payload | np.uint32(0x7F800000), payload | np.uint32(0xFF800000)])
    assert np.isnan(narrowed(x.view(np.float32), dtype).astype(np.float32)).all()


# The instructions underneath


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (bits_of, (np.int32(1),)),
        (bits_of, (np.uint64(1),)),
        (bits_of, (True,)),
        (from_bits, (np.uint32(1),)),
        (from_bits, (np.int16(1),)),
        (from_bits, (np.uint64(1),)),
        (from_bits, (np.float32(1),)),
        (fma, (np.float32(1), np.float32(1), np.float64(1))),
        (fma, (np.float64(1), np.float32(1), np.float64(1))),
        (fma, (np.int64(1), np.int64(1), np.int64(1))),
        (fma, (np.float32(1), np.float32(1), np.int32(1))),
    ],
    ids=lambda value: (
        getattr(value, "__name__", None) or ", ".join(type(item).__name__ for item in value)
    ),
)
def test_intrinsics_refuse_other_types(function, arguments):
    if len(arguments) == 1:
        compiled = njit(lambda x: function(x))
    else:
        compiled = njit(lambda a, b, c: function(a, b, c))
    with pytest.raises(TypingError, match=r"(bits_of|from_bits|fma) takes .*, got "):
        compiled(*arguments)


@pytest.mark.parametrize(("T", "I"), [(np.float32, np.int32), (np.float64, np.int64)])
def test_bits_survive_the_round_trip(T, I):  # noqa: E741
    x = np.array([0.0, -0.0, 1.5, -np.inf, 2.0 ** (-149 if T is np.float32 else -1074)], T)
    bits = np.empty(x.shape, I)
    looped(njit(lambda v: bits_of(v)))(x, bits)
    np.testing.assert_array_equal(bits, x.view(I))
    back = np.empty_like(x)
    looped(njit(lambda v: from_bits(v)))(bits, back)
    np.testing.assert_array_equal(back.view(I), x.view(I))


@pytest.mark.parametrize("T", [np.float32, np.float64])
def test_fma_rounds_once(T):
    """(1 + eps) (1 - eps) - 1 is -eps^2, of which two roundings leave nothing."""
    eps = np.finfo(T).eps
    got = njit(lambda a, b, c: fma(a, b, c))(T(1) + eps, T(1) - eps, T(-1))
    assert got == -eps * eps
