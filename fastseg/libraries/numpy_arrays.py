"""NumPy's arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np

from fastseg.libraries.base import known_layout, numpy_layout
from fastseg_kernels.views import View


def numpy_address(array: Any) -> int:
    """Return where the first element lies; ``ctypes.data`` alone takes a microsecond."""
    try:
        return addressof(c_char.from_buffer(array))
    except (TypeError, ValueError, BufferError):  # strided, read-only, empty, bfloat16
        address: int = array.ctypes.data
        return address


_SCALARS = {"float32": np.float32, "float64": np.float64}  # astype takes twice as long


class NumPy:
    """`numpy.ndarray`, memory maps included."""

    name, allocator = "numpy", "numpy"
    counts_writes = False

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe an array; every layout, byte order and read-only arrays are accepted."""
        if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a numpy.ma.MaskedArray, whose mask would be ignored; pass {name}.data "
                f"and mask=~numpy.ma.getmaskarray({name})"
            )
        layout = known_layout(array) or numpy_layout(array, name)
        if writable and not array.flags.writeable:
            raise ValueError(f"{name} must be writable, got a read-only array")
        return View(numpy_address(array), layout, array)

    def empty_like(self, array: Any) -> Any:
        """Allocate in the same memory order (a plain array also for a memory map)."""
        return np.empty_like(array, dtype=array.dtype.newbyteorder("="), order="K", subok=False)

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Convert."""
        return _SCALARS[dtype](values) if values.ndim == 0 else values.astype(dtype)

    def device(self, array: Any, name: str = "array") -> str:
        """Return "cpu"."""
        return "cpu"

    def written(self, arrays: Sequence[Any]) -> None:
        """Do nothing: NumPy keeps no count of writes."""

    def used(self, arrays: Iterable[Any]) -> None:
        """Do nothing."""
