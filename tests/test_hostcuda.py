"""The harness that runs CUDA text on the CPU finds what it is there to find: planted bugs.

Each bug is a macro of one small kernel, absent in the right one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hostcuda

TESTS = Path(__file__).parent
KERNELS = r"""
// Sums n floats by blocks of BLOCK threads; the block that comes last adds the parts up.
template <int BLOCK>
__global__ void total(const float* x, long long n, float* parts, unsigned* ticket, float* out) {
  __shared__ float buffer[BLOCK];
  __shared__ bool last;
  float sum = 0;
  for (long long i = blockIdx.x * BLOCK + threadIdx.x; i < n; i += gridDim.x * BLOCK) sum += x[i];
#ifdef PLANT_UNINITIALISED
  if (threadIdx.x != 3)
#endif
  buffer[threadIdx.x] = sum;
#ifdef PLANT_DIVERGENT_BARRIER
  if (threadIdx.x < 7) __syncthreads(); else
#endif
  __syncthreads();
  for (int half = BLOCK / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) buffer[threadIdx.x] += buffer[threadIdx.x + half];
#ifndef PLANT_NO_BARRIER
    __syncthreads();
#endif
  }
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = buffer[0];
#ifndef PLANT_NO_FENCE
    __threadfence();
#endif
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
#ifdef PLANT_RETURN_BEFORE_SHUFFLE
  if (threadIdx.x == 5) return;
  __shfl_xor_sync(0xffffffffu, 1, 1);
#endif
#ifdef PLANT_WRONG_MASK
  __shfl_xor_sync(0x0000000fu, 1, 1);
#endif
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  float all = 0;
  for (unsigned k = 0; k < gridDim.x; ++k) all += __ldcg(parts + k);
#ifdef PLANT_OUT_OF_BOUNDS
  parts[gridDim.x] = 0;
#endif
#ifdef PLANT_SHARED_OUT_OF_BOUNDS
  buffer[BLOCK + int(n & 1)] = 0;
#endif
  *out = all;
}

// Copies n floats, four at a time.
__global__ void copy(const float* x, long long n, float* out) {
#ifdef PLANT_MISALIGNED
  x += 1;
#endif
  const long long i = threadIdx.x;
  if (4 * i + 4 > n) return;
  reinterpret_cast<float4*>(out)[i] = __ldcs(reinterpret_cast<const float4*>(x) + i);
}

