"""Array libraries: how an array of each is read in place, and how answers are made in kind.

An array library is found by the class of the array and remembered per class. A library that the
caller has not imported is never imported here: an array of it could not have been passed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from ctypes import addressof, c_char
from functools import cache
from operator import index
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastseg.dispatch import Backend, backend_of
from fastseg_kernels.constants import DTYPE_CODES, ITEM_SIZES
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


def _numpy_layout(array: np.ndarray[Any, Any], name: str) -> Layout:
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
        layout = known_layout(array) or _numpy_layout(array, name)
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


class Torch:
    """`torch.Tensor` on the CPU or a GPU, subclasses such as MONAI's MetaTensor included."""

    name, allocator = "torch", "torch"
    counts_writes = True

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]
        names = {
            getattr(self._torch, name): name for name in DTYPE_CODES if hasattr(self._torch, name)
        }
        self._dtypes: dict[Any, str] = names
        self._layouts: dict[Any, Layout] = {}
        self._strided = self._torch.strided
        self._count = self._torch.autograd.graph.increment_version
        try:
            self._count([])
            self._counts_lists = True  # in one call, 0.3 instead of 1 us each
        except TypeError:
            self._counts_lists = False

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe a tensor; one that requires grad is refused, not detached in silence."""
        torch = self._torch
        if type(array) is not torch.Tensor and hasattr(array, "to_local"):
            raise TypeError(f"{name} is a DTensor; pass its local part, {name}.to_local()")
        self.device(array, name)
        if array.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires grad: use fastseg.torch.Loss(loss), which autograd follows, or "
                f"pass {name}.detach()"
            )
        if array.layout is not self._strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {array.layout}")
        if array.is_neg() or array.is_conj():
            if writable:
                raise ValueError(
                    f"{name} must hold its own values, got a negated or conjugated view, which "
                    "cannot be written in place"
                )
            array = array.resolve_conj().resolve_neg()
        address = array.data_ptr()
        key = array.dtype, array.shape, array.stride()
        layout = self._layouts.get(key) or self._new_layout(key, name)
        if address == 0 and 0 not in layout.shape:
            raise TypeError(
                f"{name} has no memory to be read, got a {type(array).__name__} whose storage is "
                "elsewhere or was freed"
            )
        if address & 7 and address % ITEM_SIZES[layout.dtype] and array.is_cuda:
            raise _misaligned(name, ITEM_SIZES[layout.dtype])
        return View(address, layout, array)

    def _new_layout(self, key: tuple[Any, ...], name: str) -> Layout:
        """Make the layout of a tensor by dtype, shape and strides, and remember it."""
        dtype, shape, strides = key
        kind = self._dtypes.get(dtype)
        if kind is None:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(self._dtypes.values())}, "
                f"got {dtype}"
            )
        if len(self._layouts) >= MOST_LAYOUTS:
            self._layouts.clear()
        size = ITEM_SIZES[kind]
        layout = Layout(tuple(shape), tuple([step * size for step in strides]), kind)
        return self._layouts.setdefault(key, layout)

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

    def device(self, array: Any, name: str = "array") -> str:
        """Return "cpu" or "cuda:0"; other devices have no backend."""
        if array.is_cpu:
            return "cpu"
        device = array.device
        if device.type != "cuda" or self._torch.version.hip:
            kind = "an AMD GPU" if device.type == "cuda" else device
            raise TypeError(
                f"{name} is on {kind}: fastseg computes on the CPU and on NVIDIA GPUs; pass "
                f"{name}.cpu()"
            )
        return f"cuda:{device.index}"

    def written(self, arrays: Sequence[Any]) -> None:
        """Bump the version counters, by which autograd notices that a saved tensor changed."""
        if self._counts_lists:
            self._count(arrays)
        else:
            for array in arrays:
                self._count(array)

    def used(self, arrays: Iterable[Any]) -> None:
        """Do nothing: tensors are used on PyTorch's current stream."""


def _misaligned(name: str, size: int) -> ValueError:
    return ValueError(
        f"{name} must be aligned to its elements on a GPU, got an address or a stride that is no "
        f"multiple of {size} bytes; pass a copy"
    )


class CuPy:
    """`cupy.ndarray`."""

    name, allocator = "cupy", "cupy"
    counts_writes = False

    def __init__(self) -> None:
        self._cupy = sys.modules["cupy"]

    def view(self, array: Any, name: str, *, writable: bool = False) -> View:
        """Describe an array; every layout is accepted."""
        layout = known_layout(array) or _numpy_layout(array, name)
        address, size = array.data.ptr, array.dtype.itemsize
        if address % size or any(step % size for step in layout.strides):
            raise _misaligned(name, size)
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
            raise _misaligned(name, size)
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


