"""What only a GPU can show: `pytest -m gpu`, on a machine that has one, with CuPy and PyTorch.

The contract's rows run on the device as they are (gpu_mirror.py). The rest is about what the
stand-ins of the other tests do not have: streams, graphs, memory, sizes, devices, approximations.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cases
import fastseg as fs
import fastseg.formula
import fastseg.functional
import fastseg.info
import fastseg.losses
import fastseg.metrics
import fastseg.updater
from cuda_rows import *  # noqa: F403
from fastseg_kernels.cuda import Backend, backend
from fastseg_kernels.cuda.modules import THREADS, text
from gpu_mirror import MirrorBackend

pytestmark = pytest.mark.gpu
LOSS = fs.BCE() + 2.0 * fs.SoftJaccard()
SHAPE = (2, 3, 7, 11, 13)
PLACES = (fastseg.losses, fastseg.functional, fastseg.metrics, fastseg.updater)


@pytest.fixture(scope="session")
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


@pytest.fixture(scope="session")
def device(cupy: Any) -> Backend:
    return backend("cupy", 0)


@pytest.fixture(autouse=True)
def rows_run_on_the_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cupy: Any
) -> None:
    """Let the contract's tests, which are of other modules, compute on the GPU."""
    if request.function.__module__.endswith("test_gpu"):
        return
    mirror = MirrorBackend(request.getfixturevalue("device"))
    for module in PLACES:
        monkeypatch.setattr(module, "backend_of", lambda library, array: mirror)
    monkeypatch.setattr(fastseg.formula, "cpu", lambda: mirror)


