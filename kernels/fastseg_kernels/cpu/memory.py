"""Memory of the backend's own: the states of optimisers, and what other backends copy."""

from __future__ import annotations

from ctypes import addressof, c_char
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import ITEM_SIZES
from fastseg_kernels.views import View

CACHE_LINE, PAGE = 64, 4096  # bytes


def state_like(param: View, k: int, dtype: str) -> NDArray[Any]:
    """Return zeros for state ``k``, one for each element of ``param``, in memory order.

    bfloat16 numbers, which NumPy does not know, are int16.

    NumPy starts all large arrays 16 bytes into a page. Then every vector store touches two cache
    lines, and reads of one array seem to depend on writes to another that agree in their lowest
    twelve bits. States are aligned to cache lines, and large ones lie a quarter of a page apart
    from the parameter and each other: Adam of 16M float32 8.5 instead of 10.8 ms.
    """
    count = prod(param.shape)
    size = count * ITEM_SIZES[dtype]
    period = PAGE if size >= 16 * PAGE else CACHE_LINE
    memory = np.zeros(size + period, np.uint8)
    wanted = param.address // CACHE_LINE * CACHE_LINE + (k + 1) * PAGE // 4
    offset = (wanted - memory.ctypes.data) % period
    return np.ndarray((count,), "int16" if dtype == "bfloat16" else dtype, memory, offset)


def own_address(array: Any) -> int:
    """Return where a contiguous array of our own lies, in a quarter of ``ctypes.data``'s time."""
    try:
        return addressof(c_char.from_buffer(array))
    except (TypeError, ValueError):  # read-only, empty
        address: int = array.ctypes.data
        return address


def counter(value: int) -> NDArray[np.int64]:
    """Return an array of one number."""
    return np.array([value], np.int64)


def is_recording() -> bool:
    """Return False."""
    return False


def current_stream() -> None:
    """Return None: a call has done its work when it returns."""


def to_host(array: NDArray[Any], stream: None = None) -> NDArray[Any]:
    """Return the array: it is on the host."""
    return array


def from_host(array: NDArray[Any], values: NDArray[Any]) -> None:
    """Write ``values`` to ``array``."""
    array[...] = values
