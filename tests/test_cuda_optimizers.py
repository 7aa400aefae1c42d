"""Optimisers of parameters on a GPU, without a GPU: steps, their number, streams and graphs."""

from __future__ import annotations

import numpy as np
import pytest

import cases
import fastseg as fs
import fastseg.torch
from cuda_device import LOSS, Foreign, close, host, on_device
from fastseg_kernels.cuda import Backend
from hostcuda import cupy

pytestmark = pytest.mark.usefixtures("cupy_stand_in")


def test_streams_of_other_libraries_and_optimisers():
    theta, grad = Foreign(np.zeros(4, np.float32), 7), Foreign(np.ones(4, np.float32), 8)
    opt = fs.GradientDescent([theta], lr=1.0)
    for _ in range(2):
        cupy.events.clear()
        opt.step(grad)  # an object without a shape is one array, too
        before = [("record", 7), ("wait", 0), ("record", 8), ("wait", 0)]
        after = [("record", 0), ("wait", 7), ("record", 0), ("wait", 8)]
        assert cupy.events == [*before, *after]


def test_streams_of_numbers_wait_too():
    logits, targets = cases.make((1, 1, 9))
    LOSS.value_and_grad(*on_device(logits, targets), grad_scale=Foreign(np.array(2.0), 9))
    assert cupy.events == [("record", 9), ("wait", 0), ("record", 0), ("wait", 9)]
    cupy.events.clear()
    opt = fs.GradientDescent(cupy.asarray(logits), lr=1.0)
    opt.step(cupy.asarray(logits), lr=Foreign(np.array(2.0), 9))
    assert cupy.events == [("record", 9), ("wait", 0), ("record", 0), ("wait", 9)]


RULES = [
    lambda params: fs.GradientDescent(params, lr=0.1, weight_decay=0.01),
    lambda params: fs.Momentum(params, lr=0.1, nesterov=True),
    lambda params: fs.Momentum(params, lr=0.1, form="pytorch"),
    lambda params: fs.Adam(params, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1),
]


