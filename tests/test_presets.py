"""Presets: the numbers of the peers that they are named after, for the peers' own arguments.

MONAI is run as it is. The others are restated here in a few lines of PyTorch, each with where its
formula is from, so that their packages need not be installed. Peers compute in float64, presets in
float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import fastseg as fs
import fastseg.torch
from fastseg import presets

SHAPES = [(2, 3, 7, 11), (3, 4, 5, 3, 7), (1, 5, 263)]
ONE = (3, 1, 13, 5)
Peer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def monai():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import monai.losses
    return monai.losses


def logits_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([*shape]).normal(0.0, 2.0, shape).astype(np.float32)


def indices_of(shape: tuple[int, ...], ignore: int | None = None) -> np.ndarray:
    """Return class indices (N, 1, *spatial); the last class is nowhere, another not in image 0."""
    rng = np.random.default_rng([7, *shape])
    labels = rng.integers(0, shape[1] - 1, (shape[0], 1, *shape[2:]))
    labels[0][labels[0] == 1] = 0
    if ignore is not None:
        labels[rng.random(labels.shape) < 0.2] = ignore
    return labels


def regions_of(shape: tuple[int, ...], ignore: int | None = None) -> np.ndarray:
    """Return binary targets that may overlap; the last class is empty where there are several."""
    rng = np.random.default_rng([8, *shape])
    regions = (rng.random(shape) < 0.4).astype(np.int64)
    regions[:, 1:][:, -1:] = 0
    if ignore is not None:
        regions[rng.random(shape) < 0.2] = ignore
    return regions


def soft_of(shape: tuple[int, ...]) -> np.ndarray:
    """Return soft targets that add up to 1 over the classes (of one class: in [0, 1])."""
    soft = np.random.default_rng([9, *shape]).random((*shape[:1], max(2, shape[1]), *shape[2:]))
    soft = (soft**4 / (soft**4).sum(1, keepdims=True)).astype(np.float32)
    return soft[:, : shape[1]]


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.concatenate([labels == c for c in range(classes)], 1)


def kept(targets: torch.Tensor, ignore: int | None) -> torch.Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if ignore is None else targets != ignore


def check(
    loss: fs.Loss, logits: np.ndarray, targets: np.ndarray, peer: Peer, truth: Any = None, **options
) -> None:
    """Hold value and gradient to those of a peer, whose targets are ``truth``."""
    value, grad = loss.value_and_grad(logits, targets, **options)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = peer(x, torch.as_tensor(targets if truth is None else truth))
    expected.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    expected = expected.detach().numpy()
    np.testing.assert_allclose(value, expected.reshape(np.shape(value)), rtol=1e-6, atol=1e-7)
    largest = float(x.grad.abs().max())
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-5, atol=1e-6 * largest)


# MONAI

DICE: list[dict[str, Any]] = [
    {},
    {"jaccard": True},
    {"jaccard": True, "smooth_nr": 1.0, "smooth_dr": 3.0},
    {"smooth_nr": 0.0, "smooth_dr": 0.5},
    {"batch": True},
    {"batch": True, "reduction": "sum", "jaccard": True},
    {"include_background": False},
    {"include_background": False, "batch": True, "jaccard": True},
    {"reduction": "sum"},
    {"reduction": "none", "jaccard": True},
    {"weight": 0.5},
]
WEIGHTS = (0.5, 2.0, 0.0, 1.5, 3.0)


def weighted(options: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Return options with weights of the classes that count."""
    first = 0 if options.get("include_background", True) else 1
    return {**options, "weight": list(WEIGHTS[first : shape[1]])}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("options", DICE, ids=str)
def test_monai_dice_equals_monai(monai, options, activation, shape):
    logits = logits_of(shape)
    indexed = activation == "softmax"
    targets = indices_of(shape) if indexed else regions_of(shape)
    for given in (options, weighted(options, shape)):
        arguments = {**given, activation: True, "to_onehot_y": indexed}
        peer = monai.DiceLoss(**arguments)
        loss = presets.monai_dice(**arguments)
        check(loss, logits, targets, peer)


