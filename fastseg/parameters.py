"""Lists of parameters and gradients, as the optimisers see them: every check of them.

Nothing here computes; what does not fit raises before anything is written.
"""

from __future__ import annotations

import sys
from ctypes import addressof, c_char
from functools import lru_cache
from math import inf, prod
from numbers import Real
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.libraries import library_of
from fastseg.libraries.base import Library
from fastseg.libraries.numpy_arrays import numpy_address
from fastseg_kernels.constants import FLOAT_DTYPES, ITEM_SIZES
from fastseg_kernels.views import View

_nbytes = attrgetter("nbytes")


class Gradients(NamedTuple):
    """Gradients that were checked, and how to tell that they still lie where they lay."""

    arrays: list[Any]
    watched: list[Any]
    places: list[Any]
    writable: bool


def is_same(last: Gradients | None, grads: list[Any], zero_grads: bool) -> bool:
    """Tell whether ``grads`` are the very objects that were checked, in the same memory."""
    return (
        last is not None
        and (last.writable or not zero_grads)
        and len(grads) == len(last.arrays)
        and all(map(is_, grads, last.arrays))
        and places_of(last.watched) == last.places
    )


def watched_tensors(arrays: Any) -> list[Any]:
    """Return the tensors: ``tensor.data = other`` exchanges the memory under the same object.

    NumPy's and CuPy's arrays cannot be moved while they are referenced, as they are here; of others
    with ``__cuda_array_interface__`` nothing is known, see `may_move`.
    """
    if {*map(type, arrays)} == {np.ndarray}:
        return []  # the usual case, quickly
    others = (array for array in arrays if type(array) is not np.ndarray)
    return [array for array in others if library_of(array, "array").name == "torch"]


def may_move(libraries: list[Library]) -> bool:
    """Tell whether arrays must be looked at again at each step: they may lie elsewhere by then."""
    return any(library.name == "__cuda_array_interface__" for library in libraries)


def places_of(watched: list[Any]) -> list[Any]:
    """Return what tells whether tensors still have the memory they had, in the same order."""
    if not watched:
        return []
    tensor = sys.modules["torch"].Tensor
    pointer, stride = tensor.data_ptr, tensor.stride  # 60 ns each; methodcaller takes 130
    return [*map(pointer, watched), *map(_nbytes, watched), *map(stride, watched)]


def as_list(arrays: Any) -> list[Any]:
    """Return the arrays as a list; one array is a list of one."""
    if isinstance(arrays, list):
        return arrays
    is_array = hasattr(arrays, "shape") or hasattr(arrays, "__cuda_array_interface__")
    return [arrays] if is_array else list(arrays)


def checked_number(name: str, value: Any, *, at_least: float = -inf, below: float = inf) -> float:
    """Return ``value`` as a float; it must be finite and in [at_least, below)."""
    if not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__qualname__}")
    number = float(value)
    if not (at_least <= number < below and number != -inf):
        if at_least == -inf:
            rule = "finite"
        elif below == inf:
            rule = f"finite and at least {at_least}"
        else:
            rule = f"in [{at_least}, {below})"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number


def checked_max_norm(value: Any) -> float:
    """Return the norm to which gradients are clipped, at least 0, perhaps infinite."""
    if isinstance(value, Real) and float(value) == inf:
        return inf
    return checked_number("max_norm", value, at_least=0)


def check_state_dtype(value: Any) -> None:
    """Raise unless states can have this dtype; None: that which is computed in."""
    if value not in (None, "bfloat16"):
        raise ValueError(f"state_dtype must be None or 'bfloat16', got {value!r}")


