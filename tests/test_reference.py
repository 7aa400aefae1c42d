"""The float64 reference against independent oracles.

Finite differences for every gradient, PyTorch and MONAI for values and trajectories, and cases
small enough to be computed by hand.
"""

import decimal
import doctest
import importlib
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from fastseg_kernels import reference as ref

VALUE = {"rtol": 1e-13, "atol": 1e-15}  # both sides in float64: a few roundings of sums of ~100
DIFFERENCE = {"rtol": 1e-6, "atol": 1e-9}  # central differences, step 1e-5: error h^2 + 1e-16 / h
TRAJECTORY = {"rtol": 1e-12, "atol": 1e-12}  # 50 steps, rounding in another order

SHAPES = [(1, 1, 1), (2, 3, 7), (2, 3, 5, 4), (1, 2, 3, 2, 3)]
SMOOTHING = [
    {},
    {"smooth_num": 0.3, "smooth_den": 0.7},
    {"smooth_num": 1.0, "smooth_den": 1.0, "eps": 1e-7},
    {"smooth_num": 0.5, "eps": 1e3},  # the clamp holds in every row
]
SCORES = {
    "jaccard": (ref.soft_jaccard_index, ref.soft_jaccard_index_gradient, ()),
    "dice": (ref.soft_dice_score, ref.soft_dice_score_gradient, ()),
    "tversky": (ref.tversky_index, ref.tversky_index_gradient, (0.3, 0.7)),
    "tversky_alpha": (ref.tversky_index, ref.tversky_index_gradient, (1.4, 0.0)),
}
LINKS = [("one_minus", 1.0), ("negative", 1.0), ("log", 1.0), ("power", 0.75), ("power", 2.0)]


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture
def monai_losses():
    """Return MONAI's losses, imported without the deprecation warnings of its dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return pytest.importorskip("monai.losses")


def volumes(rng, shape, soft=False):
    """Return logits, probabilities and targets; no row is without foreground."""
    logits = rng.normal(scale=2.0, size=shape)
    targets = rng.random(shape) if soft else (rng.random(shape) < 0.4).astype(np.float64)
    targets.reshape(*shape[:2], -1)[:, :, 0] = 1
    return logits, ref.sigmoid(logits), targets


def finite_differences(function, x, h=1e-5):
    """Return the central difference of a scalar function along every element of x."""
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[i] += h
        below[i] -= h
        out[i] = (function(above) - function(below)) / (2 * h)
    return out


def torch_gradient(function, x):
    """Return the gradient of a scalar torch function at a NumPy array."""
    leaf = torch.tensor(x, requires_grad=True)
    function(leaf).backward()
    return leaf.grad.numpy()


def score_of(name, probs, targets, weights=None, **smoothing):
    score, _, shape = SCORES[name]
    return score(*ref.overlap_sums(probs, targets, weights), *shape, **smoothing)


def gradient_of(name, probs, targets, weights=None, **smoothing):
    _, gradient, shape = SCORES[name]
    return gradient(probs, targets, *shape, weights=weights, **smoothing)


def test_reference_exports_every_public_function():
    modules = [
        *("cross_entropy", "curves", "hard", "links", "logistic", "lovasz", "lovasz_bins"),
        *("multiclass", "overlap", "region_scores", "updates"),
    ]
    expected = set()
    for name in modules:
        module = importlib.import_module(f"fastseg_kernels.reference.{name}")
        expected |= {
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
        }
    assert set(ref.__all__) == expected | {"LINKS"}
    assert not set(ref.__all__) & set(modules)


@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy", "curves", "hard", "links", "logistic", "lovasz", "lovasz_bins"),
        *("multiclass", "overlap", "region_scores", "updates"),
    ],
)
def test_reference_examples_run(name):
    got = doctest.testmod(importlib.import_module(f"fastseg_kernels.reference.{name}"))
    assert got.attempted > 0
    assert got.failed == 0


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32])
def test_reference_casts_every_dtype_to_float64(dtype):
    volume = np.array([[[1, 0, 1, 0]]]).astype(dtype)
    for got in (
        ref.sigmoid(volume),
        ref.bce_with_logits(volume, volume),
        ref.bce(volume, volume),
        *ref.overlap_sums(volume, volume),
        ref.soft_jaccard_index_gradient(volume, volume),
        ref.gradient_descent(volume, volume, 0.1),
    ):
        assert got.dtype == np.float64
        assert np.all(np.isfinite(got))


@pytest.mark.parametrize("x", [-745.0, -40.0, -1.5, -1e-9, 0.0, 1e-9, 0.5, 3.0, 36.0, 40.0, 700.0])
def test_logistic_equals_decimal_arithmetic(x):
    with decimal.localcontext(prec=400):  # 1 + exp(-745) needs 324 digits
        e = decimal.Decimal(-x).exp()
        expected = float(1 / (1 + e))
        expected_softplus = float((1 + 1 / e).ln())
        expected_gradient = float(e / (1 + e) ** 2)
    tiny = 5e-324  # the results of x = -745 are subnormal
    np.testing.assert_allclose(ref.sigmoid(x), expected, rtol=5e-16, atol=tiny)
    np.testing.assert_allclose(ref.softplus(x), expected_softplus, rtol=5e-16, atol=tiny)
    np.testing.assert_allclose(ref.sigmoid_gradient(x), expected_gradient, rtol=5e-16, atol=tiny)


def test_logistic_has_limits_and_passes_nan():
    x = np.array([-np.inf, -1e4, 1e4, np.inf, np.nan])
    np.testing.assert_array_equal(ref.sigmoid(x), [0, 0, 1, 1, np.nan])
    np.testing.assert_array_equal(ref.softplus(x), [0, 0, 1e4, np.inf, np.nan])
    np.testing.assert_array_equal(ref.sigmoid_gradient(x), [0, 0, 0, 0, np.nan])


def test_sigmoid_gradient_equals_finite_differences(rng):
    x = rng.normal(scale=3.0, size=50)
    expected = finite_differences(lambda t: ref.sigmoid(t).sum(), x)
    np.testing.assert_allclose(ref.sigmoid_gradient(x), expected, **DIFFERENCE)


def test_softplus_has_the_sigmoid_as_derivative(rng):
    x = rng.normal(scale=3.0, size=50)
    expected = finite_differences(lambda t: ref.softplus(t).sum(), x)
    np.testing.assert_allclose(ref.sigmoid(x), expected, **DIFFERENCE)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("pos_weight", [1.0, 2.5, [[0.5], [1.0], [3.0]]])
def test_bce_with_logits_equals_torch(rng, soft, pos_weight):
    logits, _, targets = volumes(rng, (2, 3, 7), soft)

    def peer(x):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            x, torch.tensor(targets), pos_weight=torch.tensor(pos_weight), reduction="none"
        )

    got = ref.bce_with_logits(logits, targets, pos_weight)
    np.testing.assert_allclose(got, peer(torch.tensor(logits)).numpy(), **VALUE)
    got = ref.bce_with_logits_gradient(logits, targets, pos_weight)
    np.testing.assert_allclose(got, torch_gradient(lambda x: peer(x).sum(), logits), **VALUE)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("pos_weight", [1.0, 2.5, [[0.5], [1.0], [3.0]]])
def test_bce_gradients_equal_finite_differences(rng, soft, pos_weight):
    logits, probs, targets = volumes(rng, (2, 3, 7), soft)
    expected = finite_differences(
        lambda x: ref.bce_with_logits(x, targets, pos_weight).sum(), logits
    )
    got = ref.bce_with_logits_gradient(logits, targets, pos_weight)
    np.testing.assert_allclose(got, expected, **DIFFERENCE)

    probs = 0.05 + 0.9 * probs  # the third derivative, and with it the error, grows as q^-3
    expected = finite_differences(lambda q: ref.bce(q, targets, pos_weight).sum(), probs, h=1e-6)
    got = ref.bce_gradient(probs, targets, pos_weight)
    np.testing.assert_allclose(got, expected, **DIFFERENCE)


@pytest.mark.parametrize("soft", [False, True])
def test_bce_equals_torch_also_at_the_clamps(rng, soft):
    _, probs, targets = volumes(rng, (2, 3, 7), soft)
    probs[:, :, :5] = [0.0, 1.0, 1e-50, 1e-13, 1 - 1e-13]

    def peer(q):
        return torch.nn.functional.binary_cross_entropy(q, torch.tensor(targets), reduction="none")

    expected = peer(torch.tensor(probs)).numpy()
    np.testing.assert_allclose(ref.bce(probs, targets), expected, rtol=1e-13)
    expected = torch_gradient(lambda q: peer(q).sum(), probs)
    # torch clamps at the float32 that is nearest to 1e-12, which is 4e-9 smaller
    got = ref.bce_gradient(probs, targets)
    np.testing.assert_allclose(got, expected, rtol=5e-9)
    np.testing.assert_allclose(got[:, :, 5:], expected[:, :, 5:], **VALUE)


def test_bce_of_probabilities_equals_bce_of_logits(rng):
    logits, probs, targets = volumes(rng, (2, 3, 7), soft=True)
    expected = ref.bce_with_logits(logits, targets, 2.0)
    np.testing.assert_allclose(ref.bce(probs, targets, 2.0), expected, rtol=1e-12)
    expected = ref.bce_with_logits_gradient(logits, targets, 2.0)
    got = ref.gradient_wrt_logits(ref.bce_gradient(probs, targets, 2.0), logits)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_bce_with_logits_has_limits_at_infinity():
    logits = np.array([np.inf, -np.inf, np.inf, -np.inf, 1e4, -1e4])
    targets = np.array([1, 0, 0, 1, 1, 1])
    got = ref.bce_with_logits(logits, targets)
    np.testing.assert_array_equal(got, [0, 0, np.inf, np.inf, 0, 1e4])
    got = ref.bce_with_logits_gradient(logits, targets)
    np.testing.assert_array_equal(got, [0, 0, 1, -1, 0, -1])


def test_bce_passes_nan():
    assert np.isnan(ref.bce_with_logits([np.nan, np.nan], [0, 1])).all()
    assert np.isnan(ref.bce_with_logits_gradient([np.nan, np.nan], [0, 1])).all()
    assert np.isnan(ref.bce([np.nan, np.nan], [0, 1])).all()
    assert np.isnan(ref.bce_gradient([np.nan, np.nan], [0, 1])).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_bce_per_image_equals_the_likelihood_formula(rng, shape):
    logits, probs, targets = volumes(rng, shape)
    spatial = tuple(range(2, len(shape)))
    expected = -np.log(np.where(targets == 1, probs, 1 - probs)).sum(axis=spatial)
    got = ref.bce_per_image(logits, targets)
    assert got.shape == shape[:2]
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    np.testing.assert_allclose(
        ref.bce_mean(logits, targets), expected.sum() / logits.size, rtol=1e-13
    )


def test_bce_per_image_leaves_out_voxels_of_weight_zero(rng):
    logits, _, targets = volumes(rng, (2, 3, 8))
    weights = rng.random((2, 1, 8))
    weights[:, :, 5:] = 0
    expected = (weights * ref.bce_with_logits(logits, targets, 2.0)).sum(axis=2)
    logits[:, :, 5:], targets[:, :, 5:] = np.nan, np.nan
    got = ref.bce_per_image(logits, targets, 2.0, weights)
    np.testing.assert_allclose(got, expected, **VALUE)


def test_bce_mean_is_over_valid_voxels(rng):
    logits, _, targets = volumes(rng, (2, 3, 8))
    valid = np.arange(8) < 5
    expected = ref.bce_with_logits(logits, targets)[:, :, :5].mean()
    logits[:, :, 5:] = np.nan
    np.testing.assert_allclose(ref.bce_mean(logits, targets, valid=valid), expected, **VALUE)
    assert math.isnan(ref.bce_mean(logits, targets, valid=np.zeros(8)))


def test_overlap_scores_equal_hand_computed_values():
    sums = ref.overlap_sums([[[1, 1, 0, 0]]], [[[1, 0, 1, 0]]])
    assert [float(s[0, 0]) for s in sums] == [1, 2, 2]
    assert ref.soft_jaccard_index(*sums) == 1 / 3
    assert ref.soft_dice_score(*sums) == 1 / 2
    # Not symmetric: I = 1, two false positives, one false negative
    sums = ref.overlap_sums([[[1, 1, 1, 0]]], [[[1, 0, 0, 1]]])
    assert ref.soft_jaccard_index(*sums) == 1 / 4
    assert ref.soft_dice_score(*sums) == 2 / 5
    assert ref.tversky_index(*sums, alpha=0.25, beta=1.0) == 1 / 2.5
    assert ref.tversky_index(*sums, alpha=1.0, beta=0.25) == 1 / 3.25
    assert ref.soft_jaccard_index(*sums, smooth_num=1, smooth_den=4) == 2 / 8
    assert ref.soft_jaccard_index(*sums, eps=10) == 1 / 10


def test_overlap_gradient_equals_hand_computed_values():
    # I = 1, P = 2, Q = 1, U = 2: dJ/dI = (2 + 1) / 4, dJ/dQ = -1 / 4
    got = ref.soft_jaccard_index_gradient([[[0.5, 0.5, 0.0]]], [[[1, 1, 0]]])
    np.testing.assert_array_equal(got, [[[0.5, 0.5, -0.25]]])
    # S = 3, N = 2: dD/dI = 2 / 3, dD/dQ = -2 / 9
    got = ref.soft_dice_score_gradient([[[0.5, 0.5, 0.0]]], [[[1, 1, 0]]])
    np.testing.assert_allclose(got, [[[4 / 9, 4 / 9, -2 / 9]]], **VALUE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("name", SCORES)
def test_overlap_gradients_equal_finite_differences(rng, name, smoothing, soft, shape):
    _, probs, targets = volumes(rng, shape, soft)
    expected = finite_differences(lambda q: score_of(name, q, targets, **smoothing).sum(), probs)
    got = gradient_of(name, probs, targets, **smoothing)
    assert got.shape == shape
    np.testing.assert_allclose(got, expected, **DIFFERENCE)


@pytest.mark.parametrize("name", SCORES)
def test_overlap_weights_multiply_and_exclude(rng, name):
    _, probs, targets = volumes(rng, (2, 3, 8))
    weights = rng.integers(1, 4, (2, 1, 8)).astype(np.float64)
    weights[:, :, 5:] = 0
    expected = np.empty((2, 3))
    for n, c in np.ndindex(2, 3):  # a weight of k is the voxel k times
        q, p = (np.repeat(a[n, c], weights[n, 0].astype(int)) for a in (probs, targets))
        expected[n, c] = score_of(name, q[None, None], p[None, None]).item()
    expected_gradient = finite_differences(
        lambda q: score_of(name, q, targets, weights).sum(), probs
    )
    probs[:, :, 5:], targets[:, :, 5:] = np.nan, 255
    got = score_of(name, probs, targets, weights)
    np.testing.assert_allclose(got, expected, **VALUE)
    got = gradient_of(name, probs, targets, weights)
    np.testing.assert_allclose(got, expected_gradient, **DIFFERENCE)
    assert np.all(got[:, :, 5:] == 0)


@pytest.mark.parametrize(("link", "gamma"), LINKS)
@pytest.mark.parametrize("name", SCORES)
def test_overlap_loss_gradient_wrt_logits_equals_finite_differences(rng, name, link, gamma):
    logits, probs, targets = volumes(rng, (2, 3, 5), soft=True)

    def loss(x):
        return ref.link_value(score_of(name, ref.sigmoid(x), targets), link, gamma).sum()

    slope = ref.link_derivative(score_of(name, probs, targets), link, gamma)
    dprobs = slope[:, :, None] * gradient_of(name, probs, targets)
    got = ref.gradient_wrt_logits(dprobs, logits)
    np.testing.assert_allclose(got, finite_differences(loss, logits), **DIFFERENCE)


def test_tversky_index_contains_jaccard_and_dice(rng):
    sums = ref.overlap_sums(*volumes(rng, (2, 3, 7))[1:])
    got = ref.tversky_index(*sums, 1.0, 1.0, smooth_num=0.1, smooth_den=0.2)
    expected = ref.soft_jaccard_index(*sums, smooth_num=0.1, smooth_den=0.2)
    np.testing.assert_allclose(got, expected, **VALUE)
    got = ref.tversky_index(*sums, 0.5, 0.5, smooth_num=0.1, smooth_den=0.2)
    expected = ref.soft_dice_score(*sums, smooth_num=0.2, smooth_den=0.4)
    np.testing.assert_allclose(got, expected, **VALUE)


@pytest.mark.parametrize(("smooth_nr", "smooth_dr"), [(0.0, 0.0), (1e-5, 1e-5), (0.3, 0.7)])
@pytest.mark.parametrize("jaccard", [False, True])
def test_overlap_losses_equal_monai_dice(rng, monai_losses, jaccard, smooth_nr, smooth_dr):
    logits, probs, targets = volumes(rng, (2, 3, 5, 4))
    peer = monai_losses.DiceLoss(
        sigmoid=True, jaccard=jaccard, smooth_nr=smooth_nr, smooth_dr=smooth_dr, reduction="none"
    )
    name, share = ("jaccard", 0.5) if jaccard else ("dice", 1.0)  # MONAI halves its smoothing
    smoothing = {"smooth_num": share * smooth_nr, "smooth_den": share * smooth_dr}
    got = 1 - score_of(name, probs, targets, **smoothing)
    expected = peer(torch.tensor(logits), torch.tensor(targets)).numpy().reshape(2, 3)
    np.testing.assert_allclose(got, expected, **VALUE)
    got = -ref.gradient_wrt_logits(gradient_of(name, probs, targets, **smoothing), logits)
    expected = torch_gradient(lambda x: peer(x, torch.tensor(targets)).sum(), logits)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-15)


def test_tversky_loss_equals_monai(rng, monai_losses):
    logits, probs, targets = volumes(rng, (2, 3, 5, 4))
    peer = monai_losses.TverskyLoss(
        sigmoid=True, alpha=0.3, beta=0.7, smooth_nr=0.1, smooth_dr=0.2, reduction="none"
    )
    got = 1 - score_of("tversky", probs, targets, smooth_num=0.1, smooth_den=0.2)
    expected = peer(torch.tensor(logits), torch.tensor(targets)).numpy().reshape(2, 3)
    np.testing.assert_allclose(got, expected, **VALUE)


def test_error_sums_equal_differences_of_overlap_sums(rng):
    logits, probs, targets = volumes(rng, (2, 3, 7), soft=True)
    weights = rng.random((2, 1, 7))
    intersection, P, Q = ref.overlap_sums(probs, targets, weights)
    fn, fp = ref.error_sums(logits, targets, weights)
    np.testing.assert_allclose(fn, P - intersection, rtol=1e-12)
    np.testing.assert_allclose(fp, Q - intersection, rtol=1e-12)
    expected = 1 - ref.soft_jaccard_index(intersection, P, Q)
    np.testing.assert_allclose((fn + fp) / (P + fp), expected, **VALUE)


def test_error_sums_keep_digits_of_confident_predictions():
    targets = np.array([[[1.0, 1.0, 0.0, 0.0]]])
    logits = 40 * (2 * targets - 1)
    fn, fp = ref.error_sums(logits, targets)
    e = math.exp(-40)
    got = (fn + fp) / (2 + fp)
    np.testing.assert_allclose(got, 4 * e / (2 + 2 * e) / (1 + e), rtol=1e-15)


def test_overlap_scores_of_empty_rows_are_nan():
    sums = ref.overlap_sums(np.zeros((1, 1, 3)), np.zeros((1, 1, 3)))
    assert np.isnan(ref.soft_jaccard_index(*sums))
    assert np.isnan(ref.soft_dice_score(*sums))
    assert np.isnan(ref.tversky_index(*sums, 0.3, 0.7))
    assert ref.soft_jaccard_index(*sums, smooth_num=1, smooth_den=1) == 1
    assert ref.soft_jaccard_index(*sums, eps=1e-7) == 0


def test_overlap_gradient_passes_nan_to_its_row_alone(rng):
    _, probs, targets = volumes(rng, (2, 3, 5))
    probs[1, 2, 0] = np.nan
    got = np.isnan(ref.soft_jaccard_index_gradient(probs, targets))
    assert got[1, 2].all()
    assert got.sum() == 5


@pytest.mark.parametrize("function", [ref.link_value, ref.link_derivative])
def test_link_lists_the_choices(function):
    with pytest.raises(ValueError, match=r"one_minus.*power.*got 'exp'"):
        function(0.5, "exp")


@pytest.mark.parametrize(("link", "gamma"), LINKS)
def test_link_derivative_equals_finite_differences(link, gamma):
    score = np.array([[0.1, 0.5, 0.9]])
    expected = finite_differences(lambda s: ref.link_value(s, link, gamma).sum(), score)
    np.testing.assert_allclose(ref.link_derivative(score, link, gamma), expected, **DIFFERENCE)


def test_link_has_its_limits():
    assert ref.link_value(0.0, "log") == np.inf
    assert ref.link_derivative(0.0, "log") == -np.inf
    assert ref.link_derivative(1.0, "power", 0.5) == -np.inf
    assert ref.link_derivative(1.0, "power", 1.0) == -1
    assert ref.link_derivative(1.0, "power", 2.0) == 0


def test_hard_counts_threshold_at_one_half_inclusive():
    logits = np.array([[[0.0, -0.0, -5e-324, -1e-20, 1.0, -1.0, np.nan]]])
    targets = np.array([[[1, 0, 1, 0, 1, 0, 1]]])
    got = [int(n[0, 0]) for n in ref.confusion_counts(logits, targets)]
    assert got == [2, 1, 2, 2]


def test_hard_counts_equal_direct_counting(rng):
    logits, probs, targets = volumes(rng, (2, 3, 5, 4))
    valid = rng.random((2, 1, 5, 4)) < 0.7
    counts = ref.confusion_counts(logits, targets, valid)
    for n, c in np.ndindex(2, 3):
        pairs = [
            (bool(p), bool(q >= 0.5))
            for p, q, v in zip(targets[n, c].flat, probs[n, c].flat, valid[n, 0].flat, strict=True)
            if v
        ]
        expected = [
            pairs.count(k) for k in [(True, True), (False, True), (True, False), (False, False)]
        ]
        assert [int(k[n, c]) for k in counts] == expected
    from_probs = ref.confusion_counts(probs - 0.5, targets, valid)
    np.testing.assert_array_equal(from_probs, counts)


def test_soft_scores_equal_hard_scores_of_masks():
    # Every pair of masks of four voxels, 0/0 included
    masks = np.array(list(itertools.product([0, 1], repeat=4)))
    probs = np.repeat(masks, 16, axis=0).reshape(16, 16, 4)
    targets = np.tile(masks, (16, 1)).reshape(16, 16, 4)
    sums = ref.overlap_sums(probs, targets)
    tp, fp, fn, tn = ref.confusion_counts(probs - 0.5, targets)
    np.testing.assert_array_equal(tp + fp + fn + tn, 4)
    got = ref.hard_jaccard_index(tp, fp, fn)
    np.testing.assert_array_equal(got, ref.soft_jaccard_index(*sums))
    assert np.isnan(got).sum() == 1
    got = ref.hard_dice_score(tp, fp, fn)
    np.testing.assert_array_equal(got, ref.soft_dice_score(*sums))


def test_hard_scores_equal_hand_computed_values():
    tp, fp, fn, tn = ref.confusion_counts([[[2, 1, -1, -2]]], [[[1, 0, 1, 0]]])
    assert (tp.item(), fp.item(), fn.item(), tn.item()) == (1, 1, 1, 1)
    assert ref.hard_jaccard_index(tp, fp, fn) == 1 / 3
    assert ref.hard_dice_score(tp, fp, fn) == 1 / 2


STEPS = 50


def quadratic_gradients(rng):
    """Return a start and the gradient of an anisotropic quadratic with noise, by step."""
    start, curvature = rng.normal(size=7), rng.random(7) + 0.1
    noise = rng.normal(scale=0.1, size=(STEPS, 7))
    return start, lambda theta, t: curvature * theta + noise[t]


def torch_trajectory(optimiser, start, gradient, lrs, **options):
    """Return theta after every step of a torch optimiser."""
    theta = torch.nn.Parameter(torch.tensor(start))
    opt = optimiser([theta], lr=lrs[0], **options)
    out = []
    for t, lr in enumerate(lrs):
        opt.param_groups[0]["lr"] = lr
        theta.grad = torch.as_tensor(gradient(theta.detach().numpy(), t))
        opt.step()
        out.append(theta.detach().numpy().copy())
    return np.array(out)


CONSTANT = [0.1] * STEPS
SCHEDULE = [0.1 * 0.95**t for t in range(STEPS)]


@pytest.mark.parametrize("lrs", [CONSTANT, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_gradient_descent_equals_torch_sgd(rng, weight_decay, lrs):
    theta, gradient = quadratic_gradients(rng)
    expected = torch_trajectory(torch.optim.SGD, theta, gradient, lrs, weight_decay=weight_decay)
    for t, lr in enumerate(lrs):
        theta = ref.gradient_descent(theta, gradient(theta, t), lr, weight_decay=weight_decay)
        np.testing.assert_allclose(theta, expected[t], **TRAJECTORY)


@pytest.mark.parametrize("lrs", [CONSTANT, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, False), (0.2, False), (0.0, True)])
def test_momentum_pytorch_equals_torch_sgd(rng, dampening, nesterov, weight_decay, lrs):
    theta, gradient = quadratic_gradients(rng)
    options = {"dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
    expected = torch_trajectory(torch.optim.SGD, theta, gradient, lrs, momentum=0.9, **options)
    buf = None
    for t, lr in enumerate(lrs):
        theta, buf = ref.momentum_pytorch(theta, buf, gradient(theta, t), lr, 0.9, **options)
        np.testing.assert_allclose(theta, expected[t], **TRAJECTORY)


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_pytorch_at_constant_lr_alone(rng, nesterov, weight_decay):
    start, gradient = quadratic_gradients(rng)

    def both(lrs):
        theta, velocity, peer, buf = start, np.zeros_like(start), start, None
        options = {"nesterov": nesterov, "weight_decay": weight_decay}
        for t, lr in enumerate(lrs):
            theta, velocity = ref.momentum(theta, velocity, gradient(theta, t), lr, 0.9, **options)
            peer, buf = ref.momentum_pytorch(peer, buf, gradient(peer, t), lr, 0.9, **options)
        return theta, peer

    got, expected = both(CONSTANT)
    np.testing.assert_allclose(got, expected, **TRAJECTORY)
    got, expected = both(SCHEDULE)
    assert np.abs(got - expected).max() > 1e-3


def test_momentum_equals_hand_computed_values():
    # v1 = 1, theta1 = -1; the lr halves: v2 = 0.5 + 0.5 = 1, theta2 = -2; nesterov adds to v
    theta, v = ref.momentum(0.0, 0.0, 1.0, lr=1.0, gamma=0.5)
    assert (theta, v) == (-1.0, 1.0)
    assert ref.momentum(theta, v, 1.0, lr=0.5, gamma=0.5) == (-2.0, 1.0)
    assert ref.momentum(theta, v, 1.0, lr=0.5, gamma=0.5, nesterov=True) == (-2.0, 1.0)
    assert ref.momentum(theta, v, 3.0, lr=0.5, gamma=0.5, nesterov=True) == (-3.5, 2.0)
    # PyTorch's form: buf = 0.5 + 1 = 1.5, theta = -1 - 0.5 * 1.5
    assert ref.momentum_pytorch(theta, 1.0, 1.0, lr=0.5, gamma=0.5) == (-1.75, 1.5)


@pytest.mark.parametrize("lrs", [CONSTANT, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_equals_torch(rng, decoupled, weight_decay, lrs):
    theta, gradient = quadratic_gradients(rng)
    optimiser = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    expected = torch_trajectory(optimiser, theta, gradient, lrs, **options)
    m = v = np.zeros_like(theta)
    for t, lr in enumerate(lrs):
        theta, m, v = ref.adam(
            *(theta, m, v, gradient(theta, t), t + 1, lr, 0.8, 0.99, 1e-6),
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        np.testing.assert_allclose(theta, expected[t], **TRAJECTORY)


def test_adam_first_step_is_lr_in_size_at_any_scale():
    got, _, _ = ref.adam(np.zeros(3), 0.0, 0.0, [1e-3, -1.0, 1e6], step=1, lr=0.1, eps=0.0)
    np.testing.assert_allclose(got, [-0.1, 0.1, -0.1], rtol=1e-14)


def test_updates_leave_their_arguments_unchanged(rng):
    theta, state, grad = rng.normal(size=(3, 5))
    state = np.abs(state)
    copies = theta.copy(), state.copy(), grad.copy()
    ref.gradient_descent(theta, grad, 0.1, weight_decay=0.1)
    ref.momentum(theta, state, grad, 0.1, 0.9, nesterov=True, weight_decay=0.1)
    ref.momentum_pytorch(theta, state, grad, 0.1, 0.9, nesterov=True, weight_decay=0.1)
    ref.adam(theta, state, state, grad, 1, weight_decay=0.1, decoupled=True)
    _, buf = ref.momentum_pytorch(theta, None, grad, 0.1, 0.9)
    assert not np.shares_memory(buf, grad)
    for got, expected in zip((theta, state, grad), copies, strict=True):
        np.testing.assert_array_equal(got, expected)