@pytest.mark.parametrize("options", DICE, ids=str)
def test_monai_dice_takes_one_hot_and_soft_targets_and_probabilities(monai, options):
    shape = (2, 4, 9, 5)
    logits, hot = logits_of(shape), one_hot(indices_of(shape), 4)
    for targets in (hot, soft_of(shape)):
        peer = monai.DiceLoss(softmax=True, **options)
        check(presets.monai_dice(softmax=True, **options), logits, targets, peer)
        probs = 1 / (1 + np.exp(-logits))
        check(presets.monai_dice(**options), probs, targets, monai.DiceLoss(**options))


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_monai_dice_of_one_class_ignores_a_label(monai, batch, sigmoid):
    logits, targets = logits_of(ONE), regions_of(ONE, ignore=255)
    logits = logits if sigmoid else 1 / (1 + np.exp(-logits))
    options = {"sigmoid": sigmoid, "batch": batch, "ignore_index": 255}
    check(presets.monai_dice(**options), logits, targets, monai.DiceLoss(**options))


@pytest.mark.parametrize("ignore", [255, 1, -1])
@pytest.mark.parametrize("background", [True, False])
def test_monai_dice_of_classes_ignores_a_label(monai, background, ignore):
    shape = (2, 3, 7, 11)
    options = {"softmax": True, "to_onehot_y": True, "include_background": background}
    options["ignore_index"] = ignore
    targets = indices_of(shape, ignore)
    loss = presets.monai_dice(**options)
    check(loss, logits_of(shape), targets, monai.DiceLoss(**options))


def test_monai_rules_of_ignored_one_hot_targets_are_masks(monai):
    shape = (2, 3, 7, 11)
    hot = one_hot(indices_of(shape, 255), 3)
    loss = presets.monai_dice(sigmoid=True)
    outside, second = (monai.DiceLoss(sigmoid=True, ignore_index=i) for i in (255, 1))
    check(loss, logits_of(shape), hot, outside, hot.astype(float), mask=hot.any(1))
    check(loss, logits_of(shape), hot, second, hot.astype(float), mask=hot[:, 1] == 0)


def test_monai_dice_without_reduction_is_0_for_the_background(monai):
    shape, options = (2, 3, 7, 11), {"include_background": False, "reduction": "none"}
    logits, targets = logits_of(shape), regions_of(shape)
    got = presets.monai_dice(sigmoid=True, **options)(logits, targets)
    expected = monai.DiceLoss(sigmoid=True, **options)(torch.tensor(logits), torch.tensor(targets))
    np.testing.assert_allclose(got[:, 1:], expected.squeeze(), rtol=1e-6)
    np.testing.assert_array_equal(got[:, 0], 0.0)


def test_an_image_without_a_voxel_that_counts_is_left_out(monai):
    """MONAI counts it as 0 in the mean: half the loss, and half the gradient of the other image."""
    logits, targets = logits_of((2, 3, 7, 11)), indices_of((2, 3, 7, 11))
    targets[0] = 255
    options = {"softmax": True, "to_onehot_y": True, "ignore_index": 255}
    loss, peer = presets.monai_dice(**options), monai.DiceLoss(**options)
    check(loss, logits, targets, lambda x, y: 2 * peer(x, y))
    np.testing.assert_array_equal(loss(logits, targets), loss(logits[1:], targets[1:]))


def test_monai_dice_ce_is_differentiated_by_pytorch(monai):
    shape, options = (2, 3, 7, 11), {"softmax": True, "to_onehot_y": True}
    targets, gradients = torch.tensor(indices_of(shape)), []
    for loss in (
        fastseg.torch.Loss(presets.monai_dice_ce(**options)),
        monai.DiceCELoss(**options),
    ):
        logits = torch.tensor(logits_of(shape), requires_grad=True)
        (3.0 * loss(logits, targets)).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


DICE_CE: list[dict[str, Any]] = [
    {},
    {"jaccard": True, "lambda_dice": 0.3, "lambda_ce": 2.0},
    {"include_background": False, "batch": True},
    {"reduction": "sum", "lambda_ce": 0.01},
    {"label_smoothing": 0.1},
    {"lambda_ce": 0.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "one_hot", "soft"])
@pytest.mark.parametrize("options", DICE_CE, ids=str)
def test_monai_dice_ce_equals_monai(monai, options, kind, shape):
    logits, labels = logits_of(shape), indices_of(shape)
    targets = {"indices": labels, "one_hot": one_hot(labels, shape[1]), "soft": soft_of(shape)}
    for weight in (None, torch.tensor(WEIGHTS[: shape[1]])):
        arguments = {**options, "softmax": True, "to_onehot_y": kind == "indices"}
        peer = monai.DiceCELoss(
            weight=None if weight is None else weight.double(), **arguments
        ).double()
        loss = presets.monai_dice_ce(weight=weight, **arguments)
        check(loss, logits, targets[kind], peer)


