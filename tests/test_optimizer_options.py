"""What trainers ask of a step beside the rule: few bytes, a bounded norm, finite gradients."""

import numpy as np
import pytest
import torch

import fastseg as fs
from fastseg_kernels.updates import STEP_STRIDE, from_bfloat16, to_bfloat16

SHAPES = [(3, 5), (0,), (1,), (4097,), (2, 2, 2), (1031,)]
OPTIONS = [
    (fs.GradientDescent, {}),
    (fs.Momentum, {}),
    (fs.Momentum, {"form": "pytorch", "dampening": 0.3, "nesterov": False}),
    (fs.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (fs.Adam, {"amsgrad": True, "betas": (0.9, 0.7)}),
]
each_rule = pytest.mark.parametrize(
    ("rule", "options"), OPTIONS, ids=[f"{rule.__name__}-{opts}" for rule, opts in OPTIONS]
)


def numbers(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]


def arrays_of(dtype, values):
    """Return arrays of a dtype: NumPy's, tensors where it has none."""
    if dtype == "bfloat16":
        return [torch.tensor(value).to(torch.bfloat16) for value in values]
    return [value.astype(dtype) for value in values]


def widened(array):
    return array.float().numpy() if isinstance(array, torch.Tensor) else array.astype(np.float32)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# Parameters of 2 bytes.


@each_rule
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masters_go_the_way_of_float32_parameters(rule, options, dtype):
    halves = arrays_of(dtype, numbers(0))
    singles = [widened(half) for half in halves]
    opt, other = rule(halves, lr=0.01, **options), rule(singles, lr=0.01, **options)
    for step in range(1, 6):
        grads = arrays_of(dtype, numbers(step))
        opt.step(grads, grad_scale=0.5, zero_grads=True)
        assert not any(widened(grad).any() for grad in grads)
        other.step([widened(grad) for grad in arrays_of(dtype, numbers(step))], grad_scale=0.5)
        same(map(widened, halves), map(widened, arrays_of(dtype, singles)))
    state, expected = opt.state_dict(), other.state_dict()
    same(state.pop("master_param"), singles)
    for name in opt._names():
        same(state[name], expected[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_parameter_that_others_wrote_is_taken_over(dtype):
    (half,) = arrays_of(dtype, [np.array([1.0, 2.0, 3.0, np.nan], np.float32)])
    (grad,) = arrays_of(dtype, [np.full(4, 2.0**-15, np.float32)])
    opt = fs.GradientDescent(half, lr=1.0)
    for _ in range(3):
        opt.step(grad)
    assert widened(half).tolist()[:3] == [1.0, 2.0, 3.0]  # each step is less than rounding sees
    half[1] = 5.0
    opt.step(grad)
    masters = opt.state_dict()["master_param"][0]
    expected = [1 - 4 * 2.0**-15, 5 - 2.0**-15, 3 - 4 * 2.0**-15, np.nan]
    np.testing.assert_array_equal(masters, np.array(expected, np.float32))


def test_halves_beside_wider_parameters():
    """The list has one step and one norm; masters are None where none is needed."""
    params = [np.ones(300, np.float16), np.ones(5), np.ones(5, np.float32)]
    grads = [np.ones(300, np.float16), np.ones(5), np.ones(5, np.float32)]
    opt = fs.Momentum(params, lr=0.25)
    assert opt.grad_norm(grads) == pytest.approx(np.sqrt(310), rel=1e-14)
    opt.step(grads)
    assert all((param == 0.75).all() for param in params)
    masters = opt.state_dict()["master_param"]
    assert (masters[0] == 0.75).all() and masters[1:] == [None, None]
    other = fs.Momentum([param.copy() for param in params], lr=0.25)
    other.load_state_dict(opt.state_dict())
    other.step(grads)
    opt.step(grads)
    same(other.params, params)


# States of 2 bytes.


def scrambled(x):
    """Return the hash of updates.cu, by integers of Python."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def by_chance(values, step, high):
    """Return float32 values as bfloat16, up or down as the hash says."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(-1).astype(np.int64)
    noise = np.array([scrambled(i + step * STEP_STRIDE) for i in range(bits.size)], np.int64)
    chance = noise >> 16 if high else noise & 0xFFFF
    rounded = ((bits + chance.reshape(bits.shape)) >> 16).astype(np.uint16).view(np.int16)
    return from_bfloat16(rounded).reshape(values.shape)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_states_are_rounded_as_the_hash_says(amsgrad):
    params, plain = numbers(0), numbers(0)
    options = {"betas": (0.9, 0.7), "amsgrad": amsgrad}
    opt = fs.Adam(params, state_dtype="bfloat16", **options)
    for step in range(1, 4):
        other = fs.Adam(plain, **options)  # from the states that were rounded last
        other.load_state_dict(opt.state_dict())
        opt.step(numbers(step))
        other.step(numbers(step))
        same(params, plain)
        state, unrounded = opt.state_dict(), other.state_dict()
        for name in opt._names():
            for k, got in enumerate(state[name]):
                want = by_chance(unrounded[name][k], step, name != "exp_avg")
                same([got], [want])


def test_small_states_are_right_on_average():
    """Rounded to nearest, v would not come down from the first gradients: 44% too large here."""
    param, size = np.zeros(4000, np.float32), 4000
    opt = fs.Adam(param, lr=0.0, state_dtype="bfloat16")
    expected, nearest, rng = np.zeros(size), np.zeros(size, np.float32), np.random.default_rng(0)
    for step in range(1500):
        grad = rng.standard_normal(size).astype(np.float32) * (2.0 if step < 500 else 1.0)
        grad = grad.astype(np.float32)
        opt.step(grad)
        expected = 0.999 * expected + (1 - 0.999) * grad.astype(np.float64) ** 2
        exact = 0.999 * nearest.astype(np.float64) + (1 - 0.999) * grad.astype(np.float64) ** 2
        nearest = from_bfloat16(to_bfloat16(exact.astype(np.float32)))
    error = opt.state_dict()["exp_avg_sq"][0] / expected - 1
    assert abs(error.mean()) < 3e-4 and error.std() < 0.05  # 6e-5 was seen
    assert np.mean(nearest / expected - 1) == pytest.approx(0.444, abs=0.005)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_small_states_continue_bit_for_bit_whatever_the_threads(dtype, threads):
    results = []
    for count in (1, 2, 3):
        fs.set_num_threads(count)
        params = arrays_of(dtype, [*numbers(0), np.ones(50_000, np.float32)])
        opt = fs.Adam(params, lr=0.01, state_dtype="bfloat16")
        for step in range(1, 5):
            if step == 3:
                state, opt = opt.state_dict(), fs.Adam(params, state_dtype="bfloat16")
                opt.load_state_dict(state)
            opt.step(arrays_of(dtype, [*numbers(step), np.ones(50_000, np.float32)]))
        results.append([*params, *opt.state_dict()["exp_avg"], *opt.state_dict()["exp_avg_sq"]])
    same(results[1], results[0])
    same(results[2], results[0])


def test_rounding_of_values_that_are_not_finite():
    grad = np.array([np.inf, -np.inf, np.nan, 1e20, 0.0, -0.0], np.float32)
    opt = fs.Momentum(np.zeros(6, np.float32), lr=1.0, state_dtype="bfloat16")
    opt.step(grad)
    (velocity,) = opt.state_dict()["velocity"]
    np.testing.assert_array_equal(velocity[[0, 1, 2, 4, 5]], grad[[0, 1, 2, 4, 5]])
    assert velocity[3] == pytest.approx(1e20, rel=2.0**-7)
    values = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -3.4e38, np.nan, np.inf], np.float32)
    nearest = torch.tensor(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), nearest)


