"""Arrays of a GPU through the public face: CuPy's, PyTorch's, Numba's, without a GPU.

hostcuda/cupy.py stands for CuPy. The kernels have their tests in test_cuda_contract.py: here it is
what stands around them, who allocates, what waits, and where answers are.
"""

from __future__ import annotations

import contextlib
import inspect
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cases
import fastseg as fs
import fastseg.torch
from fastseg import dispatch, info, libraries, updater
from fastseg_kernels.cuda import Backend, installation, job
from fastseg_kernels.cuda.runtime import CuPyDriver, TorchMemory
from gpu_mirror import MirrorBackend
from hostcuda import cupy
from hostcuda.runtime import HostDriver
from stand_in import forget_libraries

LOSS = fs.BCE() + 2.0 * fs.SoftJaccard()
SHAPE = (2, 3, 7, 11, 13)


@pytest.fixture(autouse=True)
def device(cupy_stand_in: None) -> None:
    """Put the stand-in in CuPy's place."""


def on_device(*arrays: np.ndarray) -> list[Any]:
    return [cupy.asarray(array) for array in arrays]


def host(array: Any) -> np.ndarray:
    return np.asarray(array.view(np.ndarray))


def close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(host(got), expected, rtol=rtol, atol=1e-9)


# CuPy


def test_answers_are_on_the_device_and_nobody_waits():
    logits, targets = cases.make(SHAPE)
    value, grad = LOSS.value_and_grad(logits, targets)
    x, t = on_device(logits, targets)
    scale = cupy.asarray(np.float32(2.0))
    answer, slope, s = LOSS.evaluate(x, t, track=("hard",), grad_scale=scale)
    again = LOSS.gradient(x, t, s)
    total = LOSS.value(s)
    assert cupy.events == []
    assert [type(a) for a in (answer, slope, again, total)] == [cupy.ndarray] * 4
    assert (answer.shape, answer.dtype, total.dtype) == ((), np.float32, np.float64)
    close(answer, value)
    close(total, value, 1e-6)
    close(slope, 2 * grad)
    close(again, grad)
    assert s.jaccard_index() == LOSS.statistics(logits, targets, track=("hard",)).jaccard_index()
    s.check()
    assert [event[0] for event in cupy.events] == ["get"]  # once, and remembered


def test_statistics_travel():
    logits, targets = cases.make(SHAPE)
    x, t = on_device(logits, targets)
    there, here = LOSS.statistics(x, t, samples=("a", "b")), LOSS.statistics(logits, targets)
    assert there.shape == here.shape == (2, 3)
    copy = pickle.loads(pickle.dumps(there))
    assert copy == there and copy.samples == ("a", "b")
    np.testing.assert_allclose(copy.array, here.array, rtol=1e-6)
    close(LOSS.gradient(x, t, copy), LOSS.gradient(logits, targets, here))
    close(LOSS.gradient(x[1:], t[1:], there, rows=slice(1, 2)), host(LOSS.gradient(x, t, copy))[1:])
    assert isinstance(LOSS.value(copy), np.float64)
    for got, expected in zip(LOSS.term_values(there), LOSS.term_values(here), strict=True):
        close(got, expected, 1e-6)


def test_what_is_known_of_a_small_call_is_its_backends():
    """Layouts of a device and of the host are alike, and their addresses are not."""
    logits, targets = cases.make((1, 2, 30))
    x, t = on_device(logits, targets)
    loss = fs.BCE() + fs.SoftDice()
    host_value, host_grad = loss.value_and_grad(logits, targets)
    calls = loss.__dict__["_small_calls"]._by_arrangement
    (known,) = calls.values()
    assert known is not None
    value, grad = loss.value_and_grad(x, t)
    assert [each is None for each in calls.values()] == [False, True]
    close(value, host_value, 1e-6)
    close(grad, host_grad)