@pytest.mark.parametrize("weight", [None, 2.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"jaccard": True, "batch": True, "lambda_dice": 0.5}, {"reduction": "sum"}],
    ids=str,
)
def test_monai_dice_ce_of_one_class_equals_monai(monai, options, weight):
    pos_weight = None if weight is None else torch.tensor([weight])
    peer = monai.DiceCELoss(sigmoid=True, weight=pos_weight, **options)
    loss = presets.monai_dice_ce(sigmoid=True, weight=pos_weight, **options)
    check(loss, logits_of(ONE), regions_of(ONE), peer)


# segmentation_models_pytorch 0.6.0. losses/_functional.py, soft_tversky_score: with
# N = (sum q + sum p - sum |q - p|) / 2, score = (N + s) / max(N + a (Q - N) + b (P - N) + s, eps),
# sums over batch and space. losses/dice.py, jaccard.py: loss 1 - score or -log(max(score, eps)),
# times [P > 0], mean over the classes chosen, weighted if weights are given. tversky.py: the mean
# to the power of gamma. Ignored voxels have q = p = 0.


def smp_region(
    a: float,
    b: float,
    *,
    activation: str,
    classes: Any = None,
    log_loss: bool = False,
    smooth: float = 0.0,
    eps: float = 1e-7,
    gamma: float = 1.0,
    ignore_index: int | None = None,
    class_weights: Any = None,
) -> Peer:
    def peer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "": lambda x: x}
        probs, keep = q[activation](x), kept(y, ignore_index)
        p = torch.where(keep, y, 0)
        if activation == "softmax":
            p = functional.one_hot(p[:, 0].long(), x.shape[1]).movedim(-1, 1)
        probs, p = probs * keep, (p * keep).double()
        over = (0, *range(2, x.ndim))
        P, Q, D = p.sum(over), probs.sum(over), (probs - p).abs().sum(over)
        N = (P + Q - D) / 2
        score = (N + smooth) / (N + a * (Q - N) + b * (P - N) + smooth).clamp_min(eps)
        each = (-score.clamp_min(eps).log() if log_loss else 1 - score) * (P > 0)
        weights = torch.ones(x.shape[1]) if class_weights is None else torch.tensor(class_weights)
        chosen = slice(None) if classes is None else list(classes)
        mean = (each * weights)[chosen].sum() / weights[chosen].sum()
        return mean**gamma

    return peer


SMP: list[dict[str, Any]] = [
    {},
    {"log_loss": True},
    {"smooth": 1.5},
    {"log_loss": True, "smooth": 0.5, "eps": 0.3},
    {"eps": 1e4},
]
SEVERAL: list[dict[str, Any]] = [
    {"classes": [0, 2], "class_weights": [1.0, 5.0, 3.0]},
    {"classes": [1]},
    {"class_weights": [0.5, 0.0, 2.0]},
]
REGIONS: dict[str, tuple[Callable[..., fs.Loss], float, float, dict[str, Any]]] = {
    "jaccard": (presets.smp_jaccard, 1.0, 1.0, {}),
    "dice": (presets.smp_dice, 0.5, 0.5, {}),
    "tversky": (presets.smp_tversky, 0.3, 0.7, {"alpha": 0.3, "beta": 0.7}),
}


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("options", SMP + SEVERAL, ids=str)
@pytest.mark.parametrize("name", REGIONS)
def test_smp_region_multiclass_equals_peer(name, options, ignore):
    preset, a, b, extra = REGIONS[name]
    shape = (2, 3, 7, 11)
    logits, targets = logits_of(shape), indices_of(shape, ignore)
    loss = preset("multiclass", ignore_index=ignore, **options, **extra)
    peer = smp_region(a, b, activation="softmax", ignore_index=ignore, **options)
    check(loss, logits, targets, peer)


@pytest.mark.parametrize("gamma", [0.75, 1.0, 2.0])
def test_smp_tversky_gamma_is_of_one_class(gamma):
    shape = (2, 3, 7, 11)
    loss = presets.smp_tversky("multiclass", [0], alpha=0.3, beta=0.7, gamma=gamma)
    peer = smp_region(0.3, 0.7, activation="softmax", classes=[0], gamma=gamma)
    check(loss, logits_of(shape), indices_of(shape), peer)


