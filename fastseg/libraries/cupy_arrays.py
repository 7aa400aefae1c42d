"""CuPy's arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fastseg.libraries.base import known_layout, misaligned, numpy_layout
from fastseg_kernels.views import View


class CuPy:
    """`cupy.ndarray`."""

    name, allocator = "cupy", "cupy"
    counts_writes = False

    def __init__(self) -> None:
        self._cupy = sys.modules["cupy"]

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe an array; every layout is accepted."""
        layout = known_layout(array) or numpy_layout(array, name)
        address, size = array.data.ptr, array.dtype.itemsize
        if address % size or any(step % size for step in layout.strides):
            raise misaligned(name, size)
        return View(address, layout, array)

    def empty_like(self, array: Any) -> Any:
        """Allocate in the same memory order, on the array's device."""
        with array.device:
            return self._cupy.empty_like(array, order="K")

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Convert."""
        if isinstance(values, self._cupy.ndarray):
            return values.astype(dtype, copy=False)
        with like.device:
            return self._cupy.asarray(values, dtype=dtype)

    def device(self, array: Any, name: str = "array") -> str:
        """Return "cuda:0"."""
        return f"cuda:{array.device.id}"

    def written(self, arrays: Sequence[Any]) -> None:
        """Do nothing: CuPy keeps no count of writes."""

    def used(self, arrays: Iterable[Any]) -> None:
        """Do nothing: arrays are used on CuPy's current stream."""
