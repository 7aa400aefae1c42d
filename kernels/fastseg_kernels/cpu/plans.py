"""What of a call depends on the arrangement of its arrays: job records, all but their addresses."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import FLOAT_DTYPES, ITEM_SIZES, TARGETS_AS_STORED
from fastseg_kernels.cpu import overlap, softmax
from fastseg_kernels.cpu.compiled import Kernel
from fastseg_kernels.cpu.conversions import conversion, to_labels
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.label_codes import codes_kernel
from fastseg_kernels.cpu.operands import fill_operand
from fastseg_kernels.cpu.overlap import block_length
from fastseg_kernels.cpu.softmax_stage import MOST_CLASSES, tile_load_kernel
from fastseg_kernels.cpu.stage import EXCLUDED_INPUT, load_kernel, store_kernel
from fastseg_kernels.cpu.threads import SHARED_FROM
from fastseg_kernels.cpu.variants import Variant
from fastseg_kernels.problem import Arrangement
from fastseg_kernels.views import Geometry, Layout, merge_layouts


class Call(NamedTuple):
    """A kernel, and the job that it is called for: what depends on arrangement and families."""

    kernel: Kernel
    words: NDArray[np.int64]  # one job record, all but addresses and values filled in
    free: list[tuple[NDArray[np.int64], int]]  # copies, with their addresses, that no call uses now
    shape: tuple[int, ...] = ()  # of the sums of the statistics
    counted: int = 0  # columns of their histograms
    row_words: int = 0
    bins: int = 0  # of the histogram whose slopes a gradient looks up


class Plan(NamedTuple):
    """What of a call depends on its arrangement alone."""

    job: NDArray[Any]  # one record, all but addresses, values and what families need filled in
    module: Any  # whose kernels these are: `overlap` or `softmax`
    variant: Variant
    tasks: int
    blocks: int  # of a row
    task_rows: int  # rows that a task reads
    share: bool  # large enough for more than one thread
    statistics: dict[frozenset[str], Call]  # by the families that are added up
    gradients: dict[tuple[frozenset[str], bool], Call]  # by the loss's families, and by `keeps`
    keeps: bool = False  # arrays are such that statistics may keep something for the gradient


OPERANDS = ("logits", "targets", "mask", "weights", "out")
"""As they are called in a job, in the order of `Problem.addresses`."""


def is_run(geometry: Geometry, k: int, layout: Layout) -> bool:
    """Tell whether operand ``k``'s rows are runs of memory in native byte order."""
    one_run = len(geometry.sizes) == 1 and geometry.strides[k][0] == ITEM_SIZES[layout.dtype]
    return not layout.swapped and (one_run or geometry.sizes == (1,))


def fill_geometry(record: Any, layouts: dict[str, Layout]) -> Geometry:
    """Write ``layouts`` (N, C, *spatial), by their names in the job, with merged spatial axes."""
    geometry = merge_layouts(layouts.values())
    record["ndim"] = len(geometry.sizes)
    record["sizes"][: len(geometry.sizes)] = geometry.sizes
    for (name, layout), strides in zip(layouts.items(), geometry.strides, strict=True):
        fill_operand(record[name], layout, strides)
    return geometry


