"""From the caller's arrays to a `Problem`: names of axes, shapes, and every check of them.

Nothing here reads an element of an array, except to say what was wrong with one.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

from fastseg.libraries import Library, common_library, library_of
from fastseg.options import Options
from fastseg_kernels.constants import (
    FLOAT_DTYPES,
    ITEM_SIZES,
    TARGETS_AS_STORED,
    TARGETS_EQUAL,
    TARGETS_NONZERO,
)
from fastseg_kernels.problem import Problem
from fastseg_kernels.views import View


def with_row_axes(view: View, layout: str, name: str) -> View:
    """Give a view the axes N and C that its layout lacks, with length 1."""
    if len(view.shape) < len(layout):
        raise ValueError(
            f"{name} must have the axes {layout!r} before the spatial ones (layout={layout!r}), "
            f"got shape {view.shape}"
        )
    if layout == "NC":
        return view
    shape, strides = view.shape, view.strides
    if layout == "N":
        shape, strides = (shape[0], 1, *shape[1:]), (strides[0], 0, *strides[1:])
    elif layout == "C":
        shape, strides = (1, *shape), (0, *strides)
    else:
        shape, strides = (1, 1, *shape), (0, 0, *strides)
    return view._replace(shape=shape, strides=strides)


def matched(view: View, name: str, logits: View, layout: str, *, broadcast: bool) -> View:
    """Bring targets, a mask or a weight map to the logits' shape (N, C, *spatial).

    The class axis may be absent; one of length 1 is repeated over the classes if ``broadcast``.
    """
    if layout == "NC" and view.shape == logits.shape:
        return view
    samples, classes, *spatial = logits.shape
    has_n, has_c = "N" in layout, "C" in layout
    lead = (samples,) if has_n else ()
    full = (*lead, *((classes,) if has_c else ()), *spatial)
    bare = (*lead, *spatial)
    single = (*lead, 1, *spatial)
    n_stride = view.strides[:1] if has_n else (0,)
    if view.shape == full:
        strides = with_row_axes(view, layout, name).strides
    elif view.shape == single and broadcast:
        strides = (*n_stride, 0, *view.strides[len(lead) + 1 :])
    elif view.shape == bare and (broadcast or classes == 1):
        strides = (*n_stride, 0, *view.strides[len(lead) :])
    else:
        allowed = [full, single, bare] if broadcast else ([full, bare] if classes == 1 else [full])
        listed = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name} must have shape {listed}, got {view.shape}")
    return view._replace(shape=logits.shape, strides=strides)


def is_representable(label: int, dtype: str) -> bool:
    """Tell whether labels of ``dtype`` can hold ``label`` at all."""
    if dtype in FLOAT_DTYPES:
        return True
    if dtype == "bool":
        return label in (0, 1)
    info = np.iinfo(dtype)
    return int(info.min) <= label <= int(info.max)


def as_int64(label: int) -> int:
    """Return the int64 that has the bits of a uint64 label."""
    return label - 2**64 if label >= 2**63 else label


def make_problem(
    logits: Any,
    targets: Any,
    mask: Any,
    weight_map: Any,
    options: Options,
    activation: str,
    threshold: float = 0.0,
) -> tuple[Library, Problem]:
    """Check the arguments of a verb and describe them to a backend."""
    library = common_library(logits, "logits", targets=targets, mask=mask, weight_map=weight_map)
    plain = library.view(logits, "logits")
    if plain.dtype not in FLOAT_DTYPES:
        raise TypeError(f"logits must be floating point, got {plain.dtype}")
    layout = options.layout
    predictions = with_row_axes(plain, layout, "logits")
    truth = library.view(targets, "targets")
    truth = matched(truth, "targets", predictions, layout, broadcast=False)
    keep = weights = None
    if mask is not None:
        keep = library.view(mask, "mask")
        if keep.dtype in FLOAT_DTYPES:
            raise TypeError(
                f"mask must be boolean or integer (not 0: counts), got {keep.dtype}; weights go "
                "to weight_map"
            )
        keep = matched(keep, "mask", predictions, layout, broadcast=True)
    if weight_map is not None:
        weights = library.view(weight_map, "weight_map")
        weights = matched(weights, "weight_map", predictions, layout, broadcast=True)
    mode, positive = TARGETS_AS_STORED, 0
    if options.positive == "nonzero":
        mode = TARGETS_NONZERO
    elif options.positive is not None:
        mode, positive = TARGETS_EQUAL, int(options.positive)
        if not is_representable(positive, truth.dtype):
            raise ValueError(f"positive={positive} cannot occur in targets of dtype {truth.dtype}")
    ignore = options.ignore_index
    if ignore is not None:
        ignore = as_int64(ignore) if is_representable(ignore, truth.dtype) else None
    problem = Problem(
        predictions, truth, keep, weights, activation, mode, as_int64(positive), ignore, threshold
    )
    return library, problem


def as_numpy(view: View, shape: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
    """Return the memory of a view as a NumPy array (halves and bfloat16 as uint16), uncopied."""
    shape = view.shape if shape is None else shape
    if 0 in shape:
        return np.zeros(shape, _numpy_dtype(view))
    low, high = _extent(shape, view.strides, view.dtype)
    size = high - low
    buffer: Any = (ctypes.c_char * size).from_address(view.address + low)
    return np.ndarray(shape, _numpy_dtype(view), buffer, -low, view.strides)


def _numpy_dtype(view: View) -> np.dtype[Any]:
    dtype = np.dtype("uint16" if view.dtype == "bfloat16" else view.dtype)
    return dtype.newbyteorder("S") if view.swapped else dtype


def check_out(out: Any, library: Library, problem: Problem, layout: str) -> View:
    """Check the array that a gradient is written to; return it as (N, C, *spatial)."""
    other = library_of(out, "out")
    if other is not library:
        raise TypeError(
            f"logits and out must come from one library, got {library.name} and {other.name}"
        )
    view = library.view(out, "out", writable=True)
    logits = problem.logits
    view = with_row_axes(view, layout, "out")
    if view.shape != logits.shape:
        raise ValueError(f"out must have the shape of logits, {logits.shape}, got {view.shape}")
    double = logits.dtype == "float64"
    allowed = ("float32", "float64") if double else FLOAT_DTYPES
    if view.dtype not in allowed:
        raise TypeError(
            f"out must have dtype {', '.join(allowed)} for {logits.dtype} logits, got {view.dtype}"
        )
    if _is_broadcast(view.shape, view.strides):
        raise ValueError("out must not be a broadcast array: several voxels share its memory")
    for k, operand in enumerate(problem[:4]):
        if operand is None or operand[:5] == view[:5]:
            continue  # absent, or the very same array: every voxel is read before it is written
        if _overlap(operand, view):
            name = ("logits", "targets", "mask", "weight_map")[k]
            raise ValueError(f"out must not overlap {name} in memory (it may be logits itself)")
    return view


@lru_cache(maxsize=256)
def _is_broadcast(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    pairs = zip(strides, shape, strict=True)
    return 0 not in shape and any(step == 0 and size > 1 for step, size in pairs)


@lru_cache(maxsize=256)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Return the bytes that an array spans, relative to its first element."""
    spans = [step * (size - 1) for step, size in zip(strides, shape, strict=True)]
    low, high = sum(min(0, span) for span in spans), sum(max(0, span) for span in spans)
    return low, high + ITEM_SIZES[dtype]


