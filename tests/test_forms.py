"""The forms of a region term: what they are equal to, where their minimum is, what has none."""

import numpy as np
import pytest

import fastseg as fs
import oracle
from cases import make

REGIONS = [fs.SoftJaccard, fs.SoftDice, fs.Tversky]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("region", REGIONS)
def test_the_l1_form_of_binary_targets_is_the_product(region, activation):
    logits, labels = make((2, 3, 7, 91))
    targets = labels if activation == "sigmoid" else labels[:, 0]
    plain = region().replace(activation=activation)
    l1 = region(form="l1").replace(activation=activation)
    expected, slope = plain.value_and_grad(logits, targets)
    got, grad = l1.value_and_grad(logits, targets)
    assert got == expected
    np.testing.assert_array_equal(grad, slope)
    as_reals = targets.astype(np.float32)
    if activation == "softmax":
        as_reals = (targets[:, None] == np.arange(3)[:, None, None]).astype(np.float32)
    got, grad = l1.value_and_grad(logits, as_reals)  # min(p, q) and its slopes
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("form", ["l1", "squared"])
def test_soft_targets_are_reached_where_the_product_leads_away_from_them(form, region, activation):
    logits = make((1, 3, 7, 91), np.float64)[0]
    loss = region(form=form).replace(activation=activation)
    if activation == "softmax":
        e = np.exp(logits)
        targets = e / e.sum(1, keepdims=True)
    else:
        targets = fs.sigmoid(logits)
    predictions = logits if activation else targets
    value, grad = loss.value_and_grad(predictions, targets)
    assert 0 <= value < 1e-14
    if form == "squared":  # the l1 form has an edge there
        assert np.abs(grad).max() < 1e-14
    product, away = region().replace(activation=activation).value_and_grad(predictions, targets)
    assert product > 0.1 and np.abs(away).max() > 1e-5
    rng = np.random.default_rng(0)
    for _ in range(5):
        other = logits + rng.normal(0, 0.1, logits.shape)
        assert loss(other if activation else fs.sigmoid(other), targets) > 1e-5


@pytest.mark.parametrize("form", ["l1", "squared"])
def test_a_sure_network_keeps_the_digits_of_the_form(form):
    for size in (8.0, 15.0, 30.0):
        targets = make((1, 1, 3001))[1]
        sure = np.where(targets, size, -size).astype(np.float32)
        loss = fs.SoftJaccard(form=form)
        u = 1 / (1 + np.exp(size))  # on the wrong side of every voxel
        n, on = targets.size, targets.sum()
        if form == "l1":
            expected = n * u / (on + (n - on) * u)
        else:
            expected = n * u**2 / (on * (1 - u) + n * u**2)
        np.testing.assert_allclose(loss(sure, targets), expected, rtol=1e-6)


def test_weights_masks_and_layouts_of_the_forms():
    logits, targets = make((2, 3, 7, 91), target=np.float32)
    rng = np.random.default_rng(0)
    mask = rng.random(logits.shape) < 0.8
    weights = rng.integers(0, 4, logits.shape).astype(np.float32)
    loss = fs.SoftJaccard(form="l1", scope="batch") + 0.5 * fs.SoftDice(form="squared")
    expected, slope = oracle.evaluate(loss, logits, targets, mask=mask, weight_map=weights)
    for x in (logits, np.where(mask, logits, np.float32(np.nan)), np.asfortranarray(logits)):
        got, grad = loss.value_and_grad(x, targets, mask=mask, weight_map=weights)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        np.testing.assert_allclose(grad, slope, rtol=2e-5, atol=1e-10)


def test_a_nan_prediction_is_a_nan_loss_in_every_form():
    logits, targets = make((1, 1, 300), target=np.float32)
    logits[0, 0, 7] = np.nan
    for form in ("l1", "squared"):
        for region in REGIONS:
            value, grad = region(form=form, empty="one").value_and_grad(logits, targets)
            assert np.isnan(value) and np.isnan(grad[0, 0, 7])


def test_statistics_of_forms_hold_what_they_need():
    logits, targets = make((1, 1, 300), target=np.float32)
    s = fs.SoftJaccard(form="l1").statistics(logits, targets)
    q, p = fs.sigmoid(logits.astype(np.float64)), targets.astype(np.float64)
    np.testing.assert_allclose(s["l1_true_positive_sum"], np.minimum(p, q).sum(), rtol=1e-6)
    np.testing.assert_allclose(s["l1_false_negative_sum"], np.maximum(p - q, 0).sum(), rtol=1e-6)
    np.testing.assert_allclose(s["l1_false_positive_sum"], np.maximum(q - p, 0).sum(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"do not hold squared_error_sum|do not hold product_sum"):
        fs.SoftDice(form="squared").value(s)


def test_what_has_no_squared_form_is_refused():
    with pytest.raises(
        ValueError, match=r"form='squared' needs missed foreground and false alarms"
    ):
        fs.Tversky(alpha=0.3, beta=0.7, form="squared")
    with pytest.raises(ValueError, match="form must be one of 'product', 'l1', 'squared', got"):
        fs.SoftJaccard(form="l2")
