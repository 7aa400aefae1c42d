"""Losses whose classes share one softmax, against the float64 reference, PyTorch and MONAI."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastseg as fs
import oracle
from cases import LOGIT_DTYPES, TARGET_DTYPES, VALUE_RTOL, extra_ulp, name_of, ulp_error
from cases import SOFTMAX_LOSSES as LOSSES

CE_JACCARD = fs.CrossEntropy() + 2.0 * fs.SoftJaccard()
SHAPES = [(1, 2, 1), (2, 3, 255), (1, 3, 257), (2, 3, 7, 11, 13), (1, 3, 37, 251), (3, 4)]


def make(
    shape: tuple[int, ...], dtype: Any = np.float32, target: Any = np.uint8, scale: float = 2.5
) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian logits, and the class of each voxel."""
    rng = np.random.default_rng([*shape])
    classes = min(shape[1], 2 if np.dtype(target).name == "bool" else shape[1])
    targets = rng.integers(0, classes, (shape[0], *shape[2:]))
    return rng.normal(0.0, scale, shape).astype(dtype), targets.astype(target)


def soft(targets: np.ndarray, classes: int) -> np.ndarray:
    """Return targets that are spread over the classes, and add up to 1."""
    hot = np.stack([targets == c for c in range(classes)], 1).astype(np.float32)
    spread = 0.75 * hot + 0.25 / classes
    keep = np.random.default_rng(3).random((hot.shape[0], 1, *hot.shape[2:])) < 0.5
    return np.where(keep, hot, spread).astype(np.float32)


GRAD_ULP = 8.0
"""Units of float32 at the sum of the magnitudes of what is added up: q alone errs by 3 of them, by
the exponential, their sum, the quotient and the product. 7 were reached with up to 64 classes, 9
with 256, whose sums are longer."""


def check(loss: fs.Loss, logits: np.ndarray, targets: np.ndarray) -> None:
    value, grad = loss.value_and_grad(logits, targets)
    expected, expected_grad = oracle.evaluate(loss, logits, targets)
    rtol = VALUE_RTOL[name_of(logits.dtype)]
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=2 * rtol)
    scale = oracle.softmax_magnitude(loss, logits, targets)
    error, bound = ulp_error(grad, expected_grad, scale, grad.dtype)
    allowed = GRAD_ULP if logits.shape[1] <= 64 else 1.5 * GRAD_ULP
    allowed = allowed if name_of(grad.dtype) == "float32" else bound
    assert error <= allowed + extra_ulp(loss, grad.dtype)
    assert (grad.dtype, grad.shape) == (logits.dtype.newbyteorder("="), logits.shape)


def fits(loss: fs.Loss, classes: int) -> bool:
    weights = [term.class_weights for _, term in loss.parts if term.class_weights]
    chosen = [term.classes for _, term in loss.parts if term.classes]
    return all(len(w) == classes for w in weights) and all(max(c) < classes for c in chosen)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_softmax_equals_reference(loss, shape):
    if not fits(loss, shape[1]):
        shape = (shape[0], 3, *shape[2:])
    logits, targets = make(shape)
    check(loss, logits, targets)
    check(loss, logits, soft(targets, shape[1]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "batch" not in repr(loss)], ids=repr)
def test_softmax_reduction_equals_reference(loss, reduction):
    check(loss.replace(reduction=reduction), *make((2, 3, 5, 67), np.float64))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
@pytest.mark.parametrize("target", TARGET_DTYPES, ids=name_of)
def test_every_dtype_is_read(dtype, target):
    check(CE_JACCARD, *make((2, 3, 7, 41), dtype, target))


@pytest.mark.parametrize("classes", [2, 5, 16, 64, 65, 130, 256])
def test_any_number_of_classes(classes):
    logits, targets = make((2, classes, 3, 131))
    check(CE_JACCARD, logits, targets)
    check(CE_JACCARD, logits, soft(targets, classes))


@pytest.mark.parametrize("shape", ["bare", "single"])
def test_shapes_of_indices(shape):
    logits, targets = make((2, 3, 7, 11))
    expected = CE_JACCARD.value_and_grad(logits, targets)
    got = CE_JACCARD.value_and_grad(logits, targets if shape == "bare" else targets[:, None])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


