"""The promised numerics, on data that is hard for sums: constant, confident, huge."""

from __future__ import annotations

import numpy as np
import pytest

import fastseg as fs
import oracle
from cases import GRAD_ULP, extra_ulp, ulp_error, value_rtol
from fastseg_kernels import reference as ref

LOSS = fs.BCE() + fs.SoftJaccard()


def exact(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Return BCE and soft Jaccard loss of one row, in float64 without cancellation."""
    x, p = logits.astype(np.float64).ravel(), targets.astype(np.float64).ravel()
    missed, false_alarms = (v.item() for v in ref.error_sums(x[None, None], p[None, None]))
    bce = ref.bce_with_logits(x, p).mean()
    return float(bce), (missed + false_alarms) / (p.sum() + false_alarms)


def check(logits: np.ndarray, targets: np.ndarray, rtol: float) -> None:
    s = LOSS.statistics(logits, targets)
    for got, expected in zip(LOSS.term_values(s), exact(logits, targets), strict=True):
        np.testing.assert_allclose(got, expected, rtol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1.0, 4.0, 8.0, 12.0, 15.0, 20.0, 40.0, 80.0])
def test_a_confident_network_keeps_its_digits(size, dtype):
    rng = np.random.default_rng(0)
    targets = rng.random((1, 1, 1 << 20)) < 0.3
    logits = np.where(targets, size, -size).astype(dtype)
    check(logits, targets, 5e-7 if dtype is np.float32 else 1e-12)
    logits *= rng.uniform(0.5, 1.0, logits.shape).astype(dtype)
    check(logits, targets, 5e-7 if dtype is np.float32 else 1e-12)


@pytest.mark.parametrize("value", [-9.0, -1.0, -0.1, 0.0, 0.1, 3.3])
def test_constant_logits_do_not_drift(value):
    targets = np.random.default_rng(0).random((1, 1, 1 << 20)) < 0.3
    check(np.full(targets.shape, value, np.float32), targets, 5e-7)


def check_gradient_of_constant_logits(share: float, bound: float) -> None:
    """Every voxel repeats one rounding, in the sums too, which the slope of a score feels twice."""
    targets = np.zeros((1, 1, 5000), np.uint8)
    targets[..., : int(share * 5000)] = 1
    losses = [
        fs.SoftJaccard(smooth_num=1.0, smooth_den=1.0),
        fs.SoftDice(smooth_num=1e-5, smooth_den=1e-5),
    ]
    for value in np.linspace(-8.0, 8.0, 65):
        logits = np.full(targets.shape, value, np.float32)
        for loss in losses:
            expected = oracle.evaluate(loss, logits, targets)[1]
            grad = loss.value_and_grad(logits, targets)[1]
            error, _ = ulp_error(grad, expected, expected, np.float32)
            assert error <= bound, (value, loss)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradient_of_constant_logits_is_within_4_ulp(share):
    check_gradient_of_constant_logits(share, 4.0)


@pytest.mark.parametrize("kind", ["gaussian", "constant", "confident"])
def test_2_to_the_26_voxels(kind):
    """64 million voxels, where a running float32 sum has stopped to count: 64 times a million."""
    rng = np.random.default_rng(0)
    period, repeats = (1, 1, 1 << 20), 1 << 6
    p = (rng.random(period, np.float32) < 0.3).view(np.uint8)
    x = {
        "gaussian": rng.standard_normal(period, np.float32),
        "constant": np.full(period, -1.7, np.float32),
        "confident": np.where(p, np.float32(9), np.float32(-9)),
    }[kind]
    logits, targets = np.tile(x, repeats), np.tile(p, repeats)
    s = LOSS.statistics(logits, targets, track=("hard",))
    assert s["count"] == 1 << 26
    assert s["targets_sum"] == np.count_nonzero(targets)
    counts = s.counts()
    assert counts["tp"] == np.count_nonzero((logits >= 0) & (targets != 0))
    assert counts["fp"] == np.count_nonzero((logits >= 0) & (targets == 0))
    expected = exact(x, p)
    np.testing.assert_allclose(LOSS.term_values(s), expected, rtol=5e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("size", [100.0, 1e4, np.inf])
def test_extreme_logits_have_their_limits(size, dtype):
    logits = np.array([[[size, -size, size, -size]]], dtype)
    right = np.array([[[1, 0, 1, 0]]], np.uint8)
    value, grad = LOSS.value_and_grad(logits, right)
    assert 0 <= value <= 1e-40
    assert np.all(np.abs(grad) <= 1e-40)
    with np.errstate(over="ignore"):
        expected = float(dtype(size)) + 1.0
    value, grad = LOSS.value_and_grad(logits, 1 - right)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, [[[0.25, -0.25, 0.25, -0.25]]], rtol=1e-6)
    for soft in (right.astype(np.float32), right.astype(np.float32) * 0.5 + 0.25):
        value, grad = LOSS.value_and_grad(logits, soft)
        assert np.isfinite(grad).all()
        assert not np.isnan(value)


@pytest.mark.parametrize("where", [0, 300, 5003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("target", [np.uint8, np.float32])
@pytest.mark.parametrize("activation", ["sigmoid", None], ids=str)
def test_nan_in_nan_out(activation, target, dtype, where):
    logits = np.full((2, 1, 5004), 0.25, dtype)
    targets = (np.arange(5004) % 3 == 0)[None, None].repeat(2, 0).astype(target)
    logits[1, 0, where] = np.nan
    loss = LOSS.replace(activation=activation, reduction="none")
    value, grad = loss.value_and_grad(logits, targets)
    assert np.isfinite(value[0, 0])
    assert np.isnan(value[1, 0])
    assert np.isfinite(grad[0]).all()
    assert np.isnan(grad[1, 0, where])
    bce_grad = fs.BCE().replace(activation=activation).value_and_grad(logits, targets)[1]
    assert np.count_nonzero(np.isnan(bce_grad)) == 1  # at that voxel and nowhere else


# Sums in float64 are off by a few ulp themselves, and so are the coefficients made of them.
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 4.0), (np.float64, 8.0)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 30.0])
def test_gradient_of_bce_and_jaccard_is_within_4_ulp_of_itself(spread, dtype, bound):
    """Binary targets: the two terms have one sign, so nothing cancels. Extended precision."""
    rng = np.random.default_rng(0)
    targets = rng.random((1, 1, 200_000)) < 0.3
    logits = (rng.standard_normal(targets.shape) * spread).astype(dtype)
    got = LOSS.value_and_grad(logits, targets)[1]
    x, p = logits.astype(np.longdouble), targets.astype(np.longdouble)
    e = np.exp(-np.abs(x))
    large, small = 1 / (1 + e), e / (1 + e)
    q, rest = np.where(x >= 0, large, small), np.where(x >= 0, small, large)
    missed, false_alarms = (p * rest).sum(), ((1 - p) * q).sum()
    union = p.sum() + false_alarms
    index = 1 - (missed + false_alarms) / union
    region = np.where(targets, -1, index) / union * large * small
    expected = region + np.where(targets, -rest, q) / p.size
    spacing = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
    # Below the normal numbers, past |x| = 87 (708 in float64), sigma(-|x|) is taken as 0.
    allowed = np.maximum(bound * spacing, np.finfo(dtype).tiny)
    assert float((np.abs(got - expected) / allowed).max()) <= 1.0


SCORES = [
    fs.SoftJaccard(),
    fs.SoftJaccard(link="negative"),
    fs.SoftDice(link="log"),
    fs.Tversky(alpha=0.3, beta=0.7, link="power", gamma=0.75),
]


@pytest.mark.parametrize("shift", [-4.6, -7.0, -12.0, -16.0])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 4.0), (np.float64, 8.0)])
@pytest.mark.parametrize("loss", SCORES, ids=repr)
def test_a_score_near_0_keeps_its_digits(loss, dtype, bound, shift):
    """A network that starts from the prior: all logits low, and a score of 1e-2 to 1e-7."""
    rng = np.random.default_rng(0)
    targets = rng.random((1, 1, 50_000)) < 0.01
    logits = (shift + 0.5 * rng.standard_normal(targets.shape)).astype(dtype)
    value, grad = loss.value_and_grad(logits, targets)
    e = np.exp(logits.astype(np.longdouble))
    q, rest = e / (1 + e), 1 / (1 + e)
    inner = (targets * q).sum()
    missed, false_alarms = (targets * rest).sum(), (~targets * q).sum()
    factors = {"SoftJaccard": (1, 1), "SoftDice": (0.5, 0.5), "Tversky": (0.3, 0.7)}
    alpha, beta = factors[type(loss).__name__]
    size = inner + alpha * false_alarms + beta * missed
    score, error = inner / size, (alpha * false_alarms + beta * missed) / size
    expected, outer = {
        "one_minus": (error, -1),
        "negative": (-score, -1),
        "log": (-np.log(score), -1 / score),
        "power": (error**loss.gamma, -loss.gamma * error ** (loss.gamma - 1)),
    }[loss.link]
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-6 if bound == 4.0 else 1e-13)
    # d score / d q: with size = (1 - beta) inner + alpha (Q - inner) + beta P
    on_target = (1 - score * (1 - beta)) / size
    slope = np.where(targets, on_target, -score * alpha / size)
    exact = outer * slope * q * rest
    spacing = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    assert float((np.abs(grad - exact) / spacing).max()) <= bound


@pytest.mark.parametrize("beta", [0.0, 1e-8, 0.1, 0.2, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [3.0, 20.0, 40.0])
@pytest.mark.parametrize("link", ["negative", "log"])
def test_tversky_of_a_network_that_is_sure_and_wrong(link, size, beta):
    """No coefficient may leave a rest of the missed voxels, which outnumber the hits by far."""
    logits = np.full((1, 1, 2048), -size)
    targets = np.arange(2048)[None, None] % 2 == 0
    value, grad = fs.Tversky(alpha=1.0, beta=beta, link=link).value_and_grad(logits, targets)
    e = np.exp(np.longdouble(-size))
    q, rest = e / (1 + e), 1 / (1 + e)
    inner, denominator = 1024 * q, 1024 * (q + q + np.longdouble(beta) * rest)
    score = inner / denominator
    expected, outer = {"negative": (-score, -1), "log": (-np.log(score), -1 / score)}[link]
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-13)
    # d score / d q on the foreground: inner grows by 1 and the denominator by 1 - beta
    slope = outer * (1 - score * (1 - np.longdouble(beta))) / denominator * q * rest
    np.testing.assert_allclose(grad[targets], float(slope), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minimum_of_soft_bce_is_at_the_target(dtype):
    probs = np.linspace(0.05, 0.95, 19).astype(dtype)
    logits = np.log(probs) - np.log1p(-probs)
    grad = fs.BCE().value_and_grad(logits[None, None], probs[None, None])[1]
    assert np.abs(grad).max() < 8 * np.finfo(dtype).eps


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.5, 2.0, 2.7, 5.0, 9.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_focal_loss_of_one_logit(dtype, gamma):
    """Right and wrong, sure and not: every voxel has the same error, so the sums have it too.

    gamma is rounded first, as it is for the kernels: that moves w^gamma by more than they do.
    """
    loss = fs.FocalBCE(gamma=float(dtype(gamma)), normalize=None)
    bound = GRAD_ULP["float32"] if dtype is np.float32 else 8.0
    for size in np.linspace(0.25, 80 / (gamma + 1), 23):
        logits = np.full((1, 1, 2048), size, dtype)
        logits[..., ::2] *= -1
        for sign in (0, 1):
            targets = ((logits < 0) == sign).astype(np.uint8)
            value, grad = loss.value_and_grad(logits, targets)
            expected, slope = oracle.evaluate(loss, logits, targets)
            np.testing.assert_allclose(value, expected, rtol=value_rtol(loss, dtype))
            assert ulp_error(grad, slope, slope, dtype)[0] <= bound + extra_ulp(loss, dtype)


@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0])
def test_a_focal_loss_of_classes_of_one_logit(gamma):
    loss = fs.FocalCrossEntropy(gamma=gamma, normalize=None)
    for size in np.linspace(-60 / (gamma + 1), 60 / (gamma + 1), 25):
        logits = np.zeros((1, 3, 300), np.float32)
        logits[:, 1] = size
        targets = np.ones((1, 300), np.uint8)
        value, grad = loss.value_and_grad(logits, targets)
        expected, slope = oracle.evaluate(loss, logits, targets)
        np.testing.assert_allclose(value, expected, rtol=value_rtol(loss, np.float32))
        assert ulp_error(grad, slope, slope, np.float32)[0] <= 8 + extra_ulp(loss, np.float32)
