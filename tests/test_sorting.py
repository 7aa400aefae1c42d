"""Sorted Lovasz weights against the reference: data, shapes, levels and threads.

Levels beyond the first begin with 65536 elements in a bucket. `shallow` lets them begin with 48, so
that arrays of a few thousand elements go through several.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import fastseg as fs
from fastseg_kernels import reference as ref
from fastseg_kernels.cpu import sorting

# A weight is one or two quotients of integers in float64; a slope is rounded once to the dtype.
SLOPE = {
    "float32": {"rtol": 2.0**-24 * 1.001, "atol": 1e-45},
    "float64": {"rtol": 2e-15, "atol": 0},
}
VALUE = {"rtol": 1e-12, "atol": 0}  # the order of 1e5 positive terms
DTYPES = ("float32", "float64")
Data = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]


def hinge(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.maximum(1 - 2 * rng.normal(size=shape), 0)


def mostly_one(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return errors of which most are 1 and others within a few units in the last place of it."""
    near = 1 + rng.integers(-9, 10, shape) * 2.0**-23
    return np.where(rng.random(shape) < 0.6, 1.0, np.where(rng.random(shape) < 0.7, near, 3.0))


def nested(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return errors that crowd at 1 on every scale: a few are left behind on each level."""
    return 1 + 2.0 ** -rng.integers(0, 53, shape).astype(float) * rng.random(shape)


DATA: dict[str, Data] = {
    "hinge": hinge,
    "softmax": lambda rng, shape: 1 / (1 + np.exp(4 * rng.normal(size=shape) + 6)),
    "tied": lambda rng, shape: np.round(hinge(rng, shape) * 8) / 8,
    "constant": lambda rng, shape: np.full(shape, 0.75),
    "two": lambda rng, shape: rng.choice([0.5, np.nextafter(0.5, 1, dtype=np.float32)], shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "few": lambda rng, shape: np.where(rng.random(shape) < 0.01, hinge(rng, shape), 0),
    "sorted": lambda rng, shape: np.sort(hinge(rng, shape), axis=-1),
    "wide": lambda rng, shape: 2.0 ** rng.uniform(-148, 127, shape),
    "infinite": lambda rng, shape: np.where(rng.random(shape) < 0.3, np.inf, hinge(rng, shape)),
    "mostly_one": mostly_one,
    "nested": nested,
}
LABELS = {"some": 0.3, "none": 0.0, "all": 1.0}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240301)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = ("SMALL", 0), ("SHORTEST_BLOCK", 300), ("LONGEST_BLOCK", 700)
    for name, value in (*constants, ("LARGEST_BUCKET", 48), ("BUCKET_LENGTH", 16)):
        monkeypatch.setattr(sorting, name, value)


def signed(magnitudes: NDArray[np.float64], positive: NDArray[np.bool_], dtype: str) -> NDArray:
    return np.where(positive, -magnitudes, magnitudes).astype(dtype)


def expected_of(
    errors: NDArray, foreground: NDArray, batch: bool, factors: NDArray
) -> tuple[NDArray[np.float64], NDArray]:
    """Return values and slopes by the reference, of which a NaN is no part."""
    N, C, _ = errors.shape
    of_group = [slice(0, N)] if batch else [slice(n, n + 1) for n in range(N)]
    values, slopes = np.zeros((len(of_group), C)), np.zeros(errors.shape)
    for g, samples in enumerate(of_group):
        for c in range(C):
            e = errors[samples, c].ravel().astype(np.float64)
            positive = np.signbit(e)
            kept = np.flatnonzero(~np.isnan(e) & (e != 0))
            # foreground without an error stands at the end, where it changes P alone
            rest = int(foreground[samples, c].sum() - np.sum(positive[kept]))
            every = np.concatenate([np.abs(e[kept]), np.zeros(rest)])
            labels = np.concatenate([positive[kept], np.ones(rest, bool)])
            values[g, c], weights = ref.lovasz_extension(every, labels)
            of_row = np.repeat(factors[samples, c], errors.shape[2])
            s = np.where(np.isnan(e), np.nan, 0.0)
            with np.errstate(invalid="ignore"):
                s[kept] = weights[: kept.size] * np.where(positive, -1, 1)[kept] * of_row[kept]
            slopes[samples, c] = s.reshape(-1, errors.shape[2])
            if np.isnan(e).any():
                values[g, c] = np.nan
    return values, slopes.astype(errors.dtype)


def check(errors: NDArray, foreground: NDArray, batch: bool, factors: NDArray) -> None:
    values, slopes = expected_of(errors, foreground, batch, factors)
    got, only_values = errors.copy(), errors.copy()
    got_values = sorting.weigh(got, foreground, batch, factors)
    np.testing.assert_allclose(got_values, values, **VALUE)
    np.testing.assert_allclose(got, slopes, **SLOPE[errors.dtype.name])
    got_values_alone = sorting.weigh(only_values, foreground, batch)
    # bit by bit, but for short rows with factors of their own, which are sorted as float64
    np.testing.assert_allclose(got_values_alone, got_values, rtol=1e-14 if batch else 0)
    assert got_values.dtype == np.float64 and got_values.shape == values.shape
    assert not np.signbit(got[errors == 0]).any()


def make(
    rng: np.random.Generator, data: str, shape: tuple[int, int, int], dtype: str, share: float = 0.3
) -> tuple[NDArray, NDArray, NDArray]:
    """Return errors, P and factors, which differ from row to row and may be negative."""
    positive = rng.random(shape) < share
    errors = signed(DATA[data](rng, shape), positive, dtype)
    return errors, positive.sum(axis=-1).astype(float), rng.normal(size=shape[:2])


def check_made(case: tuple[NDArray, NDArray, NDArray], batch: bool) -> None:
    errors, foreground, factors = case
    check(errors, foreground, batch, factors)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("data", DATA)
def test_weigh_equals_the_reference_when_small(data, share, dtype, batch, rng):
    for V in (1, 2, 25, 331):
        check_made(make(rng, data, (2, 3, V), dtype, share), batch=batch)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("data", DATA)
def test_weigh_equals_the_reference_on_several_levels(data, share, dtype, batch, rng, shallow):
    check_made(make(rng, data, (2, 2, 5003), dtype, share), batch=batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["hinge", "tied", "constant", "mostly_one", "few", "nested"])
def test_weigh_equals_the_reference_when_large(data, dtype, rng):
    check_made(make(rng, data, (1, 1, 300_007), dtype), batch=False)


@pytest.mark.parametrize("V", [1, 299, 300, 301, 599, 600, 601, 1023, 1024, 1025, 2049])
def test_weigh_at_the_borders_of_blocks_and_chunks(V, rng, shallow):
    check_made(make(rng, "hinge", (3, 1, V), "float32"), batch=False)
    check_made(make(rng, "hinge", (3, 1, V), "float32"), batch=True)


@pytest.mark.parametrize("V", [sorting.SMALL - 1, sorting.SMALL, sorting.SMALL + 1, 65537])
def test_weigh_at_the_borders_of_small_groups(V, rng):
    check_made(make(rng, "hinge", (1, 2, V), "float32"), batch=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["hinge", "constant", "mostly_one", "infinite", "zero"])
@pytest.mark.parametrize("shape", [(401, 2, 7), (9, 1, 299), (2, 2, 301), (5, 3, 149)])
def test_rows_that_are_shorter_than_a_block(shape, data, dtype, rng, shallow):
    errors, foreground, factors = make(rng, data, shape, dtype)
    check(errors, foreground, True, factors)
    check(errors, foreground, True, np.broadcast_to(factors[0], factors.shape).copy())
    errors[3 % shape[0], :, :2] = np.nan
    check(errors, foreground, True, factors)


def test_tables_of_short_rows_are_not_larger_than_the_rows(rng):
    for factors in (np.ones((20_000, 1)), rng.normal(size=(20_000, 1))):
        errors, foreground, _ = make(rng, "hinge", (20_000, 1, 10), "float32")
        tracemalloc.start()
        sorting.weigh(errors, foreground, True, factors)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 45 * errors.size  # scratch of a thread and runs are much of it here


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
@pytest.mark.parametrize("batch", [False, True])
def test_weigh_of_nothing_is_zero(shape, batch):
    values = sorting.weigh(np.empty(shape, np.float32), np.zeros(shape[:2]), batch)
    np.testing.assert_array_equal(values, np.zeros((1 if batch else shape[0], shape[1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["hinge", "constant", "zero", "mostly_one"])
@pytest.mark.parametrize("V", [40, 4001])
def test_nan_is_no_part_of_the_others(V, data, dtype, rng, shallow, monkeypatch):
    for small in (0, sorting.LARGEST_BUCKET * 1000):
        monkeypatch.setattr(sorting, "SMALL", small)
        errors, foreground, factors = make(rng, data, (3, 1, V), dtype)
        errors[0, 0, [0, 7, V - 1]] = np.nan, -np.nan, np.nan
        errors[1] = np.nan
        for batch in (False, True):
            check(errors, foreground, batch, factors)
    assert not np.isnan(sorting.weigh(errors.copy(), foreground, False)[2, 0])


def test_foreground_without_an_error_counts(rng, shallow):
    errors, foreground, factors = make(rng, "hinge", (2, 1, 3001), "float64")
    check(errors, foreground + 1000, False, factors)
    errors[:] = np.abs(errors)  # all of the foreground is right
    check(errors, np.full((2, 1), 1000.0), True, factors)


def test_zeros_of_both_signs_stay_out(rng):
    errors = np.array([[[0.0, -0.0, 0.5, -0.25]]])
    values = sorting.weigh(errors, np.array([[1.0]]), False, np.array([[np.inf]]))
    np.testing.assert_allclose(values, [[0.5 * 0.5 + 0.25 * 0.5]])
    np.testing.assert_array_equal(errors, [[[0.0, 0.0, np.inf, -np.inf]]])


@pytest.mark.parametrize("with_slopes", [False, True])
@pytest.mark.parametrize("data", ["hinge", "mostly_one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, data, with_slopes, rng, threads):
    errors, foreground, factors = make(rng, data, (2, 1, 200_003), dtype)
    results = []
    for count in (1, 2, 3, 2):
        fs.set_num_threads(count)
        got = errors.copy()
        values = sorting.weigh(got, foreground, False, factors if with_slopes else None)
        results.append(values.tobytes() + (got.tobytes() if with_slopes else b""))
    assert len(set(results)) == 1


def test_many_small_groups_equal_each_alone(rng, threads):
    errors, foreground, factors = make(rng, "hinge", (500, 2, 101), "float32")
    fs.set_num_threads(3)
    got = errors.copy()
    values = sorting.weigh(got, foreground, False, factors)
    for n in (0, 1, 250, 499):
        alone = errors[n : n + 1].copy()
        here = slice(n, n + 1)
        value = sorting.weigh(alone, foreground[here], False, factors[here])
        np.testing.assert_array_equal(value, values[here])
        np.testing.assert_array_equal(alone, got[here])


def test_order_within_equal_errors_does_not_matter(rng, shallow):
    errors, foreground, factors = make(rng, "tied", (1, 1, 4001), "float32")
    order = rng.permutation(4001)
    got, permuted = errors.copy(), errors[:, :, order].copy()
    np.testing.assert_array_equal(
        sorting.weigh(got, foreground, False, factors),
        sorting.weigh(permuted, foreground, False, factors),
    )
    np.testing.assert_array_equal(got[:, :, order], permuted)


def test_levels_are_reached(rng, shallow, monkeypatch):
    """The tests above would pass as well if no bucket were ever too large."""
    depths = []
    solve = sorting._weigh

    def deeper(level, real, slopes):
        depths.append(0)
        depth = len(depths)
        values = solve(level, real, slopes)
        reached.append(depth)
        depths.pop()
        return values

    reached: list[int] = []
    monkeypatch.setattr(sorting, "_weigh", deeper)
    errors, foreground, _ = make(rng, "nested", (1, 1, 20_000), "float64")
    sorting.weigh(errors, foreground, False)
    assert 3 <= max(reached) <= 7


def test_too_large_a_group_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sorting, "MOST_ELEMENTS", 19)
    errors, foreground = np.ones((2, 1, 10)), np.zeros((2, 1))
    sorting.weigh(errors, foreground, False)
    with pytest.raises(ValueError, match=r"at most 19 voxels, got 20: count its errors in bins"):
        sorting.weigh(errors, foreground, True)