# losses/soft_bce.py: torch's binary cross-entropy of each voxel times [y != ignore_index], then the
# mean over all voxels, or the sum.


def smp_bce(
    ignore_index: int | None = -100,
    reduction: str = "mean",
    smooth_factor: float = 0.0,
    **weights: Any,
) -> Peer:
    s = float(smooth_factor)
    weights = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in weights.items()}

    def peer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        p = (1 - y.double()) * s + y.double() * (1 - s)
        each = functional.binary_cross_entropy_with_logits(x, p, reduction="none", **weights)
        each = each * kept(y, ignore_index)
        return each.mean() if reduction == "mean" else each.sum()

    return peer


BY_CLASS = np.array([0.5, 2.0, 3.0]).reshape(3, 1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 2.0},
        {"smooth_factor": 0.1},
        {"smooth_factor": 0.3, "pos_weight": [3.0]},
        {"pos_weight": [3.0]},
        {"weight": BY_CLASS},
        {"pos_weight": BY_CLASS[None]},
        {"weight": BY_CLASS[None], "pos_weight": BY_CLASS[::-1]},
        {"weight": torch.tensor(0.25), "pos_weight": torch.tensor(BY_CLASS.copy())},
    ],
    ids=lambda options: "-".join(f"{k}{np.ndim(v)}" for k, v in options.items()) or "plain",
)
def test_smp_soft_bce_equals_peer(options, ignore, reduction):
    shape = (2, 3, 7, 11)
    loss = presets.smp_soft_bce(ignore_index=ignore, reduction=reduction, **options)
    copies = {name: np.array(presets.arguments.plain(v)) for name, v in options.items()}
    check(loss, logits_of(shape), regions_of(shape, ignore), smp_bce(ignore, reduction, **copies))


# MONAI's focal losses are terms here, not presets: alpha and gamma are theirs, and the mean of the
# softmax's is over classes, too.


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.7])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_bce_is_monais(monai, gamma, alpha):
    shape = (2, 3, 7, 11)
    peer = monai.FocalLoss(gamma=gamma, alpha=alpha)
    check(fs.FocalBCE(gamma=gamma, alpha=alpha), logits_of(shape), regions_of(shape), peer)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.7])
def test_focal_cross_entropy_is_monais(monai, gamma):
    shape = (2, 3, 7, 11)
    peer = monai.FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True)
    loss = fs.FocalCrossEntropy(gamma=gamma) * (1 / shape[1])
    check(loss, logits_of(shape), indices_of(shape), peer)


# nnunetv2 2.8.1. training/loss/dice.py, MemoryEfficientSoftDiceLoss: minus the mean over rows of
# (2 I + s) / max(P + Q + s, 1e-8), q and p times the mask. compound_losses.py: cross-entropy with
# ignore_index; binary cross-entropy over all elements, or its masked sum over the voxels kept.


def nnunet_dice(q, p, keep, batch_dice, do_bg, smooth):
    q, p = (q * keep)[:, 0 if do_bg else 1 :], (p * keep)[:, 0 if do_bg else 1 :]
    over = (0,) * batch_dice + tuple(range(2, q.ndim))
    inner, size = (q * p).sum(over), (q + p).sum(over)
    return -((2 * inner + smooth) / (size + smooth).clamp_min(1e-8)).mean()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignore", [None, 200])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("do_bg", [True, False])
def test_nnunet_dice_ce_equals_peer(shape, ignore, batch_dice, do_bg):
    def peer(x, y):
        keep = kept(y, ignore)
        labels = torch.where(keep, y, 0)[:, 0]
        p = functional.one_hot(labels, shape[1]).movedim(-1, 1)
        ce = functional.cross_entropy(x, y[:, 0], ignore_index=-100 if ignore is None else ignore)
        return 0.7 * ce + 1.3 * nnunet_dice(x.softmax(1), p, keep, batch_dice, do_bg, 1e-5)

    loss = presets.nnunet_dice_ce(
        batch_dice, do_bg, weight_ce=0.7, weight_dice=1.3, ignore_label=ignore
    )
    check(loss, logits_of(shape), indices_of(shape, ignore), peer)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_nnunet_takes_the_options_of_cross_entropy(smoothing):
    shape, weight = (2, 3, 7, 11), torch.tensor(WEIGHTS[:3], dtype=torch.float64)

    def peer(x, y):
        p = functional.one_hot(y[:, 0], 3).movedim(-1, 1)
        ce = functional.cross_entropy(x, y[:, 0], weight, label_smoothing=smoothing)
        return ce + nnunet_dice(x.softmax(1), p, torch.ones_like(y), False, False, 1e-5)

    loss = presets.nnunet_dice_ce(weight=weight, label_smoothing=smoothing)
    check(loss, logits_of(shape), indices_of(shape), peer)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("do_bg", [True, False])