@lru_cache(maxsize=1024)
def plan_of(arrangement: Arrangement, out: Layout | None) -> Plan:
    """Return what calls that are arranged alike share."""
    if arrangement.activation == "softmax":
        return _softmax_plan(arrangement, out)
    logits, targets, shape = arrangement.logits, arrangement.targets, arrangement.shape
    real = arrangement.real
    as_stored = arrangement.target_mode == TARGETS_AS_STORED
    labelled = targets.dtype not in FLOAT_DTYPES or not as_stored
    weighted = arrangement.weights is not None
    kind = "weighted" if weighted else ("binary" if labelled else "soft")

    job, geometry = _new_job(arrangement, out)
    record = job[0]
    voxels = prod(shape[2:])
    interleaved = shape[1] > 1 and 0 < abs(logits.strides[1]) < abs(geometry.strides[0][-1])
    record["classes"], record["voxels"] = shape[1], voxels
    record["block"] = block_length(voxels)
    record["blocks"] = -(-voxels // block_length(voxels))
    record["inner_classes"] = shape[1] if interleaved else 1
    record["direct"] = (
        not interleaved and as_stored and _are_read_in_place(arrangement, geometry, kind)
    )
    _fill_labels(record, arrangement, labelled)
    record["threshold"] = arrangement.threshold
    record["excluded_input"] = EXCLUDED_INPUT[arrangement.activation]
    if not record["direct"]:
        record["load"] = load_kernel(real, kind == "binary").address
        _fill_targets(record, arrangement, labelled)
        _fill_conversions(record, arrangement)
    if out is not None:
        _fill_output(record, geometry, out, real)
    groups = shape[1] // int(record["inner_classes"]) if shape[1] else 0
    blocks = int(record["blocks"])
    tasks = shape[0] * groups * blocks
    variant = Variant(real, kind, arrangement.activation)
    share = prod(shape) >= SHARED_FROM
    task_rows = int(record["inner_classes"])
    lies_right = bool(record["direct"] and record["in_place"])
    keeps = lies_right and variant.of_binary_logits
    return Plan(job, overlap, variant, tasks, blocks, task_rows, share, {}, {}, keeps)


def _are_read_in_place(arrangement: Arrangement, geometry: Geometry, kind: str) -> bool:
    """Tell whether both are stored as the loops want them, with nothing that is left out."""
    logits, targets, real = arrangement.logits, arrangement.targets, arrangement.real
    wanted = ("bool", "uint8", "int8") if kind == "binary" else (real,)  # -1 is invalid as 255
    return (
        arrangement.weights is arrangement.mask is None
        and arrangement.ignore_index is None
        and logits.dtype == real
        and targets.dtype in wanted
        and is_run(geometry, 0, logits)
        and is_run(geometry, 1, targets)
    )


def _new_job(arrangement: Arrangement, out: Layout | None) -> tuple[NDArray[Any], Geometry]:
    """Return a job that knows how its operands lie, and the axes that they share."""
    job = np.zeros(1, JOB)
    layouts = {
        name: layout
        for name, layout in zip(OPERANDS, (*arrangement.layouts, out), strict=True)
        if layout is not None
    }
    return job, fill_geometry(job[0], layouts)


def _fill_labels(record: Any, arrangement: Arrangement, labelled: bool) -> None:
    """Write which labels are foreground and which do not count, in the type of the targets."""
    record["labelled"], record["target_mode"] = labelled, arrangement.target_mode
    record["has_ignore"] = arrangement.ignore_index is not None
    kind = "real" if arrangement.targets.dtype in FLOAT_DTYPES else "label"
    record[f"ignore_{kind}"] = arrangement.ignore_index or 0
    record[f"positive_{kind}"] = arrangement.positive


def _fill_output(record: Any, geometry: Geometry, out: Layout, real: str) -> None:
    """Write how ``out``, the last operand of the geometry, is written to."""
    in_place = out.dtype == real and is_run(geometry, len(geometry.strides) - 1, out)
    record["in_place"], record["store"] = in_place, 0 if in_place else store_kernel().address
    record["out"]["convert"] = conversion(real, out.dtype)


def _fill_targets(record: Any, arrangement: Arrangement, labelled: bool) -> None:
    """Write how targets become bytes, or reals."""
    if labelled:
        record["classify"] = codes_kernel(arrangement.targets.dtype).address
    else:
        record["targets"]["convert"] = conversion(arrangement.targets.dtype, arrangement.real)


def _fill_conversions(record: Any, arrangement: Arrangement) -> None:
    """Write how what else there is becomes reals; masks of one byte are looked at as such."""
    mask, weights, real = arrangement.mask, arrangement.weights, arrangement.real
    record["logits"]["convert"] = conversion(arrangement.logits.dtype, real)
    if mask is not None and (ITEM_SIZES[mask.dtype] > 1 or arrangement.activation == "softmax"):
        record["mask"]["convert"] = conversion(mask.dtype, real)
    if weights is not None:
        record["weights"]["convert"] = conversion(weights.dtype, real)


def _softmax_plan(arrangement: Arrangement, out: Layout | None) -> Plan:
    """Return the plan where a task is a block of voxels with all of its classes."""
    logits, targets, shape = arrangement.logits, arrangement.targets, arrangement.shape
    real = arrangement.real
    if shape[1] > MOST_CLASSES:
        raise ValueError(f"at most {MOST_CLASSES} classes are supported, got {shape[1]}")
    job, geometry = _new_job(arrangement, out)
    record = job[0]
    voxels, tile = prod(shape[2:]), softmax.tile_length(shape[1])
    record["classes"], record["voxels"], record["inner_classes"] = shape[1], voxels, tile
    record["block"] = block = softmax.block_length(voxels, shape[1])
    record["blocks"] = blocks = -(-voxels // block)
    is_plain = arrangement.mask is None and arrangement.weights is None
    has_ignore = arrangement.ignore_index is not None
    record["direct"] = (
        is_plain and not has_ignore and logits.dtype == real and is_run(geometry, 0, logits)
    )
    record["has_ignore"], record["ignore_label"] = has_ignore, arrangement.ignore_index or 0
    record["load"] = tile_load_kernel(real, arrangement.indexed).address
    if not arrangement.indexed:
        record["targets"]["convert"] = conversion(targets.dtype, real)
    elif targets.dtype not in ("bool", "uint8"):
        record["targets"]["convert"] = to_labels(targets.dtype)
    _fill_conversions(record, arrangement)
    if out is not None:
        _fill_output(record, geometry, out, real)
        record["store"] = store_kernel().address  # of what is not computed where it lies
    kind = "indexed" if arrangement.indexed else "soft"
    weighted = "weighted_" if arrangement.weights is not None else ""
    variant = Variant(real, weighted + kind, "softmax")
    tasks, share = shape[0] * blocks, prod(shape) >= SHARED_FROM
    return Plan(job, softmax, variant, tasks, blocks, shape[1], share, {}, {})
