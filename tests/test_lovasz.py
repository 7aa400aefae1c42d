"""The Lovász losses against the reference, which sorts: both modes, and how they combine."""

import numpy as np
import pytest

import fastseg as fs
from cases import make
from fastseg_kernels import reference as ref
from fastseg_kernels.constants import LOVASZ_BINS

SCOPES = ("sample", "batch", "image", "class")


def spread(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    return rows.reshape(*rows.shape, *(1,) * (x.ndim - 2))


def shares(scope: str, kept: np.ndarray) -> np.ndarray:
    """Return the factor of each row in the mean."""
    if scope in ("image", "class"):
        axis = 1 if scope == "image" else 0
        line = kept.sum(axis, keepdims=True)
        return np.where(kept, 1 / np.maximum(line, 1), 0) / max(1, (line > 0).sum())
    return kept / max(1, kept.sum())


def hinge(x, p, scope="sample", valid=None, empty="formula"):
    """Return the value and the gradient by the reference."""
    batch = scope == "batch"
    values, slopes = ref.lovasz_hinge(x, p, valid, batch=batch)
    on = p * (1 if valid is None else valid)
    has = on.reshape(*p.shape[:2], -1).sum(2) > 0
    has = has.any(0, keepdims=True) if batch else has
    share = shares(scope, has if empty == "skip" else np.ones_like(has))
    return (values * share).sum(), slopes * spread(share, x)


def softmax(x, one_hot, scope="sample", classes="present"):
    values, slopes = ref.lovasz_softmax(x, one_hot, batch=scope == "batch")
    has = one_hot.reshape(*one_hot.shape[:2], -1).sum(2) > 0
    has = has.any(0, keepdims=True) if scope == "batch" else has
    kept = has if classes == "present" else np.ones_like(has)
    if isinstance(classes, tuple):
        kept = np.zeros_like(has)
        kept[:, list(classes)] = True
    share = shares(scope, kept)
    return (values * share).sum(), ref.softmax_gradient(slopes * spread(share, x), x)


def classes_of(shape, seed=0, present=None):
    """Return logits (N, C, *spatial), labels (N, *spatial), and these as (N, C, *spatial)."""
    logits = make(shape, seed=seed)[0]
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or shape[1], (shape[0], *shape[2:]))
    return logits, labels, ref.one_hot(labels, shape[1])


