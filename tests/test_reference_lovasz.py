"""The reference of the Lovász losses against rational arithmetic, Berman's and brute force.

Rational arithmetic covers every arrangement of up to six voxels, ties included. Berman's algorithm
is restated in PyTorch, whose autograd differentiates it, on data without ties.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastseg_kernels import reference as ref

WEIGHT = {"rtol": 1e-15, "atol": 0}  # a few roundings of a quotient of integers
VALUE = {"rtol": 1e-13, "atol": 1e-15}  # sums of ~100 terms; Berman's differences of J cancel
GRADIENT = {"rtol": 1e-10, "atol": 1e-14}  # the differences of J in the weights themselves
ROUNDING = 1e-12  # of the sums in a bound, relative to the largest of them
HALF = Fraction(1, 2)


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


def arrangements(size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield every sequence of groups (n1, n0) with this number of voxels in all."""
    if size == 0:
        yield []
    for count in range(1, size + 1):
        for n1 in range(count + 1):
            for rest in arrangements(size - count):
                yield [(n1, count - n1), *rest]


def row_of(groups: list[tuple[int, int]]) -> tuple[list[float], list[bool]]:
    """Return errors and foreground of groups, the first with the largest error."""
    errors, foreground = [], []
    for k, (n1, n0) in enumerate(groups):
        errors += [float(len(groups) - k)] * (n1 + n0)
        foreground += [True] * n1 + [False] * n0
    return errors, foreground


SMALL = [row_of(groups) for size in range(1, 7) for groups in arrangements(size)]


def loss_of_set(members: tuple[int, ...], foreground: list[bool]) -> Fraction:
    """Return 1 - |A and B| / |A or B| of the mask that is wrong at the members and right else."""
    predicted = {i for i, t in enumerate(foreground) if t != (i in members)}
    truth = {i for i, t in enumerate(foreground) if t}
    if not predicted | truth:
        return Fraction(0)
    return 1 - Fraction(len(predicted & truth), len(predicted | truth))


def test_small_rows_cover_ties_and_rows_of_one_class():
    assert len(SMALL) == 2 + 7 + 24 + 82 + 280 + 956
    assert sum(not any(t) for _, t in SMALL) == sum(all(t) for _, t in SMALL) == 63


def test_jaccard_loss_of_counts_equals_that_of_masks():
    for n1, n0 in itertools.product(range(4), repeat=2):
        foreground = [True] * n1 + [False] * n0
        for f, b in itertools.product(range(n1 + 1), range(n0 + 1)):
            members = (*range(f), *range(n1, n1 + b))
            got = ref.jaccard_loss_of_counts(f, b, n1)
            assert got == float(loss_of_set(members, foreground))


def test_lovasz_weights_equal_rational_arithmetic():
    for errors, foreground in SMALL:
        expected = [float(w) for w in ref.lovasz_weights_exact(errors, foreground)]
        got = ref.lovasz_weights(errors, foreground)
        np.testing.assert_allclose(got, expected, **WEIGHT)


def test_lovasz_weights_exact_are_a_subgradient():
    # Exactly the points below the loss on every set, and equal on those of the largest errors
    for errors, foreground in SMALL:
        weights, n = ref.lovasz_weights_exact(errors, foreground), len(errors)
        assert sum(weights) == 1
        for size in range(1, n + 1):
            for members in itertools.combinations(range(n), size):
                total = sum(weights[i] for i in members)
                loss = loss_of_set(members, foreground)
                rest = [errors[i] for i in range(n) if i not in members]
                if not rest or min(errors[i] for i in members) > max(rest):
                    assert total == loss
                assert total <= loss


def test_lovasz_weights_exact_without_ties_are_differences_of_the_loss():
    for foreground in itertools.product([False, True], repeat=5):
        got = ref.lovasz_weights_exact([5.0, 4.0, 3.0, 2.0, 1.0], foreground)
        losses = [loss_of_set(tuple(range(k)), list(foreground)) for k in range(6)]
        assert got == [after - before for before, after in itertools.pairwise(losses)]


