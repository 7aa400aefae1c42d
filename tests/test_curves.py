"""Hard scores at every threshold, from one read."""

import numpy as np
import pytest

import fastseg as fs
from cases import make
from fastseg_kernels.reference import jaccard_curve, softmax

BCE = fs.BCE()


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(np.float32, np.uint8), (np.float64, np.float32), (np.float16, np.int64)],
)
def test_scores_at_every_threshold_of_logits_are_those_of_the_hard_index(dtype, target):
    logits, targets = make((2, 3, 41, 53), dtype, target)
    logits[0, 0, 0] = np.linspace(-20, 20, 53)  # beyond both ends, and on edges
    logits[1, 0, 0, :3] = [0.0, -0.0, 1 / 32]
    curve = BCE.statistics(logits, targets, track=("curve",)).jaccard_curve()
    assert curve.thresholds.shape == (1023,) and curve.thresholds[511] == 0
    truth = targets >= 0.5
    jaccard, dice = jaccard_curve(logits.astype(np.float64), truth, curve.thresholds)
    np.testing.assert_array_equal(curve.jaccard_index, jaccard)
    np.testing.assert_array_equal(curve.dice_score, dice)
    hard = BCE.statistics(logits, targets, track=("hard",)).jaccard_index(reduction="none")
    np.testing.assert_array_equal(curve.jaccard_index[:, :, 511], hard)


def test_probabilities_and_classes():
    probs = fs.sigmoid(make((2, 3, 41, 53), np.float32)[0])
    targets = make((2, 3, 41, 53))[1]
    loss = fs.SoftJaccard().replace(activation=None)
    curve = loss.statistics(probs, targets, track=("curve",)).jaccard_curve()
    jaccard, _ = jaccard_curve(probs.astype(np.float64), targets, curve.thresholds)
    np.testing.assert_array_equal(curve.jaccard_index, jaccard)
    for k in (0, 300, 511, 700, 1022):
        level = float(curve.probabilities[k])
        got = fs.jaccard_index(probs, targets, kind="probs", threshold=level, reduction="none")
        np.testing.assert_array_equal(got, curve.jaccard_index[:, :, k])
    logits, labels = make((2, 4, 1000), np.float64, np.int64)[0], np.arange(2000).reshape(2, -1) % 3
    s = fs.CrossEntropy().statistics(logits, labels, track=("curve", "hard"))
    one_hot = labels[:, None] == np.arange(4)[:, None]
    curve = s.jaccard_curve()
    jaccard, _ = jaccard_curve(softmax(logits), one_hot, curve.thresholds)
    np.testing.assert_allclose(curve.jaccard_index, jaccard, rtol=1e-2)  # a bin's voxels at an edge
    assert np.mean(curve.jaccard_index == jaccard) > 0.999
    soft = one_hot.astype(np.float64) * 0.4 + 0.1
    also = fs.CrossEntropy().statistics(logits, soft, track=("curve",)).jaccard_curve()
    np.testing.assert_array_equal(also.jaccard_index, curve.jaccard_index)


def test_curves_merge_and_leave_out_what_is_left_out():
    logits, targets = make((1, 2, 64, 256))
    rng = np.random.default_rng(0)
    mask = rng.random(logits.shape) < 0.7
    dirty = np.where(mask, logits, np.float32(np.nan))
    whole = BCE.statistics(dirty, targets, mask=mask, track=("curve",), samples="a")
    parts = [
        BCE.statistics(
            dirty[:, :, k : k + 5], targets[:, :, k : k + 5], mask=mask[:, :, k : k + 5],
            track=("curve",), samples="a",
        )
        for k in range(0, 64, 5)
    ]  # fmt: skip
    first = whole.names.index("logit_curve_undefined")
    np.testing.assert_array_equal(sum(parts).array[:, :, first:], whole.array[:, :, first:])
    assert whole.array[:, :, first:].sum() == mask.sum()
    kept = logits[0, 0][mask[0, 0]].reshape(1, 1, -1), targets[0, 0][mask[0, 0]].reshape(1, 1, -1)
    alone = BCE.statistics(*kept, track=("curve",))
    np.testing.assert_array_equal(alone.array[0, 0, first:], whole.array[0, 0, first:])
    again = fs.Statistics.from_json(whole.to_json())
    np.testing.assert_array_equal(
        again.jaccard_curve().jaccard_index, whole.jaccard_curve().jaccard_index
    )


def test_channels_last_and_bits(threads):
    logits, targets = make((2, 3, 40, 503))
    expected = BCE.statistics(logits, targets, track=("curve",))
    last = np.ascontiguousarray(np.moveaxis(logits, 1, -1))
    for count in (1, 2):
        fs.set_num_threads(count)
        got = BCE.statistics(np.moveaxis(last, -1, 1), targets, track=("curve",))
        np.testing.assert_equal(got.jaccard_curve(), expected.jaccard_curve())
        assert BCE.statistics(logits, targets, track=("curve",)) == expected


def test_the_best_threshold():
    rng = np.random.default_rng(0)
    targets = (rng.random((2, 1, 5000)) < 0.3).astype(np.uint8)
    logits = (targets * 2.0 - 3.0 + rng.normal(0, 0.2, targets.shape)).astype(np.float32)
    threshold, score = BCE.statistics(logits, targets, track=("curve",)).jaccard_curve().best()
    assert -2.5 < threshold < -1.5 and score == 1.0
    empty = BCE.statistics(logits - 40, targets * 0, track=("curve",)).jaccard_curve().best()
    assert np.isnan(empty).all()
    logits[0, 0, 5] = np.nan
    curve = BCE.statistics(logits, targets, track=("curve",)).jaccard_curve()
    assert np.isnan(curve.jaccard_index[0]).all() and not np.isnan(curve.jaccard_index[1]).any()


def test_curve_errors():
    logits, targets = make((1, 2, 300))
    with pytest.raises(ValueError, match=r"hold no curve: ask for track=\('curve',\)"):
        BCE.statistics(logits, targets).jaccard_curve()
    s = BCE.statistics(logits, targets, track=("curve",))
    turned = fs.Statistics(s.array[:, :, ::-1], s.names[::-1])
    with pytest.raises(ValueError, match="columns of logit_curve must lie in their order"):
        turned.jaccard_curve()
    with pytest.raises(ValueError, match="track must be a tuple of"):
        BCE.statistics(logits, targets, track=("logit_curve",))
    loss = fs.SoftJaccard().replace(activation="softmax")
    with pytest.raises(
        ValueError, match="with softmax a curve cannot be counted with a weight_map"
    ):
        loss.statistics(
            logits, targets[:, 0], weight_map=np.ones((1, 300), np.float32), track=("curve",)
        )
