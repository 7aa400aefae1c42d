"""A device as the launchers see it: memory of an array library, its stream, compiled kernels.

A `Device` joins two things. The driver compiles and launches; it is CuPy's. The memory is that of
the array library whose arrays were passed: what a call needs is taken from that library's
allocator, and kernels are launched on that library's current stream, so that calls are ordered
with everything else that the library does. Nothing here waits for the device but `Memory.to_host`.

CuPy is imported when the first device is made; torch never is: a tensor could not have been passed.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cuda.installation import cupy_module, explained, raise_explained
from fastseg_kernels.cuda.modules import OPTIONS, THREADS, text

UPLOAD = np.dtype([("words", np.int64, (480,))])
"""What is passed by value at once: all arguments of a kernel together may take 4096 bytes."""


class Driver(Protocol):
    """One GPU: its compiler and its launches."""

    multiprocessors: int

    def kernel(self, code: str, options: tuple[str, ...], name: str) -> Any:
        """Compile the kernel ``name`` of a CUDA text."""

    def launch(self, kernel: Any, grid: int, arguments: tuple[Any, ...], stream: int) -> None:
        """Launch a kernel of `THREADS` threads per block on a stream, given as its address."""


class Memory(Protocol):
    """The memory of an array library on one device, and the stream that it works on now."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new C-contiguous array."""

    def address(self, array: Any) -> int:
        """Return where an array lies."""

    def descending(self, array: Any) -> tuple[Any, Any]:
        """Return each row in descending order, and where each number was, int64."""

    def cumulative(self, array: Any) -> Any:
        """Return the sums of each row up to each number, int64."""

    def to_host(self, array: Any, stream: Any = None) -> NDArray[Any]:
        """Copy an array to the host on a stream, the current one for None, and wait for it."""

    def from_host(self, array: Any, values: NDArray[Any]) -> None:
        """Write values of the host to an array of the same shape and dtype."""

    def current_stream(self) -> Any:
        """Return the current stream as `to_host` takes it; it stays valid while it is held."""

    def stream(self) -> int:
        """Return the current stream, as its address."""

    def is_capturing(self) -> bool:
        """Tell whether the current stream is recorded into a graph."""


class Device:
    """One device with the memory and the stream of one array library."""

    def __init__(self, driver: Driver, memory: Memory) -> None:
        self.driver, self.memory = driver, memory
        self._kernels: dict[tuple[str, str], Any] = {}

    def empty(self, shape: tuple[int, ...], dtype: str = "float64") -> Any:
        """Return a new C-contiguous array."""
        return self.memory.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new C-contiguous array of zeros."""
        array = self.empty(shape, dtype)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > 0:
            grid = self.grid(-(-size // (16 * THREADS)))
            self.launch("memory.cu", "clear", grid, self.memory.address(array), size)
        return array

    def is_recording(self) -> bool:
        """Tell whether the current stream is recorded into a graph."""
        return self.memory.is_capturing()

    def counter(self, value: int) -> Any:
        """Return an int64 array of one number."""
        return self.upload(np.array([value], np.int64))

    def current_stream(self) -> Any:
        """Return the current stream as `to_host` takes it."""
        return self.memory.current_stream()

    def to_host(self, array: Any, stream: Any = None) -> NDArray[Any]:
        """Copy an array of the device to the host on a stream, and wait for it."""
        return self.memory.to_host(array, stream)

    def from_host(self, array: Any, values: NDArray[Any]) -> None:
        """Write values to an array of the device."""
        self.memory.from_host(array, values)

    def upload(self, values: NDArray[Any]) -> Any:
        """Return an array of the device with the same values (items of 8 bytes).

        They travel as arguments of a kernel: the host does not wait, no page-locked memory is
        needed, and a graph that records the call holds the values.
        """
        words = np.ascontiguousarray(values).view(np.int64).reshape(-1)
        array = self.empty(values.shape, "int64" if values.dtype.kind == "V" else values.dtype.name)
        limit = UPLOAD.fields["words"][0].shape[0]  # type: ignore[index]
        for start in range(0, words.size, limit):
            piece: Any = np.zeros(1, UPLOAD)
            count = min(limit, words.size - start)
            piece["words"][0, :count] = words[start : start + count]
            target = self.memory.address(array) + 8 * start
            self.launch("memory.cu", "upload", 1, target, np.int32(count), piece)
        return array

    def grid(self, tasks: int, per_multiprocessor: int = 8) -> int:
        """Return the number of blocks for tasks that blocks take in turns."""
        return max(1, min(tasks, per_multiprocessor * self.driver.multiprocessors))

    def launch(self, file: str, name: str, grid: int, *arguments: Any) -> None:
        """Launch the kernel ``name`` of a .cu file; a template with its arguments."""
        kernel = self._kernels.get((file, name))
        if kernel is None:
            kernel = self.driver.kernel(text(file), OPTIONS, name)
            self._kernels[file, name] = kernel
        self.driver.launch(kernel, grid, arguments, self.memory.stream())


class _Stream:
    """A stream as CuPy's launches take it: they read its address alone."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CuPyDriver:
    """A GPU through CuPy."""

    def __init__(self, index: int) -> None:
        self.index, self._cupy = index, cupy_module()
        self._current = self._cupy.cuda.runtime.getDevice
        self._streams: dict[int, _Stream] = {}
        with explained():
            self._device = self._cupy.cuda.Device(index)
            self.multiprocessors = int(self._device.attributes["MultiProcessorCount"])

    def kernel(self, code: str, options: tuple[str, ...], name: str) -> Any:
        """Compile by NVRTC, or take from CuPy's cache on disk."""
        with explained(), self._device:
            module = self._cupy.RawModule(code=code, options=options, name_expressions=(name,))
            return module.get_function(name)

    def launch(self, kernel: Any, grid: int, arguments: tuple[Any, ...], stream: int) -> None:
        """Launch, on this device whichever is current."""
        on = self._streams.get(stream) or self._streams.setdefault(stream, _Stream(stream))
        if self._current() == self.index:
            kernel((grid,), (THREADS,), arguments, stream=on)
        else:
            with self._device:
                kernel((grid,), (THREADS,), arguments, stream=on)