def test_lovasz_weights_of_ties_are_the_mean_of_the_extreme_orders():
    # P = 4 with one of it before the group: U = 4, I = 3, U' = 7, I' = 1
    errors, foreground = row_of([(1, 0), (2, 3), (1, 0)])
    got = ref.lovasz_weights_exact(errors, foreground)
    of_foreground = HALF * (Fraction(1, 4) + Fraction(1, 7))
    of_background = Fraction(3 + 1, 2 * 4 * 7)
    expected = [Fraction(1, 4)] + 2 * [of_foreground] + 3 * [of_background] + [Fraction(1, 7)]
    assert got == expected


@given(st.data())
def test_group_weights_add_up_to_the_step_of_the_loss(data):
    P = data.draw(st.integers(0, 10**12))
    f = data.draw(st.integers(0, P))
    n1 = data.draw(st.integers(0, P - f))
    b, n0 = data.draw(st.integers(0, 10**12)), data.draw(st.integers(0, 10**12))
    if f + b + n1 + n0 == 0:
        return
    before = Fraction(f + b, P + b) if f + b > 0 else Fraction(0)
    step = Fraction(f + n1 + b + n0, P + b + n0) - before
    of_foreground, of_background = ref.group_weights(f, b, n1, n0, P)
    got = n1 * float(of_foreground) + n0 * float(of_background)
    assert got == pytest.approx(float(step), rel=2e-15, abs=0)


