"""Every loss x every promise, against the float64 reference."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest

import fastseg as fs
import oracle
from cases import (
    LOGIT_DTYPES,
    LOSSES,
    SHAPES,
    TARGET_DTYPES,
    VALUE_RTOL,
    extra_ulp,
    magnitude,
    make,
    name_of,
    ulp_error,
)

BCE_JACCARD = fs.BCE() + fs.SoftJaccard()


def check(loss: fs.Loss, logits: np.ndarray, targets: np.ndarray) -> None:
    """Compare value and gradient with the reference."""
    value, grad = loss.value_and_grad(logits, targets)
    expected, expected_grad = oracle.evaluate(loss, logits, targets)
    rtol = VALUE_RTOL[name_of(logits.dtype)]
    # "negative" and cancelling sums of terms have no relative accuracy of their own near 0.
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=2 * rtol)
    scale = magnitude(loss, logits, targets)
    error, bound = ulp_error(grad, expected_grad, scale, grad.dtype)
    assert error <= bound + extra_ulp(loss, grad.dtype)
    assert grad.dtype == logits.dtype.newbyteorder("=")
    assert grad.shape == logits.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_loss_equals_reference(loss, shape):
    check(loss, *make(shape))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
@pytest.mark.parametrize("target", TARGET_DTYPES, ids=name_of)
@pytest.mark.parametrize("loss", [BCE_JACCARD, fs.BCE(pos_weight=2.0) + fs.SoftDice()], ids=repr)
def test_loss_reads_every_dtype(loss, dtype, target):
    check(loss, *make((2, 3, 7, 41), dtype, target))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "batch" not in repr(loss)], ids=repr)
def test_reduction_equals_reference(loss, reduction):
    check(loss.replace(reduction=reduction), *make((2, 3, 5, 67), np.float64))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("target", [np.uint8, np.float32], ids=name_of)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=name_of)
def test_probabilities_equal_reference(loss, target, dtype):
    if any(term.needs_logits for _, term in loss.parts):
        with pytest.raises(ValueError, match="needs sigmoid"):
            loss.replace(activation=None)
        return
    _, targets = make((2, 2, 5, 67), dtype, target)
    probs = np.random.default_rng(1).uniform(0.01, 0.99, targets.shape).astype(dtype)
    loss = loss.replace(activation=None)
    value, grad = loss.value_and_grad(probs, targets)
    expected, expected_grad = oracle.evaluate(loss, probs, targets)
    tolerance = 2e-6 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
    scale = np.abs(expected_grad).max()
    np.testing.assert_allclose(grad, expected_grad, rtol=tolerance, atol=tolerance * scale)


def test_probabilities_clamp_logarithms_at_minus_100():
    loss = fs.BCE().replace(activation=None)
    probs, targets = np.array([[[0.0, 1.0, 0.0, 1.0]]]), np.array([[[1, 0, 0, 1]]])
    value, grad = loss.value_and_grad(probs, targets)
    assert value == 50.0
    expected = oracle.evaluate(loss, probs, targets)[1]
    np.testing.assert_allclose(grad, expected, rtol=1e-12)


def _strided(a: np.ndarray) -> np.ndarray:
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


LAYOUTS = {
    "fortran": np.asfortranarray,
    "channels_last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "strided": _strided,
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "transposed": lambda a: np.ascontiguousarray(np.swapaxes(a, 2, 3)).swapaxes(2, 3),
    "swapped_bytes": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "row_padded": lambda a: np.pad(a, [(0, 0), (0, 0), (0, 0), (0, 3)])[..., :-3],
    "unaligned": lambda a: (
        np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)
    ),
}


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(np.float32, np.uint8), (np.float64, np.float32), (np.float16, np.int64)],
    ids=["float32-uint8", "float64-float32", "float16-int64"],
)
@pytest.mark.parametrize("targets_layout", LAYOUTS)
@pytest.mark.parametrize("logits_layout", LAYOUTS)
def test_layout_does_not_matter(logits_layout, targets_layout, dtype, target):
    logits, targets = make((2, 3, 9, 31), dtype, target)
    expected, expected_grad = BCE_JACCARD.value_and_grad(logits, targets)
    got, grad = BCE_JACCARD.value_and_grad(
        LAYOUTS[logits_layout](logits), LAYOUTS[targets_layout](targets)
    )
    np.testing.assert_allclose(got, expected, rtol=3e-7)
    # The sums, and so the coefficients, are added up in another order.
    tolerance = (2e-3 if dtype is np.float16 else 1e-6) * float(np.abs(expected_grad).max())
    np.testing.assert_allclose(
        grad.astype(np.float64), expected_grad.astype(np.float64), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "unaligned"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=name_of)
def test_out_may_have_any_layout(layout, dtype):
    logits, targets = make((2, 3, 9, 31), dtype)
    expected = BCE_JACCARD.value_and_grad(logits, targets)[1]
    out = LAYOUTS[layout](np.zeros_like(logits))
    base = out.base if out.base is not None else out
    around = base.size - out.size
    assert BCE_JACCARD.value_and_grad(logits, targets, out=out)[1] is out
    np.testing.assert_array_equal(out, expected)
    assert np.count_nonzero(base) - np.count_nonzero(out) == 0, f"wrote to {around} other elements"


@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
def test_gradient_keeps_strides(dtype):
    logits, targets = make((2, 3, 9, 31), dtype)
    for change in (np.asfortranarray, LAYOUTS["channels_last"]):
        changed = change(logits)
        assert BCE_JACCARD.value_and_grad(changed, targets)[1].strides == changed.strides


@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1, 5000), (2, 3, 7, 11)], ids=str)
def test_out_may_be_the_logits(dtype, shape):
    logits, targets = make(shape, dtype)
    expected_value, expected = BCE_JACCARD.value_and_grad(logits, targets)
    value, grad = BCE_JACCARD.value_and_grad(logits, targets, out=logits)
    assert grad is logits
    assert value == expected_value
    np.testing.assert_array_equal(grad, expected)


def test_out_may_be_the_logits_by_another_name():
    """The stride of an axis of length 1 says nothing."""
    logits, targets = make((1, 1, 8, 8))
    expected = BCE_JACCARD.value_and_grad(logits, targets)[1]
    out = np.lib.stride_tricks.as_strided(logits, logits.shape, (4, 4, *logits.strides[2:]))
    BCE_JACCARD.value_and_grad(logits, targets, out=out)
    np.testing.assert_array_equal(logits, expected)


def test_out_may_be_wider_than_the_logits():
    logits, targets = make((1, 2, 3001), np.float16)
    out = np.empty(logits.shape, np.float32)
    BCE_JACCARD.value_and_grad(logits, targets, out=out)
    expected = BCE_JACCARD.value_and_grad(logits.astype(np.float32), targets)[1]
    np.testing.assert_array_equal(out, expected)


def test_read_only_and_memory_mapped_inputs(tmp_path):
    logits, targets = make((1, 1, 40, 50))
    expected, expected_grad = BCE_JACCARD.value_and_grad(logits, targets)
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    targets.flags.writeable = False
    value, grad = BCE_JACCARD.value_and_grad(mapped, targets)
    assert value == expected
    assert type(grad) is np.ndarray
    np.testing.assert_array_equal(grad, expected_grad)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 1, 0), (1, 1, 3, 0, 2)], ids=str)
def test_empty_arrays_give_zero(shape):
    logits, targets = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    value, grad, s = BCE_JACCARD.evaluate(logits, targets, track=("hard",))
    assert value == 0.0
    assert grad.shape == shape
    assert s.array.shape[:2] == shape[:2]
    assert np.isnan(s.jaccard_index())


@pytest.mark.parametrize("layout", ["NC", "N", "C", ""])
def test_layout_names_the_axes(layout):
    logits, targets = make((2, 3, 5, 7), np.float64)
    wanted = logits if layout == "NC" else logits[:, 0] if layout == "N" else logits[0]
    truth = targets if layout == "NC" else targets[:, 0] if layout == "N" else targets[0]
    if layout == "":
        wanted, truth = wanted[0], truth[0]
    value, grad = BCE_JACCARD.replace(layout=layout).value_and_grad(wanted, truth)
    lead = {"NC": (2, 3), "N": (2, 1), "C": (1, 3), "": (1, 1)}[layout]
    full = (*lead, 5, 7)
    expected, expected_grad = oracle.evaluate(
        BCE_JACCARD, wanted.reshape(full), truth.reshape(full)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, expected_grad.reshape(wanted.shape), rtol=1e-12)


def test_targets_may_lack_the_class_axis():
    logits, targets = make((2, 1, 5, 7))
    assert BCE_JACCARD(logits, targets[:, 0]) == BCE_JACCARD(logits, targets)


@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
def test_grad_scale_is_applied_before_rounding(dtype):
    logits, targets = make((1, 1, 4099), dtype)
    loss = 1e-5 * fs.BCE() + 1e-5 * fs.SoftJaccard()
    scale = 2.0**20
    got = loss.value_and_grad(logits, targets, grad_scale=scale)[1]
    exact = oracle.evaluate(loss, logits, targets)[1] * scale
    parts = scale * magnitude(loss, logits, targets)
    error, bound = ulp_error(got, exact, parts, dtype)
    assert error <= bound
    if dtype == np.float16:  # without it most of this gradient is not representable
        unscaled = loss.value_and_grad(logits, targets)[1]
        assert np.count_nonzero(got) > np.count_nonzero(unscaled)


def test_grad_scale_per_row():
    logits, targets = make((2, 3, 50), np.float64)
    loss = BCE_JACCARD.replace(reduction="none")
    scale = np.arange(6.0).reshape(2, 3)
    got = loss.value_and_grad(logits, targets, grad_scale=scale)[1]
    expected = loss.value_and_grad(logits, targets)[1] * scale[:, :, None]
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_verbs_agree_with_value_and_grad():
    logits, targets = make((2, 3, 5, 67))
    value, grad, s = BCE_JACCARD.evaluate(logits, targets, track=("hard",))
    assert BCE_JACCARD(logits, targets) == value == np.float32(BCE_JACCARD.value(s))
    np.testing.assert_array_equal(BCE_JACCARD.gradient(logits, targets, s), grad)
    part = BCE_JACCARD.gradient(logits[1:], targets[1:], s, rows=slice(1, 2))
    np.testing.assert_array_equal(part, grad[1:])


def test_repeated_runs_and_threads_give_the_same_bits(threads):
    logits, targets = make((2, 3, 40, 1003))
    results = []
    for count in (1, 2, 3, 7, None):
        fs.set_num_threads(count)
        value, grad, s = BCE_JACCARD.evaluate(logits, targets, track=("hard",))
        results.append((value.tobytes(), grad.tobytes(), s.array.tobytes()))
    assert len(set(results)) == 1


def test_term_values_and_weights_add_up():
    logits, targets = make((2, 3, 5, 67))
    loss = 0.5 * fs.BCE() + 2 * fs.SoftJaccard()
    s = loss.statistics(logits, targets)
    bce, jaccard = loss.term_values(s)
    np.testing.assert_allclose(loss.value(s), 0.5 * bce + 2 * jaccard, rtol=1e-15)
    np.testing.assert_allclose(bce, oracle.evaluate(fs.BCE(), logits, targets)[0], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_compare_pickle_and_print(loss):
    scope = {name: getattr(fs, name) for name in fs.__all__}
    assert eval(repr(loss), scope) == loss  # the formula is Python
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert hash(pickle.loads(pickle.dumps(loss))) == hash(loss)
    changed = loss.replace(ignore_index=255, reduction="sum")
    assert changed != loss
    assert eval(repr(changed), scope) == changed


def test_ml_dtypes_bfloat16_keeps_its_dtype():
    logits, targets = make((1, 1, 100), ml_dtypes.bfloat16)
    assert BCE_JACCARD.value_and_grad(logits, targets)[1].dtype == ml_dtypes.bfloat16


def test_a_read_only_scale_of_rows():
    logits, targets = make((1, 2, 9))
    scale = np.ones((1, 2))
    scale.flags.writeable = False
    loss = BCE_JACCARD.replace(reduction="none")
    _, grad = loss.value_and_grad(logits, targets, grad_scale=scale)
    np.testing.assert_array_equal(grad, loss.value_and_grad(logits, targets)[1])