THREAD_STREAM = 2
"""The address by which every thread names a default stream of its own."""


class CuPyMemory:
    """Memory of CuPy's current allocator, by default a pool."""

    def __init__(self, index: int) -> None:
        self.index, self._cupy = index, cupy_module()
        self.of_graphs: list[Any] = []
        """What graphs that were recorded go on using, for good: CuPy's pool knows of no graphs."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate on this device, on its current stream; for a graph, from CuPy's default pool.

        Other allocators may be recorded themselves, and then a graph can be launched only once.
        """
        cuda = self._cupy.cuda
        try:
            if self.is_capturing():
                pool = self._cupy.get_default_memory_pool()
                with cuda.Device(self.index), cuda.using_allocator(pool.malloc):
                    array = self._cupy.empty(shape, dtype)
                self.of_graphs.append(array)
                return array
            if cuda.runtime.getDevice() == self.index:
                return self._cupy.empty(shape, dtype)
            with cuda.Device(self.index):
                return self._cupy.empty(shape, dtype)
        except Exception as error:
            raise_explained(error)

    def address(self, array: Any) -> int:
        """Return the device pointer."""
        return int(array.data.ptr)

    def descending(self, array: Any) -> tuple[Any, Any]:
        """Sort by CuPy."""
        with self._cupy.cuda.Device(self.index):
            order = self._cupy.argsort(-array, axis=1)
            return self._cupy.take_along_axis(array, order, axis=1), order

    def cumulative(self, array: Any) -> Any:
        """Add up by CuPy."""
        with self._cupy.cuda.Device(self.index):
            return self._cupy.cumsum(array, axis=1)

    def to_host(self, array: Any, stream: Any = None) -> NDArray[Any]:
        """Copy and wait."""
        return np.asarray(array.get(stream=stream or self._current()))

    def from_host(self, array: Any, values: NDArray[Any]) -> None:
        """Copy on the current stream."""
        array.set(values, stream=self._current())

    def _current(self) -> Any:
        return self._cupy.cuda.get_current_stream(self.index)

    def current_stream(self) -> Any:
        """Return CuPy's object; for the default stream of a thread the one that waits for all."""
        current = self._current()
        return self._cupy.cuda.Stream.null if current.ptr == THREAD_STREAM else current

    def stream(self) -> int:
        """Return CuPy's current stream."""
        return int(self._current().ptr)

    def is_capturing(self) -> bool:
        """Ask the stream; the default stream cannot be recorded."""
        current = self._current()
        return bool(current.ptr not in (0, 1) and current.is_capturing())


class TorchMemory:
    """Memory of PyTorch's caching allocator, which gives a graph a pool of its own."""

    def __init__(self, index: int) -> None:
        self._torch: Any = sys.modules["torch"]
        self._device = self._torch.device("cuda", index)
        self._empty, self._dtypes = self._torch.empty, vars(self._torch)
        # Its address without an object for it, as PyTorch's own compiler asks: 0.1 instead of 1 us.
        self._index = index
        self._raw_stream = getattr(self._torch._C, "_cuda_getCurrentRawStream", None)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate on this device, on its current stream."""
        try:
            return self._empty(shape, dtype=self._dtypes[dtype], device=self._device)
        except Exception as error:
            raise_explained(error)

    def address(self, array: Any) -> int:
        """Return the device pointer."""
        return int(array.data_ptr())

    def descending(self, array: Any) -> tuple[Any, Any]:
        """Sort by PyTorch."""
        sizes, order = self._torch.sort(array, dim=1, descending=True)
        return sizes, order

    def cumulative(self, array: Any) -> Any:
        """Add up by PyTorch."""
        return self._torch.cumsum(array, dim=1)

    def to_host(self, array: Any, stream: Any = None) -> NDArray[Any]:
        """Copy and wait."""
        if stream is None or stream == self.stream():
            return np.asarray(array.cpu().numpy())
        cuda = self._torch.cuda
        if stream == 0:  # ExternalStream(0) would be some other stream
            made_by = cuda.default_stream(self._device)
        else:
            made_by = cuda.ExternalStream(stream, device=self._device)
        with cuda.stream(made_by):
            return np.asarray(array.cpu().numpy())

    def from_host(self, array: Any, values: NDArray[Any]) -> None:
        """Copy on the current stream."""
        array.copy_(self._torch.from_numpy(values))

    def current_stream(self) -> Any:
        """Return the address: PyTorch keeps its streams for good, external ones their owner."""
        return self.stream()

    def stream(self) -> int:
        """Return PyTorch's current stream."""
        if self._raw_stream is not None:
            return int(self._raw_stream(self._index))
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    def is_capturing(self) -> bool:
        """Ask PyTorch."""
        with self._torch.cuda.device(self._device):
            return bool(self._torch.cuda.is_current_stream_capturing())
