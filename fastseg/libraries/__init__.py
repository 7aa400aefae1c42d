"""Array libraries: how an array of each is read in place, and how answers are made in kind.

An array library is found by the class of the array and remembered per class. A library that the
caller has not imported is never imported here: an array of it could not have been passed. What
fastseg asks of a library is in ``base.py``, and each has a module of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, Literal

import numpy as np

from fastseg.dispatch import Backend, backend_of
from fastseg.libraries.base import Library
from fastseg.libraries.cuda_arrays import CUDAArray
from fastseg.libraries.cupy_arrays import CuPy
from fastseg.libraries.numpy_arrays import NumPy
from fastseg.libraries.torch_tensors import Torch
from fastseg_kernels.views import View

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


def backend_name(array: Any) -> Literal["cpu", "cuda"]:
    """Return which backend computes on an array: the one of the device that holds it.

    Parameters
    ----------
    array
        A NumPy or CuPy array, a PyTorch tensor, or an object with ``__cuda_array_interface__``.

    Raises
    ------
    TypeError
        For anything else, and for tensors of other devices.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> fs.backend_name(np.zeros(3))
    'cpu'
    """
    library = library_of(array, "array")
    return "cpu" if library.device(array) == "cpu" else "cuda"


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
