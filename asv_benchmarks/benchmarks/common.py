"""What the benchmarks share: their arrays, a fair clock, and the machine's limit.

The machine's limit is the time in which the same number of threads moves the same bytes with the
same mix of reads and writes, by kernels that compute next to nothing. Its arrays are as large as
the benchmark's: a volume that fits into the caches is held against the caches, not against memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

import fastseg as fs
from fastseg import clock
from fastseg.clock import Call

from . import device

BACKENDS = ("cpu", "cuda") if device.present() else ("cpu",)
"""The one switch: where there is no GPU, no benchmark knows of one."""

SAMPLES = 2
FOREGROUND = 0.3  # share of the voxels
PERIOD = 2**20  # random numbers before they repeat: drawing 33 million takes a second
PAGE = 4096  # bytes


class Volume(NamedTuple):
    """Arrays of one benchmark, (SAMPLES, 1, size, size, size)."""

    logits: np.ndarray
    targets: np.ndarray
    out: np.ndarray

    @property
    def shape(self) -> str:
        """Return the shape as tables show it."""
        return "x".join(map(str, self.logits.shape))


def dtype_of(name: str) -> np.dtype:
    """Return the NumPy dtype; NotImplementedError, asv's "skip", where its package is absent."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise NotImplementedError("bfloat16 needs ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


@cache
def volume(dtype: str, size: int, targets: str) -> Volume:
    """Make the arrays of a benchmark, every page of them written to."""
    rng = np.random.default_rng(0)
    shape = (SAMPLES, 1, size, size, size)
    logits = np.resize(rng.standard_normal(PERIOD, np.float32), shape).astype(dtype_of(dtype))
    labels = np.resize(rng.random(PERIOD) < FOREGROUND, shape).astype(dtype_of(targets))
    return Volume(logits, labels, np.ones_like(logits))


@cache
def classes(count: int, size: int) -> Volume:
    """Make logits (1, count, size, size, size), and the class of each voxel."""
    rng = np.random.default_rng(0)
    shape = (1, count, size, size, size)
    logits = np.resize(rng.standard_normal(PERIOD, np.float32), shape)
    labels = np.resize(rng.integers(0, count, PERIOD), (1, *shape[2:])).astype(np.uint8)
    return Volume(logits, labels, np.ones_like(logits))


def placed(arrays: Volume, backend: str) -> Volume:
    """Return the arrays where a backend computes."""
    return arrays if backend == "cpu" else Volume(*map(device.to_device, arrays))


# The clock


STOPWATCHES: dict[str, Callable[[Call], float]] = {
    "cpu": clock.wall_seconds,
    "cuda": device.seconds,
}


def interleaved(
    calls: dict[str, Call], rounds: int, turn: float = 0.03, backend: str = "cpu"
) -> dict[str, float]:
    """Return the median seconds of each call, in turns, by the backend's own clock."""
    return clock.interleaved(calls, rounds, turn, STOPWATCHES[backend])


def over(call: Call, baseline: Call, rounds: int = 7, backend: str = "cpu") -> float:
    """Return the time of a call over that of a baseline."""
    times = interleaved({"call": call, "baseline": baseline}, rounds, backend=backend)
    return times["call"] / times["baseline"]


# The machine's limit


@njit
def _sum(words):
    total = 0
    for i in range(words.size):
        total += words[i]
    return total


@njit
def _copy(words, added, out):
    for i in range(words.size):
        out[i] = words[i] + added


@njit
def _descent(theta, g):
    for i in range(theta.size):
        theta[i] += g[i]


@njit
def _momentum(theta, g, v):
    for i in range(theta.size):
        v[i] += g[i]
        theta[i] += v[i]


@njit
def _adam(theta, g, m, v):
    for i in range(theta.size):
        m[i] += g[i]
        v[i] -= g[i]
        theta[i] += m[i] ^ v[i]


