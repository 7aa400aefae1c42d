"""From the caller's arrays to a `Problem`: names of axes, shapes, and every check of them.

Nothing here reads an element of an array, except to say what was wrong with one: which values are
invalid is decided where they are read, by ``bad`` in ``cpu/points.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastseg.libraries import Library, check_together, common_library, library_of
from fastseg.options import Options
from fastseg_kernels.constants import (
    FLOAT_DTYPES,
    ITEM_SIZES,
    TARGETS_AS_STORED,
    TARGETS_EQUAL,
    TARGETS_NONZERO,
)
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import Layout, View


def with_row_axes(array: Layout, layout: str, name: str) -> Layout:
    """Give an array the axes N and C that its layout lacks, with length 1."""
    if len(array.shape) < len(layout):
        raise ValueError(
            f"{name} must have the axes {layout!r} before the spatial ones (layout={layout!r}), "
            f"got shape {array.shape}"
        )
    if layout == "NC":
        return array
    shape, strides = array.shape, array.strides
    if layout == "N":
        shape, strides = (shape[0], 1, *shape[1:]), (strides[0], 0, *strides[1:])
    elif layout == "C":
        shape, strides = (1, *shape), (0, *strides)
    else:
        shape, strides = (1, 1, *shape), (0, 0, *strides)
    return array._replace(shape=shape, strides=strides)


def matched(array: Layout, name: str, logits: Layout, layout: str, *, broadcast: bool) -> Layout:
    """Bring targets, a mask or a weight map to the logits' shape (N, C, *spatial).

    The class axis may be absent; one of length 1 is repeated over the classes if ``broadcast``.
    """
    samples, classes, *spatial = logits.shape
    has_n, has_c = "N" in layout, "C" in layout
    lead = (samples,) if has_n else ()
    full = (*lead, *((classes,) if has_c else ()), *spatial)
    bare = (*lead, *spatial)
    single = (*lead, 1, *spatial)
    n_stride = array.strides[:1] if has_n else (0,)
    if array.shape == full:
        strides = with_row_axes(array, layout, name).strides
    elif array.shape == single and broadcast:
        strides = (*n_stride, 0, *array.strides[len(lead) + 1 :])
    elif array.shape == bare and (broadcast or classes == 1):
        strides = (*n_stride, 0, *array.strides[len(lead) :])
    else:
        allowed = [full, single, bare] if broadcast else ([full, bare] if classes == 1 else [full])
        listed = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} must have shape {listed}, got {array.shape}")
    return array._replace(shape=logits.shape, strides=strides)


def is_representable(label: int, dtype: str) -> bool:
    """Tell whether labels of ``dtype`` can hold ``label`` at all."""
    if dtype in FLOAT_DTYPES:
        return True
    if dtype == "bool":
        return label in (0, 1)
    info = np.iinfo(dtype)
    return int(info.min) <= label <= int(info.max)


def as_stored(label: int, dtype: str) -> int:
    """Return a label as kernels compare it: uint64 is read as the int64 of the same bits."""
    return label - 2**64 if dtype == "uint64" and label >= 2**63 else label


def check_mask_dtype(dtype: str) -> None:
    """Refuse a floating-point mask, which might be meant as weights."""
    if dtype in FLOAT_DTYPES:
        raise TypeError(
            f"mask must be boolean or integer (not 0: counts), got {dtype}; a mask stored as "
            "floats is mask != 0, and weights go to weight_map"
        )


@lru_cache(maxsize=1024)
def arrange(
    logits: Layout,
    targets: Layout,
    mask: Layout | None,
    weights: Layout | None,
    options: Options,
    activation: str,
    threshold: float,
    name: str,
) -> Arrangement:
    """Check the layouts of a call; ``name`` is what the caller calls the logits."""
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    layout = options.layout
    predictions = with_row_axes(logits, layout, name)
    if activation == "softmax":
        return _arrange_softmax(predictions, targets, mask, weights, options, name)
    truth = matched(targets, "targets", predictions, layout, broadcast=False)
    if mask is not None:
        check_mask_dtype(mask.dtype)
        mask = matched(mask, "mask", predictions, layout, broadcast=True)
    if weights is not None:
        weights = matched(weights, "weight_map", predictions, layout, broadcast=True)
    mode, positive = TARGETS_AS_STORED, 0
    if options.positive == "nonzero":
        mode = TARGETS_NONZERO
    elif options.positive is not None:
        mode, positive = TARGETS_EQUAL, options.positive
        if not is_representable(positive, truth.dtype):
            raise ValueError(f"positive={positive} cannot occur in targets of dtype {truth.dtype}")
    ignore = options.ignore_index
    if ignore is not None:
        ignore = as_stored(ignore, truth.dtype) if is_representable(ignore, truth.dtype) else None
    return Arrangement(
        predictions,
        truth,
        mask,
        weights,
        activation,
        mode,
        as_stored(positive, truth.dtype),
        ignore,
        threshold,
        options.compute_dtype == "float64",
    )


def _arrange_softmax(
    logits: Layout,
    targets: Layout,
    mask: Layout | None,
    weights: Layout | None,
    options: Options,
    name: str,
) -> Arrangement:
    """Check the layouts of a call whose classes share one softmax; ``logits`` have all axes."""
    classes, layout = logits.shape[1], options.layout
    if classes < 2:
        raise ValueError(
            f"activation='softmax' needs {name} of at least 2 classes, got {classes}; one class is "
            "activation='sigmoid'"
        )
    if options.positive is not None:
        raise ValueError(
            f"positive={options.positive!r} has no meaning with softmax: targets are class indices"
        )
    soft = len(targets.shape) == len(layout) + len(logits.shape) - 2 and (
        targets.shape[layout.index("C")] == classes
    )
    if soft and options.ignore_index is not None:
        raise ValueError(
            f"ignore_index={options.ignore_index} needs targets that are class indices, got "
            f"targets of shape {targets.shape} with an axis of classes; use mask="
        )
    truth = matched(targets, "targets", logits, layout, broadcast=not soft)
    if mask is not None:
        check_mask_dtype(mask.dtype)
    of_voxels: list[Layout | None] = []
    for operand, its_name in ((mask, "mask"), (weights, "weight_map")):
        if operand is not None:
            operand = matched(operand, its_name, logits, layout, broadcast=True)
            if operand.strides[1] != 0:
                raise ValueError(
                    f"{its_name} must lack the class axis with softmax, which a voxel's classes "
                    "share"
                )
        of_voxels.append(operand)
    ignore = options.ignore_index
    if ignore is not None:
        ignore = as_stored(ignore, truth.dtype) if is_representable(ignore, truth.dtype) else None
    return Arrangement(
        logits,
        truth,
        of_voxels[0],
        of_voxels[1],
        "softmax",
        ignore_index=ignore,
        double=options.compute_dtype == "float64",
        indexed=not soft,
    )


def make_problem(
    logits: Any,
    targets: Any,
    mask: Any,
    weight_map: Any,
    options: Options,
    activation: str,
    threshold: float = 0.0,
    name: str = "logits",
) -> tuple[Library, Problem]:
    """Check the arguments of a verb and describe them to a backend."""
    library = common_library(logits, name, targets=targets, mask=mask, weight_map=weight_map)
    if options.backend != "auto" and not library.device(logits).startswith(options.backend):
        raise TypeError(
            f"backend={options.backend!r} computes where its arrays are, and {name} is on "
            f"{library.device(logits)}; move it, or leave backend at 'auto'"
        )
    view = library.view
    x, p = view(logits, name), view(targets, "targets")
    m = ABSENT if mask is None else view(mask, "mask")
    w = ABSENT if weight_map is None else view(weight_map, "weight_map")
    arrangement = arrange(
        x.layout, p.layout, m.layout, w.layout, options, activation, threshold, name
    )
    addresses = (x.address, p.address, m.address, w.address)
    return library, Problem(arrangement, addresses, (x.owner, p.owner, m.owner, w.owner))


def stand_in(array: Any) -> Any:
    """Return an array that passes the checks as ``array`` would, where that is not there yet."""
    return None if array is None else np.broadcast_to(np.zeros((), array.dtype), array.shape)


class _Absent(NamedTuple):
    """Stands for the view of an argument that was not given."""

    address: int = 0
    layout: None = None
    owner: None = None


ABSENT = _Absent()


def as_numpy(address: int, layout: Layout) -> np.ndarray[Any, Any]:
    """Return memory as a NumPy array (bfloat16 as uint16), uncopied."""
    dtype = np.dtype("uint16" if layout.dtype == "bfloat16" else layout.dtype)
    dtype = dtype.newbyteorder("S") if layout.swapped else dtype
    if 0 in layout.shape:
        return np.zeros(layout.shape, dtype)
    low, high = _extent(layout)
    buffer: Any = (ctypes.c_char * (high - low)).from_address(address + low)
    return np.ndarray(layout.shape, dtype, buffer, -low, layout.strides)


# Where a gradient goes


class _Place(NamedTuple):
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
    place = _place(problem.arrangement, view.layout, layout)
    first, end = address + place.own[0], address + place.own[1]
    for k, low, high in place.operands:
        at = problem.addresses[k]
        if at + low < end and first < at + high:
            operand = problem.arrangement.layouts[k]
            assert operand is not None
            if share_memory(at, operand, address, place.layout):
                name = ("logits", "targets", "mask", "weight_map")[k]
                raise ValueError(f"out must not overlap {name} in memory (it may be logits itself)")
    return View(address, place.layout, view.owner)


@lru_cache(maxsize=1024)
def _place(arrangement: Arrangement, out: Layout, layout: str) -> _Place:
    logits = arrangement.logits
    out = with_row_axes(out, layout, "out")
    if out.shape != logits.shape:
        raise ValueError(f"out must have the shape of logits, {logits.shape}, got {out.shape}")
    check_out_dtype(out.dtype, "logits", logits.dtype)
    check_distinct(out)
    operands = ((k, each) for k, each in enumerate(arrangement.layouts) if each is not None)
    return _Place(out, _extent(out), tuple((k, *_extent(each)) for k, each in operands))


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


def _extent(layout: Layout) -> tuple[int, int]:
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


# Invalid targets


def invalid_message(count: int, total: int, metric: bool = False) -> str:
    """Say that voxels are invalid where it cannot be told which and what they hold."""
    return (
        "targets must be 0 or 1 (in [0, 1] if they are floats), probabilities in [0, 1] and "
        f"weights at least 0; {count} of {total} voxels have others" + _use_positive(metric)
    )


def _use_positive(metric: bool) -> str:
    option = 'positive="nonzero"' if metric else 'loss.replace(positive="nonzero")'
    return USE_POSITIVE.format(option)


USE_POSITIVE = (
    "; label volumes and 0/255 masks: use {} or positive=<label>, and ignore_index= for voxels "
    "that do not count"
)


def raise_for_invalid(
    problem: Problem,
    count: int,
    total: int,
    metric: bool = False,
    readable: bool = True,
    labels: bool = False,
) -> None:
    """Find the first invalid target, probability or weight and say what it is; only for errors.

    What is not ``readable`` from the host is not looked at. ``labels``: no target may be soft.
    """
    arrangement = problem.arrangement
    if not readable:
        raise ValueError(invalid_message(count, total, metric))
    logits, targets, mask, weights = (
        None if layout is None else as_numpy(address, layout)
        for address, layout in zip(problem.addresses, arrangement.layouts, strict=True)
    )
    assert logits is not None and targets is not None
    voxels = f"(invalid voxels: {count} of {total})"
    as_stored = arrangement.target_mode == TARGETS_AS_STORED
    indexed, classes = arrangement.indexed, arrangement.shape[1]
    soft = (arrangement.targets.dtype in FLOAT_DTYPES and as_stored) and not indexed
    soft = soft and not labels
    shape = (arrangement.shape[0], 1, *arrangement.shape[2:]) if indexed else arrangement.shape
    for index in _slabs(shape):
        seen = _readable(targets[index], arrangement.targets.dtype)
        kept = np.ones(seen.shape, bool)
        if arrangement.ignore_index is not None:
            wraps = arrangement.targets.dtype == "uint64"
            kept &= (
                seen != arrangement.ignore_index % 2**64
                if wraps
                else seen != arrangement.ignore_index
            )
        if mask is not None:
            kept &= mask[index] != 0
        allowed = (seen >= 0) & (seen <= 1) if soft else (seen == 0) | (seen == 1)
        if indexed:
            allowed = (seen >= 0) & (seen < classes) & (seen == np.floor(seen))
        if not as_stored:
            allowed = seen == seen
        wrong = seen[kept & ~allowed]
        if wrong.size and indexed:
            raise ValueError(
                f"targets must be class indices in [0, {classes}), got {wrong[0]} {voxels}; "
                "ignore_index= leaves out a label that is no class"
            )
        if wrong.size:
            raise ValueError(
                f"targets must be {'in [0, 1]' if soft else '0 or 1'}, got {wrong[0]} {voxels}"
                + ("" if arrangement.activation == "softmax" else _use_positive(metric))
            )
        if arrangement.activation == "probs":
            probs = _readable(logits[index], arrangement.logits.dtype)
            wrong = probs[kept & ((probs < 0) | (probs > 1))]
            if wrong.size:
                what = (
                    "pred must hold probabilities"
                    if metric
                    else "with activation=None logits must be probabilities"
                )
                raise ValueError(f"{what} in [0, 1], got {wrong[0]} {voxels}")
        if weights is not None:
            assert arrangement.weights is not None
            factors = _readable(weights[index], arrangement.weights.dtype)
            wrong = factors[kept & ~(factors >= 0)]
            if wrong.size:
                raise ValueError(f"weight_map must be at least 0, got {wrong[0]} {voxels}")
    raise ValueError(f"targets or probabilities have invalid values ({count} of {total} voxels)")


def _slabs(shape: tuple[int, ...], voxels: int = 2**20) -> Iterator[tuple[Any, ...]]:
    """Yield indices of parts of a volume that need little memory each."""
    for n, c in np.ndindex(*shape[:2]):
        if len(shape) == 2:
            yield n, c
            continue
        step = max(1, voxels // max(1, prod(shape[3:])))
        for start in range(0, shape[2], step):
            yield n, c, slice(start, start + step)


def _readable(values: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Return an array; bfloat16, which NumPy sees as uint16, is widened to float32."""
    if dtype != "bfloat16":
        return np.asarray(values)
    return (np.asarray(values).astype(np.uint32) << 16).view(np.float32)