@pytest.mark.parametrize("rule", RULES)
def test_optimisers_update_in_place(rule):
    rng = np.random.default_rng(0)
    shapes, dtypes = [(3, 5), (0,), (4099,), (1,), (2, 2)], [np.float32] * 4 + [np.float64]
    params = [rng.normal(size=s).astype(d) for s, d in zip(shapes, dtypes, strict=True)]
    params[0] = np.asfortranarray(params[0])
    theirs = [cupy.asarray(p) for p in params]
    theirs[0] = cupy.asarray(params[0].T).T
    mine, other = rule(params), rule(theirs)
    for step in range(3):
        grads = [rng.normal(size=p.shape).astype(p.dtype) for p in params]
        grads[0] = np.asfortranarray(grads[0])
        there = [cupy.asarray(g) for g in grads]
        there[0] = cupy.asarray(grads[0].T).T
        mine.step(grads, lr=0.3 / (1 + step), grad_scale=0.5, zero_grads=True)
        numbers = on_device(np.float64(0.3 / (1 + step)), np.float32(0.5))
        other.step(there, lr=numbers[0], grad_scale=numbers[1], zero_grads=True)
        for a, b, g in zip(params, theirs, there, strict=True):
            np.testing.assert_allclose(host(b), a, rtol=1e-5, atol=1e-7)
            assert not host(g).any()
        if step == 1:
            state = other.state_dict()
            other = rule(theirs)
            other.load_state_dict(state)
    for name in mine._state_names:
        for a, b in zip(mine.state_dict()[name], other.state_dict()[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_step_on_another_stream_or_in_a_graph_has_copies_of_its_own():
    params, grads = on_device(np.zeros(9, np.float32), np.ones(9, np.float32))
    opt = fs.Momentum(params, lr=0.1)
    opt.step(grads)
    (part,) = opt._updater._table._parts
    first = dict(part.copies)
    opt.step(grads)
    assert all(part.copies[name] is first[name] for name in first)
    cupy.current = cupy.Stream(64)
    opt.step(grads)
    second = dict(part.copies)
    assert not any(second[name] is first[name] for name in first)
    cupy.current.capturing = True
    opt.step(grads)
    assert part.copies == {}  # those of the graph are the graph's
    kept = opt._backend.memory.of_graphs
    assert len(kept) >= len(first)
    cupy.current.capturing = False
    opt.step(grads)
    assert not any(part.copies[name] is array for name in part.copies for array in kept)


def test_adam_counts_on_the_device_where_a_graph_repeats_its_steps(monkeypatch):
    params, grads = on_device(np.zeros(9, np.float32), np.ones(9, np.float32))
    cupy.current = cupy.Stream(64)
    frozen = fs.Adam(params)
    frozen.step(grads)
    cupy.current.capturing = True
    with pytest.raises(RuntimeError, match="make the optimiser with capturable=True"):
        frozen.step(grads)
    with monkeypatch.context() as patch:
        patch.setattr(Backend, "launch", lambda *arguments: pytest.fail("refused too late"))
        with pytest.raises(RuntimeError, match="make the optimiser with capturable=True"):
            frozen.step(grads)
    cupy.current.capturing = False
    with pytest.raises(ValueError, match="capturable=True is for params on a GPU"):
        fs.Adam(np.zeros(3), capturable=True)
    mine, theirs = (cupy.asarray(np.zeros(9, np.float32)) for _ in range(2))
    opt, other = fs.Adam(mine, lr=0.1, capturable=True), fs.Adam(theirs, lr=0.1)
    for k in range(1, 5):
        cupy.current.capturing = k == 3
        opt.step(grads * k)
        cupy.current.capturing = False
        other.step(grads * k)
        np.testing.assert_allclose(host(mine), host(theirs), rtol=1e-6)
        assert opt.step_count == other.step_count == k
    again = fs.Adam(mine, capturable=True)
    again.load_state_dict(opt.state_dict())
    opt.step(grads)
    expected = host(mine).copy()
    mine[...] = theirs
    again.step(grads)
    np.testing.assert_allclose(host(mine), expected, rtol=1e-6)
    assert again.step_count == 5


def test_no_step_is_counted_for_which_there_is_no_memory(monkeypatch):
    params, grads = on_device(np.zeros(9, np.float32), np.ones(9, np.float32))
    opt = fs.Adam(params, capturable=True)
    with monkeypatch.context() as patch:
        patch.setattr(Backend, "upload", lambda self, values: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            opt.step(grads)
    assert opt.step_count == 0 and not host(params).any()


def test_a_step_that_is_recorded_is_not_taken_yet():
    params, grads = on_device(np.zeros(9, np.float32), np.ones(9, np.float32))
    opt = fs.GradientDescent(params, lr=0.1)
    cupy.current = cupy.Stream(64)
    opt.step(grads)
    cupy.current.capturing = True
    opt.step(grads)
    assert opt.step_count == 1


def test_parameters_of_two_places_are_refused():
    host_array, there = np.zeros(3, np.float32), cupy.asarray(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match=r"params\[0\] on cpu and params\[1\] on cuda:0"):
        fs.Adam([host_array, there])
    opt = fs.Adam([there])
    with pytest.raises(TypeError, match=r"grads\[0\] and params\[0\] must come from one library"):
        opt.step([host_array])
    with pytest.raises(ValueError, match=r"lr must be one number, got an array of shape \(3,\)"):
        opt.step([there + 1], lr=there)
    opt = fs.Adam([host_array])
    with pytest.raises(TypeError, match="lr must be a number, or on the device"):
        opt.step([host_array + 1], lr=cupy.asarray(0.1))


def test_the_first_step_of_dampened_momentum_is_not_recorded():
    params, grads = on_device(np.zeros(9, np.float32), np.ones(9, np.float32))
    options = {"lr": 0.1, "form": "pytorch", "dampening": 0.5}
    opt = fs.Momentum(params, **options)
    cupy.current = cupy.Stream(2)  # the default stream of a thread may be recorded too
    cupy.current.capturing = True
    with pytest.raises(RuntimeError, match="a graph would repeat the step with the number"):
        opt.step(grads)
    assert opt.step_count == 0 and not host(params).any()
    counting = fs.Momentum(params, capturable=True, **options)
    for taken in (0.1, 0.1 + 0.1 * (0.9 + 0.5)):  # the first is not dampened
        counting.step(grads)
        close(params, np.full(9, -taken), 1e-6)


NUMBERS = [("float16", None), ("float32", None), ("float32", "bfloat16"), ("float16", "bfloat16")]


@pytest.mark.parametrize(("dtype", "state_dtype"), NUMBERS)
def test_a_gpu_drops_and_clips_steps_without_being_asked_about_it(dtype, state_dtype):
    """Numbers of the device decide; states go to the CPU and come back."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=size).astype(dtype) for size in (3, 4099)]
    theirs = on_device(*params)
    options = {"lr": 0.1, "state_dtype": state_dtype, "amsgrad": True}
    mine, other = fs.Adam(params, **options), fs.Adam(theirs, **options)
    for k in range(5):
        grads = [rng.normal(size=p.shape).astype(dtype) for p in params]
        if k == 1:
            grads[1][7] = np.inf
        found = np.float32(k == 3)
        arguments = {"max_norm": 2.0, "skip_non_finite": True, "zero_grads": True}
        there = on_device(*grads)
        norm = other.grad_norm(there)
        cupy.events.clear()
        other.step(there, grad_norm=norm, found_inf=cupy.asarray(found), **arguments)
        assert cupy.events == [] and not any(host(g).any() for g in there)
        assert float(host(norm)) == pytest.approx(mine.grad_norm(grads), rel=1e-12)
        mine.step(grads, found_inf=found, **arguments)
    assert mine.step_count == other.step_count == 3
    for _ in range(2):  # there, and back
        state = other.state_dict()
        for name in mine._updater.states:
            # Chance takes another side where the number beside it differs in its last digit.
            tolerance = 1e-5 if state_dtype is None else 2.0**-7
            for a, b in zip(mine.state_dict()[name], state[name], strict=True):
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-6)
        again, back = fs.Adam(theirs, **options), fs.Adam(params, **options)
        back.load_state_dict(state)
        again.load_state_dict(back.state_dict())
        assert again.step_count == 3
        for name in state:
            np.testing.assert_equal(again.state_dict()[name], state[name])
        other = again


def test_a_step_that_may_be_dropped_is_counted_on_the_device_before_it_is_recorded():
    params, grads = on_device(np.zeros(9, np.float32), np.ones(9, np.float32))
    opt = fs.GradientDescent(params, lr=0.1)
    cupy.current = cupy.Stream(64)
    cupy.current.capturing = True
    with pytest.raises(RuntimeError, match="take one before recording"):
        opt.step(grads, skip_non_finite=True)
    cupy.current.capturing = False
    opt.step(grads, skip_non_finite=True)
    opt.step(grads * np.float32(np.nan), skip_non_finite=True)
    cupy.current.capturing = True
    opt.step(grads, skip_non_finite=True)
    cupy.current.capturing = False
    assert opt.step_count == 2  # the stand-in records nothing: it computes
    close(params, np.full(9, -0.2), 1e-6)


def test_an_object_whose_memory_moved_is_looked_at_again():
    theta, grad = Foreign(np.zeros(4, np.float32)), Foreign(np.ones(4, np.float32))
    opt = fs.GradientDescent([theta], lr=1.0)
    opt.step([grad])
    first = theta.array.copy()
    theta.__init__(np.zeros(4, np.float32))
    opt.step([grad])
    assert (first == -1.0).all() and (theta.array == -1.0).all()
    with pytest.raises(TypeError, match="native byte order"):
        fs.sigmoid(Foreign(np.zeros(4, ">f4")))
