"""From the caller's arrays to a `Problem`: names of axes, shapes, and every check of them.

Nothing here reads an element of an array. ``outputs.py`` has the checks of what is written to.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastseg.libraries import common_library
from fastseg.libraries.base import Library
from fastseg.options import Options
from fastseg_kernels.constants import (
    FLOAT_DTYPES,
    TARGETS_AS_STORED,
    TARGETS_EQUAL,
    TARGETS_NONZERO,
)
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import Layout


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
        raise TypeError(
            f"{name} must be floating point, got {logits.dtype}; pass {name}.astype('float32')"
        )
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
    return Arrangement(
        predictions,
        truth,
        mask,
        weights,
        activation,
        mode,
        as_stored(positive, truth.dtype),
        _ignored(options.ignore_index, truth.dtype),
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
    return Arrangement(
        logits,
        truth,
        _of_voxels(mask, "mask", logits, layout),
        _of_voxels(weights, "weight_map", logits, layout),
        "softmax",
        ignore_index=_ignored(options.ignore_index, truth.dtype),
        double=options.compute_dtype == "float64",
        indexed=not soft,
    )


def _ignored(label: int | None, dtype: str) -> int | None:
    """Return the label of voxels that do not count, None if targets of ``dtype`` cannot have it."""
    if label is None or not is_representable(label, dtype):
        return None
    return as_stored(label, dtype)


def _of_voxels(operand: Layout | None, name: str, logits: Layout, layout: str) -> Layout | None:
    """Return a mask or a weight map in the logits' shape, which all classes of a voxel share."""
    if operand is None:
        return None
    operand = matched(operand, name, logits, layout, broadcast=True)
    if operand.strides[1] != 0:
        raise ValueError(
            f"{name} must lack the class axis with softmax, which a voxel's classes share"
        )
    return operand


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