# Bins


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_bins_of_the_hinge_come_close_to_sorting(dtype, scope):
    logits, targets = make((2, 3, 41, 53), dtype)
    targets[1, 2] = 0  # a row without foreground
    loss = fs.LovaszHinge(bins=8192, scope=scope, empty="skip")
    value, grad, s = loss.evaluate(logits, targets)
    expected, slope = hinge(logits.astype(np.float64), targets, scope, empty="skip")
    low, high = loss.bounds(s)
    assert low <= expected * (1 + 1e-6) and expected * (1 - 1e-6) <= high
    np.testing.assert_allclose(value, low, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(high, expected, rtol=1e-4)
    worst = np.abs(slope).max()
    np.testing.assert_allclose(grad.astype(np.float64), slope, rtol=0, atol=0.02 * worst)
    assert scope == "batch" or not grad[1, 2].any()


@pytest.mark.parametrize("bins", LOVASZ_BINS[::3])
def test_the_more_bins_the_closer(bins):
    logits, targets = make((1, 1, 9000))
    loss = fs.LovaszHinge(bins=bins)
    value, grad, s = loss.evaluate(logits, targets)
    expected, slope = hinge(logits.astype(np.float64), targets)
    low, high = loss.bounds(s)
    width = (64 / bins) ** 2
    assert low <= expected <= high <= expected * (1 + width)
    assert abs(value / expected - 1) < width
    assert np.abs(grad - slope).max() < 10 * (64 / bins) * np.abs(slope).max()


def test_voxels_of_bins_of_their_own_are_exact():
    logits = np.array([[[0.5, -3.0, 2.0, 0.25, -0.5, -0.25]]])
    targets = np.array([[[1, 0, 1, 0, 0, 1]]])
    value, grad = fs.LovaszHinge(bins=1024).value_and_grad(logits, targets)
    expected, slope = hinge(logits, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, slope, rtol=1e-12)


def test_an_outlier_does_not_spoil_the_bound():
    logits, targets = make((1, 1, 5000))
    for outlier in (1e4, 1e9):
        logits[0, 0, 7], targets[0, 0, 7] = outlier, 0
        loss = fs.LovaszHinge(bins=4096)
        s = loss.statistics(logits, targets)
        expected, _ = hinge(logits.astype(np.float64), targets)
        low, high = loss.bounds(s)
        assert low <= expected * (1 + 1e-6) and expected * (1 - 1e-6) <= high
        assert high - low < 1e-3 * expected
        np.testing.assert_allclose(loss.value(s), expected, rtol=1e-4)


def test_errors_below_0_carry_no_gradient_and_all_right_is_0():
    targets = make((1, 1, 3000))[1]
    sure = np.where(targets, np.float32(1.5), np.float32(-1.0))
    value, grad = fs.LovaszHinge(bins=1024).value_and_grad(sure, targets)
    assert value == 0 and not grad.any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("classes", ["present", "all", (0, 2)])
def test_bins_of_softmax_come_close_to_sorting(classes, scope):
    logits, labels, one_hot = classes_of((2, 4, 41, 53), present=3)
    loss = fs.LovaszSoftmax(bins=8192, scope=scope, classes=classes)
    expected, slope = softmax(logits.astype(np.float64), one_hot, scope, classes)
    for targets in (labels, labels.astype(np.uint8), one_hot.astype(np.float32)):
        value, grad, s = loss.evaluate(logits, targets)
        low, high = loss.bounds(s)
        assert low <= expected * (1 + 1e-6) and expected * (1 - 1e-6) <= high
        if classes != "all":  # a class without a voxel: the largest of its errors is of a bin
            np.testing.assert_allclose(value, expected, rtol=2e-5)
            atol = 0.02 * np.abs(slope).max()
            np.testing.assert_allclose(grad, slope, rtol=0, atol=atol)
        assert high - low < 1e-2 * expected


def test_a_sure_network_keeps_the_digits_of_its_errors():
    logits, labels, one_hot = classes_of((1, 3, 3000))
    sure = (30 * one_hot + 0.1 * logits).astype(np.float32)
    value = fs.LovaszSoftmax(bins=8192)(sure, labels)
    expected, _ = softmax(sure.astype(np.float64), one_hot)
    np.testing.assert_allclose(value, expected, rtol=2e-4)
    assert 0 < value < 1e-11


def test_chunks_masks_layouts_and_threads_count_the_same(threads):
    logits, targets = make((2, 2, 40, 503), target=np.int16)
    rng = np.random.default_rng(0)
    mask = rng.random(logits.shape) < 0.7
    targets[rng.random(logits.shape) < 0.1] = 255
    loss = (fs.BCE() + fs.LovaszHinge(bins=4096)).replace(ignore_index=255)
    dirty = np.where(mask, logits, np.float32(np.nan))
    keep = mask & (targets != 255)
    whole = loss.statistics(dirty, targets, mask=mask, samples=("a", "b"))
    first = whole.names.index("hinge_4096_undefined")
    plain = fs.LovaszHinge(bins=4096)
    expected, _ = hinge(logits.astype(np.float64), targets * keep, valid=keep)
    np.testing.assert_allclose(plain.value(whole), expected, rtol=1e-4)
    parts = [
        loss.statistics(
            dirty[:, :, k : k + 7], targets[:, :, k : k + 7], mask=mask[:, :, k : k + 7],
            samples=("a", "b"),
        )
        for k in range(0, 40, 7)
    ]  # fmt: skip
    merged = sum(parts)
    np.testing.assert_array_equal(merged.array[:, :, first:], whole.array[:, :, first:])
    grad = loss.value_and_grad(dirty, targets, mask=mask)[1]
    piece = loss.gradient(dirty[:, :, 7:14], targets[:, :, 7:14], whole, mask=mask[:, :, 7:14])
    np.testing.assert_array_equal(piece, grad[:, :, 7:14])
    assert not grad[~keep].any()
    alone = plain.replace(ignore_index=255).gradient(dirty, targets, whole, mask=mask)
    bce = fs.BCE().replace(ignore_index=255).value_and_grad(dirty, targets, mask=mask)[1]
    np.testing.assert_allclose(alone + bce, grad, rtol=1e-4, atol=1e-9)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(dirty, 1, -1)), -1, 1)
    for count in (1, 2):
        fs.set_num_threads(count)
        again = loss.statistics(dirty, targets, mask=mask, samples=("a", "b"))
        assert again == whole
        of_last = loss.statistics(last, targets, mask=mask)
        np.testing.assert_array_equal(of_last.array[:, :, first:], whole.array[:, :, first:])