def test_nnunet_dice_bce_equals_peer(masked, batch_dice, do_bg):
    shape = (2, 3, 7, 11)
    targets = regions_of((2, 4, 7, 11))  # of its channels the last but one is empty
    targets[:, -1] = masked * (np.random.default_rng(1).random((2, 7, 11)) < 0.3)

    def peer(x, y):
        keep = y[:, -1:] == 0
        bce = functional.binary_cross_entropy_with_logits(x, y[:, :-1].double(), reduction="none")
        ce = (bce * keep).sum() / keep.sum() if masked else bce.mean()
        return ce + nnunet_dice(x.sigmoid(), y[:, :-1], keep, batch_dice, do_bg, 1e-5)

    loss = presets.nnunet_dice_bce(batch_dice, do_bg, weight_ce=3.0 if masked else 1.0)
    mask = {"mask": targets[:, -1:] == 0} if masked else {}
    check(loss, logits_of(shape), targets[:, :-1], peer, targets, **mask)


# JDTLosses, losses/jdt_loss.py: softmax, tp = (|q| + |p| - |q - p|) / 2 of each sample and class by
# the norm to its power, score = (tp + s) / (tp + a fp + b fn + s), loss (1 - score)^gamma or
# -log(score) times class weights. mIoUD: sums over the batch, mean over active classes. mIoUI,
# mIoUC: means over the active rows of each image or class, then over those that have any.


def jdt(
    mIoUD=1.0, mIoUI=0.0, mIoUC=0.0, alpha=1.0, beta=1.0, gamma=1.0, smooth=1e-3, norm=1,
    log_loss=False, ignore_index=None, class_weights=None, present=True,
) -> Peer:  # fmt: skip
    def peer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        keep, q, p = torch.ones_like(x[:, :1]), x.softmax(1), y
        if y.shape[1] == 1:
            keep = kept(y, ignore_index).double()
            p = functional.one_hot((y * keep).long()[:, 0], x.shape[1]).movedim(-1, 1)
        q, p = (q * keep).flatten(2), (p * keep).flatten(2).double()
        size = lambda z: (z.abs() ** norm).sum(2)  # noqa: E731
        rows = (size(q) + size(p) - size(q - p)) / 2, size(q), size(p)

        def losses(tp, Q, P):
            score = (tp + smooth) / (tp + alpha * (Q - tp) + beta * (P - tp) + smooth)
            each = -score.log() if log_loss else (1 - score) ** gamma
            return each * (1 if class_weights is None else torch.tensor(class_weights))

        active = p.sum(2) > 0 if present else torch.ones(p.shape[:2], dtype=torch.bool)
        each = losses(*rows)
        total = mIoUD * losses(*(r.sum(0) for r in rows))[active.any(0)].mean()
        for weight, axis in ((mIoUI, 1), (mIoUC, 0)):
            some = active.any(axis)
            means = (each * active).sum(axis)[some] / active.sum(axis)[some]
            total = total + weight * means.mean()
        return total

    return peer


JDT: list[dict[str, Any]] = [
    {},
    {"mIoUD": 0.0, "mIoUI": 1.0},
    {"mIoUD": 0.0, "mIoUC": 1.0},
    {"mIoUD": 0.5, "mIoUI": 0.3, "mIoUC": 0.2, "alpha": 0.5, "beta": 0.5},
    {"alpha": 0.3, "beta": 0.7, "gamma": 2.0, "smooth": 1.0},
    {"log_loss": True, "mIoUI": 1.0},
    {"class_weights": [0.5, 2.0, 1.0, 3.0], "mIoUC": 0.5},
]
JDT_SHAPE = (3, 4, 5, 3, 7)


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("mode", ["PRESENT", "ALL"])
@pytest.mark.parametrize("options", JDT, ids=str)
def test_jdt_jml_of_hard_targets_equals_peer(options, mode, ignore):
    loss = presets.jdt_jml(ignore_index=ignore, active_classes_mode_hard=mode, **options)
    peer = jdt(ignore_index=ignore, present=mode == "PRESENT", **options)
    check(loss, logits_of(JDT_SHAPE), indices_of(JDT_SHAPE, ignore), peer)