@pytest.mark.parametrize("P", [1, 10**7, 5 * 10**9])
@pytest.mark.parametrize(("left_of", "error"), [(lambda P: 1, 0.01), (lambda P: -(-P // 3), 1e-9)])
def test_group_weights_of_wide_rows_are_not_noise(P, left_of, error):
    b, f = 3 * P + 7, P - left_of(P)
    of_foreground, _ = ref.group_weights(f, b, 1, 0, P)
    _, of_background = ref.group_weights(f, b, 0, 1, P)
    np.testing.assert_allclose(of_foreground, float(Fraction(1, P + b)), **WEIGHT)
    expected = float(Fraction(P - f, (P + b) * (P + b + 1)))
    np.testing.assert_allclose(of_background, expected, **WEIGHT)
    if P > 1:  # the test can tell: what a difference of J makes of it
        J = ref.jaccard_loss_of_counts(f, np.array([b, b + 1]), P)
        assert abs((J[1] - J[0]) / expected - 1) > error


def test_group_weight_bounds_are_the_extremes_over_all_orders():
    for P, b, n1, n0 in itertools.product(range(4), range(4), range(4), range(4)):
        for f in range(P - n1 + 1):
            seen = {True: [], False: []}
            for chosen in itertools.combinations(range(n1 + n0), n1):
                now_f, now_b = f, b
                for k in range(n1 + n0):
                    is_foreground = k in chosen
                    old = Fraction(now_f + now_b, max(P + now_b, 1))
                    now_f, now_b = now_f + is_foreground, now_b + (not is_foreground)
                    seen[is_foreground].append(Fraction(now_f + now_b, P + now_b) - old)
            bounds = ref.group_weight_bounds(f, b, n1, n0, P)
            weights = ref.group_weights(f, b, n1, n0, P)
            for values, (low, high), weight in zip(seen.values(), bounds, weights, strict=True):
                if values:
                    np.testing.assert_allclose(low, float(min(values)), **WEIGHT)
                    np.testing.assert_allclose(high, float(max(values)), **WEIGHT)
                    assert low <= weight * (1 + 1e-15)
                    assert weight <= high * (1 + 1e-15)


def test_lovasz_extension_of_errors_0_and_1_equals_the_jaccard_loss():
    for foreground in itertools.product([False, True], repeat=5):
        for wrong in itertools.product([0.0, 1.0], repeat=5):
            members = tuple(i for i in range(5) if wrong[i])
            expected = float(loss_of_set(members, list(foreground)))
            got, _ = ref.lovasz_extension(wrong, foreground)
            np.testing.assert_allclose(got, expected, rtol=1e-15, atol=1e-16)


def test_lovasz_extension_lies_above_its_tangents(rng):
    # Convexity and the subgradient at once, with ties: errors of four levels
    for _ in range(300):
        foreground = rng.random(9) < rng.random()
        x, y = rng.integers(-1, 3, size=(2, 9)).astype(np.float64)
        (at_x, slope), (at_y, _) = (ref.lovasz_extension(e, foreground) for e in (x, y))
        assert at_y >= at_x + slope @ (y - x) - 1e-14
        middle, _ = ref.lovasz_extension((x + y) / 2, foreground)
        assert middle <= (at_x + at_y) / 2 + 1e-14


def test_lovasz_extension_without_voxels_is_zero():
    value, gradient = ref.lovasz_extension([], [])
    assert value == 0
    assert gradient.shape == (0,)


def test_lovasz_extension_passes_nan_on_and_not_what_has_no_weight():
    value, gradient = ref.lovasz_extension([np.nan, 1.0], [True, False])
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    value, gradient = ref.lovasz_extension([3.0, -np.inf], [False, False])
    assert value == 3
    assert gradient.tolist() == [1, 0]


def test_lovasz_extension_does_not_depend_on_the_order(rng):
    errors, foreground = rng.integers(0, 20, size=200).astype(np.float64), rng.random(200) < 0.3
    value, gradient = ref.lovasz_extension(errors, foreground)
    for _ in range(20):
        order = rng.permutation(200)
        got, got_gradient = ref.lovasz_extension(errors[order], foreground[order])
        np.testing.assert_array_equal(got_gradient, gradient[order])
        np.testing.assert_allclose(got, value, rtol=1e-14)


# Berman's algorithm, from PEERS.md: sorted errors times differences of J


def berman_extension(errors: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    sorted_errors, order = torch.sort(errors, descending=True)
    t = foreground[order].double()
    G = t.sum()
    J = 1 - (G - t.cumsum(0)) / (G + (1 - t).cumsum(0))
    return torch.relu(sorted_errors) @ torch.cat([J[:1], J[1:] - J[:-1]])


def volumes(rng, shape, empty=False):
    """Return logits without ties and binary targets of any share; none in row [0, 0] if empty."""
    targets = rng.random(shape) < rng.random((*shape[:2], *[1] * (len(shape) - 2)))
    if empty:
        targets[0, 0] = False
    return rng.normal(scale=1.5, size=shape), targets.astype(np.float64)


def rows_of(array: np.ndarray, batch: bool) -> list[list[np.ndarray]]:
    """Return the flat rows as [sample or 0][class]."""
    samples = [slice(None)] if batch else [slice(n, n + 1) for n in range(len(array))]
    return [[array[s, c].ravel() for c in range(array.shape[1])] for s in samples]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 11), (2, 3, 5, 4), (1, 2, 3, 2, 3)])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_lovasz_hinge_equals_berman(rng, shape, batch, masked):
    logits, targets = volumes(rng, shape, empty=True)
    valid = np.broadcast_to(rng.random((shape[0], 1, *shape[2:])) < 0.7, shape)
    x = torch.tensor(logits, requires_grad=True)
    errors = 1 - x * (2 * torch.tensor(targets) - 1)
    expected = []
    rows = zip(*(rows_of(a, batch) for a in (errors, targets == 1, valid)), strict=True)
    for row in rows:
        expected.append([])
        for e, t, keep in zip(*row, strict=True):
            keep = torch.tensor(keep if masked else np.ones_like(keep))
            if keep.any():
                expected[-1].append(berman_extension(e[keep], torch.tensor(t)[keep]))
            else:
                expected[-1].append((0 * e).sum())
    expected = torch.stack([torch.stack(row) for row in expected])
    expected.sum().backward()
    got, gradient = ref.lovasz_hinge(logits, targets, valid[:, :1] if masked else None, batch=batch)
    assert got.shape == (1 if batch else shape[0], shape[1])
    np.testing.assert_allclose(got, expected.detach().numpy(), **VALUE)
    np.testing.assert_allclose(gradient, x.grad.numpy(), **GRADIENT)


@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_lovasz_softmax_equals_berman(rng, classes, batch, masked):
    N, C, S = 3, 4, 29
    logits, indices = rng.normal(scale=1.5, size=(N, C, S)), rng.integers(0, C - 1, size=(N, S))
    indices[1] = 0  # class C - 1 is absent; in this sample all but one
    valid = rng.random((N, S)) < 0.7 if masked else np.ones((N, S), bool)
    x = torch.tensor(logits, requires_grad=True)
    probs, losses = torch.softmax(x, 1), []
    for samples in [slice(None)] if batch else [slice(n, n + 1) for n in range(N)]:
        y, keep = torch.tensor(indices[samples]), torch.tensor(valid[samples])
        kept = []
        for c in range(C):
            truth = y[keep] == c
            if truth.any() or classes == "all":
                errors = (truth.double() - probs[samples, c][keep]).abs()
                kept.append(berman_extension(errors, truth))
        losses.append(torch.stack(kept).mean())
    expected = torch.stack(losses).mean()
    expected.backward()

    targets = ref.one_hot(indices, C)
    values, dprobs = ref.lovasz_softmax(logits, targets, valid[:, None], batch=batch)
    assert values.shape == (1 if batch else N, C)
    foreground = (targets * valid[:, None]).sum(axis=2)
    present = (foreground.sum(axis=0, keepdims=True) if batch else foreground) > 0
    weights = present if classes == "present" else np.ones_like(present)
    weights = weights / weights.sum(axis=1, keepdims=True) / len(weights)
    np.testing.assert_allclose((values * weights).sum(), expected.item(), **VALUE)
    gradient = ref.softmax_gradient(dprobs * weights[:, :, None], logits)
    np.testing.assert_allclose(gradient, x.grad.numpy(), **GRADIENT)


@pytest.mark.parametrize("batch", [False, True])
def test_lovasz_gradients_equal_finite_differences(rng, batch):
    logits, targets = volumes(rng, (2, 3, 7))
    onehot = ref.one_hot(rng.integers(0, 3, size=(2, 7)), 3)
    _, hinge = ref.lovasz_hinge(logits, targets, batch=batch)
    _, dprobs = ref.lovasz_softmax(logits, onehot, batch=batch)
    softmax = ref.softmax_gradient(dprobs, logits)
    h = 1e-6  # errors of these seeds are further apart than that, and from 0
    for i in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[i] = h
        for function, p, got in (
            (ref.lovasz_hinge, targets, hinge),
            (ref.lovasz_softmax, onehot, softmax),
        ):
            above, below = (
                function(x, p, batch=batch)[0].sum() for x in (logits + step, logits - step)
            )
            assert got[i] == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-8)


def test_lovasz_hinge_of_a_row_without_foreground_is_its_largest_error(rng):
    logits = rng.normal(size=(2, 3, 50))
    got, gradient = ref.lovasz_hinge(logits, np.zeros_like(logits))
    np.testing.assert_array_equal(got, 1 + logits.max(axis=2))
    assert ((gradient == 1) == (logits == logits.max(axis=2, keepdims=True))).all()
    assert (gradient.sum(axis=2) == 1).all()


def test_lovasz_hinge_has_no_gradient_where_the_margin_is_kept():
    _, gradient = ref.lovasz_hinge([[[1.0, -1.0, 1.5, np.inf, 0.5]]], [[[1, 0, 1, 1, 1]]])
    assert (gradient[..., :4] == 0).all()
    assert gradient[0, 0, 4] == -0.25


@pytest.mark.parametrize("function", [ref.lovasz_hinge, ref.lovasz_softmax])
@pytest.mark.parametrize("batch", [False, True])
def test_lovasz_losses_do_not_read_what_is_not_valid(rng, function, batch):
    logits = rng.normal(size=(2, 3, 8))
    targets = ref.one_hot(rng.integers(0, 3, size=(2, 8)), 3)
    valid = np.ones((2, 1, 8), bool)
    valid[:, :, 3:5] = False
    spoilt, other = logits.copy(), targets.copy()
    spoilt[:, :, 3:5], other[:, :, 3:5] = np.nan, 7
    expected, slopes = function(
        np.delete(logits, [3, 4], axis=2), np.delete(targets, [3, 4], axis=2), batch=batch
    )
    got, gradient = function(spoilt, other, valid, batch=batch)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.delete(gradient, [3, 4], axis=2), slopes)
    assert (gradient[:, :, 3:5] == 0).all()
    got, gradient = function(spoilt, other, np.zeros_like(valid), batch=batch)
    assert (got == 0).all()
    assert (gradient == 0).all()


