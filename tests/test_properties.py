"""Promises over shapes, layouts and values that hypothesis makes up and shrinks when they fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastseg as fs
import oracle
from cases import VALUE_RTOL, magnitude, name_of, ulp_error
from fastseg_kernels import reference as ref

# The first example of a dtype compiles. The same examples in each run: a change is judged by what
# it changes; take derandomize away to look for others.
COMPILES = settings(deadline=None, max_examples=150, derandomize=True)
FLOATS = st.sampled_from([np.float32, np.float64, np.float16])
LABELS = st.sampled_from([np.bool_, np.uint8, np.int16, np.uint32, np.int64])
SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 3), hnp.array_shapes(min_dims=0, max_dims=3, max_side=9)
).map(lambda parts: (*parts[:2], *parts[2]))
NUMBERS = st.floats(0.0, 4.0, allow_subnormal=False)


@st.composite
def losses(draw: Any) -> fs.Loss:
    """Return a sum of terms that is defined for any data: region terms are smoothed."""
    smooth = draw(st.floats(0.01, 2.0))
    options = {
        "smooth_num": smooth,
        "smooth_den": smooth,
        "scope": draw(st.sampled_from(["sample", "batch"])),
    }
    alpha, beta = draw(NUMBERS), draw(NUMBERS)
    region = draw(
        st.sampled_from(
            [
                fs.SoftJaccard(**options),
                fs.SoftDice(**options),
                fs.Tversky(alpha=alpha, beta=beta, **options),
            ]
        )
    )
    bce = fs.BCE(pos_weight=draw(NUMBERS), normalize=draw(st.sampled_from(["valid", "all", None])))
    return draw(st.floats(0.1, 3.0)) * bce + draw(st.floats(0.1, 3.0)) * region


def laid_out(draw: Any, array: np.ndarray) -> np.ndarray:
    """Return the same values in some memory: axes in any order, reversed, or with gaps."""
    order = draw(st.permutations(range(array.ndim)))
    steps = [draw(st.sampled_from([1, -1, 2])) for _ in order]
    memory = np.zeros([array.shape[k] * abs(steps[k]) for k in order], array.dtype)
    view = memory.transpose(np.argsort(order))
    view = view[tuple(slice(None, None, step) for step in steps)]
    view[...] = array
    return view


@st.composite
def volumes(draw: Any, bound: float = 80.0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits up to ``bound`` and binary targets, each in a layout of its own."""
    shape, dtype = draw(SHAPES), draw(FLOATS)
    width = 8 * np.dtype(dtype).itemsize
    values = st.floats(-bound, bound, width=width, allow_subnormal=False)
    logits = draw(hnp.arrays(dtype, shape, elements=values))
    targets = draw(hnp.arrays(np.bool_, shape)).astype(draw(LABELS))
    return laid_out(draw, logits), laid_out(draw, targets)


@COMPILES
@given(st.data(), losses(), volumes())
def test_value_and_gradient_equal_the_reference(data, loss, volume):
    logits, targets = volume
    mask = None
    if data.draw(st.booleans()):
        mask = laid_out(data.draw, data.draw(hnp.arrays(np.bool_, logits.shape)))
    value, grad = loss.value_and_grad(logits, targets, mask=mask)
    expected, expected_grad = oracle.evaluate(loss, logits, targets, mask=mask)
    # The reference forms 1 - score in float64, which loses what is left of a loss below 1e-9.
    rtol = VALUE_RTOL[name_of(logits.dtype)]
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-14)
    if mask is None:
        scale = magnitude(loss, logits, targets)
        error, bound = ulp_error(grad, expected_grad, scale, grad.dtype)
        assert error <= bound
    else:  # what the terms of a part of the voxels are made of, `magnitude` does not know
        assert np.all(grad[~mask] == 0)
        half = logits.dtype == np.float16
        atol = 1e-6 * np.abs(expected_grad).max(initial=0.0) + half * 2.0**-24
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-3 if half else 1e-5, atol=atol)