def test_softmax_chunks_merge_exactly():
    logits, labels, _ = classes_of((2, 3, 40, 503))
    labels[0, :3] = 255
    loss = (fs.CrossEntropy() + fs.LovaszSoftmax(bins=1024)).replace(ignore_index=255)
    whole = loss.statistics(logits, labels, samples=("a", "b"))
    parts = [
        loss.statistics(logits[:, :, k : k + 9], labels[:, k : k + 9], samples=("a", "b"))
        for k in range(0, 40, 9)
    ]
    first = whole.names.index("errors_1024_undefined")
    np.testing.assert_array_equal(sum(parts).array[:, :, first:], whole.array[:, :, first:])
    grad = loss.gradient(logits, labels, whole)
    piece = loss.gradient(logits[:, :, 9:18], labels[:, 9:18], whole)
    np.testing.assert_allclose(piece, grad[:, :, 9:18], rtol=1e-5, atol=1e-12)


def test_nan_and_infinite_logits_of_bins():
    logits, targets = make((2, 1, 300))
    logits[0, 0, 7] = np.nan
    value, grad = fs.LovaszHinge(bins=1024).value_and_grad(logits, targets)
    assert np.isnan(value) and np.isnan(grad[0, 0, 7]) and not np.isnan(grad[1]).any()
    assert np.isnan(grad).sum() == 1
    logits[0, 0, 7] = -np.inf if targets[0, 0, 7] == 0 else np.inf  # right and sure
    assert np.isfinite(fs.LovaszHinge(bins=1024)(logits, targets))
    classes, labels, _ = classes_of((1, 3, 300))
    classes[0, 1, 7] = np.nan
    value, grad = fs.LovaszSoftmax(bins=1024).value_and_grad(classes, labels)
    assert np.isnan(value) and np.isnan(grad[0, :, 7]).all() and np.isnan(grad).sum() == 3


def test_rows_without_foreground_follow_the_rule():
    logits, targets = make((2, 1, 300))
    targets[1] = 0
    results = {
        rule: fs.LovaszHinge(bins=1024, empty=rule).replace(reduction="none")(logits, targets)
        for rule in ("formula", "one", "zero", "skip")
    }
    assert results["one"][1, 0] == 0 and results["zero"][1, 0] == 1 and results["skip"][1, 0] == 0
    largest = (1 + logits[1]).max()
    np.testing.assert_allclose(results["formula"][1, 0], largest, rtol=1 / 16)
    grad = fs.LovaszHinge(bins=1024, empty="one").value_and_grad(logits, targets)[1]
    assert grad[0].any() and not grad[1].any()


# What does not fit

