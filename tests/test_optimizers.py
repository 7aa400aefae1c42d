"""The optimisers against the float64 reference, against torch.optim, and against wrong input."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastseg import updater
from fastseg.optimizers import Adam, GradientDescent, Momentum
from fastseg_kernels import reference as ref
from fastseg_kernels.cpu import threads, update_kernels
from fastseg_kernels.cuda import updates as cuda_updates
from fastseg_kernels.updates import COEFFICIENT_NAMES, STATE_COUNTS

STEPS = 50
SIZES = [0, 1, 2, 3, 7, 255, 256, 257, 4095, 4096, 4097, 16383, 16384, 16385]
MIXTURE = [(0,), (1,), (3, 5), (257,), (0, 4), (4097,), (2, 2, 2), (9001,), (31,), ()]
EPS = {"float32": 2.0**-24, "float64": 2.0**-53}

DESCENT = [{}, {"weight_decay": 0.02}]
MOMENTUM = [
    {},
    {"gamma": 0.7, "nesterov": True},
    {"gamma": 0.99, "weight_decay": 0.02},
    {"form": "pytorch"},
    {"form": "pytorch", "dampening": 0.3, "weight_decay": 0.02},
    {"form": "pytorch", "nesterov": True},
]
ADAM = [
    {},
    {"betas": (0.5, 0.9), "eps": 1e-3},
    {"betas": (0.0, 0.0), "eps": 1e-2},
    {"weight_decay": 0.02},
    {"weight_decay": 0.3, "decoupled_weight_decay": True},
    {"betas": (0.9, 0.7), "amsgrad": True},
]
RULES = [
    *((GradientDescent, options) for options in DESCENT),
    *((Momentum, options) for options in MOMENTUM),
    *((Adam, options) for options in ADAM),
]


def name_of(rule):
    return "-".join([rule[0].__name__, *(f"{k}={v}" for k, v in rule[1].items())])


each_rule = pytest.mark.parametrize("rule", RULES, ids=map(name_of, RULES))


def reference_step(rule, state, theta, grad, step, lr):
    """Return theta and the state after one float64 step; the state is a list of arrays."""
    kind, options = rule
    decay = {"weight_decay": options.get("weight_decay", 0.0)}
    if kind is GradientDescent:
        return ref.gradient_descent(theta, grad, lr, **decay), []
    if kind is Momentum:
        gamma, nesterov = options.get("gamma", 0.9), options.get("nesterov", False)
        if options.get("form") == "pytorch":
            buf = state[0] if step > 1 else None
            damp = options.get("dampening", 0.0)
            new = ref.momentum_pytorch(theta, buf, grad, lr, gamma, damp, nesterov, **decay)
        else:
            new = ref.momentum(
                theta, state[0] if state else 0.0, grad, lr, gamma, nesterov, **decay
            )
        return new[0], [new[1]]
    if kind is not Adam:
        raise TypeError(f"{kind.__name__} needs a branch here")
    betas, eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    decoupled = options.get("decoupled_weight_decay", False)
    if options.get("amsgrad"):
        m, v, largest = state or (0.0, 0.0, 0.0)
        new = ref.amsgrad(
            theta, m, v, largest, grad, step, lr, *betas, eps, decoupled=decoupled, **decay
        )
    else:
        m, v = state or (0.0, 0.0)
        new = ref.adam(theta, m, v, grad, step, lr, *betas, eps, decoupled=decoupled, **decay)
    return new[0], list(new[1:])


def make(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def copies(arrays):
    return [array.copy(order="K") for array in arrays]


def assert_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def all_states(opt):
    return [array for name in opt._names() for array in opt.state_dict()[name]]


@each_rule
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trajectory_equals_reference(rule, dtype):
    kind, options = rule
    params = make(MIXTURE, dtype)
    expected = [param.astype(np.float64) for param in params]
    states = [[] for _ in params]
    moved = [np.zeros(param.shape) for param in expected]
    largest = [np.abs(param) for param in expected]
    opt = kind(params, lr=0.01, **options)
    for step in range(1, STEPS + 1):
        grads = make(MIXTURE, dtype, seed=step)
        opt.step(grads)
        for i, grad in enumerate(grads):
            new, states[i] = reference_step(rule, states[i], expected[i], grad, step, 0.01)
            moved[i] = moved[i] + np.abs(new - expected[i])
            largest[i] = np.maximum(largest[i], np.abs(new))
            expected[i] = new
    # Each step rounds theta once, by EPS of it, and its update by a few EPS of the update.
    # (Both references round too; half of this was seen.)
    for got, want, path, size in zip(params, expected, moved, largest, strict=True):
        assert np.all(np.abs(got - want) <= EPS[dtype] * (STEPS * size + 4 * path))


@each_rule
def test_one_float32_step_is_within_three_ulp(rule):
    kind, options = rule
    params, grads = make([(5000,)], "float32"), make([(5000,)], "float32", seed=1)
    before = params[0].astype(np.float64)
    expected, _ = reference_step(rule, [], before, grads[0], 1, 0.01)
    kind(params, lr=0.01, **options).step(grads)
    # Units of theta or of the update, whichever is larger: half a unit for rounding theta, and up
    # to five half units for the update's factors (Nesterov's momentum has most: 2.1 were seen).
    unit = np.spacing(np.maximum(np.abs(before), np.abs(expected - before)).astype(np.float32))
    assert np.max(np.abs(params[0] - expected) / unit) < 3


def torch_optimizer(rule, tensors, lr):
    kind, options = rule
    options = dict(options)
    if kind is Adam:
        decoupled = options.pop("decoupled_weight_decay", False)
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(
            tensors, lr=lr, **{"weight_decay": 0.0} | options
        )
    if kind not in (GradientDescent, Momentum):
        raise TypeError(f"{kind.__name__} needs a branch here")
    gamma = options.pop("gamma", 0.9) if kind is Momentum else 0.0
    options.pop("form", None)
    return torch.optim.SGD(tensors, lr=lr, momentum=gamma, **options)


@each_rule
def test_trajectory_equals_torch(rule):
    """At a constant step size the source's momentum takes PyTorch's steps too."""
    kind, options = rule
    params = make(MIXTURE, "float64")
    tensors = [torch.tensor(param, requires_grad=True) for param in params]
    opt, peer = kind(params, lr=0.01, **options), torch_optimizer(rule, tensors, 0.01)
    for step in range(1, STEPS + 1):
        grads = make(MIXTURE, "float64", seed=step)
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        opt.step(grads)
        peer.step()
    for got, expected in zip(params, tensors, strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype):
    """Every element of every size is updated once, and nothing beside it."""
    memory = np.full(size + 2, 7.0, dtype)
    param, grad = memory[1 : size + 1], np.ones(size, dtype)
    for kind in (GradientDescent, Momentum, Adam):
        memory[:] = 7.0
        kind(param, lr=0.5).step(grad)
        np.testing.assert_allclose(param, 6.5, rtol=1e-6)
        assert memory[0] == 7.0 and memory[-1] == 7.0


def test_list_equals_arrays_one_by_one():
    shapes = [(size,) for size in SIZES] + MIXTURE
    for dtypes in (("float32",), ("float64",), ("float32", "float64")):
        dtype = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
        params = [make([s], d, i)[0] for i, (s, d) in enumerate(zip(shapes, dtype, strict=True))]
        grads = [
            make([s], d, -i - 1 + 99)[0] for i, (s, d) in enumerate(zip(shapes, dtype, strict=True))
        ]
        expected = copies(params)
        opt, alone = Adam(params), [Adam(param) for param in expected]
        for _ in range(3):
            opt.step(grads)
            for one, grad in zip(alone, grads, strict=True):
                one.step(grad)
        assert_bits(params, expected)


@each_rule
def test_two_thousand_small_arrays(rule):
    kind, options = rule
    params, grads = make([(1000,)] * 2000, "float32"), make([(1000,)] * 2000, "float32", seed=1)
    joined, joined_grad = np.concatenate(params), np.concatenate(grads)
    opt, one = kind(params, lr=0.01, **options), kind(joined, lr=0.01, **options)
    for _ in range(2):
        opt.step(grads)
        one.step(joined_grad)
    assert np.concatenate(params).tobytes() == joined.tobytes()


@each_rule
def test_bits_do_not_depend_on_threads(rule):
    kind, options = rule
    shapes, results = [(50_001,), (3,), (8191,), (20_000,)], []
    try:
        for count in (1, 2, 3):
            threads.set_num_threads(count)
            params = make(shapes, "float32")
            opt = kind(params, lr=0.01, **options)
            for step in range(3):
                opt.step(make(shapes, "float32", seed=step + 1), zero_grads=True)
            results.append(params + all_states(opt))
    finally:
        threads.set_num_threads(None)
    assert_bits(results[1], results[0])
    assert_bits(results[2], results[0])


@pytest.mark.parametrize("order", ["F", "transposed", "channels_last"])
def test_any_dense_order(order):
    param, grad = make([(4, 5, 6, 7)] * 2, "float32")
    expected = param.copy()
    if order == "F":
        param, grad = np.asfortranarray(param), np.asfortranarray(grad)
    else:
        axes = (2, 0, 3, 1) if order == "transposed" else (0, 2, 3, 1)
        inverse = np.argsort(axes)
        param = np.ascontiguousarray(param.transpose(axes)).transpose(inverse)
        grad = np.ascontiguousarray(grad.transpose(axes)).transpose(inverse)
    opt, plain = Adam(param), Adam(expected)
    for _ in range(3):
        opt.step(grad)
        plain.step(np.ascontiguousarray(grad))
    np.testing.assert_array_equal(param, expected)
    state = plain.state_dict()
    np.testing.assert_array_equal(opt.state_dict()["exp_avg_sq"][0], state["exp_avg_sq"][0])
    opt.load_state_dict(state)  # C order into another
    np.testing.assert_array_equal(opt.state_dict()["exp_avg"][0], state["exp_avg"][0])


def test_axes_of_length_one_may_have_any_stride():
    param, grad = np.zeros((3, 1, 4)), np.ones((3, 4, 1)).transpose(0, 2, 1)
    assert param.strides != grad.strides
    GradientDescent(param, lr=1.0).step(grad)
    assert (param == -1).all()


@each_rule
def test_grad_scale_equals_scaled_gradient(rule):
    kind, options = rule
    params, grads = make(MIXTURE, "float32"), make(MIXTURE, "float32", seed=1)
    expected, scaled = copies(params), [np.asarray(grad * np.float32(0.37)) for grad in grads]
    opt, plain = kind(params, lr=0.01, **options), kind(expected, lr=0.01, **options)
    for _ in range(3):
        opt.step(grads, grad_scale=0.37)
        plain.step(scaled)
    assert_bits(params, expected)


@each_rule
def test_zero_grads(rule):
    kind, options = rule
    params, grads = make(MIXTURE, "float64"), make(MIXTURE, "float64", seed=1)
    expected, kept = copies(params), copies(grads)
    kind(params, lr=0.01, **options).step(grads, zero_grads=True)
    kind(expected, lr=0.01, **options).step(kept)
    assert_bits(params, expected)
    assert all((grad == 0).all() for grad in grads)
    assert_bits(kept, make(MIXTURE, "float64", seed=1))  # without being asked it writes none


def test_lr_is_an_attribute_and_an_argument():
    param, grad = np.zeros(3), np.ones(3)
    opt = GradientDescent(param, lr=1.0)
    opt.step(grad, lr=0.25)
    assert param.tolist() == [-0.25] * 3 and opt.lr == 1.0
    opt.lr = np.float32(0.5)
    opt.step(grad)
    assert param.tolist() == [-0.75] * 3


@pytest.mark.parametrize("form", ["source", "pytorch"])
def test_momentum_under_a_schedule(form):
    """A new step size acts on new gradients alone, or in PyTorch's form on the whole velocity."""
    rule = (Momentum, {"form": form})
    params, peer = make([(40,)], "float64"), make([(40,)], "float64")
    tensor = torch.tensor(peer[0], requires_grad=True)
    sgd = torch.optim.SGD([tensor], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=10, gamma=0.3)
    opt, expected, state = Momentum(params, lr=0.1, form=form), peer[0], []
    for step in range(1, STEPS + 1):
        grad = make([(40,)], "float64", seed=step)[0]
        opt.lr = 0.1 * 0.3 ** ((step - 1) // 10)
        opt.step(grad)
        expected, state = reference_step(rule, state, expected, grad, step, opt.lr)
        tensor.grad = torch.tensor(grad)
        sgd.step()
        schedule.step()
    np.testing.assert_allclose(params[0], expected, rtol=1e-12, atol=1e-12)
    close = np.allclose(params[0], tensor.detach().numpy(), rtol=1e-12, atol=1e-12)
    assert close == (form == "pytorch")


@each_rule
@pytest.mark.parametrize("through", ["dict", "pickle", "savez"])
def test_state_dict_continues_bit_for_bit(rule, through):
    kind, options = rule
    params = make(MIXTURE, "float32")
    opt = kind(params, lr=0.01, **options)
    for step in range(3):
        opt.step(make(MIXTURE, "float32", seed=step + 1))
    saved, state = copies(params), opt.state_dict()
    if through == "pickle":
        state = pickle.loads(pickle.dumps(state))
    elif through == "savez":
        file = io.BytesIO()
        flat = {k: v for k, v in state.items() if k not in opt._names()}
        for name in opt._names():
            flat |= {f"{name}_{i}": array for i, array in enumerate(state[name])}
        np.savez(file, **flat)
        file.seek(0)
        loaded = np.load(file)
        state = {k: loaded[k] for k in flat if k in state}
        for name in opt._names():
            state[name] = [loaded[f"{name}_{i}"] for i in range(len(MIXTURE))]
    other = kind(saved, lr=123.0, amsgrad=True) if "amsgrad" in options else kind(saved, lr=123.0)
    other.load_state_dict(state)
    for step in range(3):
        grads = make(MIXTURE, "float32", seed=step + 9)
        opt.step(grads)
        other.step(grads)
    assert_bits(saved, params)
    assert_bits(all_states(other), all_states(opt))
    assert repr(other) == repr(opt) and other.step_count == opt.step_count == 6


def test_state_dict_is_a_copy():
    param = np.ones(3)
    opt = Adam(param)
    opt.step(np.ones(3))
    state = opt.state_dict()
    kept = copy.deepcopy(state)
    state["exp_avg"][0][:] = 9
    assert opt.state_dict()["exp_avg"][0].tolist() == kept["exp_avg"][0].tolist()
    opt.load_state_dict(kept)
    opt.step(np.ones(3))
    assert kept["step"] == 1 and kept["exp_avg"][0][0] == opt.state_dict()["exp_avg"][0][0] / 1.9


# What is remembered between steps.


def test_contents_of_the_same_gradients_are_read_anew(monkeypatch):
    params, grads = make(MIXTURE, "float64"), make(MIXTURE, "float64", seed=1)
    start = copies(params)
    opt = GradientDescent(params, lr=1.0)
    opt.step(grads)
    monkeypatch.setattr(updater, "check_grads", None)  # the same objects: no check
    for grad in grads:
        grad *= 2
    opt.step(list(grads))
    first = make(MIXTURE, "float64", seed=1)
    assert_bits(params, [a - g - 2 * g for a, g in zip(start, first, strict=True)])


def test_new_gradient_objects_are_noticed():
    param = np.zeros(4)
    opt = GradientDescent(param, lr=1.0)
    grads = [np.ones(4)]
    opt.step(grads)
    grads[0] = np.full(4, 10.0)
    opt.step(grads)
    assert param.tolist() == [-11.0] * 4
    grads[0] = np.ones(5)
    with pytest.raises(ValueError, match="grads\\[0\\] must have shape"):
        opt.step(grads)
    opt.step(np.ones(4))
    assert param.tolist() == [-12.0] * 4


def test_zero_grads_is_checked_for_remembered_gradients():
    grad = np.ones(4)
    grad.flags.writeable = False
    opt = GradientDescent(np.zeros(4), lr=1.0)
    opt.step(grad)
    with pytest.raises(ValueError, match="grads\\[0\\] must be writable"):
        opt.step(grad, zero_grads=True)


def test_large_gradients_are_not_kept_alive(monkeypatch):
    monkeypatch.setattr(updater, "HELD_BYTES", 100)
    for size, held in ((12, True), (13, False)):
        param, grad = np.zeros(size), np.ones(size)
        before = sys.getrefcount(grad)
        opt = GradientDescent(param, lr=1.0)
        opt.step(grad)
        opt.step(grad)
        assert (sys.getrefcount(grad) > before) == held
        assert (param == -2).all()


def test_held_gradients_cannot_be_resized():
    grad = np.ones(4)
    opt = GradientDescent(np.zeros(4), lr=1.0)
    opt.step(grad)
    with pytest.raises(ValueError, match="resize"):
        grad.resize(1000)


@pytest.mark.parametrize("which", ["param", "grad"])
def test_exchanged_tensor_data_is_noticed(which):
    param, grad = torch.zeros(4), torch.ones(4)
    opt = GradientDescent(param, lr=1.0)
    opt.step(grad)
    if which == "param":
        param.data = torch.full((4,), 5.0)
        opt.step(grad)
        assert param.tolist() == [4.0] * 4
    else:
        grad.data = torch.full((4,), 5.0)
        opt.step(grad)
        assert param.tolist() == [-6.0] * 4


def test_param_exchanged_for_another_shape():
    param = torch.zeros(4)
    opt = Adam(param)
    opt.step(torch.ones(4))
    param.data = torch.zeros(6)
    with pytest.raises(ValueError, match=r"params\[0\] had .* make a new optimiser"):
        opt.step(torch.ones(6))
    assert opt.step_count == 1 and param.tolist() == [0.0] * 6


# Tensors.


def test_module_parameters_are_trained_and_their_versions_counted():
    module = torch.nn.Linear(3, 2).double()
    expected = copies([p.detach().numpy() for p in module.parameters()])
    opt = Adam(module.parameters(), lr=0.1)
    plain = Adam(expected, lr=0.1)
    for _ in range(3):
        module(torch.ones(5, 3, dtype=torch.float64)).square().sum().backward()
        grads = [p.grad for p in module.parameters()]
        plain.step([grad.numpy().copy() for grad in grads])
        versions = [tensor._version for tensor in [*module.parameters(), *grads]]
        opt.step(grads, zero_grads=True)
        now = [tensor._version for tensor in [*module.parameters(), *grads]]
        assert all(new > old for new, old in zip(now, versions, strict=True))
        assert all((p.grad == 0).all() for p in module.parameters())
    assert_bits([p.detach().numpy() for p in module.parameters()], expected)


def test_autograd_refuses_what_was_saved_before_the_step():
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    GradientDescent(weight, lr=0.1).step(torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_with_a_graph_and_channels_last():
    weight = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    assert grad.requires_grad and grad.stride() == weight.stride()
    opt = GradientDescent(weight, lr=1.0)
    opt.step(grad)
    assert (weight == -2).all()
    assert opt._updater._last is None  # holding the gradient would hold its graph


# Values that are not finite, and the end of float32's range.


@each_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_propagate_at_their_place(rule, bad):
    kind, options = rule
    param, grad = np.ones(40, np.float32), np.ones(40, np.float32)
    grad[21] = bad
    opt = kind(param, lr=0.01, **options)
    opt.step(grad)
    opt.step(np.ones_like(grad))
    assert not np.isfinite(param[21])
    assert np.isfinite(np.delete(param, 21)).all()


def test_float32_second_moment_in_the_long_run():
    """Rounding averages out; 0.999 rounded to float32 would leave 1.28e-5, as PyTorch's does."""
    rng = np.random.default_rng(0)
    param, expected = np.zeros(1000, np.float32), np.zeros(1000)
    opt = Adam(param, lr=0.0)
    for _ in range(10_000):
        grad = rng.standard_normal(1000, dtype=np.float32)
        opt.step(grad)
        expected = 0.999 * expected + (1 - 0.999) * grad.astype(np.float64) ** 2
    error = opt.state_dict()["exp_avg_sq"][0] / expected - 1
    assert abs(error.mean()) < 1e-6 and np.abs(error).max() < 5e-6  # 6e-8 and 2.3e-6 were seen


def test_second_moment_that_overflows_shows():
    param = np.ones(3, np.float32)
    opt = Adam(param, lr=0.1)
    for _ in range(2):
        opt.step(np.array([1.0, 1e21, 1e18], np.float32))
    assert np.isnan(param).tolist() == [False, True, False]


def test_all_arrays_empty():
    opt = Adam([np.zeros((0, 3)), np.zeros(0, np.float32)])
    opt.step([np.zeros((0, 3)), np.zeros(0, np.float32)], zero_grads=True)
    assert opt.step_count == 1


# Wrong input: (what is wrong, error, message); `p` are two parameters, float32 (2, 3) and (4,).


class FakeJax(np.ndarray):
    pass


FakeJax.__module__ = "jaxlib._jax"


def read_only(array):
    array.flags.writeable = False
    return array


def shifted():
    return np.zeros(17, np.uint8)[1:].view(np.float32)


def test_a_gradient_between_elements_is_refused():
    """Its layout is that of its parameter, where it begins is not."""
    opt = Adam(np.zeros(4, np.float32))
    opt.step(np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"grads\[0\] must be a plain array aligned"):
        opt.step(shifted())


BAD_PARAMS = [
    (lambda p: [], ValueError, "params must have at least one array, got none"),
    (lambda p: [p[0], [1.0]], TypeError, r"params\[1\] must be an array of NumPy, CuPy or PyTorch"),
    (
        lambda p: [p[0].astype("i4")],
        TypeError,
        r"params\[0\] must be float16, bfloat16, float32, float64, got int32",
    ),
    (lambda p: [p[0].astype(">f4")], ValueError, r"params\[0\] must be in native byte order"),
    (lambda p: [read_only(p[0])], ValueError, r"params\[0\] must be writable"),
    (lambda p: [p[1], p[0][:, ::2]], ValueError, r"params\[1\] must be one run .*contiguous copy"),
    (lambda p: [p[1][::-1]], ValueError, r"params\[0\] must be one run of memory"),
    (lambda p: [torch.zeros(1).expand(3)], ValueError, r"params\[0\] must be one run of memory"),
    (lambda p: [shifted()], ValueError, r"params\[0\] must be .*aligned to its elements"),
    (lambda p: [p[0], p[1], p[0]], ValueError, r"params\[2\] shares memory with params\[0\]"),
    (lambda p: [p[1][1:], p[0], p[1][:2]], ValueError, r"params\[2\] shares .* params\[0\]"),
    (lambda p: [p[0].view(FakeJax)], TypeError, r"params\[0\] is a JAX array, .*immutable"),
    (lambda p: [np.ma.masked_array(p[0])], TypeError, r"params\[0\] is a numpy.ma.MaskedArray"),
    (lambda p: [torch.zeros(3).to_sparse()], TypeError, r"params\[0\] must be a dense tensor"),
    (lambda p: [torch.zeros(3, device="meta")], TypeError, r"params\[0\] is on meta"),
    (lambda p: [{"params": p}], TypeError, r"params\[0\] must be an array of NumPy.* got dict"),
]
BAD_GRADS = [
    (lambda p, g: g[:1], ValueError, r"grads must have one array per param \(2\), got 1"),
    (
        lambda p, g: [g[0], g[1][:3]],
        ValueError,
        r"grads\[1\] must have shape \(4,\) as params\[1\]",
    ),
    (lambda p, g: [g[0].T, g[1]], ValueError, r"grads\[0\] must have shape \(2, 3\).*got \(3, 2\)"),
    (lambda p, g: [g[0], g[1].astype("f8")], TypeError, r"grads\[1\] must have dtype float32 as"),
    (lambda p, g: [g[0], g[1].astype("f2")], TypeError, r"grads\[1\] .*got float16"),
    (lambda p, g: [g[0].copy("F"), g[1]], ValueError, r"grads\[0\] must have strides \(12, 4\)"),
    (lambda p, g: [g[0], np.zeros(8, "f4")[::2]], ValueError, r"grads\[1\] must have strides"),
    (lambda p, g: [g[0], torch.zeros(4)], TypeError, r"grads\[1\] and params\[1\] must come from"),
    (lambda p, g: [g[0], None], TypeError, r"grads\[1\] is None"),
    (lambda p, g: [g[0], g[1].astype(">f4")], ValueError, r"grads\[1\] must be in native byte"),
    (lambda p, g: [g[0], np.ma.masked_array(g[1])], TypeError, r"grads\[1\] is a numpy.ma"),
    (lambda p, g: [g[0], p[1]], ValueError, r"grads\[1\] shares memory with params\[1\]"),
    (lambda p, g: [g[0], p[0].ravel()[2:]], ValueError, r"grads\[1\] shares memory with params\[0"),
]
BAD_STEPS = [
    ({"lr": -0.5}, ValueError, r"lr must be finite and at least 0, got -0.5"),
    ({"lr": np.nan}, ValueError, r"lr must be .*got nan"),
    ({"lr": np.inf}, ValueError, r"lr must be .*got inf"),
    ({"lr": "0.1"}, TypeError, r"lr must be a number, got str"),
    ({"grad_scale": np.nan}, ValueError, r"grad_scale must be finite, got nan"),
    ({"grad_scale": -np.inf}, ValueError, r"grad_scale must be finite, got -inf"),
    ({"grad_scale": None}, TypeError, r"grad_scale must be a number, got NoneType"),
    ({"max_norm": -1.0}, ValueError, r"max_norm must be finite and at least 0, got -1.0"),
    ({"max_norm": np.nan}, ValueError, r"max_norm must be finite and at least 0, got nan"),
    ({"grad_norm": -1.0}, ValueError, r"grad_norm must be .*at least 0, got -1.0"),
    ({"grad_norm": "1"}, TypeError, r"grad_norm must be a number, got str"),
    ({"found_inf": "no"}, TypeError, r"found_inf must be a number, got str"),
]
BAD_HYPERPARAMETERS = [
    (GradientDescent, {"lr": -1}, ValueError, r"lr must be finite and at least 0, got -1"),
    (GradientDescent, {"lr": 1, "weight_decay": -1e-3}, ValueError, r"weight_decay .*got -0.001"),
    (Momentum, {"lr": 1, "gamma": 1.0}, ValueError, r"gamma must be in \[0, 1\), got 1.0"),
    (Momentum, {"lr": 1, "gamma": -0.1}, ValueError, r"gamma must be in \[0, 1\), got -0.1"),
    (Momentum, {"lr": 1, "form": "keras"}, ValueError, r"form must be one of source, pytorch, got"),
    (Momentum, {"lr": 1, "dampening": 0.1}, ValueError, r"dampening must be 0 unless"),
    (
        Momentum,
        {"lr": 1, "form": "pytorch", "nesterov": True, "dampening": 0.1},
        ValueError,
        r"dampening must be 0 unless",
    ),
    (Adam, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    (Adam, {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\), got -0.1"),
    (Adam, {"betas": 0.9}, ValueError, r"betas must be two numbers, got 0.9"),
    (Adam, {"eps": -1e-8}, ValueError, r"eps must be finite and at least 0, got -1e-08"),
    (Adam, {"lr": [0.1]}, TypeError, r"lr must be a number, got list"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_PARAMS)
def test_bad_params(bad, error, message):
    params = make([(2, 3), (4,)], "float32")
    with pytest.raises(error, match=message):
        Adam(bad(params))


def unchanged_after(act, error, message, params, opt):
    """Assert that ``act`` raises and that nothing of the optimiser has changed, nor of params."""
    before, states, step = copies(params), all_states(opt), opt.step_count
    with pytest.raises(error, match=message):
        act()
    assert_bits(params, before)
    assert_bits(all_states(opt), states)
    assert opt.step_count == step


@pytest.mark.parametrize(("bad", "error", "message"), BAD_GRADS)
def test_bad_grads(bad, error, message):
    params, grads = make([(2, 3), (4,)], "float32"), make([(2, 3), (4,)], "float32", seed=1)
    opt = Adam(params)
    for _ in range(2):  # the second time over gradients that were remembered
        unchanged_after(lambda: opt.step(bad(params, grads)), error, message, params, opt)
        opt.step(grads)
    assert opt.step_count == 2


def test_zeroed_gradients_must_not_share_memory():
    params, grad = make([(4,), (4,)], "float32"), np.ones(4, np.float32)
    opt = Adam(params)
    opt.step([grad, grad])  # read twice: no harm
    message = r"grads\[1\] shares memory with grads\[0\] and would be zeroed"
    act = lambda: opt.step([grad, grad], zero_grads=True)  # noqa: E731
    unchanged_after(act, ValueError, message, params, opt)
    assert (grad == 1).all()


@pytest.mark.parametrize(("options", "error", "message"), BAD_STEPS)
def test_bad_step_arguments(options, error, message):
    params, grads = make([(2, 3)], "float32"), make([(2, 3)], "float32", seed=1)
    opt = Adam(params)
    opt.step(grads)
    unchanged_after(lambda: opt.step(grads, **options), error, message, params, opt)


@pytest.mark.parametrize(("kind", "options", "error", "message"), BAD_HYPERPARAMETERS)
def test_bad_hyperparameters(kind, options, error, message):
    """In the constructor, as an attribute that was set, and in a state to be loaded."""
    params, grads = make([(2, 3)], "float32"), make([(2, 3)], "float32", seed=1)
    with pytest.raises(error, match=message):
        kind(params, **options)
    opt = kind(params, lr=1.0)
    state = opt.state_dict() | options
    unchanged_after(lambda: opt.load_state_dict(state), error, message, params, opt)
    for name, value in options.items():
        setattr(opt, name, value)
    unchanged_after(lambda: opt.step(grads), error, message, params, kind(params, lr=1.0))


BAD_STATES = [
    ({"extra": 1}, ValueError, r"state must have the keys optimizer, step, lr"),
    ({"optimizer": "Momentum"}, ValueError, r"state must be of optimizer Adam, got Momentum"),
    ({"step": -1}, ValueError, r"state\['step'\] must be an integer of at least 0, got -1"),
    ({"step": 1.5}, ValueError, r"state\['step'\] must be an integer of at least 0, got 1.5"),
    ({"exp_avg": []}, ValueError, r"state\['exp_avg'\] must have one array per param \(1\), got 0"),
    (
        {"exp_avg_sq": [np.zeros((3, 2), np.float32)]},
        ValueError,
        r"state\['exp_avg_sq'\]\[0\] must have shape \(2, 3\) as params\[0\], got \(3, 2\)",
    ),
    (
        {"exp_avg": [np.ones((2, 3), np.float32)], "exp_avg_sq": [np.zeros((2, 3))]},
        TypeError,
        r"state\['exp_avg_sq'\]\[0\] must have dtype float32 for params\[0\], which .* got float64",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STATES)
def test_bad_states(change, error, message):
    params = make([(2, 3)], "float32")
    opt = Adam(params)
    opt.step(make([(2, 3)], "float32", seed=1))
    state = opt.state_dict() | change | {"lr": 0.5}
    unchanged_after(lambda: opt.load_state_dict(state), error, message, params, opt)
    assert opt.lr == 1e-3


def test_missing_state_key():
    opt = Adam(np.zeros(2))
    state = opt.state_dict()
    del state["exp_avg"]
    with pytest.raises(ValueError, match=r"state must have the keys .*exp_avg"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_optimisers_are_not_copied(duplicate):
    with pytest.raises(TypeError, match=r"Adam is bound to .*pickle its state_dict\(\)"):
        duplicate(Adam(np.zeros(2)))


def test_repr():
    opt = Momentum([np.zeros(3), np.zeros((20, 100))], 0.1)
    expected = "Momentum(<2 arrays, 2,003 elements>, lr=0.1, gamma=0.9, form='source', "
    assert repr(opt) == expected + "dampening=0.0, nesterov=False, weight_decay=0.0)"


def test_import_is_lazy():
    code = (
        "import sys, fastseg.optimizers; "
        "assert not {'numba', 'cupy', 'torch'} & set(sys.modules); "
        "import numpy; fastseg.optimizers.Adam(numpy.zeros(3)); "
        "assert not {'cupy', 'torch'} & set(sys.modules)"
    )
    path = [entry for entry in sys.path if entry]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(path)})


def test_every_backend_has_every_rule():
    assert set(STATE_COUNTS) == set(COEFFICIENT_NAMES) == set(update_kernels._RULES)
    assert set(STATE_COUNTS) == set(cuda_updates.RULES)
    rules = [kind(np.zeros(1), lr=0.1, **options)._rule for kind, options in RULES]
    for (kind, options), rule in zip(RULES, rules, strict=True):
        made = rule(kind(np.zeros(1), lr=0.1, **options)._current())
        assert len(made.coefficients) <= len(COEFFICIENT_NAMES[made.kernel])


def test_loops_are_vectorised(monkeypatch):
    """A scalar square root and division per element would cost several times the bandwidth."""
    monkeypatch.setenv("FASTSEG_CACHE_DIR", "")  # machine code from the cache has no assembly
    kernel = update_kernels.update_kernel.__wrapped__("adam", "float32")
    assembly = kernel._keep_alive._library.get_asm_str()
    if "vsqrtss" not in assembly:
        pytest.skip("not an x86-64 CPU with AVX")
    assert "vsqrtps" in assembly and "vdivps" in assembly