_LIBRARIES: dict[str, Callable[[], Library]] = {
    "numpy": NumPy,
    "torch": Torch,
    "cupy": CuPy,
    "__cuda_array_interface__": CUDAArray,
}
_CLASSES = {"numpy": "ndarray", "torch": "Tensor", "cupy": "ndarray"}
"""What the arrays of a library derive from."""
_ADVICE_FOR_JAX = (
    "pass numpy.asarray(...), or call fastseg.jax.value_and_grad, or fastseg.jax.Loss inside jit, "
    "grad and vmap"
)
_ADVICE = {
    "dask": "call fastseg.dask, or pass it chunk by chunk: statistics of chunks add up",
    "zarr": "pass it chunk by chunk: statistics of chunks add up (see Statistics)",
    "jax": _ADVICE_FOR_JAX,
    "jaxlib": _ADVICE_FOR_JAX,
    "builtins": "pass numpy.asarray(...)",
}


_making = Lock()
_made: dict[str, Library] = {}


def _instance(key: str) -> Library:
    """Return the only instance: threads may come here at once, and libraries are compared."""
    with _making:
        if key not in _made:
            _made[key] = _LIBRARIES[key]()
        return _made[key]


@cache
def _library_of_class(cls: type) -> Library | None:
    for base in cls.__mro__:
        key = base.__module__.partition(".")[0]
        if key == "numpy" and hasattr(cls, "__cuda_array_interface__"):
            continue  # Numba's managed and mapped arrays are NumPy's too
        if key in _CLASSES and issubclass(cls, _class_of(key)):
            return _instance(key)
        if key in _ADVICE and key != "builtins":
            return None  # JAX's arrays have the interface, but may not be written to
    return _cuda_array() if hasattr(cls, "__cuda_array_interface__") else None


def _class_of(key: str) -> Any:
    return getattr(sys.modules.get(key), _CLASSES[key], ())


def _cuda_array() -> Library:
    return _instance("__cuda_array_interface__")


def library_or_none(array: Any) -> Library | None:
    """Return the library of ``array``, or None if it is no array that can be read."""
    cls: Any = type(array)
    return _library_of_class(cls)


def library_of(array: Any, name: str) -> Library:
    """Return the library of ``array``, the argument called ``name``; TypeError if it is none."""
    library = library_or_none(array)
    if library is None:
        modules = [base.__module__.partition(".")[0] for base in type(array).__mro__]
        advice = next(
            (_ADVICE[key] for key in modules if key in _ADVICE), "pass numpy.asarray(...)"
        )
        kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"{name} must be an array of NumPy, CuPy or PyTorch, or have __cuda_array_interface__, "
            f"got {kind}: {advice}"
        )
    return library


def device_number(backend: Backend, value: Any, name: str) -> View | None:
    """Describe a number, or several, in the memory of ``backend``; None: ``value`` is on the host.

    A number on another device is refused: fetching it would wait for that device.
    """
    library = None if isinstance(value, float | int | np.generic) else library_or_none(value)
    if library is None or library.device(value, name) == "cpu":
        return None
    if backend_of(library, value) is not backend:
        raise TypeError(
            f"{name} must be a number, or on the device and of the library of the other arrays, "
            f"got {library.name} on {library.device(value)}"
        )
    view = library.view(value.detach() if library.name == "torch" else value, name)
    if view.dtype == "bool":
        raise TypeError(f"{name} must be a number or an array of them, got booleans")
    return view


def check_together(library: Library, name: str, other: Library, other_name: str) -> None:
    """Refuse two arrays of different libraries, unless both are in CuPy's hands."""
    if library is not other and not library.allocator == other.allocator == "cupy":
        raise TypeError(
            f"{name} and {other_name} must come from one library, got {library.name} and "
            f"{other.name}"
        )


def common_library(first: Any, first_name: str, **others: Any) -> Library:
    """Return the library that all arrays share; TypeError that names two that differ."""
    library = library_of(first, first_name)
    plain = type(first) is np.ndarray
    for name, array in others.items():
        if array is None or (plain and type(array) is np.ndarray):
            continue  # the usual case, without the questions below
        other = library_of(array, name)
        if other is not library:
            check_together(library, first_name, other, name)
            library = _cuda_array()  # which reads CuPy's arrays too
        where, other_place = library.device(first, first_name), library.device(array, name)
        if where != other_place:
            raise TypeError(
                f"{first_name} and {name} must be on one device, got {where} and {other_place}"
            )
    return library