HINGE = fs.LovaszHinge(bins=1024)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: fs.LovaszHinge(bins=100), "bins must be one of None, 1024, 2048, 4096, 8192"),
        (lambda x, p: HINGE.replace(activation=None), r"LovaszHinge\(bins=1024\) needs sigmoid"),
        (lambda x, p: HINGE + fs.LovaszSoftmax(), "LovaszHinge needs sigmoid and LovaszSoftmax"),
        (lambda x, p: HINGE(x, p, weight_map=abs(x)), "weight_map has no meaning for LovaszHinge"),
        (lambda x, p: HINGE(x, np.where(p, 0.5, 0)), "targets must be 0 or 1, got 0.5"),
        (lambda x, p: (HINGE + fs.LovaszHinge(bins=2048))(x, p), "must have the same bins"),
        (lambda x, p: HINGE.statistics(x, p, track=("errors_1024",)), "must have the same bins"),
        (lambda x, p: fs.LovaszSoftmax(classes="some"), "classes must be one of 'present', 'all'"),
        (
            lambda x, p: fs.LovaszSoftmax(classes=(5,), bins=1024)(x, p[:, 0]),
            r"must be in \[0, 3\)",
        ),
        (
            lambda x, p: HINGE.value(fs.BCE().statistics(x, p)),
            r"do not hold hinge_1024_undefined: ask for track=\('hinge_1024',\)",
        ),
    ],
)
def test_bad_lovasz_input(call, message):
    logits, targets = make((2, 3, 300))
    with pytest.raises(ValueError, match=message):
        call(logits, targets)


# Sorting


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_sorted_hinge_is_the_references(dtype, scope):
    logits, targets = make((2, 3, 41, 53), dtype)
    targets[1, 2] = 0
    for empty in ("formula", "skip"):
        loss = fs.LovaszHinge(scope=scope, empty=empty)
        value, grad = loss.value_and_grad(logits, targets)
        expected, slope = hinge(logits.astype(np.float64), targets, scope, empty=empty)
        assert loss(logits, targets) == value
        np.testing.assert_allclose(value, expected, rtol=1e-12 if dtype is np.float64 else 2e-7)
        rtol = {np.float16: 1e-3, np.float32: 1e-6, np.float64: 1e-12}[dtype]
        if dtype is np.float32:  # 1 - x is rounded: errors that tie there need not be equal
            off = np.abs(grad - slope) > rtol * np.abs(slope)
            assert off.mean() < 0.02
            np.testing.assert_allclose(grad, slope, rtol=5e-3)
        else:
            np.testing.assert_allclose(grad.astype(np.float64), slope, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("classes", ["present", "all", (0, 2)])
def test_the_sorted_softmax_is_the_references(classes, scope):
    logits, labels, one_hot = classes_of((2, 4, 17, 53), present=3)
    loss = fs.LovaszSoftmax(scope=scope, classes=classes)
    expected, slope = softmax(logits.astype(np.float64), one_hot, scope, classes)
    for targets in (labels, labels.astype(np.uint8), one_hot.astype(np.float32)):
        value, grad = loss.value_and_grad(logits, targets)
        np.testing.assert_allclose(value, expected, rtol=3e-7)
        np.testing.assert_allclose(grad, slope, rtol=0, atol=2e-3 * np.abs(slope).max())
    value, grad = loss.value_and_grad(logits.astype(np.float64), labels)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, slope, rtol=0, atol=1e-12 * np.abs(slope).max())


def test_voxels_of_equal_errors_share():
    logits, targets = np.zeros((1, 1, 700), np.float32), make((1, 1, 700))[1]
    value, grad = fs.LovaszHinge().value_and_grad(logits, targets)
    expected, slope = hinge(logits, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-6)
    assert len(np.unique(grad)) == 2
    quantised = np.round(make((2, 1, 5000))[0])
    targets = make((2, 1, 5000))[1]
    for scope in ("sample", "batch"):
        grad = fs.LovaszHinge(scope=scope).value_and_grad(quantised, targets)[1]
        _, slope = hinge(quantised.astype(np.float64), targets, scope)
        np.testing.assert_allclose(grad, slope, rtol=1e-6)


