"""Where a gradient goes: every check of an output, of its memory above all.

An output may be the logits themselves; it must not overlap an operand in any other way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastseg.libraries import check_together, library_of
from fastseg.libraries.base import Library
from fastseg.problems import with_row_axes
from fastseg_kernels.constants import FLOAT_DTYPES, ITEM_SIZES
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import Layout, View


class Place(NamedTuple):
    """What of an output depends on layouts alone."""

    layout: Layout  # (N, C, *spatial)
    own: tuple[int, int]  # the bytes that it spans, from its first element on
    operands: tuple[tuple[int, int, int], ...]  # (number, and the bytes that it spans) of each


def check_out(out: Any, logits: Any, library: Library, problem: Problem, layout: str) -> View:
    """Check the array that a gradient is written to; return it as (N, C, *spatial)."""
    other = library_of(out, "out")
    check_together(library, "logits", other, "out")
    where, its = library.device(logits, "logits"), other.device(out, "out")
    if where != its:  # a kernel of one device would write to another's address
        raise TypeError(f"logits and out must be on one device, got {where} and {its}")
    view = other.view(out, "out", writable=True)
    address = view.address
    place = place_of(problem.arrangement, view.layout, layout)
    for k in reached(place, problem.addresses, address):
        operand = problem.arrangement.layouts[k]
        assert operand is not None
        if share_memory(problem.addresses[k], operand, address, place.layout):
            name = ("logits", "targets", "mask", "weight_map")[k]
            raise ValueError(f"out must not overlap {name} in memory (it may be logits itself)")
    return View(address, place.layout, view.owner)


def reached(place: Place, addresses: Sequence[int], address: int) -> list[int]:
    """Return which operands, by number, an output's span of memory reaches into."""
    first, end = address + place.own[0], address + place.own[1]
    return [
        k
        for k, low, high in place.operands
        if addresses[k] + low < end and first < addresses[k] + high
    ]


@lru_cache(maxsize=1024)
def place_of(arrangement: Arrangement, out: Layout, layout: str) -> Place:
    """Return what is known of an output once its layout, as the caller has it, was checked."""
    logits = arrangement.logits
    out = with_row_axes(out, layout, "out")
    if out.shape != logits.shape:
        raise ValueError(f"out must have the shape of logits, {logits.shape}, got {out.shape}")
    check_out_dtype(out.dtype, "logits", logits.dtype)
    check_distinct(out)
    operands = ((k, each) for k, each in enumerate(arrangement.layouts) if each is not None)
    return Place(out, extent(out), tuple((k, *extent(each)) for k, each in operands))


def check_out_dtype(dtype: str, name: str, given: str) -> None:
    """Refuse an output that is not floating point, or half where ``name`` is float64."""
    allowed = ("float32", "float64") if given == "float64" else FLOAT_DTYPES
    if dtype not in allowed:
        raise TypeError(f"out must have dtype {', '.join(allowed)} for {given} {name}, got {dtype}")


def check_distinct(out: Layout) -> None:
    """Refuse an output in which two elements may lie in the same memory."""
    end = ITEM_SIZES[out.dtype]
    pairs = zip(out.strides, out.shape, strict=True)
    for step, size in sorted((abs(step), size) for step, size in pairs if size > 1):
        if step < end and 0 not in out.shape:
            raise ValueError(
                "out must not be a broadcast or self-overlapping array: several voxels share its "
                "memory"
            )
        end += step * (size - 1)


def extent(layout: Layout) -> tuple[int, int]:
    """Return the bytes that an array spans, relative to its first element."""
    if 0 in layout.shape:
        return 0, 0
    pairs = zip(layout.strides, layout.shape, strict=True)
    spans = [step * (size - 1) for step, size in pairs]
    low, high = sum(min(0, span) for span in spans), sum(max(0, span) for span in spans)
    return low, high + ITEM_SIZES[layout.dtype]


def _axes(layout: Layout) -> list[tuple[int, int]]:
    """Return length and stride of the axes that have more than one element."""
    pairs = zip(layout.shape, layout.strides, strict=True)
    return [(size, step) for size, step in pairs if size != 1]


def share_memory(first: int, a: Layout, second: int, b: Layout) -> bool:
    """Tell whether two arrays share memory, unless they are the very same array.

    The same array is fine for an output: every voxel is read before it is written.
    """
    if (first, _axes(a), a[2:]) == (second, _axes(b), b[2:]):
        return False
    try:
        work: Any = 10_000  # candidate solutions; NumPy's stub knows only its two special values
        return np.shares_memory(as_numpy(first, a), as_numpy(second, b), max_work=work)
    except np.exceptions.TooHardError:
        return True


def as_numpy(address: int, layout: Layout) -> np.ndarray[Any, Any]:
    """Return memory as a NumPy array (bfloat16 as uint16), uncopied."""
    dtype = np.dtype("uint16" if layout.dtype == "bfloat16" else layout.dtype)
    dtype = dtype.newbyteorder("S") if layout.swapped else dtype
    if 0 in layout.shape:
        return np.zeros(layout.shape, dtype)
    low, high = extent(layout)
    buffer: Any = (ctypes.c_char * (high - low)).from_address(address + low)
    return np.ndarray(layout.shape, dtype, buffer, -low, layout.strides)