@njit
def _part(words, part, parts):
    return words[part * words.size // parts : (part + 1) * words.size // parts]


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop over parts, for several threads and for one; the last argument says which."""
    shared, alone = njit(parallel=True)(function), njit(function)  # alone, prange is range

    def call(*arguments: Any) -> None:
        (alone if arguments[-1] == 1 else shared)(*arguments)

    return call


@_shared
def _read_two(first, second, sums, parts):
    for part in prange(parts):
        sums[part] = _sum(_part(first, part, parts)) + _sum(_part(second, part, parts))


@_shared
def _read_two_write_one(first, second, out, parts):
    for part in prange(parts):
        added = _sum(_part(second, part, parts))
        _copy(_part(first, part, parts), added, _part(out, part, parts))


@_shared
def _update(arrays, parts):
    for part in prange(parts):
        theta, g = _part(arrays[0], part, parts), _part(arrays[1], part, parts)
        if len(arrays) == 2:
            _descent(theta, g)
        elif len(arrays) == 3:
            _momentum(theta, g, _part(arrays[2], part, parts))
        else:
            _adam(theta, g, _part(arrays[2], part, parts), _part(arrays[3], part, parts))


def words(size: int, place: int) -> np.ndarray:
    """Return ``size`` bytes as int64, a multiple of a quarter page from a page's start.

    Arrays that all start at one place in a page slow each other down, which no limit should.
    """
    memory = np.empty(size + PAGE, np.uint8)
    start = (place * PAGE // 4 - memory.ctypes.data) % PAGE
    array = memory[start : start + size // 8 * 8].view(np.int64)
    array[:] = np.arange(array.size)
    return array


def _start_pool() -> None:
    """Let fastseg start Numba's threads: it leaves a pool alone that others have started."""
    loss = fs.BCE()
    arrays = volume("float32", 64, "uint8")
    loss.statistics(arrays.logits, arrays.targets)


def statistics_limit(arrays: Volume) -> Call:
    """Return a call that reads as many bytes as the statistics do."""
    _start_pool()
    first, second = words(arrays.logits.nbytes, 0), words(arrays.targets.nbytes, 1)
    threads = fs.get_num_threads()
    sums = np.zeros(threads, np.int64)
    return _compiled(lambda: _read_two(first, second, sums, threads))


def gradient_limit(arrays: Volume) -> Call:
    """Return a call that reads and writes as many bytes as the gradient does."""
    _start_pool()
    first, second = words(arrays.logits.nbytes, 0), words(arrays.targets.nbytes, 1)
    out, threads = words(arrays.out.nbytes, 2), fs.get_num_threads()
    return _compiled(lambda: _read_two_write_one(first, second, out, threads))


def value_and_grad_limit(arrays: Volume) -> Call:
    """Return a call that moves the bytes of both passes, one after the other."""
    return limit_of(*(words(array.nbytes, k) for k, array in enumerate(arrays)))


def limit_of(logits: np.ndarray, targets: np.ndarray, out: np.ndarray) -> Call:
    """Return as `value_and_grad_limit`, over the arrays themselves: what is in ``out`` is lost."""
    _start_pool()
    first, second, third = (
        np.frombuffer(array, np.int64, array.nbytes // 8) for array in (logits, targets, out)
    )
    threads = fs.get_num_threads()
    sums = np.zeros(threads, np.int64)

    def move() -> None:
        _read_two(first, second, sums, threads)
        _read_two_write_one(first, second, third, threads)

    return _compiled(move)


def update_limit(nbytes: int, arrays: int) -> Call:
    """Return a call that reads ``arrays`` arrays of ``nbytes`` and writes all but the second."""
    _start_pool()
    memory = tuple(words(nbytes, k) for k in range(arrays))
    threads = fs.get_num_threads()
    return _compiled(lambda: _update(memory, threads))


def _compiled(call: Call) -> Call:
    call()
    return call