LAYOUTS = {
    "channels_last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "swapped_bytes": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "fortran": np.asfortranarray,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=name_of)
def test_softmax_layout_does_not_matter(dtype, layout):
    logits, targets = make((2, 3, 9, 31), dtype, np.int64)
    expected, slope = CE_JACCARD.value_and_grad(logits, targets)
    other = LAYOUTS[layout](logits)
    got, grad = CE_JACCARD.value_and_grad(other, np.asfortranarray(targets))
    np.testing.assert_allclose(got, expected, rtol=3e-7)
    wide_grad, wide_slope = grad.astype(np.float64), slope.astype(np.float64)
    tolerance = (2e-3 if dtype is np.float16 else 1e-6) * np.abs(wide_slope).max()
    np.testing.assert_allclose(wide_grad, wide_slope, rtol=0, atol=tolerance)
    if layout == "channels_last":
        assert grad.strides == other.strides
    over = logits.copy()
    assert CE_JACCARD.value_and_grad(over, targets, out=over)[1] is over
    np.testing.assert_array_equal(over, slope)


def test_confident_logits_keep_their_digits():
    for margin in (8.0, 15.0, 40.0, 80.0):
        logits, targets = make((1, 4, 3001), scale=0.1)
        np.put_along_axis(logits, targets[:, None].astype(np.int64), np.float32(margin), 1)
        for loss in (fs.CrossEntropy(), fs.SoftJaccard().replace(activation="softmax")):
            value, grad = loss.value_and_grad(logits, targets)
            expected, slope = oracle.evaluate(loss, logits, targets)
            q = np.exp(logits.astype(np.float64) - margin)
            if isinstance(loss, fs.losses.WeightedSum):  # 1 - q from q loses it in the oracle
                np.put_along_axis(q, targets[:, None].astype(np.int64), 0.0, 1)
                exact = np.mean([_missed_share(q[0, c], targets[0] == c, q[0]) for c in range(4)])
                expected = exact
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            if margin < 40:
                scale = oracle.softmax_magnitude(loss, logits, targets)
                assert ulp_error(grad, slope, scale, np.float32)[0] <= 4


def _missed_share(q: np.ndarray, own: np.ndarray, others: np.ndarray) -> float:
    """Return (F + G) / (P + G) of one class from the probabilities of the wrong classes."""
    F = (others.sum(0) / (1 + others.sum(0)))[own].sum()
    G = (q / (1 + others.sum(0)))[~own].sum()
    return float((F + G) / (own.sum() + G))


def test_mask_ignored_labels_and_weights():
    logits, targets = make((2, 3, 7, 41), target=np.int64)
    rng = np.random.default_rng(0)
    targets[rng.random(targets.shape) < 0.2] = 255
    mask = rng.random(targets.shape) < 0.7
    weights = rng.integers(0, 4, targets.shape).astype(np.float32)
    out = ~mask | (targets == 255) | (weights == 0)
    dirty = np.where(np.repeat(out[:, None], 3, 1), np.float32(np.nan), logits)
    loss = CE_JACCARD.replace(ignore_index=255)
    for x in (logits, dirty):
        value, grad = loss.value_and_grad(x, targets, mask=mask[:, None], weight_map=weights)
        expected, slope = oracle.evaluate(
            loss, logits, targets, mask=mask[:, None], weight_map=weights[:, None]
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(grad, slope, rtol=2e-5, atol=1e-9)
        assert (grad[np.repeat(out[:, None], 3, 1)] == 0).all()
    plain = np.where(targets == 255, 0, targets)
    spread = soft(plain, 3)
    value, grad = CE_JACCARD.value_and_grad(dirty, spread, mask=mask & (targets != 255),
                                            weight_map=weights)  # fmt: skip
    expected, slope = oracle.evaluate(
        CE_JACCARD, logits, spread, mask=(mask & (targets != 255))[:, None],
        weight_map=weights[:, None],
    )  # fmt: skip
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, rtol=2e-5, atol=1e-9)


def test_nothing_is_left():
    logits, targets = make((2, 3, 40))
    value, grad, s = CE_JACCARD.evaluate(logits, targets, mask=np.zeros(targets.shape, bool))
    assert value == 0 and not grad.any() and s["count"].sum() == 0
    one_sample = np.zeros(targets.shape, bool)
    one_sample[1] = True
    got = CE_JACCARD(logits, targets, mask=one_sample)
    np.testing.assert_allclose(got, CE_JACCARD(logits[1:], targets[1:]), rtol=1e-6)


def test_nan_and_infinite_logits():
    logits, targets = make((1, 3, 300))
    logits[0, 2, 7] = np.nan
    value, grad, s = CE_JACCARD.evaluate(logits, targets, track=("hard",))
    assert np.isnan(value) and np.isnan(grad[0, :, 7]).all()
    assert s["undefined"].tolist() == [[1, 1, 1]] and np.isnan(s.jaccard_index())
    other = fs.CrossEntropy().value_and_grad(logits, targets)[1]
    assert np.isfinite(np.delete(other, 7, 2)).all()
    logits, targets = np.zeros((1, 3, 2), np.float32), np.array([[0, 1]])
    logits[0, 0] = np.inf
    value, grad = fs.CrossEntropy().value_and_grad(logits, targets)
    assert value == np.inf
    np.testing.assert_allclose(grad[0, :, 0], 0)
    np.testing.assert_allclose(grad[0, :, 1], [0.5, -0.5, 0])
    logits[0, 0], logits[0, 1] = -np.inf, 3.0
    np.testing.assert_allclose(
        fs.CrossEntropy()(logits, np.array([[1, 1]])), np.log1p(np.exp(-3.0)), rtol=1e-6
    )


def test_ties_share():
    logits, targets = np.zeros((1, 4, 300), np.float32), np.zeros((1, 300), np.uint8)
    value, grad = fs.CrossEntropy().value_and_grad(logits, targets)
    np.testing.assert_allclose(value, np.log(4.0), rtol=1e-6)
    np.testing.assert_allclose(grad[0, :, 0] * 300, [-0.75, 0.25, 0.25, 0.25], rtol=1e-6)
    assert fs.CrossEntropy().statistics(logits, targets, track=("hard",)).jaccard_index(
        reduction="none"
    )[0].tolist() == pytest.approx([1.0, np.nan, np.nan, np.nan], nan_ok=True)


def test_hard_counts_are_those_of_the_largest_logit():
    logits, targets = make((2, 5, 7, 51))
    s = CE_JACCARD.statistics(logits, targets, track=("hard",))
    expected = fs.stat_scores(logits.argmax(1), targets, num_classes=5)
    counts = s.counts()
    for name in expected:
        np.testing.assert_array_equal(counts[name], expected[name])
    spread = soft(targets, 5)
    also = CE_JACCARD.statistics(logits, spread, track=("hard",))
    np.testing.assert_array_equal(also.counts()["tp"], expected["tp"])
    weighted = CE_JACCARD.statistics(
        logits, targets, weight_map=np.zeros(targets.shape, np.float32), track=("hard",)
    )
    np.testing.assert_array_equal(weighted.counts()["tp"], expected["tp"])


def test_softmax_chunks_add_up():
    logits, targets = make((1, 4, 16, 256), np.float64)
    whole = CE_JACCARD.statistics(logits, targets, samples="a")
    parts = [
        CE_JACCARD.statistics(logits[:, :, k : k + 4], targets[:, k : k + 4], samples="a")
        for k in range(0, 16, 4)
    ]
    np.testing.assert_allclose(sum(parts).array, whole.array, rtol=1e-12)
    grad = CE_JACCARD.gradient(logits, targets, whole)
    part = CE_JACCARD.gradient(logits[:, :, 4:8], targets[:, 4:8], sum(parts))
    np.testing.assert_allclose(part, grad[:, :, 4:8], rtol=1e-12)


def test_softmax_bits_depend_on_no_thread(threads):
    logits, targets = make((2, 5, 40, 503))
    answers = []
    for count in (1, 2):
        fs.set_num_threads(count)
        value, grad, s = CE_JACCARD.evaluate(logits, targets)
        answers.append((value, grad.tobytes(), s.array.tobytes()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("weights", [None, (0.3, 2.0, 0.0, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("ignored", [None, 2])
def test_cross_entropy_is_pytorchs(weights, smoothing, ignored):
    logits, targets = make((2, 4, 6, 41), target=np.int64)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        x,
        torch.tensor(targets),
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        label_smoothing=smoothing,
        ignore_index=-100 if ignored is None else ignored,
    )
    theirs.backward()
    loss = fs.CrossEntropy(
        class_weights=weights, label_smoothing=smoothing, normalize="weights"
    ).replace(ignore_index=ignored)
    value, grad = loss.value_and_grad(logits, targets)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-5, atol=1e-9)


def test_autograd_and_module():
    import fastseg.torch

    logits, targets = make((2, 4, 6, 41), target=np.int64)
    x = torch.tensor(logits, requires_grad=True)
    fastseg.torch.Loss(CE_JACCARD)(x, torch.tensor(targets)).backward()
    np.testing.assert_array_equal(x.grad.numpy(), CE_JACCARD.value_and_grad(logits, targets)[1])


# What does not fit


def test_indices_out_of_range_are_errors():
    logits, targets = make((2, 3, 40), target=np.int64)
    for wrong in (3, -1, 2**40, 255):
        targets[1, 7] = wrong
        with pytest.raises(
            ValueError, match=rf"class indices in \[0, 3\), got {wrong} \(invalid voxels: 1 of 80\)"
        ):
            CE_JACCARD(logits, targets)
    CE_JACCARD.replace(ignore_index=255)(logits, targets)
    halves = targets.astype(np.float32)
    halves[1, 7] = 0.5
    with pytest.raises(ValueError, match=r"class indices in \[0, 3\), got 0.5"):
        CE_JACCARD(logits, halves)
    spread = soft(np.clip(targets, 0, 2), 3)
    spread[0, 1, 5] = 1.5
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\], got 1.5"):
        CE_JACCARD(logits, spread)
    with pytest.raises(ValueError, match="weight_map must be at least 0, got -1"):
        CE_JACCARD(logits, np.clip(targets, 0, 2), weight_map=np.full((2, 40), -1, np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: CE_JACCARD(x[:, :1], y), "needs logits of at least 2 classes, got 1"),
        (lambda x, y: CE_JACCARD(x, y[:, :9]), r"targets must have shape \(2, 3, 40\) or"),
        (lambda x, y: CE_JACCARD(x, y[0]), "targets must have shape"),
        (
            lambda x, y: CE_JACCARD.replace(positive=1)(x, y),
            "positive=1 has no meaning with softmax",
        ),
        (lambda x, y: CE_JACCARD.replace(ignore_index=9)(x, x * 0), "ignore_index=9 needs targets"),
        (lambda x, y: CE_JACCARD(x, y, mask=x > 0), "mask must lack the class axis with softmax"),
        (lambda x, y: CE_JACCARD(x, y, weight_map=x * x), "weight_map must lack the class axis"),
        (lambda x, y: CE_JACCARD(np.zeros((1, 300, 4)), y[:1, :4]), "at most 256 classes"),
        (lambda x, y: fs.BCE() + fs.CrossEntropy(), "BCE needs sigmoid and CrossEntropy softmax"),
        (lambda x, y: fs.BCE().replace(activation="softmax"), "BCE needs sigmoid, got"),
        (lambda x, y: fs.CrossEntropy().replace(activation=None), "CrossEntropy needs softmax"),
        (
            lambda x, y: fs.CrossEntropy(class_weights=(1.0, 2.0))(x, y),
            "one entry per class, got 2",
        ),
        (lambda x, y: fs.CrossEntropy(class_weights=(np.nan,) * 3), "class_weights must be finite"),
        (lambda x, y: fs.CrossEntropy(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\]"),
        (lambda x, y: fs.CrossEntropy(normalize="mean"), "normalize must be one of 'valid', 'all'"),
        (
            lambda x, y: fs.CrossEntropy(classes=(3,))(x, y),
            r"classes must be in \[0, 3\), got \(3,\)",
        ),
    ],
)
def test_bad_softmax_input(call, message):
    logits, targets = make((2, 3, 40))
    with pytest.raises(ValueError, match=message):
        call(logits, targets)


def test_a_label_of_a_class_may_be_ignored():
    logits, targets = make((2, 3, 40))
    got = CE_JACCARD.replace(ignore_index=0)(logits, targets)
    np.testing.assert_allclose(got, CE_JACCARD(logits, targets, mask=targets != 0), rtol=1e-6)


def test_half_indices_of_ml_dtypes():
    logits, targets = make((1, 3, 40), ml_dtypes.bfloat16, np.float16)
    assert CE_JACCARD.value_and_grad(logits, targets)[1].dtype == ml_dtypes.bfloat16
