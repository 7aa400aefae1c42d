"""Array libraries: how an array of each is read in place, and how answers are made in kind.

An array library is found by the class of the array and remembered per class. A library that the
caller has not imported is never imported here: an array of it could not have been passed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from ctypes import addressof, c_char
from functools import cache
from typing import Any, Protocol

import numpy as np

from fastseg_kernels.constants import DTYPE_CODES
from fastseg_kernels.views import Layout, View


class Library(Protocol):
    """What fastseg asks of an array library."""

    name: str

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe ``array`` (the argument called ``name``) without copying it."""

    def empty_like(self, array: Any) -> Any:
        """Allocate an array of the same shape, dtype, device and memory order."""

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Make an array with ``dtype`` on the device of ``like``; a scalar of a NumPy scalar."""

    def device(self, array: Any) -> str:
        """Name the device that holds ``array``."""

    def written(self, array: Any) -> None:
        """Be told that ``array`` was changed in place."""


_LAYOUTS: dict[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]], Layout] = {}
"""Layouts by dtype, shape and strides: describing one takes as long as all the rest of a view."""
MOST_LAYOUTS = 4096


def _numpy_layout(array: np.ndarray[Any, Any], name: str) -> Layout:
    dtype = array.dtype
    kind = dtype.newbyteorder("=").name
    if kind not in DTYPE_CODES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(DTYPE_CODES)}, got {dtype}")
    if len(_LAYOUTS) >= MOST_LAYOUTS:
        _LAYOUTS.clear()
    layout = Layout(array.shape, array.strides, kind, not dtype.isnative)
    return _LAYOUTS.setdefault((dtype, *layout[:2]), layout)


def _numpy_address(array: Any) -> int:
    """Return where the first element lies; ``ctypes.data`` alone takes a microsecond."""
    try:
        return addressof(c_char.from_buffer(array))
    except (TypeError, ValueError, BufferError):  # strided, read-only, empty, bfloat16
        address: int = array.ctypes.data
        return address


_SCALARS = {"float32": np.float32, "float64": np.float64}  # astype takes twice as long


class NumPy:
    """`numpy.ndarray`, memory maps included."""

    name = "numpy"

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe an array; every layout, byte order and read-only arrays are accepted."""
        if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a numpy.ma.MaskedArray, whose mask would be ignored; pass {name}.data "
                f"and mask=~numpy.ma.getmaskarray({name})"
            )
        layout = _LAYOUTS.get((array.dtype, array.shape, array.strides))
        if layout is None:
            layout = _numpy_layout(array, name)
        if writable and not array.flags.writeable:
            raise ValueError(f"{name} must be writable, got a read-only array")
        return View(_numpy_address(array), layout, array)

    def empty_like(self, array: Any) -> Any:
        """Allocate in the same memory order (a plain array also for a memory map)."""
        return np.empty_like(array, dtype=array.dtype.newbyteorder("="), order="K", subok=False)

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Convert."""
        return _SCALARS[dtype](values) if values.ndim == 0 else values.astype(dtype)

    def device(self, array: Any) -> str:
        """Return "cpu"."""
        return "cpu"

    def written(self, array: Any) -> None:
        """Do nothing: NumPy keeps no count of writes."""


class Torch:
    """`torch.Tensor` on the CPU, subclasses such as MONAI's MetaTensor included."""

    name = "torch"

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]
        names = {
            getattr(self._torch, name): name for name in DTYPE_CODES if hasattr(self._torch, name)
        }
        self._dtypes: dict[Any, str] = names

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe a tensor; one that requires grad is refused, not detached in silence."""
        torch = self._torch
        if hasattr(array, "to_local"):
            raise TypeError(f"{name} is a DTensor; pass its local part, {name}.to_local()")
        if array.device.type != "cpu":
            raise TypeError(
                f"{name} is on {array.device}: this version computes on the CPU only; "
                f"pass {name}.cpu()"
            )
        if array.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {array.layout}")
        if array.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad: use fastseg.torch.Loss(loss), which autograd follows, or "
                f"pass {name}.detach()"
            )
        kind = self._dtypes.get(array.dtype)
        if kind is None:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(self._dtypes.values())}, "
                f"got {array.dtype}"
            )
        if array.is_neg() or array.is_conj():
            if writable:
                raise ValueError(
                    f"{name} must hold its own values, got a negated or conjugated view, which "
                    "cannot be written in place"
                )
            array = array.resolve_conj().resolve_neg()
        address, shape = array.data_ptr(), tuple(array.shape)
        if address == 0 and 0 not in shape:
            raise TypeError(
                f"{name} has no memory to be read, got a {type(array).__name__} whose storage is "
                "elsewhere or was freed"
            )
        size = array.element_size()
        strides = tuple([step * size for step in array.stride()])
        return View(address, Layout(shape, strides, kind), array)

    def empty_like(self, array: Any) -> Any:
        """Allocate a plain tensor in the same memory format."""
        plain = (
            array.as_subclass(self._torch.Tensor)
            if type(array) is not self._torch.Tensor
            else array
        )
        return self._torch.empty_like(plain.detach())

    def array(self, values: Any, dtype: str, like: Any) -> Any:
        """Convert; a scalar becomes a 0-d tensor."""
        dtype = getattr(self._torch, dtype)
        return self._torch.as_tensor(values, dtype=dtype, device=like.device)

    def device(self, array: Any) -> str:
        """Return the device, as "cpu" or "cuda:0"."""
        return str(array.device)

    def written(self, array: Any) -> None:
        """Tell autograd, which would else go on with what was saved before."""
        self._torch.autograd.graph.increment_version(array)


# Libraries by the top-level module of the array's class, each made on first use.
_LIBRARIES: dict[str, Callable[[], Library]] = {"numpy": NumPy, "torch": Torch}
_ADVICE = {
    "dask": "pass it chunk by chunk: statistics of chunks add up (see Statistics)",
    "zarr": "pass it chunk by chunk: statistics of chunks add up (see Statistics)",
    "cupy": "this version computes on the CPU only; pass cupy.asnumpy(...)",
    "jax": "this version does not read JAX arrays; pass numpy.asarray(...)",
    "jaxlib": "this version does not read JAX arrays; pass numpy.asarray(...)",
    "builtins": "pass numpy.asarray(...)",
}


@cache
def _instance(key: str) -> Library:
    return _LIBRARIES[key]()


@cache
def _library_of_class(cls: type) -> Library | None:
    for base in cls.__mro__:
        key = base.__module__.partition(".")[0]
        if key == "numpy" and not issubclass(cls, np.ndarray):
            continue  # numpy scalars and numpy.matrixlib helpers are not arrays
        if key in _LIBRARIES:
            return _instance(key)
    return None


def library_of(array: Any, name: str) -> Library:
    """Return the library of ``array``, the argument called ``name``; TypeError if it is none."""
    cls: Any = type(array)
    library = _library_of_class(cls)
    if library is None:
        modules = [base.__module__.partition(".")[0] for base in type(array).__mro__]
        advice = next(
            (_ADVICE[key] for key in modules if key in _ADVICE), "pass numpy.asarray(...)"
        )
        kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {kind}: {advice}")
    return library


def common_library(first: Any, first_name: str, **others: Any) -> Library:
    """Return the library that all arrays share; TypeError that names two that differ."""
    library = library_of(first, first_name)
    plain = type(first) is np.ndarray
    for name, array in others.items():
        if array is None or (plain and type(array) is np.ndarray):
            continue  # the usual case, without the questions below
        other = library_of(array, name)
        if other is not library:
            raise TypeError(
                f"{first_name} and {name} must come from one library, got {library.name} and "
                f"{other.name}"
            )
        if library.device(array) != library.device(first):
            raise TypeError(
                f"{first_name} and {name} must be on one device, got {library.device(first)} and "
                f"{library.device(array)}"
            )
    return library