def test_invalid_targets_are_nan_until_somebody_asks():
    logits, targets = cases.make(SHAPE)
    targets[1, 2, 3, 4, 5] = 7
    x, t = on_device(logits, targets)
    value, grad, s = LOSS.evaluate(x, t)
    assert np.isnan(host(value)) and np.isnan(host(grad)).all()
    assert all(np.isnan(host(term)) for term in LOSS.term_values(s))
    with pytest.raises(ValueError, match="1 of 6006 voxels have others"):
        s.check()
    with pytest.raises(ValueError, match="1 of 6006 voxels have others"):
        fs.jaccard_index(x, t)
    excluded = LOSS.replace(ignore_index=7)(x, t)
    assert np.isfinite(host(excluded))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_the_nan_that_a_gpu_makes_stays_nan(dtype):
    """All its bits are set, a CPU's are not: arithmetic on bits could make a number of it."""
    logits, targets = cases.make((1, 2, 5000), dtype)
    bits = np.array(2 ** (8 * logits.itemsize - 1) - 1, f"u{logits.itemsize}")
    logits[0, 0, 16] = bits.view(dtype)
    for step in (1, 2):
        x, t = (array[..., ::step] for array in on_device(logits, targets))
        at = (0, 0, 16 // step)
        value, grad, s = LOSS.evaluate(x, t, track=("hard",))
        assert np.isnan(host(value)) and np.isnan(host(grad)[at])
        assert np.isfinite(host(grad)[0, 1]).all() and s["undefined"].tolist() == [[1, 0]]
        assert np.isnan(host(fs.sigmoid(x))[at])


def test_a_gradient_may_overwrite_its_logits():
    logits, targets = cases.make(SHAPE)
    expected = LOSS.value_and_grad(logits, targets)[1]
    x, t = on_device(logits, targets)
    _, grad = LOSS.value_and_grad(x, t, out=x)
    assert grad is x
    close(x, expected)
    with pytest.raises(ValueError, match="out must not overlap logits"):
        LOSS.value_and_grad(x[..., 1:], t[..., 1:], out=x[..., :-1])


def test_memory_order_is_kept():
    logits, targets = (np.moveaxis(array, 1, -1).copy() for array in cases.make(SHAPE))
    x, t = (np.moveaxis(array, -1, 1) for array in on_device(logits, targets))
    grad = LOSS.value_and_grad(x, t)[1]
    assert grad.strides == x.strides
    close(grad, LOSS.value_and_grad(host(x), host(t))[1])


def test_reduction_none_with_a_scale_for_each_row():
    logits, targets = cases.make(SHAPE)
    loss, scale = LOSS.replace(reduction="none"), np.arange(6.0).reshape(2, 3)
    value, grad = loss.value_and_grad(logits, targets, grad_scale=scale)
    x, t, factors = on_device(logits, targets, scale)
    for factor in (factors, scale, factors.T.copy().T):
        there, slope = loss.value_and_grad(x, t, grad_scale=factor)
        close(there, value)
        close(slope, grad)
    with pytest.raises(ValueError, match=r"grad_scale must have shape \(N, C\) = \(2, 3\)"):
        loss.value_and_grad(x, t, grad_scale=factors[0])


def test_a_table_of_terms_of_any_size():
    """Up to TABLE_NUMBERS it is an argument of the kernel, past that it is uploaded."""
    logits, targets = cases.make((1, 300, 5))
    value, grad = LOSS.value_and_grad(logits, targets)
    x, t = on_device(logits, targets)
    there, slope = LOSS.value_and_grad(x, t)
    close(there, value)
    close(slope, grad)


def test_no_samples_and_no_voxels():
    for shape in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        x, t = on_device(np.zeros(shape, np.float32), np.zeros(shape, np.uint8))
        value, grad = LOSS.value_and_grad(x, t)
        expected = LOSS.value_and_grad(host(x), host(t))[0]
        np.testing.assert_equal(host(value), expected)
        assert grad.shape == shape


def test_scores_and_sigmoid():
    logits, targets = cases.make(SHAPE)
    x, t = on_device(logits, targets)
    assert fs.dice_score(x, t) == fs.dice_score(logits, targets)
    close(fs.sigmoid(x), fs.sigmoid(logits))
    assert type(fs.sigmoid(x)) is cupy.ndarray
    rng = np.random.default_rng(0)
    for classes in (2, 5, 3000):  # the counts of 3000 classes are not kept in shared memory
        pred, true = (rng.integers(0, classes, (2, 70, 90)) for _ in range(2))
        got, expected = (
            fs.stat_scores(*arrays, num_classes=classes)
            for arrays in (on_device(pred, true), (pred, true))
        )
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
    with pytest.raises(ValueError, match=r"targets must hold labels in \[0, 2\)"):
        fs.jaccard_index(*on_device(pred * 0, true))


def test_rows_of_more_than_32_bits(monkeypatch):
    """The kernels that count voxels in 64 bits, on a row that would not need them."""
    logits, targets = cases.make((1, 2, 9, 33))
    x, t = (array[..., ::2] for array in on_device(logits, targets))
    expected, bits = LOSS.value_and_grad(x, t), fs.sigmoid(x)
    monkeypatch.setattr(job.counter, "__code__", (lambda voxels: "unsigned long long").__code__)
    y, u = (array[..., ::2].copy()[..., ::2] for array in on_device(logits, targets))
    y, u = (np.repeat(a, 2, axis=-1)[..., ::2] for a in (x, t))  # other strides: a new plan
    got = LOSS.value_and_grad(y, u)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(host(one), host(other))
    np.testing.assert_array_equal(host(fs.sigmoid(y)), host(bits))


# Which backend


def test_the_array_decides_and_an_option_insists():
    logits, targets = cases.make((1, 1, 9))
    x, t = on_device(logits, targets)
    assert (fs.backend_name(logits), fs.backend_name(x)) == ("cpu", "cuda")
    close(LOSS.replace(backend="cuda")(x, t), LOSS(logits, targets))
    assert LOSS.replace(backend="cpu")(logits, targets) == LOSS(logits, targets)
    with pytest.raises(TypeError, match=r"backend='cuda' computes where its arrays are.*on cpu"):
        LOSS.replace(backend="cuda")(logits, targets)
    with pytest.raises(TypeError, match=r"backend='cpu'.*logits is on cuda:0"):
        LOSS.replace(backend="cpu")(x, t)
    with pytest.raises(ValueError, match="backend must be 'auto', 'cpu' or 'cuda', got 'gpu'"):
        LOSS.replace(backend="gpu")


def test_nothing_is_moved_in_silence():
    logits, targets = cases.make((1, 1, 9))
    x, t = on_device(logits, targets)
    with pytest.raises(TypeError, match="one library, got cupy and numpy"):
        LOSS(x, targets)
    with pytest.raises(TypeError, match="one library, got numpy and cupy"):
        LOSS(logits, t)
    with pytest.raises(TypeError, match=r"grad_scale must be a number.*got cupy on cuda:0"):
        LOSS.value_and_grad(logits, targets, grad_scale=cupy.asarray(1.0))
    with pytest.raises(TypeError, match=r"grad_scale must be a number.*got booleans"):
        LOSS.value_and_grad(x, t, grad_scale=cupy.asarray(True))
    with pytest.raises(TypeError, match="x must be floating point, got uint8"):
        fs.sigmoid(t)


def test_an_address_that_a_gpu_cannot_read_is_refused():
    bytes_, t = on_device(np.zeros(41, np.uint8), np.zeros((1, 1, 10), np.uint8))
    x = bytes_[1:].view(np.float32).reshape(1, 1, 10).view(cupy.ndarray)
    with pytest.raises(ValueError, match="logits must be aligned to its elements on a GPU"):
        LOSS(x, t)


# Objects with __cuda_array_interface__


class Foreign:
    """An array of some other library, with a stream of its own."""

    def __init__(self, array: np.ndarray, stream: int | None = None, **more: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
            "stream": stream,
            **more,
        }


Foreign.__cuda_array_interface__ = None  # as a class that has it as a property


def test_arrays_of_other_libraries():
    logits, targets = cases.make(SHAPE)
    value, grad = LOSS.value_and_grad(logits, targets)
    x, t = Foreign(logits), Foreign(targets)
    there, slope = LOSS.value_and_grad(x, t)
    assert type(there) is type(slope) is cupy.ndarray
    close(there, value)
    close(slope, grad)
    assert cupy.events == []
    out = Foreign(np.empty_like(logits).transpose(0, 1, 4, 2, 3).copy().transpose(0, 1, 3, 4, 2))
    assert LOSS.value_and_grad(x, t, out=out)[1] is out
    np.testing.assert_allclose(out.array, grad, rtol=1e-5, atol=1e-9)
    mixed = LOSS.value_and_grad(cupy.asarray(logits), t, out=x)[1]  # both are in CuPy's hands
    assert mixed is x
    np.testing.assert_allclose(logits, grad, rtol=1e-5, atol=1e-9)
    moved = Foreign(np.moveaxis(np.moveaxis(logits, 1, -1).copy(), -1, 1))
    assert LOSS.value_and_grad(moved, t)[1].strides == moved.array.strides


def test_streams_of_other_libraries_are_waited_for_by_streams():
    logits, targets = cases.make(SHAPE)
    x, t, out = Foreign(logits, 7), Foreign(targets, 0), Foreign(np.empty_like(logits), 8)
    LOSS.value_and_grad(x, t, out=out)
    into = [("record", 7), ("wait", 0), ("record", 8), ("wait", 0)]
    assert cupy.events == [*into, ("record", 0), ("wait", 7), ("record", 0), ("wait", 8)]
    cupy.events.clear()
    s = LOSS.statistics(x, t)
    assert cupy.events == [("record", 7), ("wait", 0), ("record", 0), ("wait", 7)]
    for call in (lambda: LOSS.gradient(x, t, s), lambda: LOSS(x, t), lambda: fs.sigmoid(x)):
        cupy.events.clear()
        call()
        assert ("wait", 7) in cupy.events
    cupy.events.clear()
    LOSS(cupy.asarray(logits), t)  # CuPy's are on the current stream, whatever they export
    LOSS(Foreign(logits, 1), t)  # which is the default stream here
    assert cupy.events == []


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


def test_other_streams_are_no_part_of_a_graph():
    logits, targets = cases.make((1, 1, 9))
    x, t = Foreign(logits, 7), Foreign(targets, 7)
    cupy.current = cupy.Stream(64)
    LOSS(x, t)
    cupy.current.capturing = True
    cupy.events.clear()
    LOSS(x, t)
    assert cupy.events == []


def test_statistics_are_fetched_on_the_stream_that_made_them():
    x, t = on_device(*cases.make(SHAPE))
    cupy.current = cupy.Stream(64)
    s = LOSS.statistics(x, t)
    cupy.current = cupy.Stream(128)
    s.check()
    assert cupy.events == [("get", (2, 3, 8), 64)]


def test_interfaces_that_cannot_be_served():
    logits, targets = cases.make((1, 1, 9))
    x, t = Foreign(logits), Foreign(targets)
    with pytest.raises(TypeError, match="targets has a mask"):
        LOSS(x, Foreign(targets, mask=Foreign(targets)))
    with pytest.raises(ValueError, match="out must be writable"):
        LOSS.value_and_grad(x, t, out=Foreign(logits.copy(), data=(logits.ctypes.data, True)))
    with pytest.raises(TypeError, match=r"logits must have one of the dtypes .* got complex64"):
        LOSS(Foreign(logits.astype(np.complex64)), t)
    for more in (
        {"typestr": "nothing"}, {"shape": None}, {"shape": (1, 1, 9.7)}, {"data": 7},
        {"strides": "ab"}, {"strides": (4,)}, {"strides": (36, 36, 4, 4)}, {"stream": "one"},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="logits must have a __cuda_array_interface__ with"):
            LOSS(Foreign(logits, **more), t)


class Managed(np.ndarray):
    """As Numba's managed arrays: NumPy's, and of the device."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.ctypes.data, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "version": 3}


def test_managed_arrays_are_of_the_device():
    logits, targets = (array.view(Managed) for array in cases.make((1, 2, 9)))
    assert fs.backend_name(logits) == "cuda"
    close(LOSS(logits, targets), LOSS(*map(np.asarray, (logits, targets))))


def test_what_only_lives_beside_arrays_is_none():
    pair = torch.max(torch.zeros(2, 3), dim=1)  # a tuple of a class of torch.return_types
    for other in (pair, torch.nn.Identity(), cupy.cuda.Stream(3), np.float32(1)):
        with pytest.raises(TypeError, match="x must be an array of NumPy, CuPy or PyTorch"):
            fs.sigmoid(other)


# Optimisers

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


def test_a_recorded_call_owns_its_memory(monkeypatch):
    logits, targets = cases.make(SHAPE)
    x, t = on_device(logits, targets)
    LOSS.value_and_grad(x, t)
    kept = dispatch._on_device("cupy", "cuda:0").memory.of_graphs
    assert kept == []
    cupy.current = cupy.Stream(64)
    cupy.current.capturing = True
    allocators = []
    real = cupy.empty
    monkeypatch.setattr(
        cupy, "empty", lambda *a: allocators.append(cupy.allocators[-1:]) or real(*a)
    )
    LOSS.value_and_grad(x, t, out=x)
    assert all(used[0].__func__ is cupy.MemoryPool.malloc for used in allocators)
    assert sum(array.nbytes for array in kept) < 2**20
    assert len(kept) == 4  # sums of tasks and of rows; value, coefficients


def test_statistics_of_a_recorded_call_are_those_of_the_last_replay():
    x, t = on_device(*cases.make(SHAPE))
    LOSS.statistics(x, t)
    cupy.current = cupy.Stream(64)
    cupy.current.capturing = True
    s = LOSS.statistics(x, t)
    cupy.current.capturing = False
    before = s["count"].copy()
    s._on_device.sums[...] *= 2  # as a replay rewrites them
    assert (s["count"] == 2 * before).all()
    cupy.events.clear()
    LOSS.statistics(x, t, track=("hard",))
    cupy.current.capturing = True
    hard = LOSS.statistics(x, t, track=("hard",))
    cupy.current.capturing = False
    hard.jaccard_index()
    assert len(cupy.events) == 1  # all of a score is of one replay


def test_sums_of_the_host_in_any_order_of_columns():
    x, t = on_device(*cases.make(SHAPE))
    s = LOSS.statistics(x, t)
    order = [k for k in range(len(s.names)) if s.names[k] != "invalid"]
    order += [s.names.index("invalid")]
    other = fs.Statistics(s.array[:, :, order], [s.names[k] for k in order])
    close(LOSS.gradient(x, t, other), host(LOSS.gradient(x, t, s)))
    bare = fs.Statistics(s.array[:, :, order[:-1]], [s.names[k] for k in order[:-1]])
    close(LOSS.gradient(x, t, bare), host(LOSS.gradient(x, t, s)))


def test_statistics_of_the_default_stream_of_a_thread(monkeypatch):
    """In another thread its address names another stream: the one that waits for all is asked."""
    x, t = on_device(*cases.make(SHAPE))
    cupy.current = cupy.Stream(2)
    s = LOSS.statistics(x, t)
    cupy.current = cupy.Stream(64)
    s.check()
    assert cupy.events == [("get", (2, 3, 8), 0)]


def test_threads_that_come_first_together_share_a_backend(monkeypatch):
    forget_libraries()
    import fastseg_kernels.cuda as cuda

    made, real = [], cuda.backend

    def slow(library: str, index: int) -> Any:
        time.sleep(0.05)
        made.append(real(library, index))
        return made[-1]

    monkeypatch.setattr(cuda, "backend", slow)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(dispatch._on_device, "cupy", "cuda:0") for _ in range(4)]
        assert len({id(future.result()) for future in found}) == len(made) == 1


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


def test_invalid_targets_are_errors_once_the_sums_are_on_the_host():
    logits, targets = cases.make(SHAPE)
    targets[1, 2, 3, 4, 5] = 7
    s = LOSS.statistics(*on_device(logits, targets), track=("hard",), samples=("a", "b"))
    other = LOSS.statistics(*on_device(*cases.make(SHAPE)), track=("hard",), samples=("a", "b"))
    for lost in (s + other, s.over_batch(), pickle.loads(pickle.dumps(s))):
        for call in (LOSS.value, LOSS.term_values):
            with pytest.raises(ValueError, match=r"1 of \d+ voxels have others"):
                call(lost)
    with pytest.raises(ValueError, match="1 of 6006 voxels have others"):
        LOSS.gradient(logits, targets, s)
    with pytest.raises(ValueError, match="1 of 6006 voxels have others"):
        s.jaccard_index()


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


def test_terms_of_invalid_targets_are_nan_by_row_too():
    logits, targets = cases.make((1, 2, 50))
    targets[0, 1, 3] = 7
    loss = LOSS.replace(reduction="none")
    value, _, s = loss.evaluate(*on_device(logits, targets))
    assert np.isnan(host(value)).all()
    assert all(np.isnan(host(term)).all() for term in loss.term_values(s))


# PyTorch


class HostTorchMemory(TorchMemory):
    """PyTorch's memory, on the CPU."""

    def __init__(self) -> None:
        super().__init__(0)
        self._device = torch.device("cpu")

    def stream(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False


@pytest.fixture
def tensors_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Let tensors of the CPU pass for tensors of a GPU."""
    backend = Backend(HostDriver(), HostTorchMemory())
    monkeypatch.setattr(libraries.Torch, "device", lambda self, array, name="": "cuda:0")
    real = dispatch._on_device
    monkeypatch.setattr(
        dispatch,
        "_on_device",
        lambda library, place: backend if library == "torch" else real(library, place),
    )
    return backend


@pytest.mark.parametrize("made_on", [0, 64])
def test_statistics_of_tensors_are_fetched_on_their_stream(made_on, monkeypatch):
    """ExternalStream(0) would be some stream of PyTorch's pool, which waits for nothing."""
    used = []
    memory = HostTorchMemory()
    fake = SimpleNamespace(
        default_stream=lambda device: "default",
        ExternalStream=lambda address, device: address,
        stream=lambda stream: used.append(stream) or contextlib.nullcontext(),
    )
    monkeypatch.setattr(memory, "_torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(memory, "stream", lambda: 128)
    assert memory.to_host(torch.ones(3), made_on).tolist() == [1, 1, 1]
    assert used == [made_on or "default"]
    assert hasattr(torch.cuda, "default_stream") and hasattr(torch.cuda, "ExternalStream")


def test_the_module_is_differentiable(tensors_on_a_device, monkeypatch):
    logits, targets = cases.make(SHAPE)
    expected = LOSS.value_and_grad(logits, targets, grad_scale=3.0)
    x = torch.tensor(logits, requires_grad=True)
    t = torch.tensor(targets)
    monkeypatch.setattr(  # nobody waits for the device
        HostTorchMemory, "to_host", lambda self, array: pytest.fail("copied to the host")
    )
    criterion = fastseg.torch.Loss(LOSS, track=("hard",))
    value = criterion(x, t)
    assert (value.shape, value.dtype) == ((), torch.float32)
    (3.0 * value).backward()
    np.testing.assert_allclose(value.detach().numpy(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), expected[1], rtol=1e-5, atol=1e-9)
    monkeypatch.undo()
    there = criterion.last_statistics
    assert there.jaccard_index() == fs.jaccard_index(logits, targets)


def test_a_scaled_half_gradient_is_rounded_once(tensors_on_a_device):
    logits, targets = cases.make((1, 1, 20_000))
    x = torch.tensor(logits * 3).half().requires_grad_()
    criterion, scale = fastseg.torch.Loss(LOSS), torch.tensor(65536.0)
    (criterion(x, torch.tensor(targets)) * scale).backward()
    assert (x.grad != 0).float().mean() > 0.99


def test_optimisers_of_tensors(tensors_on_a_device):
    theta = torch.zeros(5, requires_grad=True)
    version = theta._version
    opt = fs.Adam([theta], lr=0.5)
    opt.step([torch.ones(5)], grad_scale=torch.tensor(0.5))
    torch.testing.assert_close(theta.detach(), torch.full((5,), -0.5))
    assert theta._version > version
    assert isinstance(opt.state_dict()["exp_avg"][0], np.ndarray)


def test_another_device_is_refused_before_anything_is_launched(tensors_on_a_device, monkeypatch):
    x, t = torch.zeros(1, 1, 5), torch.ones(1, 1, 5, dtype=torch.uint8)
    far = torch.zeros(1, 1, 5)
    monkeypatch.setattr(
        libraries.Torch, "device", lambda self, a, name="": "cpu" if a is far else "cuda:0"
    )
    for call in (
        lambda: LOSS.value_and_grad(x, t, out=far),
        lambda: LOSS.gradient(x, t, LOSS.statistics(x, t), out=far),
    ):
        with pytest.raises(TypeError, match="logits and out must be on one device, got cuda:0 and"):
            call()
    opt = fs.Adam([x])
    with pytest.raises(
        TypeError, match=r"grads\[0\] must be on the device of params, cuda:0, got cpu"
    ):
        opt.step([far])


def test_params_that_moved_to_another_device_are_refused(tensors_on_a_device, monkeypatch):
    theta = torch.zeros(5)
    opt = fs.Adam([theta])
    theta.data = torch.zeros(5)  # as module.cuda() does
    monkeypatch.setattr(libraries.Torch, "device", lambda self, a, name="": "cuda:1")
    with pytest.raises(ValueError, match="params were on cuda:0 and are on cuda:1 now"):
        opt.step([torch.ones(5)])


def test_tensors_of_other_devices_are_refused():
    logits = torch.zeros(1, 1, 3, device="meta")
    with pytest.raises(TypeError, match="logits is on meta: fastseg computes on the CPU and"):
        LOSS(logits, logits)


# What test_gpu.py runs the contract by


def test_the_mirror_keeps_what_it_does_not_write(monkeypatch):
    mirror = MirrorBackend(dispatch._on_device("cupy", "cuda:0"))
    logits, targets = cases.make(SHAPE)
    expected = LOSS.value_and_grad(logits, targets)
    wide = np.full((2, 3, 7, 11, 26), 5.0, np.float32)
    wide[..., ::2] = logits
    params, grads = [np.zeros((3, 2), np.float32), np.zeros(7)], [np.ones((3, 2), "f"), np.ones(7)]
    for module in (fs.losses, updater, fs.functional, fs.metrics):
        monkeypatch.setattr(module, "backend_of", lambda library, array: mirror)
    monkeypatch.setattr(fs.formula, "cpu", lambda: mirror)
    x = wide[..., ::2]
    value, _ = LOSS.value_and_grad(x, targets, out=x)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(x, expected[1], rtol=1e-5, atol=1e-9)
    assert (wide[..., 1::2] == 5.0).all()
    opt = fs.Adam(params, lr=0.5)
    opt.step(grads)
    np.testing.assert_allclose(params[0], -0.5, rtol=1e-6)
    assert opt.state_dict()["exp_avg"][1][0] == pytest.approx(0.1)
    np.testing.assert_allclose(fs.sigmoid(logits[::-1]), 1 / (1 + np.exp(-logits[::-1])), rtol=1e-6)
    assert fs.jaccard_index(targets[:, 0], targets[:, 0]) == 1.0


# An installation that lacks something


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(installation.InstallationError, match="CuPy, which launches") as caught:
        libraries.CUDAArray()
    assert "\n" not in str(caught.value)
    assert "pip install 'cupy-cuda12x[ctk]>=14.2'" in str(caught.value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(installation.InstallationError, match=r"cupy-cuda13x\[ctk\]"):
        installation.cupy_module()


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class DynamicLibNotFoundError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
            "the NVIDIA driver is missing or older",
        ),
        (CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device"), "no NVIDIA GPU is visible"),
        (DynamicLibNotFoundError("Failure finding libnvrtc.so"), "NVRTC, which compiles"),
    ],
)
def test_errors_of_an_installation_are_one_line(monkeypatch, error, line):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cupy.cuda, "Device", fail)
    with pytest.raises(installation.InstallationError, match=line) as caught:
        LOSS(*on_device(*cases.make((1, 1, 3))))
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_no_memory_left_keeps_its_class(monkeypatch):
    x, t = on_device(*cases.make((1, 1, 3)))
    LOSS(x, t)

    def fail(*arguments: object) -> None:
        raise OutOfMemoryError("Out of memory allocating 512 bytes")

    monkeypatch.setattr(cupy, "empty", fail)
    with pytest.raises(OutOfMemoryError) as caught:
        LOSS(x, t)
    (note,) = caught.value.__notes__
    assert note.startswith("fastseg: the device has no memory left") and "pass out=" in note


@pytest.mark.parametrize(
    ("driver", "cupy_found", "hint"),
    [
        (None, None, "computes on the CPU: no NVIDIA driver was found"),
        ("11.8", None, "the NVIDIA driver supports CUDA 11.8 only: update it to one for CUDA 12"),
        ("12.4", None, r"for the GPU: pip install 'cupy-cuda12x\[ctk\]"),
        ("13.1", None, r"for the GPU: pip install 'cupy-cuda13x\[ctk\]"),
        ("14.0", None, r"for the GPU: pip install 'cupy-cuda13x\[ctk\]"),
        ("12.4", ("cupy-cuda13x", "14.2.0"), "the NVIDIA driver is missing or older than the CUDA"),
    ],
)
def test_info_says_what_to_do(monkeypatch, driver, cupy_found, hint):
    def fail() -> int:
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    monkeypatch.setattr(installation, "driver_version", lambda: driver)
    monkeypatch.setattr(installation, "installed_cupy", lambda: cupy_found)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail, raising=False)
    found = info.collect()["gpu"]
    assert re.match(hint, found["hint"]) and "\n" not in found["hint"]


