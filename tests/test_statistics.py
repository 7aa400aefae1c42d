"""How statistics combine, and how they are kept."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

import fastseg as fs
from cases import make
from fastseg_kernels import reference as ref

LOSS = fs.BCE() + fs.SoftJaccard()


def stats(seed: int = 0, samples: object = None, n: int = 2, **kwargs: object) -> fs.Statistics:
    logits, targets = make((n, 2, 33), np.float64, seed=seed)
    return LOSS.statistics(logits, targets, samples=samples, **kwargs)


def test_columns_hold_what_their_names_say():
    logits, targets = make((2, 3, 999), np.float64)
    s = (LOSS + fs.BCE(pos_weight=2.0)).statistics(logits, targets, track=("hard",))
    missed, false_alarms = ref.error_sums(logits, targets)
    pos = (targets * ref.softplus(-logits)).sum(2)
    neg = ((1 - targets) * ref.softplus(logits)).sum(2)
    tp, fp, fn, _ = ref.confusion_counts(logits, targets)
    expected = {
        "voxels": np.full((2, 3), 999.0), "count": np.full((2, 3), 999.0),
        "invalid": np.zeros((2, 3)), "targets_sum": targets.sum(2), "undefined": np.zeros((2, 3)),
        "true_positive_sum": (targets * ref.sigmoid(logits)).sum(2),
        "false_negative_sum": missed, "false_positive_sum": false_alarms,
        "bce_pos_sum": pos, "bce_neg_sum": neg, "bce_sum": pos + neg,
        "hard_true_positives": tp, "hard_false_positives": fp, "hard_false_negatives": fn,
    }  # fmt: skip
    assert {*s.names, "bce_sum"} == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(s[name], value, rtol=1e-13, err_msg=name)


def test_chunks_add_up_to_the_whole():
    logits, targets = make((1, 2, 40, 16, 16))
    whole = LOSS.statistics(logits, targets, track=("hard",), samples="v")
    chunks = [
        LOSS.statistics(
            logits[:, :, i : i + 7], targets[:, :, i : i + 7], track=("hard",), samples="v"
        )
        for i in range(0, 40, 7)
    ]
    total = sum(chunks)
    assert total.samples == ("v",)
    np.testing.assert_allclose(total.array, whole.array, rtol=1e-12)


def test_add_refuses_unnamed_and_different_samples():
    with pytest.raises(ValueError, match="do not say whose they are"):
        stats() + stats()
    with pytest.raises(ValueError, match=r"same samples, got \('a', 'b'\) and \('a', 'c'\)"):
        stats(samples=["a", "b"]) + stats(samples=["a", "c"])
    with pytest.raises(ValueError, match="same samples and classes"):
        stats().add_voxels(stats(n=1))
    with pytest.raises(ValueError, match="same columns"):
        stats().add_voxels(stats(track=("hard",)))
    with pytest.raises(TypeError, match="unsupported operand"):
        stats() + 1.0
    joined = stats(1).add_voxels(stats(2))
    np.testing.assert_array_equal(joined.array, stats(1).array + stats(2).array)


def test_concatenate_joins_samples():
    logits, targets = make((5, 2, 33), np.float64)
    whole = LOSS.statistics(logits, targets)
    parts = [LOSS.statistics(logits[i:j], targets[i:j]) for i, j in ((0, 2), (2, 3), (3, 5))]
    joined = fs.concatenate_statistics(parts)
    assert joined == whole
    assert LOSS.value(joined) == LOSS.value(whole)
    with pytest.raises(ValueError, match="at least one"):
        fs.concatenate_statistics([])
    with pytest.raises(ValueError, match="samples a come twice"):
        fs.concatenate_statistics([stats(samples=["a", "b"]), stats(samples=["c", "a"])])
    with pytest.raises(ValueError, match="same columns and classes"):
        fs.concatenate_statistics([stats(), stats(track=("hard",))])
    joined = fs.concatenate_statistics([stats(samples=["a", "b"]), stats(samples=["c", "d"])])
    assert joined.samples == ("a", "b", "c", "d")


def test_per_sample_loss_of_two_halves_differs_from_their_sum():
    """The trap that ``+`` guards: four samples on two ranks, added instead of joined."""
    logits, targets = make((4, 1, 33), np.float64)
    targets[2:] = 0
    targets[2:, :, :3] = 1
    first, second = (LOSS.statistics(logits[i : i + 2], targets[i : i + 2]) for i in (0, 2))
    right = LOSS.value(fs.concatenate_statistics([first, second]))
    assert right == LOSS.value(LOSS.statistics(logits, targets))
    assert abs(LOSS.value(first.add_voxels(second)) - right) > 1e-3


def test_over_batch_equals_batch_scope():
    logits, targets = make((3, 2, 33), np.float64)
    s = LOSS.statistics(logits, targets)
    got = fs.SoftJaccard().value(s.over_batch())
    np.testing.assert_allclose(got, fs.SoftJaccard(scope="batch").value(s), rtol=1e-14)


def test_gradient_of_rows_uses_the_whole():
    logits, targets = make((4, 2, 33), np.float64)
    loss = fs.SoftJaccard(scope="batch") + fs.BCE()
    s = loss.statistics(logits, targets)
    expected = loss.gradient(logits, targets, s)
    got = np.concatenate(
        [
            loss.gradient(logits[i : i + 2], targets[i : i + 2], s, rows=slice(i, i + 2))
            for i in (0, 2)
        ]
    )
    np.testing.assert_array_equal(got, expected)


def test_scores_of_statistics_without_the_column_of_invalid_voxels():
    names = ["count", *(f"hard_{n}" for n in ("true_positives", "false_positives"))]
    names += ["hard_false_negatives", "undefined"]
    s = fs.Statistics(np.array([[[10.0, 3.0, 1.0, 1.0, 0.0]]]), names)
    assert s.jaccard_index() == 0.6


def test_any_loss_takes_statistics_with_enough_families():
    logits, targets = make((2, 2, 33), np.float64)
    s = (fs.BCE(pos_weight=2.0) + fs.SoftDice()).statistics(logits, targets)
    for loss in (fs.BCE(), fs.SoftJaccard(), fs.Tversky(alpha=0.1), fs.BCE(pos_weight=9.0)):
        np.testing.assert_allclose(loss.value(s), loss(logits, targets), rtol=1e-14)
    with pytest.raises(ValueError, match=r"do not hold true_positive_sum.*track=\('overlap',\)"):
        fs.SoftJaccard().value(fs.BCE().statistics(logits, targets))
    with pytest.raises(ValueError, match=r"track=\('hard',\)"):
        s.jaccard_index()


@pytest.mark.parametrize(
    "copied",
    [
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: fs.Statistics.from_json(s.to_json()),
        copy.deepcopy,
    ],
    ids=["pickle", "json", "deepcopy"],
)
def test_statistics_survive_storage_exactly(copied):
    s = stats(samples=["a", "b"], track=("hard",))
    assert copied(s) == s
    assert hash(copied(s)) == hash(s)
    odd = fs.Statistics(np.array([[[np.nan, np.inf, 0.1, -np.inf]]]), s.names[:4])
    np.testing.assert_array_equal(copied(odd).array, odd.array)
    empty = fs.Statistics(np.zeros((0, 2, 4)), s.names[:4])
    assert copied(empty) == empty


def test_equal_statistics_have_equal_hashes():
    """Also where a NaN has another sign, as it does after JSON, or a zero."""
    array = np.array([[[2.0, 2.0, 0.0, -np.nan, -0.0]]])
    s = fs.Statistics(array, ("voxels", "count", "invalid", "targets_sum", "bce_sum"))
    other = fs.Statistics.from_json(s.to_json())
    positive = fs.Statistics(np.abs(array), s.names)
    assert s == other == positive
    assert hash(s) == hash(other) == hash(positive)


def test_bce_is_not_counted_twice():
    names = ("voxels", "count", "invalid", "targets_sum", "bce_sum", "bce_pos_sum", "bce_neg_sum")
    s = fs.Statistics(np.array([[[2.0, 2.0, 0.0, 1.0, 3.0, 1.0, 2.0]]]), names)
    assert fs.BCE().value(s) == 1.5


def test_json_is_strict_and_bad_documents_are_refused():
    json.loads(stats().to_json(), parse_constant=lambda name: pytest.fail(name))
    with pytest.raises(ValueError, match="not a JSON document of Statistics"):
        fs.Statistics.from_json("{}")


def test_statistics_are_immutable():
    s = stats()
    with pytest.raises(AttributeError, match="immutable"):
        s.names = ()
    with pytest.raises(ValueError, match="read-only"):
        s.array[0] = 0
    with pytest.raises(KeyError, match="no column 'nonsense'"):
        s["nonsense"]


def test_scores_equal_the_reference():
    logits, targets = make((3, 2, 999))
    s = LOSS.evaluate(logits, targets, track=("hard",))[2]
    tp, fp, fn, tn = ref.confusion_counts(logits, targets)
    np.testing.assert_array_equal(
        s.jaccard_index(reduction="none"), ref.hard_jaccard_index(tp, fp, fn)
    )
    np.testing.assert_array_equal(s.dice_score(reduction="none"), ref.hard_dice_score(tp, fp, fn))
    for name, expected in zip(("tp", "fp", "fn", "tn"), (tp, fp, fn, tn), strict=True):
        np.testing.assert_array_equal(s.counts()[name], expected)
    assert s.jaccard_index() == ref.hard_jaccard_index(tp, fp, fn).mean()


def test_words_are_flushed_before_they_are_full():
    """A task counts at most 2^20 voxels of a row before it adds its words to the row's."""
    size = 3 * 2**20 + 1234
    # Hinge errors just below the edge of a bin, whose sums are as large as they can be.
    logits = np.full((1, 1, size), 1.0 - 1.9374, np.float32)
    logits[..., ::7] = np.float32(0.3)
    targets = np.ones(logits.shape, np.uint8)
    fs.set_num_threads(1)
    try:
        loss = fs.LovaszHinge(bins=1024)
        s = loss.statistics(logits, targets, track=("curve",))
    finally:
        fs.set_num_threads(None)
    low, high = loss.bounds(s)
    errors = np.sort(1.0 - logits[0, 0].astype(np.float64))[::-1]
    exact = errors.mean()  # all foreground: every weight is 1 / P
    assert low - 1e-9 <= exact <= high + 1e-9
    assert high - low < 1e-3
    counted = sum(s[name].sum() for name in s.names if name.startswith("logit_curve_foreground"))
    assert counted == size