# What is refused

REFUSED: list[tuple[Callable[..., fs.Loss], tuple[Any, ...], dict[str, Any], str]] = [
    (presets.monai_dice, (), {"other_act": np.tanh}, "other_act must be None"),
    (presets.monai_dice, (), {"sigmoid": True, "softmax": True}, "must not both be True"),
    (presets.monai_dice, (), {"sigmoid": True, "to_onehot_y": True}, "to_onehot_y must be False"),
    (presets.monai_dice, (), {"reduction": "max"}, "reduction must be one of.* got 'max'"),
    (presets.monai_dice, (), {"reduction": "none", "batch": True}, "with batch=True, got 'none'"),
    (presets.monai_dice, (), {"smooth_nr": -1}, "smooth_nr must be a finite number >= 0, got -1"),
    (presets.monai_dice, (), {"smooth_dr": np.nan}, "smooth_dr must be .* got nan"),
    (presets.monai_dice, (), {"weight": [1.0, -1.0]}, "weight must be .* got -1.0"),
    (presets.monai_dice, (), {"weight": "many"}, "weight must be .* got 'many'"),
    (presets.monai_dice, (), {"weight": [1, 2], "ignore_index": 3}, r"weight .* got \[1, 2\]"),
    (presets.monai_dice_ce, (), {}, "one of sigmoid and softmax must be True"),
    (presets.monai_dice_ce, (), {"softmax": True, "other_act": np.tanh}, "other_act must be None"),
    (presets.monai_dice_ce, (), {"softmax": True, "reduction": "none"}, "got 'none'"),
    (presets.monai_dice_ce, (), {"softmax": True, "weight": 2.0}, "weight must be a sequence"),
    (presets.monai_dice_ce, (), {"softmax": True, "lambda_ce": -1.0}, "lambda_ce must be"),
    (presets.monai_dice_ce, (), {"sigmoid": True, "weight": [1, 2]}, "weight must be one number"),
    (presets.monai_dice_ce, (), {"sigmoid": True, "label_smoothing": 0.1}, "label_smoothing must"),
    (presets.monai_dice_ce, (), {"sigmoid": True, "include_background": False}, "must be True"),
    (presets.smp_dice, ("binary ",), {}, "mode must be one of 'binary'.* got 'binary '"),
    (presets.smp_dice, ("binary", [0]), {}, r"classes must be None .* got \[0\]"),
    (presets.smp_dice, ("binary",), {"class_weights": [1.0]}, "class_weights must be None"),
    (presets.smp_dice, ("multiclass", [1, 1]), {}, r"classes must be .* once, got \[1, 1\]"),
    (presets.smp_dice, ("multiclass", 2), {}, "classes must be a sequence .* got 2"),
    (presets.smp_dice, ("multiclass", [3]), {"class_weights": [1, 2]}, r"in \[0, 2\).* got \(3,\)"),
    (presets.smp_dice, ("multiclass",), {"class_weights": [0.0]}, "must not all be 0"),
    (presets.smp_jaccard, ("multiclass",), {"from_logits": False}, "from_logits must be True"),
    (presets.smp_jaccard, ("multiclass",), {"smooth": -1.0}, "smooth must be .* got -1.0"),
    (presets.smp_tversky, ("multiclass",), {"gamma": 2.0}, "gamma must be 1 .* got 2.0"),
    (presets.smp_tversky, ("binary",), {"gamma": 2.0, "log_loss": True}, "gamma must be 1"),
    (presets.smp_soft_bce, (), {"smooth_factor": 0.6}, "smooth_factor must be None or in"),
    (presets.smp_soft_bce, (), {"reduction": "none"}, "reduction must be one of 'mean', 'sum'"),
    (presets.smp_soft_bce, (), {"weight": np.ones(3)}, r"weight must .* got shape \(3,\)"),
    (presets.smp_soft_bce, (), {"pos_weight": np.ones((2, 5))}, "weight_map="),
    (presets.smp_lovasz, ("multiclass",), {"from_logits": False}, "from_logits must be True"),
    (presets.nnunet_dice_ce, (), {"ddp": True, "batch_dice": True}, "ddp must be False"),
    (presets.nnunet_dice_ce, (), {"smooth": -1.0}, "smooth must be .* got -1.0"),
    (presets.nnunet_dice_ce, (), {"weight_ce": "much"}, "weight_ce must be .* got 'much'"),
    (presets.nnunet_dice_bce, (), {"weight_dice": -1}, "weight_dice must be .* got -1"),
    (presets.nnunet_dice_bce, (), {"use_ignore_label": True}, "mask=targets"),
    (presets.jdt_jml, (0.0,), {}, "one of mIoUD, mIoUI and mIoUC must be above 0"),
    (presets.jdt_jml, (-1.0,), {}, "mIoUD must be .* got -1.0"),
    (presets.jdt_jml, (), {"gamma": 0.5}, "gamma must be at least 1.* got 0.5"),
    (presets.jdt_jml, (), {"norm": 3}, "norm must be one of 1, 2, got 3"),
    (presets.jdt_jml, (), {"active_classes_mode_hard": "all"}, "active_classes_mode_hard must be"),
    (presets.jdt_jml, (), {"soft_label": True, "ignore_index": 255}, "ignore_index must be None"),
    (
        presets.jdt_jml,
        (),
        {"soft_label": True, "active_classes_mode_soft": "PRESENT"},
        "threshold must be 0 .* got 0.01",
    ),
]