// What every lane gets of the warp.
__global__ void warp(int* sum, unsigned* votes, int* first, float* down) {
  int v = threadIdx.x;
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
  sum[threadIdx.x] = v;
  votes[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
  first[threadIdx.x] = __shfl_sync(0xffffffffu, int(threadIdx.x), 0);
  down[threadIdx.x] = __shfl_down_sync(0xffffffffu, float(threadIdx.x), 8);
}
"""
BLOCKS, BLOCK = 5, 64

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and os.environ.get("CI") is None,
    reason="the CUDA kernels are run on the CPU by g++, which is not installed",
)


def module(*defines: str) -> hostcuda.RawModule:
    options = ("--std=c++17", *(f"-D{name}" for name in defines))
    names = (f"total<{BLOCK}>", "copy", "warp")
    return hostcuda.RawModule(code=KERNELS, options=options, name_expressions=names)


def run_total(kernels: hostcuda.RawModule, n: int = 4099) -> float:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, n).astype(np.float32)  # sums are exact
    parts, ticket, out = (
        np.empty(BLOCKS, np.float32),
        np.zeros(1, np.uint32),
        np.empty(1, np.float32),
    )
    kernel = kernels.get_function(f"total<{BLOCK}>")
    for _ in range(2):  # the ticket is ready again
        out[0] = np.nan
        kernel((BLOCKS,), (BLOCK,), (x, n, parts, ticket, out))
    return float(out[0] - x.sum())


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("order", ["0", "1", "2", "77"])
def test_right_kernel_is_right_in_any_order(monkeypatch, order, workers):
    monkeypatch.setenv("HOSTCUDA_ORDER", order)
    monkeypatch.setenv("HOSTCUDA_WORKERS", workers)
    assert run_total(module()) == 0.0


def test_warp_operations():
    threads = np.arange(70)
    arrays = [np.zeros(64, dtype) for dtype in (np.int32, np.uint32, np.int32, np.float32)]
    module().get_function("warp")((1,), (64,), tuple(arrays))
    total, votes, first, down = arrays
    np.testing.assert_array_equal(
        total, np.repeat([np.arange(32).sum(), np.arange(32, 64).sum()], 32)
    )
    expected = [sum(1 << k for k in range(32) if (32 * w + k) % 3 == 0) for w in range(2)]
    np.testing.assert_array_equal(votes, np.repeat(expected, 32))
    np.testing.assert_array_equal(first, np.repeat([0, 32], 32))
    lane = threads[:64] % 32
    np.testing.assert_array_equal(down, threads[:64] + np.where(lane < 24, 8, 0))


@pytest.mark.parametrize("order", ["0", "2"])
def test_missing_barrier_gives_a_wrong_answer(monkeypatch, order):
    monkeypatch.setenv("HOSTCUDA_ORDER", order)
    assert run_total(module("PLANT_NO_BARRIER")) != 0.0


def test_shared_memory_is_nan_until_it_is_written():
    assert np.isnan(run_total(module("PLANT_UNINITIALISED")))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (
            "PLANT_DIVERGENT_BARRIER",
            r"block \(0, 0\) thread 0 in __syncthreads .*; block .* thread 7",
        ),
        (
            "PLANT_RETURN_BEFORE_SHUFFLE",
            r"thread 0 in __shfl_xor_sync .* 1 of 64 threads have returned",
        ),
        ("PLANT_WRONG_MASK", r"thread 4 in __shfl_xor_sync at .* is not in its own mask"),
    ],
)
def test_threads_that_wait_for_nobody_are_named(plant, message):
    with pytest.raises(hostcuda.HostCudaError, match=message):
        run_total(module(plant))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.zeros(4, np.float64), 4, np.zeros(4, np.float32)), "argument 0 is float64, not Pf4"),
        (
            (np.zeros(4, np.float32), np.int32(4), np.zeros(4, np.float32)),
            "argument 1 is int32, not i8",
        ),
        ((np.zeros(4, np.float32), 4.0, np.zeros(4, np.float32)), "argument 1 is float64, not i8"),
        ((np.zeros(4, np.float32), 4, None), "argument 2 is NoneType, not Pf4"),
    ],
)
def test_arguments_have_the_parameter_s_type(args, message):
    with pytest.raises(TypeError, match=message):
        module().get_function("copy")((1,), (32,), args)


def test_launches_that_no_device_takes_are_refused():
    kernel, x = module().get_function("copy"), np.zeros(4, np.float32)
    for grid, block in (((0,), (32,)), ((1,), (2048,)), ((1, 70000), (32,))):
        with pytest.raises(hostcuda.HostCudaError, match="no device takes"):
            kernel(grid, block, (x, 4, x))
    with pytest.raises(hostcuda.HostCudaError, match="has 3 parameters, got 2"):
        kernel((1,), (32,), (x, 4))


def test_text_that_does_not_compile_says_why():
    bad = hostcuda.RawModule(code="__global__ void f() { nonsense(); }", name_expressions=("f",))
    with pytest.raises(hostcuda.HostCudaError, match=r"nonsense.* was not declared"):
        bad.compile()


# Under the sanitizers, each in a process of its own: they must be loaded before Python is.

LIBRARIES = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
PROGRAM = """
import sys
import numpy as np
import test_hostcuda as t
kernels = t.module(*sys.argv[1:])
assert t.run_total(kernels, 500) == 0.0
x = np.arange(65, dtype=np.float32)
kernels.get_function("copy")((1,), (16,), (x, 64, np.empty(64, np.float32)))
print("clean")
"""


def sanitized(
    sanitize: str, *arguments: str, program: str = PROGRAM
) -> subprocess.CompletedProcess[str]:
    """Run a program with every kernel under a sanitizer."""
    find = ["g++", "-print-file-name="]
    preload = [
        subprocess.run([find[0], find[1] + name], capture_output=True, text=True, check=True).stdout
        for name in LIBRARIES[sanitize]
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(line.strip() for line in preload),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent, TESTS.parent / "kernels"))),
        "OPENBLAS_NUM_THREADS": "1",
        "HOSTCUDA_SANITIZE": sanitize,
        "HOSTCUDA_WORKERS": str(BLOCKS),  # no block then runs after another one
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1,exitcode=66",
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("sanitize", LIBRARIES)
def test_sanitizers_find_nothing_in_the_right_kernel(sanitize):
    done = sanitized(sanitize)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-3000:]


@pytest.mark.parametrize(
    ("sanitize", "plant", "finding"),
    [
        ("address,undefined", "PLANT_OUT_OF_BOUNDS", "heap-buffer-overflow"),
        ("address,undefined", "PLANT_SHARED_OUT_OF_BOUNDS", "out of bounds|overflow"),
        ("address,undefined", "PLANT_MISALIGNED", "misaligned address"),
        ("thread", "PLANT_NO_BARRIER", "data race"),
        ("thread", "PLANT_NO_FENCE", "data race"),
    ],
)
def test_sanitizers_find_planted_bugs(sanitize, plant, finding):
    done = sanitized(sanitize, plant)
    assert done.returncode != 0
    assert re.search(finding, done.stderr), done.stderr[-3000:]
