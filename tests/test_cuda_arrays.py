"""Arrays of a GPU through the public face: CuPy's and Numba's, without a GPU.

hostcuda/cupy.py stands for CuPy. The kernels have their tests in test_cuda_contract.py: here it is
what stands around them, who allocates, what waits, and where answers are.
"""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import cases
import fastseg as fs
import fastseg.torch
from cuda_device import LOSS, SHAPE, Foreign, close, host, on_device
from fastseg import dispatch, updater
from fastseg_kernels.cuda import job
from gpu_mirror import MirrorBackend
from hostcuda import cupy
from stand_in import forget_libraries

pytestmark = pytest.mark.usefixtures("cupy_stand_in")


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


def test_terms_of_invalid_targets_are_nan_by_row_too():
    logits, targets = cases.make((1, 2, 50))
    targets[0, 1, 3] = 7
    loss = LOSS.replace(reduction="none")
    value, _, s = loss.evaluate(*on_device(logits, targets))
    assert np.isnan(host(value)).all()
    assert all(np.isnan(host(term)).all() for term in loss.term_values(s))


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