def test_sorting_takes_layouts_masks_scales_and_other_terms():
    logits, targets = make((2, 3, 11, 23), np.float64, np.int16)
    rng = np.random.default_rng(0)
    mask = rng.random(logits.shape) < 0.7
    targets[rng.random(logits.shape) < 0.1] = 255
    dirty = np.where(mask, logits, np.nan)
    loss = (0.5 * fs.LovaszHinge() + fs.BCE() + fs.SoftJaccard()).replace(ignore_index=255)
    keep = mask & (targets != 255)
    expected, slope = hinge(logits, targets * keep, valid=keep)
    others = (fs.BCE() + fs.SoftJaccard()).replace(ignore_index=255)
    rest, rest_slope = others.value_and_grad(dirty, targets, mask=mask)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(dirty, 1, -1)), -1, 1)
    for x in (dirty, np.asfortranarray(dirty), last, dirty[:, :, ::-1, ::-1][:, :, ::-1, ::-1]):
        value, grad, s = loss.evaluate(x, targets, mask=mask, track=("hard",), grad_scale=8.0)
        np.testing.assert_allclose(value, 0.5 * expected + rest, rtol=1e-12)
        np.testing.assert_allclose(grad, 8 * (0.5 * slope + rest_slope), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(others.value(s), rest, rtol=1e-12)
        assert s.jaccard_index() == fs.jaccard_index(dirty, targets, mask=mask, ignore_index=255)
    over = dirty.copy()
    assert loss.value_and_grad(over, targets, mask=mask, out=over)[1] is over
    np.testing.assert_array_equal(over, loss.value_and_grad(dirty, targets, mask=mask)[1])


def test_sorted_reductions_and_scaled_rows():
    logits, targets = make((2, 3, 500), np.float64)
    rows, _ = ref.lovasz_hinge(logits, targets)
    got = fs.LovaszHinge(class_weights=(1.0, 0.5, 2.0)).replace(reduction="none")(logits, targets)
    np.testing.assert_allclose(got, rows * [1.0, 0.5, 2.0], rtol=1e-12)
    got = fs.LovaszHinge(classes=(0, 2)).replace(reduction="sum")(logits, targets)
    np.testing.assert_allclose(got, rows[:, [0, 2]].sum(), rtol=1e-12)
    scale = np.arange(6.0).reshape(2, 3)
    loss = fs.LovaszHinge().replace(reduction="none")
    grad = loss.value_and_grad(logits, targets, grad_scale=scale)[1]
    _, slopes = ref.lovasz_hinge(logits, targets)
    np.testing.assert_allclose(grad, slopes * scale[:, :, None], rtol=1e-12, atol=1e-15)


def test_sorted_nan_is_nan_there_and_in_the_value():
    logits, targets = make((2, 1, 300))
    logits[0, 0, 7] = np.nan
    value, grad = fs.LovaszHinge().value_and_grad(logits, targets)
    assert np.isnan(value) and np.isnan(grad).sum() == 1 and np.isnan(grad[0, 0, 7])


def test_sorting_is_refused_where_sums_are_needed():
    logits, targets = make((1, 1, 300))
    loss = fs.BCE() + fs.LovaszHinge()
    s = fs.BCE().statistics(logits, targets)
    for call in (
        lambda: loss.statistics(logits, targets),
        lambda: loss.value(s),
        lambda: loss.gradient(logits, targets, s),
        lambda: loss.term_values(s),
        lambda: loss.bounds(s),
    ):
        with pytest.raises(TypeError, match=r"LovaszHinge\(\) sorts its voxels: give it bins=4096"):
            call()
    with pytest.raises(ValueError, match="one Lovasz term that sorts"):
        (loss + fs.LovaszHinge(bins=1024))(logits, targets)
    with pytest.raises(ValueError, match=r"targets must be 0 or 1, got 0\.5"):
        loss(logits, np.where(targets, 0.5, 0.0))
    nothing = fs.LovaszHinge().value_and_grad(logits, targets, mask=np.zeros(targets.shape, bool))
    assert nothing[0] == 0 and not nothing[1].any()


def test_tracked_counts_of_errors_are_checked_as_the_losses_are():
    logits, targets = make((2, 1, 300))
    track = {"track": ("hinge_1024",)}
    s = fs.BCE().statistics(logits, targets, **track)
    assert HINGE.value(s) == HINGE.value(HINGE.statistics(logits, targets))
    with pytest.raises(ValueError, match="weight_map has no meaning for counts of Lovasz errors"):
        fs.BCE().statistics(logits, targets, weight_map=np.abs(logits), **track)
    with pytest.raises(ValueError, match=r"targets must be 0 or 1, got 0\.5"):
        fs.BCE().statistics(logits, np.where(targets, 0.5, 0.0), **track)
    classes, _, one_hot = classes_of((1, 3, 300))
    soft = (0.8 * one_hot + 0.1).astype(np.float32)
    with pytest.raises(ValueError, match="targets must be 0 or 1, got ") as caught:
        fs.CrossEntropy().statistics(classes, soft, track=("errors_1024",))
    assert "positive" not in str(caught.value)


@pytest.mark.parametrize("bins", [None, 1024])
@pytest.mark.parametrize("empty", ["one", "zero", "skip"])
def test_a_rule_for_empty_rows_does_not_hide_nan(empty, bins):
    logits, targets = make((2, 1, 300))
    targets[1], logits[1, 0, 7] = 0, np.nan
    value, grad = fs.LovaszHinge(empty=empty, bins=bins).value_and_grad(logits, targets)
    assert np.isnan(value) and np.isnan(grad).sum() == 1 and np.isnan(grad[1, 0, 7])
    logits[1, 0, 7] = -50.0
    without = fs.LovaszHinge(empty=empty, bins=bins).value_and_grad(logits, targets)[1]
    assert not without[1].any()


def test_voxels_beside_a_nan_have_the_slopes_of_a_row_without_it():
    logits, targets = make((1, 1, 300), np.float64)
    logits[0, 0, 7] = np.nan
    keep = np.ones(targets.shape, bool)
    keep[0, 0, 7] = False
    for bins in (None, 1024):
        loss = fs.LovaszHinge(bins=bins)
        grad = loss.value_and_grad(logits, np.where(keep, targets, 0))[1]
        alone = loss.value_and_grad(logits, targets, mask=keep)[1]
        np.testing.assert_allclose(grad[keep], alone[keep], rtol=1e-12)


def test_bounds_of_what_does_not_count_are_finite():
    logits, targets = make((1, 2, 300))
    logits[0, 0, 7], targets[0, 0, 7] = 1e13, 0
    for loss in (
        fs.BCE() + 0.0 * HINGE,
        fs.LovaszHinge(bins=1024, class_weights=(0.0, 1.0)),
        fs.LovaszHinge(bins=1024, classes=(1,)),
    ):
        low, high = loss.bounds(loss.statistics(logits, targets))
        assert np.isfinite(low) and low <= high < 10 * low
    low, high = HINGE.bounds(HINGE.statistics(logits, targets))
    assert np.isfinite(low) and high == np.inf


def test_batches_share_one_walk():
    logits, targets = make((3, 2, 50), np.float64)
    scale = np.arange(6.0).reshape(3, 2)
    loss = fs.LovaszHinge(bins=1024, scope="batch")
    grad = loss.value_and_grad(logits, targets, grad_scale=2.0)[1]
    np.testing.assert_allclose(grad, 2 * loss.value_and_grad(logits, targets)[1], rtol=1e-12)
    rows = fs.LovaszHinge(bins=1024).replace(reduction="none")
    scaled = rows.value_and_grad(logits, targets, grad_scale=scale)[1]
    plain = rows.value_and_grad(logits, targets)[1]
    np.testing.assert_allclose(scaled, plain * scale[:, :, None], rtol=1e-12)
    assert fs.LovaszHinge(bins=1024.0) == fs.LovaszHinge(bins=1024)