def test_lovasz_loss_passes_nan_to_its_row_alone(rng):
    logits, targets = volumes(rng, (2, 3, 5))
    logits[1, 2, 0] = np.nan
    got, gradient = ref.lovasz_hinge(logits, targets)
    assert np.isnan(got[1, 2])
    assert np.isnan(gradient[1, 2]).all()
    assert np.isnan(got).sum() == 1
    assert np.isnan(gradient).sum() == 5


def test_lovasz_softmax_keeps_digits_of_confident_predictions():
    # Errors 2 e, e of the class' two voxels, in that order; 1 - q would make both 0
    e = math.exp(-40)
    logits = np.log([[[1.0, 1.0], [2 * e, e]]])
    got, gradient = ref.lovasz_softmax(logits, [[[1, 1], [0, 0]]])
    np.testing.assert_allclose(got, [[1.5 * e, 2 * e]], rtol=1e-14)
    np.testing.assert_array_equal(gradient, [[[-0.5, -0.5], [1, 0]]])


# Histograms


def histogram(errors: np.ndarray, foreground: np.ndarray, edges: np.ndarray) -> tuple:
    """Return lower edges, counts and exact sums of the errors."""
    which = np.searchsorted(edges, errors, side="right") - 1
    assert which.min() >= 0
    columns: list[list[float]] = [[], [], [], []]
    for k in range(len(edges)):
        for column, of_class in ((0, foreground), (1, ~foreground)):
            members = errors[(which == k) & of_class]
            columns[column].append(len(members))
            columns[2 + column].append(math.fsum(members))
    return (edges, *columns)


