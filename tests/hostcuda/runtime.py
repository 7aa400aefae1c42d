"""A device of the launchers, on the CPU: memory is NumPy's, and NaN until it is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseg_kernels.cuda import Backend
from fastseg_kernels.cuda.modules import THREADS
from hostcuda.module import RawKernel, RawModule

MULTIPROCESSORS = 3  # tasks then outnumber the blocks in the larger cases


class HostDriver:
    """Stands for `fastseg_kernels.cuda.runtime.CuPyDriver`."""

    multiprocessors = MULTIPROCESSORS

    def kernel(self, code: str, options: tuple[str, ...], name: str) -> RawKernel:
        """Compile by g++."""
        return RawModule(code=code, options=options, name_expressions=(name,)).get_function(name)

    def launch(self, kernel: Any, grid: int, arguments: tuple[Any, ...], stream: int) -> None:
        """Run the kernel."""
        kernel((grid,), (THREADS,), arguments)


class HostMemory:
    """Stands for `fastseg_kernels.cuda.runtime.CuPyMemory`."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return memory with all bits set."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    def address(self, array: np.ndarray) -> int:
        """Return where it lies."""
        return array.ctypes.data

    def descending(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sort by NumPy, equal numbers in any order."""
        order = np.argsort(-array, axis=1)
        return np.take_along_axis(array, order, axis=1), order

    def cumulative(self, array: np.ndarray) -> np.ndarray:
        """Add up by NumPy."""
        return np.cumsum(array, axis=1)

    def current_stream(self) -> None:
        """Return the only stream."""

    def to_host(self, array: np.ndarray, stream: None = None) -> np.ndarray:
        """Return a copy."""
        return array.copy()

    def from_host(self, array: np.ndarray, values: np.ndarray) -> None:
        """Copy."""
        array[...] = values

    def stream(self) -> int:
        """Return the only stream."""
        return 0

    def is_capturing(self) -> bool:
        """Return False."""
        return False


def host_backend() -> Backend:
    """Return the CUDA backend on the stand-in for a device."""
    return Backend(HostDriver(), HostMemory())
