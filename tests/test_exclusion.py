"""Voxels that do not count, and targets that are not targets."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fastseg as fs
import oracle
from cases import LOGIT_DTYPES, LOSSES, make, name_of

LOSS = fs.BCE() + fs.SoftJaccard()


def mask_like(logits: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    return np.random.default_rng(9).random(shape or logits.shape) < 0.7


def close(loss, logits, targets, **kwargs):
    value, grad = loss.value_and_grad(logits, targets, **kwargs)
    expected, expected_grad = oracle.evaluate(loss, logits, targets, **kwargs)
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-7)
    scale = float(np.abs(expected_grad).max())
    np.testing.assert_allclose(
        grad.astype(np.float64), expected_grad, rtol=1e-2 if grad.itemsize == 2 else 1e-5,
        atol=(1e-2 if grad.itemsize == 2 else 1e-6) * scale,
    )  # fmt: skip


@pytest.mark.parametrize("target", [np.uint8, np.float32], ids=name_of)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_mask_equals_reference(loss, target):
    logits, targets = make((2, 3, 7, 331), np.float32, target)
    close(loss, logits, targets, mask=mask_like(logits))


@pytest.mark.parametrize("target", [np.uint8, np.int32, np.float32, bool], ids=name_of)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_weight_map_equals_reference(loss, target):
    logits, targets = make((2, 3, 7, 331), np.float32, target)
    weights = np.random.default_rng(9).uniform(0, 3, logits.shape).astype(np.float32)
    close(loss, logits, targets, weight_map=weights)
    close(loss, logits, targets, weight_map=weights, mask=mask_like(logits))


@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "target", [np.uint8, np.int16, np.int64, np.float32, ml_dtypes.bfloat16], ids=name_of
)
@pytest.mark.parametrize("ignore", [3, 100])
def test_ignore_index_equals_reference(ignore, target, dtype):
    logits, targets = make((2, 3, 7, 331), dtype, target)
    targets[~mask_like(logits)] = ignore
    close(LOSS.replace(ignore_index=ignore), logits, targets)
    close(
        LOSS.replace(ignore_index=ignore), logits, targets,
        weight_map=np.full(logits.shape, 0.5, np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    "target", [np.uint8, np.int8, np.int64, np.float32, np.float64], ids=name_of
)
@pytest.mark.parametrize("positive", ["nonzero", 0, 1, 4])
@pytest.mark.parametrize("ignore", [None, 4, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_positive_maps_label_volumes(weighted, ignore, positive, target):
    logits, _ = make((2, 1, 7, 331))
    labels = np.random.default_rng(3).integers(0, 6, logits.shape).astype(target)
    loss = LOSS.replace(positive=positive, ignore_index=ignore)
    extra = {"weight_map": np.full(logits.shape, 2.0)} if weighted else {}
    close(loss, logits, labels, **extra)


def test_negative_and_large_labels():
    logits = np.zeros((1, 1, 4), np.float32)
    for dtype, label in ((np.int8, -1), (np.int64, -(2**60) - 1), (np.uint64, 2**64 - 1)):
        labels = np.array([[[0, 1, 1, 0]]], dtype)
        labels[0, 0, 3] = label
        s = LOSS.replace(ignore_index=label).statistics(logits, labels)
        assert s["count"][0, 0] == 3
        s = LOSS.replace(positive=label).statistics(logits, labels)
        assert s["targets_sum"][0, 0] == 1
    # A label that the dtype cannot hold excludes nothing (2^64 - 1 has the bits of -1).
    labels = np.array([[[0, 1, 1, 2**64 - 1]]], np.uint64)
    with pytest.raises(ValueError, match="got 18446744073709551615"):
        LOSS.replace(ignore_index=-1).statistics(logits, labels)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 67), (2, 1, 5, 67), (2, 5, 67)], ids=["full", "one class", "no class axis"]
)
def test_mask_and_weights_broadcast_over_classes(shape):
    logits, targets = make((2, 3, 5, 67), np.float64)
    mask = mask_like(logits, shape)
    weights = np.random.default_rng(4).uniform(0, 2, shape)
    full = (2, 1, 5, 67) if len(shape) == 3 else shape
    got, grad = LOSS.value_and_grad(logits, targets, mask=mask, weight_map=weights)
    expected, expected_grad = oracle.evaluate(
        LOSS, logits, targets, mask=mask.reshape(full), weight_map=weights.reshape(full)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("activation", ["sigmoid", None], ids=str)
@pytest.mark.parametrize("how", ["mask", "ignore_index", "weight_map"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_stored_at_excluded_voxels_does_not_matter(poison, how, activation):
    logits, targets = make((1, 1, 3001))
    if activation is None:
        logits = np.abs(logits) / 20
    keep = mask_like(logits)
    loss, extra = LOSS.replace(activation=activation), {}
    if how == "ignore_index":
        targets = np.where(keep, targets, 255).astype(np.uint8)
        loss = loss.replace(ignore_index=255)
    else:
        extra = {"mask": keep}
    if how == "weight_map":
        extra["weight_map"] = np.where(keep, 1.0, poison).astype(np.float32)
    clean, clean_grad = loss.value_and_grad(logits, targets, **extra)
    poisoned = np.where(keep, logits, np.float32(poison))
    value, grad = loss.value_and_grad(poisoned, targets, **extra)
    assert value == clean
    np.testing.assert_array_equal(grad, clean_grad)
    assert np.all(grad[~keep] == 0)


def test_excluded_gradient_is_zero_even_where_the_loss_is_nan():
    logits, targets = make((1, 1, 300))
    keep = mask_like(logits)
    logits[np.nonzero(keep)[0][0], 0, np.nonzero(keep[0, 0])[0][0]] = np.nan
    value, grad = LOSS.value_and_grad(logits, targets, mask=keep)
    assert np.isnan(value)
    assert np.all(grad[~keep] == 0)


def test_everything_excluded_is_zero():
    logits, targets = make((2, 1, 300))
    nothing = np.zeros(logits.shape, bool)
    value, grad = LOSS.value_and_grad(logits, targets, mask=nothing)
    assert value == 0.0
    assert np.all(grad == 0)
    half = nothing.copy()
    half[0] = True
    assert LOSS(logits, targets, mask=half) == LOSS(logits[:1], targets[:1])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([0, 255, 255], np.uint8), r"0 or 1, got 255 \(invalid voxels: 2 of 3\)"),
        (np.array([0, 2, 1], np.int64), r"0 or 1, got 2 \(invalid voxels: 1 of 3\)"),
        (np.array([0, -1, 1], np.int8), r"0 or 1, got -1 \(invalid voxels: 1 of 3\)"),
        (np.array([0, 1.5, 1], np.float32), r"in \[0, 1\], got 1.5 \(invalid voxels: 1 of 3\)"),
        (np.array([0, -0.25, 1], np.float64), r"in \[0, 1\], got -0.25 \(invalid voxels: 1 of 3\)"),
        (np.array([0, np.nan, 1], np.float16), r"in \[0, 1\], got nan \(invalid voxels: 1 of 3\)"),
        (np.array([0, 3, 1], "bfloat16"), r"in \[0, 1\], got 3.0 \(invalid voxels: 1 of 3\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pad", [0, 5000], ids=["short", "long"])
def test_invalid_targets_are_counted_and_named(targets, message, pad):
    targets = np.concatenate([np.zeros(pad, targets.dtype), targets])[None, None]
    logits = np.zeros(targets.shape, np.float32)
    with pytest.raises(ValueError, match=message.replace("of 3", f"of {3 + pad}")) as error:
        LOSS.value_and_grad(logits, targets)
    wrong, said = float(targets[0, 0, pad + 1]), str(error.value)
    assert ('positive="nonzero"' in said) == (wrong in (255, 2, 3))
    assert ("ignore_index=-1" in said) == (wrong == -1)
    assert ("arguments exchanged" in said) == (wrong in (1.5, -0.25))
    with pytest.raises(ValueError, match=message.split(" \\(")[0]):
        LOSS(logits, targets, weight_map=np.ones(targets.shape, np.float32))


def test_0_255_masks_work_as_the_message_says():
    logits, targets = make((1, 1, 300))
    expected = LOSS(logits, targets)
    assert LOSS.replace(positive="nonzero")(logits, targets * 255) == expected
    assert LOSS.replace(positive=255)(logits, targets * 255) == expected


def test_invalid_probabilities_are_named():
    probs, targets = np.array([[[0.5, 1.5]]], np.float32), np.array([[[0, 1]]])
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got 1.5"):
        LOSS.replace(activation=None)(probs, targets)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ["sigmoid", None], ids=str)
def test_weight_0_leaves_a_voxel_out_whatever_is_stored_there(activation, junk):
    logits = np.array([[[0.5, 0.25, 0.75, 0.5]]], np.float32)
    targets = np.array([[[1, 0, 1, 0]]], np.uint8)
    weights = np.array([[[1.0, 0.0, 2.0, 1.0]]], np.float32)
    loss = (fs.BCE(pos_weight=2.0) + fs.SoftJaccard()).replace(activation=activation)
    expected, expected_grad = loss.value_and_grad(logits, targets, weight_map=weights)
    if activation == "sigmoid" or np.isnan(junk):  # other values outside [0, 1] are errors
        logits[0, 0, 1] = junk
    value, grad = loss.value_and_grad(logits, targets, weight_map=weights)
    assert value == expected
    np.testing.assert_array_equal(grad, expected_grad)
    assert grad[0, 0, 1] == 0.0


def test_labels_past_63_bits():
    """uint64 labels are compared by their bits, floats by their value."""
    logits, last = np.zeros((1, 1, 3)), 2**64 - 1
    ignoring = fs.BCE().replace(ignore_index=last)
    targets = np.array([[[last, 7, 1]]], np.uint64)
    with pytest.raises(ValueError, match=r"got 7 \(invalid voxels: 1 of 2\)"):
        ignoring(logits, targets)
    half = fs.BCE().replace(ignore_index=2**63)
    assert half(logits, np.array([[[2.0**63, 0.0, 1.0]]])) == fs.BCE()(
        logits[:, :, :2], targets[:, :, 2:].repeat(2, 2)
    )