def rows_for_histograms(rng) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for share in (0.0, 0.002, 0.3, 1.0):
        for draw in (
            lambda: rng.random(500),
            lambda: rng.random(500) ** 8,
            lambda: np.maximum(1 + rng.normal(size=500), 0),
            lambda: np.append(rng.random(499), 1e4),  # an outlier
            lambda: 0.3 + 1e-3 * rng.random(500),  # all in one bin
            lambda: rng.integers(0, 5, size=500) / 4,  # ties, on edges as well
            lambda: rng.random(1),
            lambda: np.zeros(3),
        ):
            errors = draw()
            yield errors, rng.random(errors.size) < share


EDGES = [
    np.array([0.0]),
    np.linspace(0, 1, 8, endpoint=False),
    np.linspace(0, 4, 401),
    np.array([0.0, 0.0, *np.geomspace(1e-6, 1e4, 60)]),
]


@pytest.mark.parametrize("edges", EDGES, ids=len)
def test_lovasz_from_histogram_bounds_the_exact_value(rng, edges):
    for errors, foreground in rows_for_histograms(rng):
        table = histogram(errors, foreground, edges)
        exact, _ = ref.lovasz_extension(errors, foreground)
        value, low, high = ref.lovasz_from_histogram(*table)
        least, largest = ref.lovasz_range_of_histogram(*table)
        rounding = ROUNDING * max(high, 1)
        chain = [low, value, least, exact, largest, high]
        assert all(a <= b + rounding for a, b in itertools.pairwise(chain)), chain


def test_lovasz_from_histogram_is_exact_for_a_level_a_bin(rng):
    edges = np.arange(6) / 5
    for share in (0.0, 0.4, 1.0):
        errors, foreground = edges[rng.integers(0, 6, size=200)], rng.random(200) < share
        exact, _ = ref.lovasz_extension(errors, foreground)
        table = histogram(errors, foreground, edges)
        got = ref.lovasz_from_histogram(*table) + ref.lovasz_range_of_histogram(*table)
        np.testing.assert_allclose(got, exact, rtol=1e-13)


def test_lovasz_from_histogram_narrows_with_its_bins(rng):
    errors, foreground = rng.random(2000), rng.random(2000) < 0.2
    exact, _ = ref.lovasz_extension(errors, foreground)
    widths, misses = [], []
    for bins in (4, 64, 1024):
        edges = np.linspace(0, 1, bins, endpoint=False)
        value, low, high = ref.lovasz_from_histogram(*histogram(errors, foreground, edges))
        widths.append(high - low)
        misses.append(exact - value)
    assert widths[0] > 10 * widths[1] > 100 * widths[2] > 0
    assert misses[0] > 10 * misses[1] > 100 * misses[2] > 0
    assert misses[1] < 1e-3