def check(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Compare value and gradient, arrays of any library."""
    value, grad = (a.get() if hasattr(a, "get") else a.float().cpu().numpy() for a in got)
    np.testing.assert_allclose(value, np.asarray(expected[0]), rtol=2e-6)
    np.testing.assert_allclose(grad, np.asarray(expected[1]), rtol=1e-5, atol=1e-9)


# The device's own numbers


ERRORS = r"""
extern "C" __global__ void apply(int which, const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = x[i];
  y[i] = which == 0 ? exp_negative(v) : which == 1 ? quick_exp_negative(v)
       : which == 2 ? reciprocal(v) : newton_reciprocal(v);
}
"""


@pytest.mark.parametrize(
    ("which", "name", "low", "high", "most"),
    [
        (0, "exp_negative", 2.0**-30, 87.0, 0.9),
        (1, "quick_exp_negative", 2.0**-30, 16.0, 3.3),
        (2, "reciprocal", 1.0, 2.0, 1.0),
        (3, "newton_reciprocal", 1.0, 2.0, 0.51),
    ],
)
def test_elementary_functions_err_as_their_comments_say(
    cupy, record_property, which, name, low, high, most
):
    """Every 16th float of the range; the error is in units in the last place."""
    module = cupy.RawModule(code=text("elementary.cuh") + ERRORS, options=("--std=c++17",))
    kernel = module.get_function("apply")
    first, last = np.array([low, high], np.float32).view(np.int32)
    worst = 0.0
    for start in range(first, last + 1, 2**28):
        bits = np.arange(start, min(last + 1, start + 2**28), 16, dtype=np.int32)
        x = cupy.asarray(bits.view(np.float32))
        y = cupy.empty_like(x)
        grid = (-(-x.size // THREADS),)
        kernel(grid, (THREADS,), (np.int32(which), x, y, np.int32(x.size)))
        wide = bits.view(np.float32).astype(np.float64)
        exact = np.exp(-wide) if which < 2 else 1.0 / wide
        spacing = np.exp2(np.floor(np.log2(exact)) - 23)
        worst = max(worst, float(np.abs((y.get() - exact) / spacing).max()))
    record_property(name, worst)
    print(f"{name}: {worst:.2f} ulp")
    assert worst <= most


# Libraries


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_cupy(cupy, dtype):
    logits, targets = cases.make(SHAPE, dtype)
    expected = LOSS.value_and_grad(logits.astype(np.float64), targets)
    x, t = cupy.asarray(logits), cupy.asarray(targets)
    value, grad, s = LOSS.evaluate(x, t, track=("hard",))
    assert grad.dtype == logits.dtype and isinstance(value, cupy.ndarray)
    if dtype != "float16":
        check((value, grad), expected)
    assert s.jaccard_index() == fs.jaccard_index(logits, targets)


def test_the_installation_is_whole():
    """Where not, the sentence says what to do, and explains what else fails here."""
    hint = fastseg.info.collect()["gpu"]["hint"]
    assert hint == "arrays of CuPy and CUDA tensors are computed on their GPU"


def test_invalid_targets_are_nan(cupy):
    logits, targets = cases.make(SHAPE)
    targets[1, 2, 3, 4, 5] = 7
    value, grad, s = LOSS.evaluate(cupy.asarray(logits), cupy.asarray(targets))
    assert np.isnan(float(value)) and bool(cupy.isnan(grad).all())
    with pytest.raises(ValueError, match="1 of 6006 voxels"):
        s.check()


def test_torch_and_its_autograd(torch):
    import fastseg.torch

    logits, targets = cases.make(SHAPE)
    expected = LOSS.value_and_grad(logits, targets, grad_scale=3.0)
    x, t = torch.tensor(logits, device="cuda", requires_grad=True), torch.tensor(targets).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = fastseg.torch.Loss(LOSS)(x, t)
        (3.0 * value).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check((value.detach(), x.grad), expected)


def test_mixed_precision_with_a_scaler(torch):
    import fastseg.torch

    torch.manual_seed(0)
    net = torch.nn.Conv3d(1, 1, 3, padding=1).cuda()
    x = torch.randn(2, 1, 32, 32, 32, device="cuda")
    t = (torch.rand_like(x) < 0.3).to(torch.uint8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler, criterion = torch.amp.GradScaler("cuda"), fastseg.torch.Loss(LOSS)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            logits = net(x)
            value = criterion(logits, t)
        assert (logits.dtype, value.dtype) == (torch.float16, torch.float32)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_numba_device_arrays():
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("Numba does not find CUDA")
    logits, targets = cases.make(SHAPE)
    check(
        LOSS.value_and_grad(cuda.to_device(logits), cuda.to_device(targets)),
        LOSS.value_and_grad(logits, targets),
    )


@pytest.mark.parametrize("rule", [fs.GradientDescent, fs.Momentum, fs.Adam])
def test_optimisers(cupy, rule):
    rng = np.random.default_rng(0)
    params = [rng.normal(size=n).astype(np.float32) for n in (1, 4099, 100_003)]
    theirs = [cupy.asarray(param) for param in params]
    mine, other = rule(params, lr=0.1), rule(theirs, lr=0.1)
    for _ in range(3):
        grads = [rng.normal(size=p.shape).astype(np.float32) for p in params]
        mine.step(grads, grad_scale=0.5)
        other.step([cupy.asarray(g) for g in grads], grad_scale=cupy.asarray(np.float32(0.5)))
    for a, b in zip(params, theirs, strict=True):
        np.testing.assert_allclose(b.get(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_options_of_a_step(cupy, dtype, state_dtype):
    rng = np.random.default_rng(0)
    params = [rng.normal(size=n).astype(dtype) for n in (1, 4099, 100_003)]
    theirs = [cupy.asarray(param) for param in params]
    options = {"lr": 0.1, "amsgrad": True, "state_dtype": state_dtype}
    mine, other = fs.Adam(params, **options), fs.Adam(theirs, **options)
    for k in range(4):
        grads = [rng.normal(size=p.shape).astype(dtype) for p in params]
        if k == 1:
            grads[1][7] = np.nan
        there = [cupy.asarray(g) for g in grads]
        if k != 1:
            np.testing.assert_allclose(float(other.grad_norm(there)), mine.grad_norm(grads), 1e-12)
        for opt, of in ((mine, grads), (other, there)):
            opt.step(of, max_norm=1.0, skip_non_finite=True, zero_grads=True)
        assert not any(g.any() for g in there)
    assert other.step_count == mine.step_count == 3
    for a, b in zip(params, theirs, strict=True):
        np.testing.assert_allclose(b.get(), a, rtol=2e-3, atol=1e-3)
    again = fs.Adam(params, **options)
    again.load_state_dict(other.state_dict())
    assert again.step_count == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_optimisers_of_torch(torch, dtype):
    import fastseg.torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    values = [torch.randn(shape, device="cuda") for shape in ((3, 5), (4099,), (64, 33, 3, 3))]
    params = [torch.nn.Parameter(value.to(kind)) for value in values]
    wide = [torch.nn.Parameter(param.detach().float()) for param in params]
    opt = fastseg.torch.AdamW(params, lr=0.01, max_norm=1.0, zero_grads=True)
    peer = torch.optim.AdamW(wide, lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for step in range(5):
        with torch.autocast("cuda", enabled=False):
            loss = sum(
                (param.float() * value).square().sum()
                for param, value in zip(params, values, strict=True)
            )
        scaler.scale(loss).backward()
        if step == 2:
            params[1].grad[5] = float("inf")
        else:
            for p, q in zip(params, wide, strict=True):
                q.grad = p.grad.float() / 1024.0
            torch.nn.utils.clip_grad_norm_(wide, 1.0)
            peer.step()
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update(scale)
        assert not any(p.grad.any() for p in params)
    for p, q in zip(params, wide, strict=True):
        torch.testing.assert_close(opt.state[p].get("master_param", p.detach()), q.detach())
    assert int(opt.state_dict()["state"][0]["step"]) == 4
    torch.optim.AdamW(wide).load_state_dict(opt.state_dict())


def test_a_step_of_torch_in_a_graph(torch):
    import fastseg.torch

    param, other = (torch.nn.Parameter(torch.ones(1000, device="cuda")) for _ in range(2))
    grad = torch.randn(1000, device="cuda")
    param.grad, other.grad = grad.clone(), grad.clone()
    opt, peer = fastseg.torch.Adam([param], max_norm=1.0), torch.optim.Adam([other])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        opt.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(3):
        graph.replay()
    torch.nn.utils.clip_grad_norm_([other], 1.0)
    for _ in range(4):
        peer.step()
    torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    assert int(opt.state[param]["step"]) == 4


# Streams, graphs, memory


def test_a_call_is_ordered_by_its_stream(cupy):
    """Inputs are made by slow work on a stream; the call must come after it, and before its use."""
    logits, targets = cases.make((1, 1, 256, 64, 64))
    expected = LOSS.value_and_grad(logits, targets)
    x, t = cupy.asarray(logits), cupy.asarray(targets)
    busy = cupy.random.rand(4096, 4096, dtype=np.float32)
    LOSS.value_and_grad(x, t)
    cupy.cuda.Device().synchronize()
    for _ in range(3):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            late = cupy.zeros_like(x)
            for _ in range(10):
                busy @ busy
            late += x
            value, grad = LOSS.value_and_grad(late, t)
            late[...] = 0
            got = value.copy(), grad.copy()
            stream.synchronize()
        check(got, expected)


def test_statistics_are_fetched_on_the_stream_that_made_them(cupy, torch):
    """While that stream is still busy, and another one, which does not wait for it, is current."""
    logits, targets = cases.make((1, 1, 64, 64, 64))
    expected = LOSS.statistics(logits, targets).array
    for streams, arrays, module in (
        ([cupy.cuda.Stream(non_blocking=True) for _ in range(2)], cupy.asarray, cupy),
        ([torch.cuda.Stream() for _ in range(2)], lambda a: torch.tensor(a).cuda(), torch),
    ):
        use = (lambda s: s) if module is cupy else torch.cuda.stream
        x, t = arrays(logits), arrays(targets)
        busy = arrays(np.zeros((4096, 4096), np.float32))
        LOSS.statistics(x, t).check()
        cupy.cuda.runtime.deviceSynchronize()
        with use(streams[0]):
            for _ in range(20):
                busy @ busy
            s = LOSS.statistics(x, t)
        with use(streams[1]):
            np.testing.assert_allclose(s.array, expected, rtol=1e-6)


def test_threads_with_streams_of_their_own(cupy):
    logits, targets = cases.make((2, 1, 64, 64, 64))
    expected = LOSS.value_and_grad(logits, targets)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                x, t = cupy.asarray(logits), cupy.asarray(targets)
                for _ in range(20):
                    got = LOSS.value_and_grad(x, t)
                    stream.synchronize()
                    check(got, expected)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_a_recorded_call_is_replayed_on_new_data(cupy):
    logits, targets = cases.make((2, 1, 32, 33, 34))
    x, t = cupy.asarray(logits), cupy.asarray(targets)
    out = cupy.empty_like(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        LOSS.value_and_grad(x, t, out=out)
        stream.synchronize()
        stream.begin_capture()
        value, _ = LOSS.value_and_grad(x, t, out=out)
        graph = stream.end_capture()
    for seed in (1, 2):
        logits, targets = cases.make((2, 1, 32, 33, 34), seed=seed)
        with stream:
            x.set(logits)
            t.set(targets)
            graph.launch()
            for _ in range(5):  # eager calls must not take the graph's memory
                LOSS.value_and_grad(cupy.zeros_like(x), t)
            graph.launch()
            stream.synchronize()
        check((value, out), LOSS.value_and_grad(logits, targets))


def test_a_recorded_step_counts_on(cupy):
    grad = cupy.ones(1000, np.float32)
    mine, theirs = cupy.zeros(1000, np.float32), np.zeros(1000, np.float32)
    opt, other = fs.Adam(mine, lr=0.1, capturable=True), fs.Adam(theirs, lr=0.1)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        opt.step(grad)
        stream.begin_capture()
        opt.step(grad)
        graph = stream.end_capture()
        for _ in range(4):
            graph.launch()
        stream.synchronize()
        assert opt.step_count == 5
    for _ in range(5):
        other.step(np.ones(1000, np.float32))
    np.testing.assert_allclose(mine.get(), theirs, rtol=1e-5)


def test_a_pytorch_graph(torch):
    logits, targets = cases.make((2, 1, 32, 33, 34))
    x, t = torch.tensor(logits).cuda(), torch.tensor(targets).cuda()
    out = torch.empty_like(x)
    LOSS.value_and_grad(x, t, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, _ = LOSS.value_and_grad(x, t, out=out)
    for seed in (1, 2):
        logits, targets = cases.make((2, 1, 32, 33, 34), seed=seed)
        x.copy_(torch.tensor(logits))
        t.copy_(torch.tensor(targets))
        graph.replay()
        torch.cuda.synchronize()
        check((value, out), LOSS.value_and_grad(logits, targets))


def test_memory_beside_the_gradient_is_small(torch):
    x = torch.randn(2, 1, 256, 256, 256, device="cuda")
    t = (torch.rand_like(x) < 0.3).to(torch.uint8)
    out = torch.empty_like(x)
    LOSS.value_and_grad(x, t, out=out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    LOSS.value_and_grad(x, t, out=out)
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_bits_depend_on_no_grid(cupy, device, monkeypatch):
    logits, targets = cases.make((2, 2, 300_007))
    x, t = cupy.asarray(logits), cupy.asarray(targets)
    answers = set()
    for processors in (1, 7, device.driver.multiprocessors):
        monkeypatch.setattr(
            fastseg.dispatch._on_device("cupy", "cuda:0").driver, "multiprocessors", processors
        )
        for _ in range(3):
            value, grad, s = LOSS.evaluate(x, t)
            answers.add((float(value), grad.get().tobytes(), s.array.tobytes()))
    assert len(answers) == 1


def test_more_than_2_to_the_31_voxels(torch):
    """A row whose voxels, and bytes, do not fit 32 bits; and one of more than 2^32 voxels."""
    for voxels in (2**31 + 4097, 2**32 + 4097):
        need = voxels * (2 + 1 + 2)
        if torch.cuda.mem_get_info()[0] < need + 2**30:
            pytest.skip(f"needs {need >> 30} GiB of device memory")
        x = torch.full((1, 1, voxels), -20.0, dtype=torch.bfloat16, device="cuda")
        t = torch.zeros((1, 1, voxels), dtype=torch.uint8, device="cuda")
        for end in (0, -1):
            x[..., end], t[..., end] = 20.0, 1
        loss = fs.BCE(normalize=None) + fs.SoftJaccard()
        _, grad, s = loss.evaluate(x, t, track=("hard",))
        assert s["targets_sum"][0, 0] == 2 and s["count"][0, 0] == voxels
        assert s.counts()["tp"][0, 0] == 2 and s.counts()["tn"][0, 0] == voxels - 2
        assert float(grad[0, 0, -1]) == float(grad[0, 0, 0]) < 0 < float(grad[0, 0, voxels // 2])
        del x, t, grad


def test_two_devices(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    logits, targets = cases.make(SHAPE)
    expected = LOSS.value_and_grad(logits, targets)
    with cupy.cuda.Device(1):
        x, t = cupy.asarray(logits), cupy.asarray(targets)
    value, grad = LOSS.value_and_grad(x, t)  # while the other device is current
    assert value.device.id == grad.device.id == 1
    check((value, grad), expected)
    with pytest.raises(TypeError, match="one device, got cuda:1 and cuda:0"):
        LOSS(x, cupy.asarray(targets))


# Under NVIDIA's checker

PROGRAM = """
import cupy, numpy as np, fastseg as fs
loss = fs.BCE() + fs.SoftJaccard()
for shape in ((1, 1, 1), (2, 3, 5, 7), (1, 2, 40_001)):
    rng = np.random.default_rng(0)
    x = cupy.asarray(rng.standard_normal(shape).astype(np.float32))
    t = cupy.asarray((rng.random(shape) < 0.3).astype(np.uint8))
    loss.value_and_grad(x, t)
    loss.value_and_grad(x, t, mask=t == t)
    if shape[1] > 1:
        (fs.CrossEntropy() + fs.SoftJaccard()).value_and_grad(x, t[:, 0])
    fs.sigmoid(x[..., ::2])
    fs.jaccard_index(t[:, 0], t[:, 0], empty=1.0)
    fs.Adam([x]).step([cupy.ones_like(x)], zero_grads=True)
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    path = ":".join(entry for entry in sys.path if entry)
    command = [checker, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent
    )
    if "done" not in done.stdout and "not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