def test_sums_of_two_gammas_are_refused():
    logits, targets = make((1, 1, 9))
    two, three = (fs.FocalBCE(gamma=g).statistics(logits, targets) for g in (2.0, 3.0))
    with pytest.raises(ValueError, match="columns"):
        two.add_voxels(three)
    with pytest.raises(ValueError, match="must be made with this gamma"):
        fs.FocalBCE(gamma=3.0).value(two)
    both = np.concatenate([two.array, three.array[..., -2:]], axis=2)
    with pytest.raises(ValueError, match="statistics hold focal sums of one gamma, got"):
        fs.Statistics(both, two.names + three.names[-2:])
    for name in ("focal_bce_pos_sum_x", "focal_bce_pos_sum_2"):
        with pytest.raises(ValueError, match="names must have a number as gamma"):
            fs.Statistics(two.array[..., :5], (*two.names[:4], name))
    assert fs.FocalBCE(gamma=-0.0) + fs.FocalBCE(gamma=0.0)


@pytest.mark.parametrize(
    ("loss", "track"),
    [
        (fs.BCE(), "ce"),
        (fs.CrossEntropy(), "bce"),
        (fs.CrossEntropy(), "bce_flipped"),
        (fs.BCE().replace(activation=None), "bce_flipped"),
    ],
)
def test_sums_that_an_activation_does_not_have_are_refused(loss, track):
    with pytest.raises(ValueError, match=f"track names sums that there are not with .*{track}"):
        loss.families((track,))