def test_lovasz_from_histogram_weighs_as_groups(rng):
    # The value is that of errors' sums times the weights that voxels of equal error would get
    errors, foreground = rng.random(300), rng.random(300) < 0.3
    edges = np.linspace(0, 1, 10, endpoint=False)
    grouped = np.searchsorted(edges, errors, side="right").astype(np.float64)
    expected = ref.lovasz_weights(grouped, foreground) @ errors
    value, _, _ = ref.lovasz_from_histogram(*histogram(errors, foreground, edges))
    np.testing.assert_allclose(value, expected, rtol=1e-14)


def test_lovasz_range_of_histogram_is_attained(rng):
    edges = np.linspace(0, 1, 4, endpoint=False)
    width = 0.25
    for share in (0.0, 0.05, 0.5, 1.0):
        errors, foreground = rng.random(60), rng.random(60) < share
        means, spread = errors.copy(), errors.copy()
        which = np.searchsorted(edges, errors, side="right") - 1
        for k, t in itertools.product(range(4), [False, True]):
            members = np.flatnonzero((which == k) & (foreground == t))
            if members.size:
                means[members] = errors[members].mean()
                above = (errors[members] - edges[k]).sum()
                # As many as possible at the upper edge; the last bin has none
                at_top = int(above // width) if k < 3 else 0
                spread[members] = edges[k]
                spread[members[:at_top]] += width
                spread[members[at_top]] += above - at_top * width
        low, high = ref.lovasz_range_of_histogram(*histogram(errors, foreground, edges))
        np.testing.assert_allclose(ref.lovasz_extension(means, foreground)[0], low, rtol=1e-13)
        np.testing.assert_allclose(ref.lovasz_extension(spread, foreground)[0], high, rtol=1e-13)


def test_lovasz_from_histogram_bound_is_of_use_without_foreground():
    # 1e7 voxels, one of them wrong: the range is of the largest error, the bounds of the sum
    counts = [10**7 - 1, 0, 1]
    table = ([0.0, 0.5, 0.75], [0, 0, 0], counts, [0, 0, 0], [1e5, 0, 0.8])
    np.testing.assert_allclose(ref.lovasz_from_histogram(*table), 0.8, rtol=1e-15)
    np.testing.assert_allclose(ref.lovasz_range_of_histogram(*table), 0.8, rtol=1e-15)
    table = ([0.0, 0.5], [0, 0], [10**7, 0], [0, 0], [1e5, 0])
    assert ref.lovasz_from_histogram(*table) == pytest.approx((0.01, 0.0, 1e5), rel=1e-9)
    assert ref.lovasz_range_of_histogram(*table) == pytest.approx((0.01, 0.5), rel=1e-12)


# Curves


def test_jaccard_curve_equals_direct_counting(rng):
    predictions, targets = rng.random((2, 3, 5, 4)), rng.random((2, 3, 5, 4)) < 0.3
    targets[0, 0] = False
    valid = rng.random((2, 1, 5, 4)) < 0.8
    thresholds = [0.5, -np.inf, predictions[1, 1, 2, 3], 1.0, 0.25]
    jaccard, dice = ref.jaccard_curve(predictions, targets, thresholds, valid)
    assert jaccard.shape == dice.shape == (2, 3, 5)
    for n, c, k in np.ndindex(2, 3, 5):
        keep = valid[n, 0]
        a = {i for i, q in enumerate(predictions[n, c][keep]) if q >= thresholds[k]}
        b = {i for i, t in enumerate(targets[n, c][keep]) if t}
        if a | b:
            assert jaccard[n, c, k] == len(a & b) / len(a | b)
            assert dice[n, c, k] == 2 * len(a & b) / (len(a) + len(b))
        else:
            assert np.isnan(jaccard[n, c, k])
            assert np.isnan(dice[n, c, k])
    assert np.isnan(jaccard).sum() == 1  # nothing true and nothing predicted from 1.0 on


def test_jaccard_curve_compares_and_does_not_subtract():
    logits = [[[np.inf, 5e-324, 0.0, -np.inf, np.nan]]]
    jaccard, _ = ref.jaccard_curve(logits, [[[1, 1, 1, 1, 1]]], [np.inf, 5e-324, 0.0, -np.inf])
    np.testing.assert_allclose(jaccard[0, 0], [0.2, 0.4, 0.6, 0.8])