@pytest.mark.parametrize(
    ("preset", "args", "options", "message"),
    REFUSED,
    ids=[f"{r[0].__name__}-{r[2]}" for r in REFUSED],
)
def test_what_cannot_be_followed_is_refused(preset, args, options, message):
    with pytest.raises(ValueError, match=message):
        preset(*args, **options)


@pytest.mark.parametrize(
    "loss",
    [
        presets.monai_dice(sigmoid=True, ignore_index=255),
        presets.monai_dice_ce(sigmoid=True),
    ],
    ids=["monai_dice", "monai_dice_ce"],
)
def test_a_loss_of_one_class_refuses_several(loss):
    with pytest.raises(ValueError, match="got 1 for 3 classes"):
        loss(logits_of((2, 3, 5)), regions_of((2, 3, 5)))


def test_presets_are_those_of_the_module():
    assert set(presets.__all__) == {
        name for name in dir(presets) if callable(getattr(presets, name))
    }
    assert fs.presets is presets


# What follows needs RegionTerm(form=...): "l1" and "squared"


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("form", ["squared_pred", "soft_label"])
@pytest.mark.parametrize("options", DICE, ids=str)
def test_form_monai_dice_equals_monai(monai, options, form, soft, activation):
    shape = (2, 4, 9, 5)
    targets = soft_of(shape) if soft else one_hot(indices_of(shape), 4)
    arguments = {**options, form: True, activation: True}
    loss, peer = presets.monai_dice(**arguments), monai.DiceLoss(**arguments)
    check(loss, logits_of(shape), targets, peer, targets.astype(float))


@pytest.mark.parametrize("jaccard", [True, False])
def test_form_monai_dice_ce_equals_monai(monai, jaccard):
    arguments = {"squared_pred": True, "jaccard": jaccard}
    peer = monai.DiceCELoss(softmax=True, to_onehot_y=True, **arguments)
    loss = presets.monai_dice_ce(softmax=True, to_onehot_y=True, **arguments)
    check(loss, logits_of((2, 3, 7, 11)), indices_of((2, 3, 7, 11)), peer)
    peer = monai.DiceCELoss(sigmoid=True, **arguments)
    loss = presets.monai_dice_ce(sigmoid=True, **arguments)
    check(loss, logits_of(ONE), regions_of(ONE), peer, regions_of(ONE).astype(float))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("mode", ["binary", "multilabel"])
@pytest.mark.parametrize("options", SMP, ids=str)
@pytest.mark.parametrize("name", REGIONS)
def test_form_smp_region_equals_peer(name, options, mode, from_logits, soft):
    preset, a, b, extra = REGIONS[name]
    shape = ONE if mode == "binary" else (2, 3, 7, 11)
    logits, targets = logits_of(shape), soft_of(shape) if soft else regions_of(shape, 255)
    logits = logits if from_logits else 1 / (1 + np.exp(-logits))
    loss = preset(mode, from_logits=from_logits, ignore_index=255, **options, **extra)
    activation = "sigmoid" if from_logits else ""
    check(
        loss, logits, targets, smp_region(a, b, activation=activation, ignore_index=255, **options)
    )