@COMPILES
@given(st.data(), losses(), volumes())
def test_statistics_of_parts_add_up(data, loss, volume):
    """Along any axis in space, at any place; parts of float32 data within their rounding."""
    logits, targets = volume
    axis = data.draw(st.integers(2, max(2, logits.ndim - 1)))
    if axis >= logits.ndim:
        return
    cut = data.draw(st.integers(0, logits.shape[axis]))
    loss = loss.replace(compute_dtype=data.draw(st.sampled_from(["auto", "float64"])))
    exact = "float64" in (loss.options.compute_dtype, logits.dtype.name)
    names = [f"sample {n}" for n in range(logits.shape[0])]

    def statistics(*index: Any) -> fs.Statistics:
        return loss.statistics(logits[index], targets[index], track=("hard",), samples=names)

    before = [slice(None)] * axis
    total = statistics(*before, slice(0, cut)) + statistics(*before, slice(cut, None))
    whole = statistics(...)
    np.testing.assert_allclose(total.array, whole.array, rtol=1e-12 if exact else 1e-6, atol=1e-290)
    counts = ("count", "targets_sum", "hard_true_positives", "hard_false_positives")
    for name in counts:
        np.testing.assert_array_equal(total[name], whole[name])


@COMPILES
@given(losses(), volumes(), st.integers(-12, 12))
def test_gradient_is_scaled_before_it_is_rounded(loss, volume, exponent):
    """By a power of two it is scaled exactly: float16 keeps what a loss scale saves."""
    logits, targets = volume
    grad = loss.value_and_grad(logits, targets, out=np.empty(logits.shape, np.float64))[1]
    scaled = loss.value_and_grad(logits, targets, grad_scale=2.0**exponent)[1]
    with np.errstate(over="ignore", under="ignore"):
        expected = (grad * 2.0**exponent).astype(logits.dtype)
    tiny = np.finfo(logits.dtype).smallest_subnormal
    np.testing.assert_allclose(scaled, expected, rtol=2.0**-22, atol=float(tiny))


@COMPILES
@given(volumes())
def test_hard_scores_equal_the_reference(volume):
    logits, targets = volume
    tp, fp, fn, tn = ref.confusion_counts(logits, targets)
    got = fs.stat_scores(logits, targets)
    for name, expected in zip(("tp", "fp", "fn", "tn"), (tp, fp, fn, tn), strict=True):
        np.testing.assert_array_equal(got[name], expected)


@COMPILES
@given(volumes(bound=2.0**15))
def test_statistics_survive_json_and_concatenation(volume):
    logits, targets = volume
    loss = fs.BCE(pos_weight=2.0) + fs.SoftDice()
    s = loss.statistics(logits, targets, track=("hard",))
    assert fs.Statistics.from_json(s.to_json()) == s
    rows = [
        loss.statistics(x[None], p[None], track=("hard",)) for x, p in zip(*volume, strict=True)
    ]
    np.testing.assert_allclose(
        fs.concatenate_statistics(rows).array, s.array, rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize("rule", ["gradient descent", "momentum", "adam"])
@COMPILES
@given(st.data())
def test_updates_equal_the_reference(rule, data):
    """Lists of arrays of any sizes and layouts, over three steps."""
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    values = st.floats(-8, 8, width=8 * np.dtype(dtype).itemsize, allow_subnormal=False)
    shapes = data.draw(st.lists(hnp.array_shapes(max_dims=3, max_side=9, min_side=0), min_size=1))
    draws = [[data.draw(hnp.arrays(dtype, s, elements=values)) for s in shapes] for _ in range(4)]
    orders = [data.draw(st.sampled_from("CF")) for _ in shapes]
    params, *steps = [
        [np.array(a, order=order) for a, order in zip(arrays, orders, strict=True)]
        for arrays in draws
    ]
    expected = [param.astype(np.float64) for param in params]
    lr, decay = data.draw(st.floats(1e-4, 0.5)), data.draw(st.floats(0.0, 0.1))
    make = {"gradient descent": fs.GradientDescent, "momentum": fs.Momentum, "adam": fs.Adam}[rule]
    optimizer = make(params, lr=lr, weight_decay=decay)
    state = [[np.zeros(param.shape) for param in params] for _ in range(2)]
    for t, grads in enumerate(steps, 1):
        optimizer.step(grads)
        for i, grad in enumerate(grads):
            g, theta = grad.astype(np.float64), expected[i]
            if rule == "gradient descent":
                expected[i] = ref.gradient_descent(theta, g, lr, weight_decay=decay)
            elif rule == "momentum":
                expected[i], state[0][i] = ref.momentum(
                    theta, state[0][i], g, lr, 0.9, weight_decay=decay
                )
            else:
                expected[i], state[0][i], state[1][i] = ref.adam(
                    theta, state[0][i], state[1][i], g, t, lr, weight_decay=decay
                )
    eps = float(np.finfo(dtype).eps)
    for got, wanted in zip(params, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=64 * eps, atol=64 * eps)
