"""What the two passes on the CPU take shortcuts for: the same bits come by the long way."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastseg as fs
from fastseg_kernels.cpu import passes

LOSSES = {
    "bce and jaccard": fs.BCE() + fs.SoftJaccard(),
    "pos_weight": fs.BCE(pos_weight=3.0),
    "l1": fs.SoftJaccard(form="l1") + fs.BCE(),
    "squared": fs.SoftDice(form="squared"),
    "tversky": fs.Tversky(alpha=0.3, beta=0.7),
    "smoothed": fs.BCE(label_smoothing=0.1) + fs.SoftJaccard(),
    "focal": fs.FocalBCE(gamma=2.0),
    "bins": fs.LovaszHinge(bins=1024) + fs.BCE(),
}
KEPT = {"bce and jaccard", "pos_weight", "l1", "squared", "tversky"}
SPECIAL = (np.inf, -np.inf, 0.0, -0.0, 1e-30, -1e-30, 87.7, -87.7, 1e30, -1e30)


def volume(voxels: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(voxels)
    logits = rng.normal(0, 4, (2, 3, voxels)).astype(dtype)
    places = rng.choice(voxels, min(voxels, len(SPECIAL)), replace=False)
    logits[..., places] = SPECIAL[: len(places)]
    return logits, rng.random(logits.shape) < 0.4


BITS = [(name, "float32") for name in ("bce and jaccard", "pos_weight", "squared")]


@pytest.mark.parametrize(("name", "dtype"), [*BITS, ("bce and jaccard", "float64")])
def test_value_and_grad_are_the_three_verbs(name, dtype):
    loss = LOSSES[name]
    for voxels in (1, 255, 256, 257, 8191, 20000):
        logits, targets = volume(voxels, dtype)
        s = loss.statistics(logits, targets)
        value, grad, made = loss.evaluate(logits, targets.view(np.uint8))
        np.testing.assert_array_equal(made.array, s.array)
        np.testing.assert_array_equal(value, loss.value(s).astype(dtype))
        np.testing.assert_array_equal(grad, loss.gradient(logits, targets, s))
        over_itself = logits.copy()
        assert loss.value_and_grad(over_itself, targets, out=over_itself)[1] is over_itself
        np.testing.assert_array_equal(over_itself, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_which_gradients_need_only_what_is_kept(name):
    assert passes._slopes_of_kept(LOSSES[name].families()) == (name in KEPT)


def test_when_something_is_kept(monkeypatch):
    logits, targets = volume(4000, "float32")
    loss, asked, gradient = LOSSES["bce and jaccard"], [], passes.gradient
    monkeypatch.setattr(
        fs.dispatch.cpu(), "gradient", lambda *a: (asked.append(a[-1]), gradient(*a))
    )
    loss.value_and_grad(logits, targets)
    assert asked == [True]
    loss.value_and_grad(logits, targets, mask=targets)
    loss.value_and_grad(logits, targets, out=np.empty(logits.shape, np.float16))
    loss.value_and_grad(logits, targets.astype(np.int64))
    loss.value_and_grad(logits, targets, out=logits)
    loss.replace(activation=None).value_and_grad(np.full_like(logits, 0.5), targets)
    assert asked == [True, *(False,) * 5]


def test_out_is_no_gradient_when_targets_are_invalid():
    loss, (logits, targets) = LOSSES["bce and jaccard"], volume(300, "float32")
    out = np.full(logits.shape, 7.0, np.float32)
    with pytest.raises(ValueError, match="targets must be"):
        loss.value_and_grad(logits, targets.view(np.uint8) * 255, out=out)
    assert np.all(np.isnan(out))  # the sums' pass had written there
    half = np.full(logits.shape, 7.0, np.float16)
    with pytest.raises(ValueError, match="targets must be"):
        loss.value_and_grad(logits, targets.view(np.uint8) * 255, out=half)
    assert np.all(half == 7.0)


def test_threads_share_what_is_known_of_a_small_call():
    loss, rng = LOSSES["bce and jaccard"], np.random.default_rng(0)
    logits = rng.normal(0, 3, (64, 1, 2, 300)).astype(np.float32)
    targets = rng.random(logits.shape) < 0.5
    expected = [loss.statistics(x, y) for x, y in zip(logits, targets, strict=True)]

    def work(first: int) -> None:
        for k in [*range(first, 64), *range(first)] * 5:
            value, grad, s = loss.evaluate(logits[k], targets[k])
            np.testing.assert_array_equal(s.array, expected[k].array)
            assert value == np.float32(loss.value(s))
            np.testing.assert_array_equal(grad, loss.gradient(logits[k], targets[k], s))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, 16 * k) for k in range(4)]:
            done.result()


def test_a_small_call_that_is_repeated_is_checked_as_the_first_was():
    """What depends on layouts is remembered; writability, overlaps and values are asked again."""
    loss, memory = fs.BCE() + fs.SoftJaccard(), np.zeros(3 * 600, np.float32)
    logits, out, other = memory.reshape(3, 1, 2, 300)
    logits[...] = np.random.default_rng(0).normal(0, 3, logits.shape)
    targets = (logits > 1).astype(np.uint8)
    expected = loss.value_and_grad(logits, targets)
    for _ in range(2):  # the second is repeated
        value, grad = loss.value_and_grad(logits, targets, out=out)
        assert grad is out and value == expected[0] and type(value) is np.float32
        np.testing.assert_array_equal(out, expected[1])
        again = loss.value_and_grad(logits, targets)
        assert again[1] is not expected[1]
        np.testing.assert_array_equal(again[1], expected[1])
    assert loss.evaluate(logits, targets, out=out)[2] == loss.statistics(logits, targets)
    assert loss.value_and_grad(logits * 0, targets, out=out)[0] != value  # not what was computed
    crossing = memory[300:900].reshape(logits.shape)
    with pytest.raises(ValueError, match="out must not overlap logits"):
        loss.value_and_grad(logits, targets, out=crossing)
    with pytest.raises(ValueError, match="targets must be 0 or 1, got 3"):
        loss.value_and_grad(logits, targets * 3, out=out)
    with pytest.raises(ValueError, match="targets must be 0 or 1, got 3"):
        loss.value_and_grad(logits, targets * 3)
    other.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable"):
        loss.value_and_grad(logits, targets, out=other)
    itself, _ = loss.value_and_grad(logits, targets, out=logits)
    assert itself == value
    np.testing.assert_array_equal(logits, expected[1])


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_small_call_is_the_steps_of_a_large_one(reduction):
    """A scale that is an array, of the value 1, takes the steps one by one."""
    for loss in (LOSSES["smoothed"], LOSSES["tversky"], fs.CrossEntropy() + fs.SoftDice()):
        chosen = loss.replace(reduction=reduction)
        logits, targets = volume(700, "float32")
        if isinstance(loss.parts[0][1], fs.CrossEntropy):
            targets = targets[:, 0].astype(np.int64)
        scale = np.ones(logits.shape[:2] if reduction == "none" else ())
        one_by_one = chosen.value_and_grad(logits, targets, grad_scale=scale.astype(np.float64))
        at_once = chosen.value_and_grad(logits, targets)
        np.testing.assert_array_equal(at_once[0], one_by_one[0])
        np.testing.assert_array_equal(at_once[1], one_by_one[1])


def test_a_nan_stays_where_it_is():
    logits, targets = volume(3000, "float32")
    logits[0, 1, 77] = logits[1, 2, 2999] = np.nan
    loss = (fs.BCE(normalize=None) + fs.SoftJaccard()).replace(reduction="none")
    value, grad, s = loss.evaluate(logits, targets, track=("hard",))
    rows = [(0, 1), (1, 2)]
    assert sorted(zip(*np.nonzero(np.isnan(value)), strict=True)) == rows
    assert all(np.isnan(grad[row]).all() for row in rows)  # a region term reads its sums
    assert np.isnan(grad).sum() == 2 * 3000
    undefined = s["undefined"]
    assert undefined.sum() == 2 and all(undefined[row] == 1 for row in rows)


HARD = {
    "told by the BCE": fs.BCE(),
    "told by the overlap": fs.SoftJaccard(),
    "counted one by one": fs.BCE(pos_weight=2.0),
    "of labels": fs.BCE().replace(positive=1),
    "in double": fs.BCE().replace(compute_dtype="float64"),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("voxels", [3, 256, 5000])
def test_hard_counts_and_nan(name, voxels):
    rng = np.random.default_rng(voxels)
    logits = rng.normal(size=(2, 1, voxels)).astype(np.float32)
    targets = rng.integers(0, 2, logits.shape, np.uint8)
    logits[0, 0, 1], logits[1, 0, voxels - 1] = -0.0, np.nan
    logits[1, 0, voxels // 2 :: 50] = np.nan
    found = HARD[name].statistics(logits, targets, track=("hard",))
    over, true = logits >= 0, targets == 1
    for column, expected in (
        ("hard_true_positives", over & true),
        ("hard_false_positives", over & ~true),
        ("hard_false_negatives", ~over & true),
        ("undefined", np.isnan(logits)),
    ):
        np.testing.assert_array_equal(found[column], expected.sum(axis=2), column)


VALUES = (0, 1, 2, 3, 7, 100, 127, 128, 200, 255, 256, 257, 300, 65535, 65536, 2**31, 2**32 + 1)
NEGATIVE = (-1, -2, -100, -128, -255, -256, -300, -(2**31), -(2**33))
RULES = (
    {"positive": "nonzero"},
    {"positive": "nonzero", "ignore_index": 255},
    {"positive": "nonzero", "ignore_index": -1},
    {"positive": 3},
    {"positive": 300, "ignore_index": 0},
    {"positive": -1, "ignore_index": 256},
    {"positive": 1, "ignore_index": 1},
    {"positive": 2**31, "ignore_index": 2**32 + 1},
)
DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
          "float16", "float32", "float64")  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small", [False, True], ids=["any", "bytes"])
def test_labels_of_every_dtype(dtype, rule, small):
    """Labels past a byte, negative ones, and numbers that a dtype does not have."""
    held = [v for v in (*VALUES, *NEGATIVE) if not (small and not 0 <= v <= 255)]
    with np.errstate(over="ignore", invalid="ignore"):
        held = [v for v in held if _holds(dtype, v)]
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array(held, object), (1, 1, 3000)).astype(dtype)
    positive, ignored = rule["positive"], rule.get("ignore_index")
    if positive != "nonzero" and not _holds(dtype, positive) and "float" not in dtype:
        with pytest.raises(ValueError, match="cannot occur"):
            fs.BCE().replace(**rule)(np.zeros(labels.shape), labels)
        return
    logits = rng.normal(size=labels.shape).astype(np.float32)
    exact = labels.astype(object)
    keep = np.array([ignored is None or v != ignored for v in exact.flat]).reshape(labels.shape)
    true = [v != 0 if positive == "nonzero" else v == positive for v in exact.flat]
    loss = fs.BCE() + fs.SoftJaccard()
    binary = np.array(true).reshape(labels.shape)
    expected, gradient = loss.value_and_grad(logits, binary, mask=keep)
    value, grad = loss.replace(**rule).value_and_grad(logits, labels)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(grad, gradient)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("positive", ["nonzero", 3])
def test_a_nan_among_labels_is_no_label(positive, dtype):
    labels = np.array([[[0.0, 3.0, np.nan]]], dtype)
    with pytest.raises(ValueError, match="nan"):
        fs.BCE().replace(positive=positive)(np.zeros(labels.shape, np.float32), labels)


def _holds(dtype: str, value: int) -> bool:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return bool(abs(value) < 6e4 and int(kind.type(value)) == value)
    if kind.kind == "b":
        return value in (0, 1)
    return bool(np.iinfo(kind).min <= value <= np.iinfo(kind).max)


@pytest.mark.parametrize("weighted", [False, True])
def test_masks_of_any_dtype_leave_out_what_is_stored_there(weighted):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 1, 5000)).astype(np.float32)
    targets = rng.random(logits.shape) < 0.3
    keep = rng.random(logits.shape) < 0.9
    keep[:, :, 2048:4096] = True  # a stage of which nothing is left out
    more = {"weight_map": rng.random(logits.shape).astype(np.float32)} if weighted else {}
    kept = {name: weights[keep][None, None] for name, weights in more.items()}
    loss = fs.BCE(normalize=None) + fs.SoftJaccard()
    value, grad = loss.value_and_grad(logits[keep][None, None], targets[keep][None, None], **kept)
    logits[~keep] = np.nan
    for dtype in ("bool", "uint8", "int8", "int64"):
        mask = keep.astype(dtype) * np.dtype(dtype).type(3)
        got = loss.value_and_grad(logits, targets, mask=mask, **more)
        np.testing.assert_allclose(got[0], value, rtol=1e-6)
        np.testing.assert_allclose(got[1][keep], grad[0, 0], rtol=1e-5)
        assert np.all(got[1][~keep] == 0)


OTHER_WAY = """
import hashlib, sys
import numpy as np
from fastseg_kernels.cpu import halves, points, tiles
points.HAS_MASKS = tiles.HAS_MASKS = points.HAS_MASKS != flip
halves.HAS_HALF = halves.HAS_HALF and not flip
import fastseg as fs
rng = np.random.default_rng(0)
logits = rng.normal(0, 5, (2, 1, 9001)).astype(np.float32)
targets = (rng.random(logits.shape) < 0.3).view(np.uint8)
loss, digest = fs.BCE() + fs.SoftJaccard(), hashlib.sha256()
s = loss.statistics(logits, targets, track=("hard",))
half = loss.value_and_grad(logits.astype(np.float16), targets, grad_scale=1e4)[1]
kept = loss.value_and_grad(logits, targets)[1]
for array in (s.array, loss.gradient(logits, targets, s), kept, half):
    digest.update(np.ascontiguousarray(array).tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_come_by_the_ways_of_other_cpus():
    """With masks or without, in one loop or two, with F16C or in integers."""
    environment = os.environ | {"FASTSEG_CACHE_DIR": ""}
    said = [
        subprocess.run(
            [sys.executable, "-c", f"flip = {flip}{OTHER_WAY}"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for flip in (False, True)
    ]
    assert said[0] == said[1]