@pytest.mark.parametrize("options", SEVERAL, ids=str)
def test_form_smp_region_of_chosen_classes_equals_peer(options):
    shape = (2, 3, 7, 11)
    peer = smp_region(1.0, 1.0, activation="sigmoid", **options)
    check(presets.smp_jaccard("multilabel", **options), logits_of(shape), regions_of(shape), peer)


@pytest.mark.parametrize("gamma", [0.75, 2.0])
def test_form_smp_tversky_gamma_is_of_one_class(gamma):
    loss = presets.smp_tversky("binary", gamma=gamma)
    peer = smp_region(0.5, 0.5, activation="sigmoid", gamma=gamma)
    check(loss, logits_of(ONE), regions_of(ONE), peer)


def test_form_smp_binary_refuses_several_classes():
    with pytest.raises(ValueError, match="got 1 for 3 classes"):
        presets.smp_dice("binary")(logits_of((2, 3, 5)), regions_of((2, 3, 5)))


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("mode", ["PRESENT", "ALL"])
@pytest.mark.parametrize("options", JDT, ids=str)
def test_form_jdt_jml_of_soft_targets_equals_peer(options, mode, norm):
    if norm == 2:
        options = {**options, "beta": options.get("alpha", 1.0)}
    targets = soft_of(JDT_SHAPE)
    targets[:, -1] = 0.0
    loss = presets.jdt_jml(
        norm=norm, soft_label=True, active_classes_mode_soft=mode, threshold=0.0, **options
    )
    peer = jdt(norm=norm, present=mode == "PRESENT", **options)
    check(loss, logits_of(JDT_SHAPE), targets, peer)


@pytest.mark.parametrize("options", JDT, ids=str)
def test_form_jdt_jml_of_squares_equals_peer(options):
    options = {**options, "beta": options.get("alpha", 1.0)}
    loss = presets.jdt_jml(norm=2, **options)
    check(loss, logits_of(JDT_SHAPE), indices_of(JDT_SHAPE), jdt(norm=2, **options))


# What follows needs fs.LovaszHinge and fs.LovaszSoftmax. segmentation_models_pytorch 0.6.0,
# losses/lovasz.py: errors descending times the differences of J_k = 1 - (P - cumsum p) /
# (P + cumsum(1 - p)); ignored voxels removed; hinge over all classes of an image at once.


def lovasz(errors: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    errors, order = errors.sort(descending=True)
    p = truth[order].double()
    index = 1 - (p.sum() - p.cumsum(0)) / (p.sum() + (1 - p).cumsum(0))
    return (errors * torch.cat([index[:1], index.diff()])).sum()


def smp_lovasz(mode: str, per_image: bool, ignore_index: int | None) -> Peer:
    def flat(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        keep = kept(y, ignore_index).reshape(-1)
        labels = y.reshape(-1)[keep]
        if mode != "multiclass":
            signs = 2.0 * labels - 1
            return lovasz((1 - x.reshape(-1)[keep] * signs).relu(), labels)
        q = x.softmax(1).movedim(1, -1).reshape(-1, x.shape[1])[keep]
        present = [c for c in range(x.shape[1]) if (labels == c).any()]
        each = [lovasz(((labels == c).double() - q[:, c]).abs(), labels == c) for c in present]
        return torch.stack(each).mean()

    def peer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not per_image:
            return flat(x, y)
        return torch.stack([flat(x[n : n + 1], y[n : n + 1]) for n in range(len(x))]).mean()

    return peer


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("mode", presets.smp.MODES)
def test_lovasz_smp_equals_peer(mode, per_image, ignore):
    shape = ONE if mode == "binary" else (3, 4, 5, 3, 7)
    targets = indices_of(shape, ignore) if mode == "multiclass" else regions_of(shape, ignore)
    if mode == "binary":
        targets[1] = 0
    loss = presets.smp_lovasz(mode, per_image, ignore)
    check(loss, logits_of(shape), targets, smp_lovasz(mode, per_image, ignore))


def test_lovasz_smp_binary_refuses_several_classes():
    with pytest.raises(ValueError, match="got 1 for 3 classes"):
        presets.smp_lovasz("binary")(logits_of((2, 3, 5)), regions_of((2, 3, 5)))
