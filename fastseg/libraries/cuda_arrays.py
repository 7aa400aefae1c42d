"""Any array with ``__cuda_array_interface__``, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, NamedTuple

import numpy as np

from fastseg.libraries.base import misaligned
from fastseg_kernels.constants import DTYPE_CODES
from fastseg_kernels.views import Layout, View


class _Interface(NamedTuple):
    """What an object says of itself by ``__cuda_array_interface__``."""

    dtype: np.dtype[Any]
    layout: Layout
    address: int
    read_only: bool
    stream: int | None
    mask: Any


def _interface(array: Any, name: str) -> _Interface:
    try:
        said = array.__cuda_array_interface__
        dtype, shape = np.dtype(said["typestr"]), tuple(map(index, said["shape"]))
        address, read_only = said["data"]
        strides = said.get("strides") or _c_strides(shape, dtype.itemsize)
        if len(strides) != len(shape):
            raise ValueError(f"strides {strides} for the shape {shape}")
        layout = Layout(shape, tuple(map(index, strides)), dtype.name)
        stream, mask = said.get("stream"), said.get("mask")
        stream = None if stream is None else index(stream)
        return _Interface(dtype, layout, int(address or 0), bool(read_only), stream, mask)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must have a __cuda_array_interface__ with typestr, shape and data, got "
            f"{type(array).__qualname__} ({type(error).__name__}: {error})"
        ) from error


LEGACY_STREAM = 1
"""What the interface calls the default stream, which has the address 0."""


class CUDAArray:
    """Anything with ``__cuda_array_interface__``, as Numba's device arrays; answers are CuPy's.

    An array that names a stream may still be written to by it, or be used by it afterwards: a call
    is ordered after what the stream was given before, and the stream after the call. While the
    call is recorded into a graph it is not: the stream is not part of that.
    """

    name, allocator = "__cuda_array_interface__", "cupy"
    counts_writes = True

    def __init__(self) -> None:
        from fastseg_kernels.cuda.installation import cupy_module

        self._cupy = cupy_module()

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe an array, and order the current stream after the array's."""
        said = _interface(array, name)
        if said.mask is not None:
            raise TypeError(f"{name} has a mask in its __cuda_array_interface__; pass it as mask=")
        if said.layout.dtype not in DTYPE_CODES or not said.dtype.isnative:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(DTYPE_CODES)} in native byte "
                f"order, got {said.dtype}"
            )
        if writable and said.read_only:
            raise ValueError(f"{name} must be writable, got a read-only array")
        size = said.dtype.itemsize
        if any(number % size for number in (said.address, *said.layout.strides)):
            raise misaligned(name, size)
        self._order(array, said, before=True)
        return View(said.address, said.layout, array)

    def _order(self, array: Any, said: _Interface, *, before: bool) -> None:
        """Let the current stream wait for the array's (``before`` a call), or the other way."""
        if not said.stream or isinstance(array, self._cupy.ndarray):
            return  # CuPy's are on the current stream, whatever they say
        cuda, device = self._cupy.cuda, self._index(said)
        current = cuda.get_current_stream(device)
        named = current.ptr or LEGACY_STREAM
        if named == said.stream or (named != LEGACY_STREAM and current.is_capturing()):
            return
        first, second = (said.stream, current.ptr) if before else (current.ptr, said.stream)
        with cuda.Device(device):  # an event is of the device that is current when it is made
            event = cuda.Event(disable_timing=True)
            cuda.runtime.eventRecord(event.ptr, first)
            cuda.runtime.streamWaitEvent(second, event.ptr)

    def _index(self, said: _Interface) -> int:
        """Ask the driver which device an address is of."""
        if not said.address:  # no elements
            return int(self._cupy.cuda.runtime.getDevice())
        return int(self._cupy.cuda.runtime.pointerGetAttributes(said.address).device)

    def empty_like(self, array: Any) -> Any:
        """Allocate a CuPy array in the same memory order, on the array's device."""
        said = _interface(array, "array")
        shape, strides, dtype = said.layout[:3]
        order = sorted(range(len(shape)), key=lambda axis: -abs(strides[axis]))
        with self._cupy.cuda.Device(self._index(said)):
            plain = self._cupy.empty([shape[axis] for axis in order], dtype)
        return plain.transpose([order.index(axis) for axis in range(len(order))])

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Return a CuPy array."""
        if isinstance(values, self._cupy.ndarray):
            return values.astype(dtype, copy=False)
        with self._cupy.cuda.Device(self._index(_interface(like, "array"))):
            return self._cupy.asarray(values, dtype=dtype)

    def device(self, array: Any, name: str = "array") -> str:
        """Ask the driver."""
        return f"cuda:{self._index(_interface(array, name))}"

    def written(self, arrays: Sequence[Any]) -> None:
        """Order the arrays' streams after the current one."""
        self.used(arrays)

    def used(self, arrays: Iterable[Any]) -> None:
        """Order the arrays' streams after the current one."""
        for array in arrays:
            if array is not None:
                self._order(array, _interface(array, "array"), before=False)


def _c_strides(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    strides = [item]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()
