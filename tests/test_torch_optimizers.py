"""fastseg.torch's optimisers in the place of torch.optim's: steps, checkpoints, scalers, hooks."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch

import fastseg.torch

PAIRS = [
    (fastseg.torch.Adam, torch.optim.Adam, {}),
    (fastseg.torch.Adam, torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (fastseg.torch.Adam, torch.optim.Adam, {"maximize": True, "betas": (0.5, 0.7)}),
    (fastseg.torch.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    (fastseg.torch.SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    (fastseg.torch.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (fastseg.torch.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
]
each_pair = pytest.mark.parametrize(
    ("mine", "theirs", "options"), PAIRS, ids=[f"{m.__name__}-{o}" for m, _, o in PAIRS]
)


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 3, 3), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.LazyLinear(2))
    model(torch.zeros(1, 2, 8, 8))
    return model.to(dtype)


def groups(model):
    """Two groups of options, and one parameter that is frozen."""
    model[1].bias.requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": decayed}, {"params": others, "lr": 0.02, "weight_decay": 0.0}]


def loss_of(model, seed):
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return model(torch.randn(5, 2, 8, 8).to(dtype)).square().mean()


def backward(model, seed):
    model.zero_grad()
    loss_of(model, seed).backward()


def assert_close(a, b, tolerance=1e-11):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@each_pair
def test_steps_are_those_of_torch(mine, theirs, options):
    """With groups, a schedule, and a parameter that has no gradient at some steps."""
    a, b = network(), network()
    opt, peer = mine(groups(a), lr=0.01, **options), theirs(groups(b), lr=0.01, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (opt, peer)]
    assert isinstance(opt, theirs)
    for step in range(8):
        for model in (a, b):
            backward(model, step)
            if step in (0, 4, 5):
                model[0].weight.grad = None
        for o, schedule in zip((opt, peer), schedules, strict=True):
            o.step()
            schedule.step()
    assert_close(a, b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for name, value in peer.state.get(q, {}).items():
            if value is not None:
                got = opt.state[p][name].double()
                torch.testing.assert_close(got, value.double(), rtol=1e-11, atol=1e-12)


@each_pair
@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
def test_checkpoints_load_both_ways(mine, theirs, options, back):
    a, b = network(), network()
    first, second = (mine, theirs) if back else (theirs, mine)
    opt, whole = first(groups(a), lr=0.01, **options), theirs(groups(b), lr=0.01, **options)
    for step in range(3):
        for model, o in ((a, opt), (b, whole)):
            backward(model, step)
            o.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = second(groups(a), lr=123.0, **options)
    other.load_state_dict(torch.load(file))
    for step in range(3, 6):
        for model, o in ((a, other), (b, whole)):
            backward(model, step)
            o.step()
    assert_close(a, b)
    assert set(other.state_dict()["param_groups"][0]) == set(whole.state_dict()["param_groups"][0])


def test_a_loaded_state_shares_no_memory():
    a, b = network(), network()
    opt = fastseg.torch.Adam(a.parameters())
    backward(a, 0)
    opt.step()
    kept = copy.deepcopy(opt.state_dict())
    other = fastseg.torch.Adam(b.parameters())
    other.load_state_dict(opt.state_dict())
    backward(b, 0)
    other.step()
    for key, state in opt.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, kept["state"][key][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_train_by_their_masters_and_checkpoints_keep_them(dtype):
    a = network(dtype=dtype)
    b = network(dtype=dtype).float()
    opt, wide = fastseg.torch.Adam(a.parameters(), lr=1e-3), torch.optim.Adam(b.parameters(), 1e-3)
    for step in range(6):
        backward(a, step)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            q.grad = p.grad.float()
        opt.step()
        wide.step()
        if step == 2:
            state, opt = opt.state_dict(), fastseg.torch.Adam(a.parameters(), lr=7.0)
            opt.load_state_dict(copy.deepcopy(state))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(opt.state[p]["master_param"], q.data, rtol=1e-5, atol=1e-7)
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(p, opt.state[p]["master_param"].to(dtype))


def test_small_states():
    model = network(dtype=torch.float32)
    opt = fastseg.torch.AdamW(model.parameters(), state_dtype="bfloat16")
    plain = fastseg.torch.AdamW(network(dtype=torch.float32).parameters())
    backward(model, 0)
    opt.step()
    for p, q in zip(model.parameters(), plain.param_groups[0]["params"], strict=True):
        q.grad = p.grad
    plain.step()
    for p, q in zip(model.parameters(), plain.param_groups[0]["params"], strict=True):
        got, wanted = opt.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"]
        assert got.dtype == torch.bfloat16 and got.shape == p.shape
        torch.testing.assert_close(got.float(), wanted, rtol=2.0**-7, atol=0)
    again = fastseg.torch.AdamW(model.parameters(), state_dtype="bfloat16")
    again.load_state_dict(opt.state_dict())
    backward(model, 1)
    again.step()
    torch.optim.AdamW(model.parameters()).load_state_dict(again.state_dict())


@each_pair
def test_clipping_over_all_groups(mine, theirs, options):
    a, b = network(), network()
    opt = mine(groups(a), lr=0.01, max_norm=0.1, zero_grads=True, **options)
    peer = theirs(groups(b), lr=0.01, **options)
    for step in range(4):
        loss_of(a, step).backward()  # no zero_grad: the step has done it
        backward(b, step)
        opt.step()
        assert all(p.grad is None or not p.grad.any() for p in a.parameters())
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), 0.1)
        peer.step()
        assert float(opt.grad_norm) == pytest.approx(float(norm), rel=1e-5) and norm > 0.1
    assert_close(a, b, 1e-5)  # torch divides by the norm + 1e-6


def test_a_gradient_that_is_not_finite_drops_the_step():
    model = network()
    opt = fastseg.torch.SGD(groups(model), lr=0.1, momentum=0.9, skip_non_finite=True)
    before = [p.clone() for p in model.parameters()]
    backward(model, 0)
    model[0].bias.grad[1] = float("nan")
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not torch.isfinite(opt.grad_norm)
    backward(model, 0)
    opt.step()
    assert not torch.equal(model[0].weight, before[0])


@each_pair
@pytest.mark.parametrize("unscale", [False, True])
def test_the_protocol_of_gradient_scalers(mine, theirs, options, unscale):
    a, b = network(dtype=torch.float32), network(dtype=torch.float32)
    opts = mine(groups(a), lr=0.01, **options), theirs(groups(b), lr=0.01, **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in opts]
    for step in range(6):
        for model, opt, scaler in zip((a, b), opts, scalers, strict=True):
            model.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 3:
                model[0].weight.grad[0, 0, 0, 0] = float("inf")
            if unscale:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() < 4096.0  # it was halved once
    assert_close(a, b, 1e-5)
    if "Adam" in mine.__name__:
        assert int(opts[0].state_dict()["state"][0]["step"]) == 5


def test_clipping_of_scaled_gradients():
    """The norm is that of the gradients before they were scaled."""
    a, b = network(), network()
    opt = fastseg.torch.Adam(a.parameters(), lr=0.01, max_norm=0.1)
    plain = fastseg.torch.Adam(b.parameters(), lr=0.01, max_norm=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        a.zero_grad()
        scaler.scale(loss_of(a, step)).backward()
        scaler.step(opt)
        scaler.update()
        backward(b, step)
        plain.step()
        assert float(opt.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-12)
    assert_close(a, b)


def test_autograd_notices_a_step():
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    fastseg.torch.SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_that_lies_otherwise():
    """torch.optim takes any strides; zeroing reaches the gradient itself."""
    param = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    param.grad = torch.arange(120.0).reshape(2, 3, 4, 5)
    expected = param.detach() - 0.1 * param.grad
    opt = fastseg.torch.SGD([param], lr=0.1, zero_grads=True)
    opt.step()
    torch.testing.assert_close(param.detach(), expected)
    assert not param.grad.any()


@pytest.mark.parametrize("through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_by_themselves(through):
    model = network()
    opt = fastseg.torch.Adam(model.parameters(), lr=0.01, max_norm=0.3, zero_grads=True)
    backward(model, 0)
    opt.step()
    twin = through(opt)
    assert (twin.max_norm, twin.zero_grads, twin.state_dtype) == (0.3, True, None)
    params = twin.param_groups[0]["params"]
    for param, original in zip(params, model.parameters(), strict=True):
        param.grad = torch.ones_like(param)
        original.grad = torch.ones_like(original)
    before = [p.clone() for p in model.parameters()]
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), params, strict=True))


def test_hooks_closures_and_groups_that_come_later():
    model, seen = network(), []
    opt = fastseg.torch.SGD([model[0].weight], lr=0.1, momentum=0.9)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(2)]
    assert losses[1] < losses[0]
    opt.add_param_group({"params": [model[0].bias], "lr": torch.tensor(0.5)})
    before = model[0].bias.clone()
    opt.step(closure)
    torch.testing.assert_close(model[0].bias, before - 0.5 * model[0].bias.grad)
    assert seen == ["before", "after"] * 3


def test_momentum_that_is_switched_on():
    model, peer = network(), network()
    opts = fastseg.torch.SGD(model.parameters(), lr=0.1), torch.optim.SGD(peer.parameters(), lr=0.1)
    for step in range(6):
        for m, o in ((model, opts[0]), (peer, opts[1])):
            o.param_groups[0]["momentum"] = 0.9 if step in (2, 3, 5) else 0.0
            backward(m, step)
            o.step()
    assert_close(model, peer)


def alike(change, steps=6, **options):
    """Train with Adam of both, ``change`` each optimiser before the fourth step, and compare."""
    models, opts = (network(), network()), []
    for model, kind in zip(models, (fastseg.torch.Adam, torch.optim.Adam), strict=True):
        opts.append(kind(model.parameters(), lr=0.05, **options))
    for step in range(steps):
        for model, opt in zip(models, opts, strict=True):
            backward(model, step)
            if step == 3:
                change(opt, model)
            opt.step()
    assert_close(*models)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        for name, value in opts[1].state[q].items():
            torch.testing.assert_close(opts[0].state[p][name].double(), value.double())
    assert len(opts[0].state_dict()["state"]) == len(opts[1].state_dict()["state"])


def exchange(opt, model):
    opt.state[model[0].weight]["exp_avg"] = torch.ones_like(model[0].weight)


def write_in_place(opt, model):
    opt.state[model[0].weight]["exp_avg_sq"].fill_(0.5)


def count_anew(opt, model):
    opt.state[model[0].bias]["step"] = torch.tensor(0.0)


def forget(opt, model):
    opt.state.clear()


def forget_one(opt, model):
    del opt.state[model[0].bias]


def lay_otherwise(opt, model):
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "change", [exchange, write_in_place, count_anew, forget, forget_one, lay_otherwise]
)
def test_states_and_memory_formats_that_others_change(change):
    alike(change)
    alike(change, amsgrad=True)


def test_momentum_that_begins_later_is_not_dampened_at_its_first_step():
    for momenta in ([0.0, 0.9, 0.9], [0.9, 0.0, 0.9, 0.9]):
        models, opts = (network(), network()), []
        for model, kind in zip(models, (fastseg.torch.SGD, torch.optim.SGD), strict=True):
            opts.append(kind(model.parameters(), lr=0.1, dampening=0.5))
        for step, momentum in enumerate(momenta):
            for model, opt in zip(models, opts, strict=True):
                opt.param_groups[0]["momentum"] = momentum
                backward(model, step)
                opt.step()
        assert_close(*models)


def test_parameters_share_a_launch_again_once_they_took_as_many_steps():
    rng = np.random.default_rng(0)
    params = [torch.ones(3, requires_grad=True) for _ in range(40)]
    others = [torch.ones(3, requires_grad=True) for _ in range(40)]
    opt, peer = fastseg.torch.Adam(params), torch.optim.Adam(others)
    for _ in range(30):
        for p, q in zip(params, others, strict=True):
            p.grad = None if rng.random() < 0.3 else torch.randn(3)
            q.grad = None if p.grad is None else p.grad.clone()
        opt.step()
        peer.step()
    for p in params:
        p.grad = torch.ones(3)
    opt.step()
    counts = {int(opt.state[p]["step"]) for p in params}
    assert 1 < len(opt._buckets._active[0].buckets) == len(counts) < 20
    for q in others:
        q.grad = torch.ones(3)
    peer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_state_that_does_not_fit_is_refused_again_and_again():
    param = torch.ones(3, requires_grad=True)
    opt = fastseg.torch.Adam([param])
    param.grad = torch.ones(3)
    opt.step()
    state, before = copy.deepcopy(opt.state_dict()), param.detach().clone()
    for size in (7, 1):
        state["state"][0]["exp_avg_sq"] = torch.zeros(size)
        opt.load_state_dict(state)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"state\['exp_avg_sq'\] .* must have its shape \(3,\)"
            ):
                opt.step()
    assert torch.equal(param, before)


def test_what_is_loaded_is_a_copy_and_hooks_come_after_it():
    a, b = network(), network()
    opts = [fastseg.torch.Adam(model.parameters(), lr=0.1) for model in (a, b)]
    for step in range(2):
        backward(a, step)
        opts[0].step()
    kept = copy.deepcopy(opts[0].state_dict())
    opts[1].register_load_state_dict_post_hook(
        lambda opt: [state["exp_avg_sq"].fill_(4.0) for state in opt.state.values()]
    )
    opts[1].load_state_dict(opts[0].state_dict())
    for step in range(3):
        backward(a, step)
        opts[0].step()
    for key, state in opts[1].state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], kept["state"][key]["exp_avg"])
        assert float(state["step"]) == 2.0 and (state["exp_avg_sq"] == 4.0).all()


def test_steps_that_were_loaded_are_counted_by_each_for_itself():
    """A state that is handed on before a step: torch.optim counts its steps up in place."""
    a, b = network(), network()
    opt, middle = fastseg.torch.Adam(a.parameters()), fastseg.torch.Adam(b.parameters())
    backward(a, 0)
    opt.step()
    middle.load_state_dict(opt.state_dict())
    last = torch.optim.Adam(b.parameters())
    last.load_state_dict(middle.state_dict())
    backward(b, 1)
    last.step()
    assert {float(state["step"]) for state in last.state.values()} == {2.0}
    assert {float(state["step"]) for state in middle.state_dict()["state"].values()} == {1.0}


def test_an_optimiser_goes_with_its_last_reference():
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    opt = fastseg.torch.Adam([param])
    opt.step()
    seen = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert seen() is None
    finally:
        gc.enable()


def test_a_norm_that_is_only_measured():
    param = torch.ones(2, requires_grad=True)
    opt = fastseg.torch.SGD([param], lr=1.0, max_norm=float("inf"))
    param.grad = torch.tensor([3e30, 4e30])
    opt.step()
    assert opt.grad_norm.dtype == torch.float64 and float(opt.grad_norm) == pytest.approx(5e30)
    assert param.tolist() == [pytest.approx(-3e30), pytest.approx(-4e30)]
    param.grad = None
    opt.step()
    assert opt.grad_norm is None


def test_a_gradient_that_was_transposed_in_place():
    param, other = (torch.zeros(2, 2, requires_grad=True) for _ in range(2))
    opt, peer = fastseg.torch.SGD([param], lr=1.0), torch.optim.SGD([other], lr=1.0)
    param.grad, other.grad = (torch.arange(4.0).reshape(2, 2) for _ in range(2))
    for o, p in ((opt, param), (peer, other)):
        o.step()
        p.grad.t_()
        o.step()
    assert torch.equal(param, other)


def test_no_gradients_at_all():
    opt = fastseg.torch.Adam(network().parameters(), max_norm=1.0)
    opt.step()
    assert opt.grad_norm is None and not opt.state_dict()["state"]


def test_what_is_refused_says_why():
    param = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="state_dtype must be None or 'bfloat16', got 'int8'"):
        fastseg.torch.Adam([param], state_dtype="int8")
    with pytest.raises(ValueError, match="max_norm must be finite and at least 0, got -1"):
        fastseg.torch.Adam([param], max_norm=-1)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        fastseg.torch.AdamW([param], lr=-1.0)
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="differentiable must be False"):
        fastseg.torch.Adam([param], differentiable=True).step()
    weight = torch.ones(4, 3, requires_grad=True)
    torch.nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    opt = fastseg.torch.SGD([param, weight], lr=0.1)
    with pytest.raises(TypeError, match=r"grads\[1\] must be a dense tensor"):
        opt.step()
    assert param.tolist() == [1.0] * 3  # nothing was written
    number = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    number.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"params\[0\] must have one of the dtypes"):
        fastseg.torch.SGD([number], lr=0.1).step()


def test_every_group_is_checked_before_any_is_written():
    good, bad = torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    opt = fastseg.torch.SGD([{"params": [good]}, {"params": [bad]}], lr=0.1)
    good.grad, bad.grad = torch.ones(3), torch.ones(2, 2).to_sparse()
    with pytest.raises(TypeError, match="dense tensor"):
        opt.step()
    assert good.tolist() == [1.0] * 3


def test_equal_to_the_plain_optimiser():
    """The same kernels: the same bits as fastseg.Adam's."""
    model = network(dtype=torch.float32)
    arrays = [p.detach().numpy().copy() for p in model.parameters()]
    opt, plain = fastseg.torch.Adam(model.parameters(), lr=0.01), fastseg.Adam(arrays, lr=0.01)
    for step in range(3):
        backward(model, step)
        plain.step([p.grad.numpy().copy() for p in model.parameters()])
        opt.step()
    for param, array in zip(model.parameters(), arrays, strict=True):
        np.testing.assert_array_equal(param.detach().numpy(), array)


def test_a_step_inside_what_is_compiled():
    """Dynamo breaks its graph there, and the numbers are the same."""
    a, b = network(), network()
    opt, plain = (fastseg.torch.Adam(m.parameters(), lr=0.01, max_norm=0.1) for m in (a, b))

    def train(model, opt, x):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        compiled = torch.compile(train, backend="eager")
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(5, 2, 8, 8).double()
            compiled(a, opt, x)
            train(b, plain, x)
    assert_close(a, b)