def test_a_float32_state_loads_into_a_small_one_and_back():
    params = numbers(0)
    opt, small = fs.Adam(params), fs.Adam(params, state_dtype="bfloat16")
    opt.step(numbers(1))
    state = opt.state_dict()
    small.load_state_dict(state)
    for got, value in zip(small.state_dict()["exp_avg"], state["exp_avg"], strict=True):
        same([got], [torch.tensor(value).to(torch.bfloat16).float().numpy()])
    opt.load_state_dict(small.state_dict())
    same(opt.state_dict()["exp_avg_sq"], small.state_dict()["exp_avg_sq"])


# The norm.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, -3.0])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.1, 3.0])
def test_clipping_shortens_all_gradients_together(dtype, scale, share):
    grads, params = arrays_of(dtype, numbers(1)), arrays_of(dtype, numbers(0))
    norm = np.sqrt(sum(np.sum(widened(g).astype(np.float64) ** 2) for g in grads))
    opt, other = fs.Momentum(params, lr=1.0), fs.Momentum(arrays_of(dtype, numbers(0)), lr=1.0)
    assert float(opt.grad_norm(grads)) == pytest.approx(norm, rel=1e-13)
    opt.step(grads, grad_scale=scale, max_norm=share * norm)
    clipped = scale * min(1.0, share / abs(scale))
    other.step(grads, grad_scale=clipped)
    for got, expected in zip(
        opt.state_dict()["velocity"], other.state_dict()["velocity"], strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_clipping_as_torch():
    params, grads = numbers(0), numbers(1)
    tensors = [torch.tensor(param, requires_grad=True) for param in params]
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = torch.tensor(grad)
    peer = torch.optim.Adam(tensors, lr=0.1)
    opt = fs.Adam(params, lr=0.1)
    for _ in range(3):
        torch.nn.utils.clip_grad_norm_(tensors, 0.5)
        peer.step()
        opt.step(grads, max_norm=0.5)
    for got, expected in zip(params, tensors, strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_infinite_limit_only_measures():
    param = np.ones(3)
    opt = fs.GradientDescent(param, lr=1.0)
    opt.step(np.full(3, 1e5), max_norm=np.inf)
    assert param.tolist() == [1 - 1e5] * 3


def test_norms_do_not_overflow_in_float32():
    grads = [np.array([3e30, 0.0], np.float32), np.array([4e30], np.float32)]
    opt = fs.GradientDescent([np.zeros(2, np.float32), np.zeros(1, np.float32)], lr=1.0)
    assert float(opt.grad_norm(grads)) == pytest.approx(5e30, rel=1e-6)
    opt.step(grads, max_norm=10.0, skip_non_finite=True)
    np.testing.assert_allclose(np.concatenate(opt.params), [-6.0, 0.0, -8.0], rtol=1e-6)


def test_a_norm_of_several_optimisers():
    params, grads = numbers(0), numbers(1)
    opts = [fs.Adam(params[:2], lr=0.1), fs.Adam(params[2:], lr=0.1)]
    joined = fs.Adam(numbers(0), lr=0.1)
    norms = [float(o.grad_norm(g)) for o, g in zip(opts, (grads[:2], grads[2:]), strict=True)]
    assert np.hypot(*norms) == pytest.approx(float(joined.grad_norm(grads)), rel=1e-14)
    for opt, part in zip(opts, (grads[:2], grads[2:]), strict=True):
        opt.step(part, max_norm=0.5, grad_norm=np.hypot(*norms))
    joined.step(grads, max_norm=0.5)
    for got, expected in zip(params, joined.params, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_norm_of_nothing_and_of_zeros():
    empty = fs.GradientDescent(np.zeros((0, 3)), lr=1.0)
    assert float(empty.grad_norm(np.zeros((0, 3)))) == 0.0
    empty.step(np.zeros((0, 3)), max_norm=1.0, skip_non_finite=True)
    param = np.ones(3)
    opt = fs.GradientDescent(param, lr=1.0)
    opt.step(np.zeros(3), max_norm=0.0)  # 0 / 0 is never asked for
    opt.step(np.ones(3), max_norm=0.0)
    assert param.tolist() == [1.0] * 3 and opt.step_count == 2


# Steps that are dropped.


@each_rule
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_drops_the_step(rule, options, dtype, bad):
    params, untouched = arrays_of(dtype, numbers(0)), arrays_of(dtype, numbers(0))
    opt, other = rule(params, lr=0.01, **options), rule(untouched, lr=0.01, **options)
    for step in (0, 1, 2):
        grads = arrays_of(dtype, numbers(step))
        if step != 1:
            grads[3][4090] = bad
        else:
            other.step(grads)
        opt.step(grads, skip_non_finite=True, zero_grads=True)
        assert not any(grad.any() for grad in grads)
        assert opt.step_count == other.step_count == (step > 0)
        same(params, untouched)
    for name in opt._names():
        same(opt.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("found", [1.0, True, np.True_, np.float32(2), np.nan, -1])
def test_what_others_found_drops_the_step(found):
    param = np.ones(5, np.float32)
    opt = fs.Adam(param, lr=0.1)
    opt.step(np.ones(5, np.float32), found_inf=found)
    assert opt.step_count == 0 and (param == 1).all()
    opt.step(np.ones(5, np.float32), found_inf=0.0)
    np.testing.assert_allclose(param, 0.9, rtol=1e-6)


def test_without_being_asked_a_norm_that_is_not_finite_drops_nothing():
    param = np.ones(3, np.float32)
    opt = fs.GradientDescent(param, lr=1.0)
    opt.step(np.array([np.nan, 3.0, 4.0], np.float32), max_norm=1.0)
    np.testing.assert_array_equal(param, [np.nan, -2.0, -3.0])  # NaN is no limit
    opt.step(np.array([0.0, np.inf, 4.0], np.float32), max_norm=1.0)
    np.testing.assert_array_equal(param, [np.nan, np.nan, -3.0])  # 1 / inf is 0


# Wrong options.


@pytest.mark.parametrize("rule", [fs.Momentum, fs.Adam])
def test_bad_state_dtype(rule):
    with pytest.raises(ValueError, match="state_dtype must be None or 'bfloat16', got 'float16'"):
        rule(np.ones(3, np.float32), lr=0.1, state_dtype="float16")
    with pytest.raises(TypeError, match=r"params\[1\] must not be float64 with state_dtype"):
        rule([np.ones(3, np.float32), np.ones(3)], lr=0.1, state_dtype="bfloat16")


def test_amsgrad_cannot_be_changed():
    param = np.ones(3)
    for made in (False, True):
        opt = fs.Adam(param, amsgrad=made)
        state = opt.state_dict()
        with pytest.raises(ValueError, match=f"amsgrad must stay {made}, as the optimiser was"):
            opt.load_state_dict(state | {"amsgrad": not made})
        opt.amsgrad = not made
        with pytest.raises(ValueError, match=f"amsgrad must stay {made}, as the optimiser was"):
            opt.step(np.ones(3))
    assert (param == 1).all()


def test_masters_must_be_loaded_with_their_shape():
    opt = fs.Momentum(np.ones(3, np.float16), lr=0.1)
    state = opt.state_dict() | {"master_param": [np.ones(3)]}
    with pytest.raises(TypeError, match=r"state\['master_param'\]\[0\] must have dtype float32"):
        opt.load_state_dict(state)
