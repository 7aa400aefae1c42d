"""Every term's derivative and options. New terms are found and checked by themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pytest

import fastseg as fs
import oracle
from cases import LOSSES, SOFTMAX_LOSSES, make
from fastseg.lovasz import LovaszTerm
from fastseg_kernels import constants
from fastseg_kernels.cpu.tiles import make_tile_sums
from fastseg_kernels.cpu.variants import Variant


def subclasses(cls: type) -> list[type]:
    found = [cls, *(leaf for sub in cls.__subclasses__() for leaf in subclasses(sub))]
    return [c for c in dict.fromkeys(found) if c.__module__.startswith("fastseg")]


TERMS = [
    cls
    for cls in subclasses(fs.Term)
    if cls not in (fs.Term, fs.RegionTerm) and not issubclass(cls, LovaszTerm)
]  # Lovász losses have edges: test_lovasz.py compares them with the reference
OPTIONS = {
    "smooth_num": 0.7,
    "smooth_den": 1.3,
    "pos_weight": 2.5,
    "alpha": 0.3,
    "beta": 0.8,
    "class_weights": (0.5, 2.0, 1.0),
    "classes": (0, -1),
    "normalize": "all",
    "form": "l1",
    "scope": "batch",
    "empty": "skip",
    "eps": 1e-7,
    "label_smoothing": 0.2,
    "include_background": False,
}


def has_squared_form(cls: type) -> bool:
    """Tell whether missed voxels and false alarms count alike in both rows of coefficients."""
    term = cls()
    return term.errors()[0] == term.errors()[1] and term.sizes()[1] == term.sizes()[2]


def variants(cls: type) -> list[fs.Term]:
    """Return the term with each of its options set, and with all of them."""
    names = [field.name for field in fields(cls)]
    known = {name: value for name, value in OPTIONS.items() if name in names}
    together = {name: value for name, value in known.items() if name != "include_background"}
    result = [cls(), *(cls(**{name: value}) for name, value in known.items()), cls(**together)]
    if "scope" in names:
        result += [cls(scope=scope, empty="skip") for scope in ("image", "class")]
    if "form" in names and has_squared_form(cls):
        result += [cls(form="squared"), cls(form="squared", smooth_num=0.7, scope="batch")]
    if "gamma" in names and "link" not in names:
        result += [cls(gamma=gamma) for gamma in (0.0, 0.5, 1.0, 3.0, 9.25)]
    if "link" in names:
        result += [cls(link="negative"), cls(link="log")]
        result += [cls(link="power", gamma=gamma) for gamma in (0.75, 1.0, 1.4)]
    return result


ALL = [term for cls in TERMS for term in variants(cls)]


def test_every_term_is_found():
    assert {fs.BCE, fs.SoftJaccard, fs.SoftDice, fs.Tversky} <= set(TERMS)
    covered = {field.name for cls in TERMS for field in fields(cls)}
    assert covered - {"link", "gamma"} <= set(OPTIONS), "give the new option a value in OPTIONS"
    tested = {type(term) for loss in (*LOSSES, *SOFTMAX_LOSSES) for _, term in loss.parts}
    assert set(TERMS) <= tested, "put the new loss into LOSSES of cases.py"


def check_gradient(loss, grad, logits, targets, **extra) -> None:
    """Compare a gradient with central differences of the value."""
    step = 1e-6
    expected = np.empty_like(grad)
    for index in np.ndindex(logits.shape):
        high, low = logits.copy(), logits.copy()
        high[index] += step
        low[index] -= step
        expected[index] = (loss(high, targets, **extra) - loss(low, targets, **extra)) / (2 * step)
    np.testing.assert_allclose(grad, expected, rtol=2e-6, atol=2e-9)


def activations(term: fs.Term) -> list[str | None]:
    """Return what a term may be combined with."""
    if term.ACTIVATION:
        takes_probs = term.ACTIVATION == "sigmoid" and not term.needs_logits
        return [term.ACTIVATION, *([None] if takes_probs else [])]
    return ["sigmoid", None, "softmax"]


@pytest.mark.parametrize("target", [np.uint8, np.float64])
@pytest.mark.parametrize(
    ("term", "activation"),
    [(term, activation) for term in ALL for activation in activations(term)],
    ids=lambda value: str(value),
)
def test_gradient_equals_finite_differences(term, target, activation):
    logits, targets = make((2, 3, 7), np.float64, target)
    if activation is None:
        logits = np.random.default_rng(5).uniform(0.05, 0.95, logits.shape)
    weights = np.random.default_rng(6).uniform(0.5, 2.0, logits.shape)
    mask = np.random.default_rng(7).random(logits.shape) < 0.9
    mask[:, :, 0] = True
    if activation == "softmax":  # these are of voxels, and labels are class indices
        weights, mask = weights[:, 0], mask[:, :1]
        if target is np.uint8:
            targets = np.random.default_rng(8).integers(0, 3, (2, 7))
            targets[:, :3] = 0, 1, 2
    loss = term.replace(activation=activation)
    for extra in ({}, {"weight_map": weights, "mask": mask}):
        grad = loss.value_and_grad(logits, targets, **extra)[1]
        check_gradient(loss, grad, logits, targets, **extra)


def test_a_wrong_derivative_is_found():
    """The check above fails for a gradient that is off by one part in a hundred thousand."""
    logits, targets = make((1, 1, 7), np.float64)
    loss = fs.SoftJaccard()
    grad = loss.value_and_grad(logits, targets)[1]
    check_gradient(loss, grad, logits, targets)
    with pytest.raises(AssertionError):
        check_gradient(loss, 1.00001 * grad, logits, targets)


def test_tversky_has_jaccard_and_dice_as_special_cases():
    logits, targets = make((2, 2, 50), np.float64)
    for special, general in (
        (fs.SoftJaccard(), fs.Tversky(alpha=1.0, beta=1.0)),
        (fs.SoftDice(), fs.Tversky(alpha=0.5, beta=0.5)),
    ):
        expected, expected_grad = special.value_and_grad(logits, targets)
        got, grad = general.value_and_grad(logits, targets)
        np.testing.assert_allclose(got, expected, rtol=1e-14)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize(("empty", "score"), [("one", 1.0), ("zero", 0.0), ("skip", 1.0)])
def test_empty_names_the_score_without_foreground(empty, score):
    logits, targets = np.ones((1, 1, 5)), np.zeros((1, 1, 5), np.uint8)
    value, grad = fs.SoftJaccard(empty=empty).value_and_grad(logits, targets)
    assert value == 1.0 - score
    assert np.all(grad == 0)


def test_empty_formula_is_nan_only_at_zero_over_zero():
    probs, targets = np.zeros((1, 1, 5)), np.zeros((1, 1, 5), np.uint8)
    assert np.isnan(fs.SoftJaccard().replace(activation=None)(probs, targets))
    smooth = fs.SoftJaccard(smooth_num=1.0, smooth_den=1.0).replace(activation=None)
    assert smooth(probs, targets) == 0.0


@pytest.mark.parametrize("scope", ["sample", "batch", "image", "class"])
@pytest.mark.parametrize("background", [True, False])
def test_scope_says_which_rows_are_averaged_together(scope, background):
    """Rows without foreground are skipped: two of sample 0, one of sample 1, all of sample 2."""
    logits, targets = make((3, 3, 50), np.float64)
    targets[0, :2] = targets[1, 2] = targets[2] = 0
    loss = fs.SoftJaccard(scope=scope, empty="skip", include_background=background)
    value, grad = loss.value_and_grad(logits, targets)
    expected, slope = oracle.evaluate(loss, logits, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, slope, rtol=1e-11, atol=1e-16)
    rows = fs.SoftJaccard(empty="skip").replace(reduction="none")(logits, targets)
    if background and scope == "image":  # written out
        np.testing.assert_allclose(value, (rows[0, 2] + rows[1, :2].mean()) / 2, rtol=1e-13)
    if background and scope == "class":
        np.testing.assert_allclose(value, (rows[1, 0] + rows[1, 1] + rows[0, 2]) / 3, rtol=1e-13)


def test_the_background_is_the_first_class():
    logits, targets = make((2, 3, 50))
    got = fs.SoftDice(include_background=False)(logits, targets)
    assert got == fs.SoftDice(classes=(1, 2))(logits, targets)
    with pytest.raises(ValueError, match="leaves none of 1 class"):
        fs.SoftDice(include_background=False)(logits[:, :1], targets[:, :1])
    with pytest.raises(ValueError, match="choose one"):
        fs.BCE(include_background=False, classes=(1,))


@pytest.mark.parametrize("empty", ["formula", "one", "zero", "skip"])
def test_nan_is_nan_also_in_a_row_without_foreground(empty):
    logits, targets = np.array([[[np.nan, 1.0, 2.0]]]), np.zeros((1, 1, 3), np.uint8)
    value, grad = fs.SoftJaccard(empty=empty).value_and_grad(logits, targets)
    assert np.isnan(value)
    assert np.isnan(grad[0, 0, 0])


def test_pos_weight_0_leaves_the_foreground_out():
    logits = np.array([[[-np.inf, 1.0]]])
    targets = np.array([[[1, 0]]], np.uint8)
    value, grad = fs.BCE(pos_weight=0.0).value_and_grad(logits, targets)
    np.testing.assert_allclose(value, np.log1p(np.exp(1.0)) / 2, rtol=1e-14)
    assert grad[0, 0, 0] == 0.0


def test_power_of_a_loss_that_is_held_at_0_is_flat():
    """More smoothing above than below: the score passes 1, and the loss stays at 0."""
    logits, targets = np.array([[[2.0, 1.0, -3.0]]]), np.array([[[1, 1, 0]]], np.uint8)
    value, grad = fs.SoftJaccard(link="power", smooth_num=5.0).value_and_grad(logits, targets)
    assert value == 0.0
    assert np.all(grad == 0.0)


def test_gradient_of_a_score_that_a_rule_gives_is_0():
    logits, targets = np.array([[[2.0, 1.0, -3.0]]]), np.zeros((1, 1, 3), np.uint8)
    value, grad = fs.SoftJaccard(link="log", empty="zero").value_and_grad(logits, targets)
    assert value == np.inf
    assert np.all(grad == 0.0)


def test_smoothing_far_below_the_hits_is_not_lost():
    logits, targets = np.full((1, 1, 4), -90.0), np.ones((1, 1, 4), np.uint8)
    loss = fs.SoftJaccard(link="log", smooth_num=1e-17, smooth_den=1.0)
    hits = 4 * np.exp(-90.0) + 1e-17
    np.testing.assert_allclose(loss(logits, targets), -np.log(hits / 5.0), rtol=1e-12)


def test_track_may_be_any_iterable():
    assert fs.BCE().families(iter(["hard"])) == {"bce", "hard"}


def test_numbers_of_numpy_are_taken():
    assert fs.BCE(pos_weight=np.float32(3)) == fs.BCE(pos_weight=3.0)
    assert fs.BCE(classes=np.array([0, 1])) == fs.BCE(classes=(0, 1))
    options = fs.BCE().replace(ignore_index=np.int64(255), positive=np.uint8(1)).options
    assert options == fs.Options(ignore_index=255, positive=1)
    assert type(options.ignore_index) is int


def test_skipped_rows_are_left_out_of_the_mean():
    logits, targets = make((2, 1, 40), np.float64)
    targets[1] = 0
    expected = fs.SoftJaccard()(logits[:1], targets[:1])
    assert fs.SoftJaccard(empty="skip")(logits, targets) == expected


def test_classes_and_class_weights():
    logits, targets = make((2, 3, 40), np.float64)
    rows = fs.SoftJaccard().replace(reduction="none")(logits, targets)
    np.testing.assert_allclose(
        fs.SoftJaccard(classes=(1, 2))(logits, targets), rows[:, 1:].mean(), rtol=1e-15
    )
    weighted = fs.SoftJaccard(class_weights=(1.0, 2.0, 4.0))(logits, targets)
    np.testing.assert_allclose(weighted, (rows * [1.0, 2.0, 4.0]).mean(), rtol=1e-15)
    grad = fs.BCE(classes=[0]).value_and_grad(logits, targets)[1]
    assert np.all(grad[:, 1:] == 0)
    assert np.all(grad[:, 0] != 0)


def test_a_kind_without_a_kernel_is_refused():
    @dataclass(frozen=True, repr=False)
    class Unknown(fs.SoftJaccard):
        def row(self) -> dict[str, float]:
            return {**super().row(), "kind": len(constants.KINDS)}

    for reduction in ("mean", "none"):
        loss = (fs.SoftJaccard() + Unknown()).replace(reduction=reduction)
        with pytest.raises(NotImplementedError, match="no kernel evaluates terms of the kind '6'"):
            loss.value_and_grad(np.zeros((1, 1, 3)), np.ones((1, 1, 3), bool))


def test_a_column_without_a_lane_is_refused(monkeypatch):
    monkeypatch.setitem(constants.FAMILY_COLUMNS, "new", ("new_sum",))
    variant = Variant("float32", "binary", "sigmoid", frozenset({"new"}))
    with pytest.raises(NotImplementedError, match="no lane adds up new_sum"):
        make_tile_sums(variant)