def view_of(array: Any, name: str, *, writable: bool) -> View:
    """Describe one array of a list; its numbers must be floats that lie as the kernels need."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a numpy.ma.MaskedArray, whose mask would be ignored; pass {name}.data"
        )
    if array is None:
        raise TypeError(f"{name} is None; leave out params that have no gradient")
    if _is_of_jax(array):
        raise TypeError(f"{name} is a JAX array; pass numpy.asarray({name})")
    library = library_of(array, name)
    if library.name == "torch" and array.requires_grad:
        array = array.detach()  # the same memory; torch.optim does not look at the graph either
    view = library.view(array, name, writable=writable)
    if view.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be {', '.join(FLOAT_DTYPES)}, got {view.dtype}")
    if view.layout.swapped:
        raise ValueError(
            f"{name} must be in native byte order, got {array.dtype}; pass "
            f"{name}.astype({view.dtype!r})"
        )
    if view.owner is not array or view.address % ITEM_SIZES[view.dtype]:
        raise ValueError(f"{name} must be a plain array aligned to its elements; pass a copy")
    return view


@lru_cache(maxsize=1024)
def _layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], item_size: int
) -> tuple[Any, ...] | None:
    if 0 in shape:
        return shape, ()
    steps = tuple((step, size) for step, size in zip(strides, shape, strict=True) if size > 1)
    expected = item_size
    for step, size in sorted(steps):
        if step != expected:
            return None
        expected *= size
    return shape, steps


def dense_layout(view: View) -> tuple[Any, ...] | None:
    """Return what two arrays share whose elements lie in one order; None unless one run."""
    return _layout_of(view.shape, view.strides, ITEM_SIZES[view.dtype])


def _is_of_jax(array: Any) -> bool:
    return any(base.__module__.split(".")[0] in ("jax", "jaxlib") for base in type(array).__mro__)


def check_params(params: tuple[Any, ...]) -> tuple[list[View], Memory]:
    """Return a view of every parameter and where all lie; raise where one cannot be updated."""
    views = []
    for i, param in enumerate(params):
        name = f"params[{i}]"
        if _is_of_jax(param):
            raise TypeError(
                f"{name} is a JAX array, which is immutable and cannot be updated in place; keep "
                "the params in NumPy arrays"
            )
        view = view_of(param, name, writable=True)
        if dense_layout(view) is None:
            raise ValueError(
                f"{name} must be one run of memory, in any order of its axes, got shape "
                f"{view.shape} with strides {view.strides}; pass a contiguous copy"
            )
        views.append(view)
    check_one_device(params)
    memory = _memory_of(views)
    _check_apart(memory.spans, "params", "would be updated twice; pass every array once")
    return views, memory


def check_one_device(params: tuple[Any, ...]) -> None:
    """Raise unless one backend can update all parameters: by one launch, in one memory."""
    first = library_of(params[0], "params[0]")
    device = first.device(params[0])
    for i, param in enumerate(params):
        library = library_of(param, f"params[{i}]")
        other = library.device(param)
        if other != device:
            raise TypeError(
                f"params must be on one device, got params[0] on {device} and params[{i}] on "
                f"{other}; make an optimiser for each device"
            )
        if device != "cpu" and library is not first:
            raise TypeError(
                f"params on a GPU must come from one library, got {first.name} and {library.name}"
            )


def check_grads(
    grads: list[Any],
    params: list[View],
    memory: Memory,
    libraries: list[Library],
    device: str,
    zero_grads: bool,
) -> NDArray[np.int64]:
    """Return the address of every gradient; raise where one does not fit its parameter."""
    if len(grads) != len(params):
        raise ValueError(f"grads must have one array per param ({len(params)}), got {len(grads)}")
    addresses = _plain_addresses(grads, memory, zero_grads)
    if addresses is None:
        views = [view_of(grad, f"grads[{i}]", writable=zero_grads) for i, grad in enumerate(grads)]
        _check_kinds(grads, views, params, libraries, device)
        addresses = addresses_of(views)
    if zero_grads:
        consequence = "would be zeroed before it is read twice; pass copies"
        _check_apart(_spans(addresses, memory.sizes), "grads", consequence)
    if len(memory.spans.starts):
        _check_beside(addresses, memory)
    return addresses


_lies = attrgetter("dtype", "shape", "strides")


def _plain_addresses(grads: list[Any], memory: Memory, writable: bool) -> NDArray[np.int64] | None:
    """Return where NumPy's arrays lie that are as their parameters are; None where one may not be.

    In a sixth of the time: what holds of a parameter's layout holds of a gradient's that has it,
    and there is no step of Python's for each of them.
    """
    if memory.plain is None or {*map(type, grads)} != {np.ndarray}:
        return None
    if [*map(_lies, grads)] != memory.plain:
        return None
    try:
        addresses = np.fromiter(map(addressof, map(c_char.from_buffer, grads)), np.int64)
    except (TypeError, ValueError, BufferError):  # some are strided, read-only or empty
        if writable and not all(grad.flags.writeable for grad in grads):
            return None
        addresses = np.fromiter(map(numpy_address, grads), np.int64)
    return None if np.any(addresses % memory.item_sizes) else addresses


def _check_kinds(
    grads: list[Any],
    views: list[View],
    params: list[View],
    libraries: list[Library],
    device: str,
) -> None:
    """Raise where a gradient is of another library, shape, dtype, layout or device."""
    if [library_of(grad, "grads") for grad in grads] != libraries or (
        [view.layout for view in views] != [view.layout for view in params]
    ):
        for i, (view, param) in enumerate(zip(views, params, strict=True)):
            _check_fits(i, view, param, library_of(grads[i], "grads"), libraries[i])
    for i, grad in enumerate(grads):
        where = library_of(grad, "grads").device(grad)
        if where != device:
            raise TypeError(f"grads[{i}] must be on the device of params, {device}, got {where}")


def _check_beside(starts: NDArray[np.int64], memory: Memory) -> None:
    """Raise where a gradient shares memory with a parameter."""
    # The last parameter that starts before the gradient's end alone can reach into it.
    spans, sizes = memory.spans, memory.sizes
    nearest = np.searchsorted(spans.starts, starts + sizes) - 1
    reaches = (nearest >= 0) & (spans.ends[nearest] > starts) & (sizes > 0)
    for i in np.flatnonzero(reaches)[:1]:
        its = f"params[{spans.owners[nearest[i]]}]"
        raise ValueError(f"grads[{i}] shares memory with {its}; pass a copy")


def _check_fits(i: int, view: View, param: View, library: Library, its_library: Library) -> None:
    """Raise if a gradient does not fit its parameter, other strides of one layout excepted."""
    name, its = f"grads[{i}]", f"params[{i}]"
    if library is not its_library:
        raise TypeError(
            f"{name} and {its} must come from one library, got {library.name} and "
            f"{its_library.name}"
        )
    if view.shape != param.shape:
        raise ValueError(f"{name} must have shape {param.shape} as {its}, got {view.shape}")
    if view.dtype != param.dtype:
        raise TypeError(f"{name} must have dtype {param.dtype} as {its}, got {view.dtype}")
    if dense_layout(view) != dense_layout(param):
        raise ValueError(
            f"{name} must have strides {param.strides} as {its}, got {view.strides}; copy it to "
            f"memory laid out as {its}"
        )


class Spans(NamedTuple):
    """Where arrays lie that have elements, by address."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]  # the byte after the last
    owners: NDArray[np.intp]  # which arrays these are