def _overlap(a: View, b: View) -> bool:
    if 0 in a.shape:
        return False
    a_low, a_high = _extent(a.shape, a.strides, a.dtype)
    b_low, b_high = _extent(b.shape, b.strides, b.dtype)
    if a.address + a_high <= b.address + b_low or b.address + b_high <= a.address + a_low:
        return False
    first, second = as_numpy(a), as_numpy(b)
    try:
        work: Any = 10_000  # candidate solutions; NumPy's stub knows only its two special values
        return np.shares_memory(first, second, max_work=work)
    except np.exceptions.TooHardError:
        return True


def raise_for_invalid(problem: Problem, count: int, total: int) -> None:
    """Find the first invalid target (or probability) and say what it is; slow, only for errors."""
    targets, logits = problem.targets, problem.logits
    mask = None if problem.mask is None else as_numpy(problem.mask)
    values = as_numpy(targets)
    for index in np.ndindex(targets.shape[: min(3, len(targets.shape))]):
        kept = np.ones(values[index].shape, bool)
        seen = _readable(values[index], targets.dtype)
        if problem.ignore_index is not None:
            kept &= seen != problem.ignore_index
        if mask is not None:
            kept &= mask[index] != 0
        soft = targets.dtype in FLOAT_DTYPES and problem.target_mode == TARGETS_AS_STORED
        allowed = (seen >= 0) & (seen <= 1) if soft else (seen == 0) | (seen == 1)
        if problem.target_mode != TARGETS_AS_STORED:
            allowed = seen == seen
        wrong = np.asarray(seen)[kept & ~allowed]
        if wrong.size:
            rule = "in [0, 1]" if soft else "0 or 1"
            hint = (
                '; label volumes and 0/255 masks: use loss.replace(positive="nonzero") or '
                "positive=<label>, and ignore_index= for voxels that do not count"
            )
            raise ValueError(
                f"targets must be {rule}, got {wrong.flat[0]} (invalid voxels: {count} of {total})"
                + hint
            )
        if problem.activation == "probs":
            probs = _readable(as_numpy(logits)[index], logits.dtype)
            wrong = np.asarray(probs)[kept & ((probs < 0) | (probs > 1))]
            if wrong.size:
                raise ValueError(
                    f"with activation=None logits must be probabilities in [0, 1], got "
                    f"{wrong.flat[0]} (invalid voxels: {count} of {total})"
                )
    raise ValueError(f"targets or probabilities have invalid values ({count} of {total} voxels)")


def _readable(values: Any, dtype: str) -> Any:
    """Widen bfloat16, which NumPy sees as uint16, to float32."""
    if dtype != "bfloat16":
        return np.asarray(values)
    return (np.asarray(values).astype(np.uint32) << 16).view(np.float32)
