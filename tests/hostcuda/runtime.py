"""The runtime of the launchers, on the CPU: memory is NumPy's, and NaN until it is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from hostcuda.module import RawModule

MULTIPROCESSORS = 3  # tasks then outnumber the blocks in the larger cases


class HostRuntime:
    """Stands for `fastseg_kernels.cuda.runtime.CuPy`."""

    def module(self, code: str, options: tuple[str, ...], names: tuple[str, ...]) -> RawModule:
        """Compile by g++."""
        return RawModule(code=code, options=options, name_expressions=names)

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return memory with all bits set."""
        array = np.empty(shape, dtype)
        array.view(np.uint8)[...] = 0xFF
        return array

    def array(self, values: Any) -> np.ndarray:
        """Return a copy, as a device's memory holds one."""
        return np.array(values, order="C", copy=True)

    def address(self, array: np.ndarray) -> int:
        """Return where it lies."""
        return array.ctypes.data

    def multiprocessors(self) -> int:
        """Return a number that makes blocks take several tasks."""
        return MULTIPROCESSORS