def test_info_names_the_devices(monkeypatch):
    properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0}
    monkeypatch.setattr(installation, "driver_version", lambda: "13.0")
    monkeypatch.setattr(installation, "installed_cupy", lambda: ("cupy-cuda13x", "14.2.0"))
    runtime = cupy.cuda.runtime
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: 1, raising=False)
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda index: properties, raising=False)
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    monkeypatch.setattr(cupy.cuda, "nvrtc", nvrtc, raising=False)
    found = info.collect()["gpu"]
    assert found["devices"] == ["NVIDIA H200, compute capability 9.0"]
    assert found["hint"] == "arrays of CuPy and CUDA tensors are computed on their GPU"
    monkeypatch.setattr(installation, "driver_version", lambda: "12.8")
    assert "by NVRTC 13.0, and the driver supports CUDA 12.8" in info.collect()["gpu"]["hint"]


def test_the_real_cupy_without_a_gpu(monkeypatch):
    """What CuPy raises there is known to the advice; what else it has is what is used of it."""
    monkeypatch.delitem(sys.modules, "cupy")
    real = pytest.importorskip("cupy")
    if real.cuda.is_available():
        pytest.skip("there is a GPU: tests/test_gpu.py")
    forget_libraries()
    with pytest.raises(installation.InstallationError, match="the NVIDIA driver is missing"):
        CuPyDriver(0)
    runtime = real.cuda.runtime
    source = inspect.getsource(real.empty_like)
    assert "subok" in source and "raise TypeError" in source  # which the stand-in does as well
    names = ("eventRecord", "streamWaitEvent", "pointerGetAttributes", "getDevice")
    assert all(hasattr(runtime, name) for name in names)
    for path in (  # what the stand-in takes, CuPy takes
        "ndarray.get", "ndarray.set", "empty", "empty_like", "asarray", "RawModule",
        "RawModule.get_function", "get_default_memory_pool", "cuda.Device", "cuda.Event",
        "cuda.Stream.is_capturing", "cuda.using_allocator", "cuda.get_current_stream",
    ):  # fmt: skip
        theirs, ours = attrgetter(path)(real), attrgetter(path)(cupy)
        if not callable(ours):
            continue
        taken = set(inspect.signature(ours).parameters) - {"self", "index", "array", "values"}
        try:
            known = set(inspect.signature(theirs).parameters)
        except ValueError:  # of Cython, with the signature in its first line
            known = set(re.findall(r"(\w+)(?= *[=,)])", theirs.__doc__.partition("\n")[0]))
        assert taken <= known, (path, taken, known)


def test_other_errors_pass():
    with pytest.raises(KeyError), installation.explained():
        raise KeyError("x")
