"""What fastseg asks of an array library, and layouts as NumPy and CuPy tell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from fastseg_kernels.constants import DTYPE_CODES
from fastseg_kernels.views import Layout, View


class Library(Protocol):
    """What fastseg asks of an array library."""

    name: str
    allocator: str
    """Whose memory and stream the CUDA backend uses: "cupy" or "torch"."""
    counts_writes: bool
    """Whether `written` is to be told."""

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe ``array`` (the argument called ``name``) without copying it."""

    def empty_like(self, array: Any) -> Any:
        """Allocate an array of the same shape, dtype, device and memory order."""

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Make an array with ``dtype`` of NumPy's ``values``, or of an array of its allocator's.

        It is on the device of ``like``, and a scalar of the library where ``values`` is 0-d.
        """

    def device(self, array: Any, name: str = "array") -> str:
        """Name the device that holds ``array``: "cpu", or "cuda:" and its index."""

    def written(self, arrays: Sequence[Any]) -> None:
        """Be told that ``arrays`` were changed in place."""

    def used(self, arrays: Iterable[Any]) -> None:
        """Be told that what reads ``arrays`` was launched; those that are None were not given."""


_LAYOUTS: dict[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]], Layout] = {}
"""Layouts by dtype, shape and strides: describing one takes as long as all the rest of a view."""
MOST_LAYOUTS = 4096


def numpy_layout(array: np.ndarray[Any, Any], name: str) -> Layout:
    """Return the layout of an array of NumPy or CuPy, and remember it for `known_layout`."""
    dtype = array.dtype
    kind = dtype.newbyteorder("=").name
    if kind not in DTYPE_CODES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(DTYPE_CODES)}, got {dtype}")
    if len(_LAYOUTS) >= MOST_LAYOUTS:
        _LAYOUTS.clear()
    layout = Layout(array.shape, array.strides, kind, not dtype.isnative)
    return _LAYOUTS.setdefault((dtype, *layout[:2]), layout)


def known_layout(array: np.ndarray[Any, Any]) -> Layout | None:
    """Return the one object that stands for the layout of an array, if such an array was seen."""
    return _LAYOUTS.get((array.dtype, array.shape, array.strides))


def misaligned(name: str, size: int) -> ValueError:
    """Return the error for an array that a GPU cannot read element by element."""
    return ValueError(
        f"{name} must be aligned to its elements on a GPU, got an address or a stride that is no "
        f"multiple of {size} bytes; pass a copy"
    )