class Memory(NamedTuple):
    """Where parameters lie, and what their gradients must have in common with them."""

    sizes: NDArray[np.int64]  # of all, in their order, in bytes
    item_sizes: NDArray[np.int64]
    spans: Spans
    plain: list[Any] | None  # how each lies, if all are plain NumPy arrays


def addresses_of(views: list[View]) -> NDArray[np.int64]:
    """Return where arrays begin."""
    return np.array([view.address for view in views], np.int64)


def _memory_of(views: list[View]) -> Memory:
    """Return where parameters lie."""
    items = np.array([ITEM_SIZES[view.dtype] for view in views], np.int64)
    sizes = items * np.array([prod(view.shape) for view in views], np.int64)
    owners: list[Any] = [view.owner for view in views]
    plain = {*map(type, owners)} == {np.ndarray}
    lies = [*map(_lies, owners)] if plain else None
    return Memory(sizes, items, _spans(addresses_of(views), sizes), lies)


def _spans(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> Spans:
    """Return the spans of arrays by address."""
    order = np.argsort(starts, kind="stable")
    order = order[sizes[order] > 0]
    return Spans(starts[order], starts[order] + sizes[order], order)


def _check_apart(spans: Spans, what: str, consequence: str) -> None:
    """Raise if two arrays share memory."""
    for k in np.flatnonzero(spans.starts[1:] < spans.ends[:-1])[:1]:
        first, second = sorted(spans.owners[k : k + 2])
        raise ValueError(f"{what}[{second}] shares memory with {what}[{first}] and {consequence}")
