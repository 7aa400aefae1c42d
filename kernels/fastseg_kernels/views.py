"""Arrays as the kernels see them: an address, a shape and strides, whoever owns the memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastseg_kernels.constants import MAX_DIMS


class Layout(NamedTuple):
    """How an array lies in memory, wherever that is.

    ``strides`` are in bytes, ``dtype`` is a name, ``swapped`` says: not in native byte order.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    swapped: bool = False


class View(NamedTuple):
    """One array; ``owner`` keeps its memory alive for as long as the view is."""

    address: int
    layout: Layout
    owner: object

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""
        return self.layout.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the strides in bytes."""
        return self.layout.strides

    @property
    def dtype(self) -> str:
        """Return the name of the element type."""
        return self.layout.dtype


class Geometry(NamedTuple):
    """Spatial axes that all operands share, merged where every operand allows it.

    ``strides[k]`` are the byte strides of operand ``k``, in the order of ``sizes``: slowest first,
    by the strides of the first operand (the logits), so that memory is read in its own order.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def merge_axes(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Geometry:
    """Order the axes by the first operand's strides and merge those that are one run of memory.

    Parameters
    ----------
    sizes
        Lengths of the spatial axes.
    strides
        For each operand its byte strides along these axes.
    """
    axes = [axis for axis in range(len(sizes)) if sizes[axis] != 1]
    axes.sort(key=lambda axis: -abs(strides[0][axis]))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for axis in axes:
        size, step = sizes[axis], tuple(operand[axis] for operand in strides)
        if merged and merged[-1][1] == tuple(size * s for s in step):
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    if not merged:
        merged = [(1, tuple(0 for _ in strides))]
    return Geometry(
        tuple(size for size, _ in merged),
        tuple(tuple(step[k] for _, step in merged) for k in range(len(strides))),
    )


def merge_layouts(layouts: Iterable[Layout]) -> Geometry:
    """Merge the spatial axes of layouts (N, C, *spatial); ValueError if too many are left."""
    several = list(layouts)
    geometry = merge_axes(several[0].shape[2:], tuple(each.strides[2:] for each in several))
    if len(geometry.sizes) > MAX_DIMS:
        raise ValueError(
            f"at most {MAX_DIMS} spatial axes that do not lie next to each other in memory are "
            f"supported, got {len(geometry.sizes)}; pass contiguous copies"
        )
    return geometry


def in_order_of(layout: Layout, dtype: str, item: int) -> Layout:
    """Return the layout (N, C, *spatial) of a new array whose rows lie as those of another.

    In the order, that is, in which `merge_axes` walks over both.
    """
    axes = range(2, len(layout.shape))
    order = [0, 1, *sorted(axes, key=lambda axis: -abs(layout.strides[axis]))]
    strides, step = [0] * len(layout.shape), item
    for axis in reversed(order):
        strides[axis] = step
        step *= max(1, layout.shape[axis])
    return Layout(layout.shape, tuple(strides), dtype)
