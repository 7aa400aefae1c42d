"""A stand-in for CuPy, as far as fastseg uses it: NumPy's memory, kernels run on the CPU.

`events` lists what would make the host wait, or order one stream after another: ("get", shape,
stream) for a copy to the host, ("record", stream) and ("wait", stream) for events.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from hostcuda.module import RawModule

__all__ = ["RawModule", "asarray", "cuda", "empty", "empty_like", "events", "ndarray"]

events: list[tuple[Any, ...]] = []


class ndarray(np.ndarray):  # noqa: N801
    """A device's array: what reads it on the host without `get` is a mistake that is not found."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0)

    @property
    def device(self) -> Any:
        return Device(0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data, typestr = (self.ctypes.data, False), self.dtype.str
        return {
            "shape": self.shape,
            "strides": self.strides,
            "data": data,
            "typestr": typestr,
            "stream": current.ptr or 1,  # as CuPy names the default stream
        }

    def get(self, stream: Any = None) -> np.ndarray:
        events.append(("get", self.shape, (stream or current).ptr))
        return np.array(self.view(np.ndarray))

    def set(self, values: np.ndarray, stream: Any = None) -> None:
        self[...] = values

    def __array_finalize__(self, other: Any) -> None:
        """Do nothing: there is no state."""

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(super().__getitem__(index)).view(ndarray)


ndarray.__module__ = "cupy"


def empty(shape: Any, dtype: Any = float) -> ndarray:
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xFF
    return array.view(ndarray)


def empty_like(array: ndarray, order: str = "K", subok: bool | None = None) -> ndarray:
    if subok is not None:  # as CuPy 14.2 has it
        raise TypeError("subok is not supported yet")
    return np.empty_like(array.view(np.ndarray), order=order).view(ndarray)


def asarray(values: Any, dtype: Any = None) -> ndarray:
    return np.array(values, dtype).view(ndarray)


def from_dlpack(array: Any) -> ndarray:
    """Read an array of another library in place."""
    return np.from_dlpack(array).view(ndarray)


def argsort(array: ndarray, axis: int = -1) -> ndarray:
    return np.argsort(array.view(np.ndarray), axis=axis).view(ndarray)


def take_along_axis(array: ndarray, order: ndarray, axis: int) -> ndarray:
    return np.take_along_axis(array.view(np.ndarray), order.view(np.ndarray), axis).view(ndarray)


def cumsum(array: ndarray, axis: int = -1) -> ndarray:
    return np.cumsum(array.view(np.ndarray), axis=axis).view(ndarray)


class Stream:
    """A stream by its address; `capturing` says that it is recorded into a graph."""

    def __init__(self, ptr: int) -> None:
        self.ptr, self.capturing = ptr, False

    def is_capturing(self) -> bool:
        return self.capturing

    def synchronize(self) -> None:
        events.append("synchronize")


Stream.null = Stream(0)  # type: ignore[attr-defined]


allocators: list[Any] = []
"""Those in use, the last one now; none: the default pool's."""


@contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    allocators.append(allocator)
    yield
    allocators.pop()


class MemoryPool:
    """The default pool."""

    def malloc(self, size: int) -> Any:
        """Be named as an allocator: arrays here are NumPy's."""


def get_default_memory_pool() -> MemoryPool:
    return MemoryPool()


class Device:
    """The only device."""

    attributes = MappingProxyType({"MultiProcessorCount": 3})

    def __init__(self, index: int) -> None:
        self.id = index

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


class Event:
    """An event by its address."""

    def __init__(self, disable_timing: bool = False) -> None:
        self.ptr = id(self)


current = Stream(0)
cuda = SimpleNamespace(
    Device=Device,
    Event=Event,
    Stream=Stream,
    get_current_stream=lambda index=0: current,
    using_allocator=using_allocator,
    runtime=SimpleNamespace(
        getDevice=lambda: 0,
        pointerGetAttributes=lambda address: SimpleNamespace(device=0),
        eventRecord=lambda event, stream: events.append(("record", stream)),
        streamWaitEvent=lambda stream, event: events.append(("wait", stream)),
    ),
)
