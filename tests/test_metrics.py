"""Hard scores against their definition."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import fastseg as fs
from cases import LOGIT_DTYPES, make, name_of
from fastseg_kernels import reference as ref


def expected_counts(pred: np.ndarray, true: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    axes = tuple(range(2, pred.ndim))
    pairs = {"tp": (1, 1), "fp": (1, 0), "fn": (0, 1), "tn": (0, 0)}
    return {name: ((pred == p) & (true == t) & valid).sum(axes) for name, (p, t) in pairs.items()}


@pytest.mark.parametrize("threshold", [None, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("target", [np.uint8, bool, np.int64, np.float32], ids=name_of)
@pytest.mark.parametrize("dtype", LOGIT_DTYPES, ids=name_of)
def test_logits_and_probabilities_are_thresholded(dtype, target, threshold):
    logits, targets = make((2, 3, 7, 331), dtype, target)
    true = targets.astype(np.float64) >= 0.5
    valid = np.ones(logits.shape, bool)
    level = 0.5 if threshold is None else threshold
    with np.errstate(divide="ignore"):
        cut = (
            np.float32(np.log(level) - np.log1p(-level))
            if dtype != np.float64
            else np.log(level) - np.log1p(-level)
        )
    expected = expected_counts(logits.astype(np.float64) >= cut, true, valid)
    got = fs.stat_scores(logits, targets, threshold=threshold)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    probs = ref.sigmoid(logits.astype(np.float64)).astype(dtype)
    level = np.float64(level) if dtype == np.float64 else np.float32(level)
    expected = expected_counts(probs.astype(level.dtype) >= level, true, valid)
    got = fs.stat_scores(probs, targets, kind="probs", threshold=threshold)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_half_probability_is_foreground():
    assert fs.jaccard_index(np.zeros((1, 1, 3)), np.ones((1, 1, 3), bool)) == 1.0
    assert fs.jaccard_index(np.full((1, 1, 3), 0.5), np.ones((1, 1, 3), bool), kind="probs") == 1.0


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.int64, np.uint64, np.float32, bool], ids=name_of
)
@pytest.mark.parametrize("ignore", [None, 0, 255])
def test_labels_equal_one_hot_counts(ignore, dtype):
    rng = np.random.default_rng(0)
    classes = 2 if dtype is bool else 5
    pred = rng.integers(0, classes, (3, 9, 1013)).astype(dtype)
    true = rng.integers(0, classes, (3, 9, 1013)).astype(dtype)
    mask = rng.random(pred.shape) < 0.8
    if ignore == 255 and dtype is not bool:
        true[rng.random(pred.shape) < 0.1] = 255
    valid = mask & (true != ignore) if ignore is not None else mask
    one_hot = [np.stack([(a == k) for k in range(classes)], axis=1) for a in (pred, true)]
    wide = np.broadcast_to(valid[:, None], one_hot[0].shape)
    expected = expected_counts(*one_hot, wide)
    kind = {"kind": "labels"}
    got = fs.stat_scores(pred, true, num_classes=classes, ignore_index=ignore, mask=mask, **kind)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    score = fs.jaccard_index(
        pred, true, num_classes=classes, ignore_index=ignore, mask=mask, reduction="none", **kind
    )
    jaccard = ref.hard_jaccard_index(expected["tp"], expected["fp"], expected["fn"])
    np.testing.assert_array_equal(score, jaccard)


def test_binary_labels_give_the_foreground():
    pred, true = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    assert fs.jaccard_index(pred, true) == 1 / 3
    assert fs.dice_score(pred.astype(bool), true.astype(bool)) == 0.5
    assert fs.jaccard_index(pred[0], true[0], layout="") == 1 / 3


def test_empty_rows():
    nothing = np.zeros((1, 4), np.uint8)
    something = np.array([[1, 1, 0, 0]], np.uint8)
    assert np.isnan(fs.jaccard_index(nothing, nothing))
    assert fs.jaccard_index(nothing, nothing, empty=1.0) == 1.0
    both = np.concatenate([nothing, something])
    assert fs.jaccard_index(both, both) == 1.0  # the mean leaves the undefined row out
    assert np.isnan(fs.jaccard_index(both, both, reduction="none")[0, 0])
    assert fs.jaccard_index(both, both, reduction="sum", empty=0.0) == 1.0
    assert fs.jaccard_index(nothing, something) == 0.0


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_nan_prediction_is_not_dropped(kind):
    logits, targets = make((2, 1, 500))
    pred = logits if kind == "logits" else ref.sigmoid(logits).astype(np.float32)
    pred[1, 0, 7] = np.nan
    rows = fs.jaccard_index(pred, targets, kind=kind, reduction="none")
    assert np.isfinite(rows[0, 0])
    assert np.isnan(rows[1, 0])
    assert np.isnan(fs.jaccard_index(pred, targets, kind=kind))


def test_statistics_of_a_training_step_give_the_same_score():
    logits, targets = make((2, 3, 999))
    s = fs.BCE().evaluate(logits, targets, track=("hard",))[2]
    assert s.jaccard_index() == fs.jaccard_index(logits, targets)
    assert s.dice_score() == fs.dice_score(logits, targets)
    for name, count in fs.stat_scores(logits, targets).items():
        np.testing.assert_array_equal(s.counts()[name], count)


def test_torch_and_bfloat16_predictions():
    logits, targets = make((2, 3, 999))
    expected = fs.jaccard_index(logits, targets)
    assert fs.jaccard_index(torch.from_numpy(logits), torch.from_numpy(targets)) == expected
    half = logits.astype(ml_dtypes.bfloat16)
    assert fs.jaccard_index(half, targets) == fs.jaccard_index(half.astype(np.float32), targets)


@pytest.mark.parametrize("layout", ["fortran", "strided", "swapped"])
def test_label_layouts(layout):
    rng = np.random.default_rng(0)
    pred, true = (rng.integers(0, 4, (2, 31, 33), dtype=np.int32) for _ in range(2))
    expected = fs.stat_scores(pred, true, num_classes=4)
    change = {
        "fortran": np.asfortranarray,
        "strided": lambda a: np.repeat(a, 2, axis=2)[..., ::2],
        "swapped": lambda a: a.astype(">i4"),
    }[layout]
    got = fs.stat_scores(change(pred), true, num_classes=4)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_ignored_label_is_not_what_is_no_label():
    """-1 stands for nothing but -1."""
    pred, targets = np.ones((1, 4), np.uint8), np.array([[1.0, -1.0, 0.5, np.nan]])
    with pytest.raises(ValueError, match="2 of 3 valid voxels do not"):
        fs.stat_scores(pred, targets, ignore_index=-1)


def test_threshold_below_the_smallest_float32_leaves_padding_out():
    probs, targets = np.zeros((1, 1, 5), np.float32), np.zeros((1, 1, 5), np.uint8)
    scores = fs.stat_scores(probs, targets, kind="probs", threshold=1e-50)
    assert {name: int(count[0, 0]) for name, count in scores.items()} == {
        "tp": 0, "fp": 0, "fn": 0, "tn": 5,
    }  # fmt: skip


def test_wrong_target_of_a_long_row_is_found_at_once():
    targets = np.zeros((1, 1, 3_000_000), np.uint8)
    targets[0, 0, -1] = 7
    with pytest.raises(ValueError, match=r"got 7 \(invalid voxels: 1 of 3000000\)"):
        fs.jaccard_index(np.zeros(targets.shape, np.float32), targets)


@pytest.mark.parametrize("classes", [2, 32, 33, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_of_few_and_of_many_classes(classes, masked):
    """Up to 32 classes pairs of labels are counted, and each label from there on."""
    rng = np.random.default_rng(classes)
    shape = (3, 41, 53, 29)
    pred, truth = (rng.integers(0, classes, shape).astype(np.int16) for _ in range(2))
    mask = rng.random(shape) < 0.5 if masked else None
    keep = (truth != 1) & (True if mask is None else mask)
    pred[~keep] = -7  # what does not count may be anything
    got = fs.stat_scores(pred, truth, num_classes=classes, ignore_index=1, mask=mask)
    for label in range(classes):
        a, b = pred == label, truth == label
        for name, where in (("tp", a & b), ("fp", a & ~b), ("fn", ~a & b), ("tn", ~a & ~b)):
            expected = (where & keep).sum(axis=(1, 2, 3))
            np.testing.assert_array_equal(got[name][:, label], expected)
    pred[0, 0, 0, 0], truth[0, 0, 0, 0] = classes, 0
    if mask is not None:
        mask[0, 0, 0, 0] = True
    with pytest.raises(ValueError, match=rf"pred must hold labels in \[0, {classes}\), 1 of"):
        fs.stat_scores(pred, truth, num_classes=classes, ignore_index=1, mask=mask)
