"""The benchmarks' other backend: arrays on a GPU, its clock, and its limit.

The limit of a GPU is the time in which it copies as many bytes, half of them read and half written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Call = Callable[[], Any]


@cache
def present() -> bool:
    """Tell whether CuPy and a GPU are there."""
    try:
        import cupy

        return bool(cupy.cuda.is_available())
    except ImportError:
        return False


def to_device(array: np.ndarray) -> Any:
    """Copy an array; NotImplementedError, asv's "skip", where CuPy does not know its dtype."""
    import cupy

    try:
        return cupy.asarray(array)
    except (TypeError, ValueError) as error:
        raise NotImplementedError(f"CuPy has no {array.dtype}") from error


def copy(nbytes: int) -> Call:
    """Return a call that moves so many bytes."""
    import cupy

    source, target = (cupy.ones(nbytes // 2, cupy.uint8) for _ in range(2))
    move, kind = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.memcpyDeviceToDevice
    return lambda: move(
        target.data.ptr, source.data.ptr, nbytes // 2, kind, cupy.cuda.get_current_stream().ptr
    )


def seconds(call: Call) -> float:
    """Return how long the device was at work for a call, by its own clock."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3


def clock() -> float:
    """Return the time, once the device has done what it was given; asv's ``timer``."""
    if present():
        import cupy

        cupy.cuda.Device().synchronize()
    return time.perf_counter()
