"""The two passes over a volume, as Python calls them: fill a job record and run it."""

from __future__ import annotations

from ctypes import addressof, c_char
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    COEFFICIENTS,
    FLOAT_DTYPES,
    ITEM_SIZES,
    MAX_DIMS,
    TARGETS_AS_STORED,
    columns,
)
from fastseg_kernels.cpu import threads
from fastseg_kernels.cpu.compiled import Kernel
from fastseg_kernels.cpu.operands import fill_operand
from fastseg_kernels.cpu.overlap import block_length, gradient_kernel, statistics_kernel
from fastseg_kernels.cpu.points import Variant
from fastseg_kernels.cpu.stage import EXCLUDED_INPUT, JOB, load_kernel, store_kernel
from fastseg_kernels.problem import Problem
from fastseg_kernels.views import Geometry, View, merge_axes

SHARED_FROM = 16384
"""Voxels from which a second thread pays for itself: 5 us of work, against 2 us to wake it."""


class _Plan(NamedTuple):
    """What of a call depends on shapes, strides and dtypes alone."""

    words: NDArray[np.int64]  # one job record, all but addresses and values filled in
    variant: Variant
    tasks: int
    blocks: int
    share: bool  # large enough for more than one thread


def _word(*path: str) -> int:
    """Return where a field lies in a job, counted in words of eight bytes."""
    dtype, position = JOB, 0
    for name in path:
        assert dtype.fields is not None
        dtype, offset = dtype.fields[name][:2]
        position += offset
    return position // 8


# A call sets a few words of a flat copy: copying a nested record costs 16 us, this 0.3.
OPERANDS = ("logits", "targets", "mask", "weights", "out")
ADDRESSES = tuple(_word(name, "address") for name in OPERANDS)
LOAD, STORE, DIRECT, IN_PLACE, SUMS, COEFFICIENT_TABLE = (
    _word(name) for name in ("load", "store", "direct", "in_place", "sums", "coefficients")
)
THRESHOLD, IGNORE_LABEL, IGNORE_REAL, POSITIVE_LABEL, POSITIVE_REAL = (
    _word(name)
    for name in ("threshold", "ignore_label", "ignore_real", "positive_label", "positive_real")
)


def compute_type(dtype: str) -> str:
    """Return the type that logits of ``dtype`` are computed in."""
    return "float64" if dtype == "float64" else "float32"


def _is_run(geometry: Geometry, k: int, dtype: str, swapped: bool) -> bool:
    """Tell whether operand ``k``'s rows are runs of memory in native byte order."""
    one_run = len(geometry.sizes) == 1 and geometry.strides[k][0] == ITEM_SIZES[dtype]
    return not swapped and (one_run or geometry.sizes == (1,))


def fill_geometry(record: Any, shape: tuple[int, ...], views: dict[str, View]) -> Geometry:
    """Write ``views`` (N, C, *spatial), by their names in the job, with merged spatial axes."""
    geometry = merge_axes(shape[2:], tuple(view.strides[2:] for view in views.values()))
    if len(geometry.sizes) > MAX_DIMS:
        raise ValueError(
            f"at most {MAX_DIMS} spatial axes that do not lie next to each other in memory are "
            f"supported, got {len(geometry.sizes)}; pass contiguous copies"
        )
    record["ndim"] = len(geometry.sizes)
    record["sizes"][: len(geometry.sizes)] = geometry.sizes
    for (name, view), strides in zip(views.items(), geometry.strides, strict=True):
        fill_operand(record[name], view, strides)
    return geometry


@lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...],
    layouts: tuple[tuple[Any, ...] | None, ...],  # logits, targets, mask, weights, out
    activation: str,
    target_mode: int,
    has_ignore: bool,
) -> _Plan:
    logits, targets, mask, weights, out = layouts
    assert logits is not None and targets is not None
    real = compute_type(logits[1])
    labelled = targets[1] not in FLOAT_DTYPES or target_mode != TARGETS_AS_STORED
    kind = "weighted" if weights is not None else ("binary" if labelled else "soft")

    job = np.zeros(1, JOB)
    record = job[0]
    views = {
        name: View(0, shape, layout[0], layout[1], layout[2], True, None)
        for name, layout in zip(OPERANDS, layouts, strict=True)
        if layout is not None
    }
    geometry = fill_geometry(record, shape, views)
    voxels = prod(shape[2:])
    interleaved = shape[1] > 1 and 0 < abs(logits[0][1]) < abs(geometry.strides[0][-1])
    record["classes"], record["voxels"] = shape[1], voxels
    record["block"] = block_length(voxels)
    record["blocks"] = -(-voxels // block_length(voxels))
    record["inner_classes"] = shape[1] if interleaved else 1
    wanted = ("bool", "uint8") if kind == "binary" else (real,)
    record["direct"] = (
        kind != "weighted"
        and mask is None
        and not has_ignore
        and logits[1] == real
        and targets[1] in wanted
        and target_mode == TARGETS_AS_STORED
        and _is_run(geometry, 0, logits[1], logits[2])
        and _is_run(geometry, 1, targets[1], targets[2])
        and not interleaved
    )
    record["labelled"], record["target_mode"] = labelled, target_mode
    record["has_ignore"] = has_ignore
    record["excluded_input"] = EXCLUDED_INPUT[activation]
    if out is not None:
        record["in_place"] = out[1] == real and _is_run(geometry, len(views) - 1, out[1], out[2])
    groups = shape[1] // int(record["inner_classes"]) if shape[1] else 0
    blocks = int(record["blocks"])
    tasks = shape[0] * groups * blocks
    words = job.view(np.int64)
    return _Plan(words, Variant(real, kind, activation), tasks, blocks, prod(shape) >= SHARED_FROM)


def _prepare(problem: Problem, out: View | None) -> tuple[_Plan, NDArray[np.int64]]:
    """Return the plan of a call and a job with the addresses filled in."""
    operands = (problem.logits, problem.targets, problem.mask, problem.weights, out)
    plan = _plan(
        problem.logits.shape,
        tuple([None if v is None else (v.strides, v.dtype, v.swapped) for v in operands]),
        problem.activation,
        problem.target_mode,
        problem.ignore_index is not None,
    )
    words = plan.words.copy()
    for word, view in zip(ADDRESSES, operands, strict=True):
        if view is not None:
            words[word] = view.address
    if not words[DIRECT]:
        reals = words.view(np.float64)
        if problem.ignore_index is not None:
            words[IGNORE_LABEL] = reals[IGNORE_REAL] = problem.ignore_index
        words[POSITIVE_LABEL] = reals[POSITIVE_REAL] = problem.positive
        words[LOAD] = load_kernel(plan.variant.real, plan.variant.targets == "binary").address
    return plan, words


def _address(array: Any) -> int:
    """Return where a contiguous array of our own lies, in a quarter of ``ctypes.data``'s time."""
    return array.ctypes.data if array.size == 0 else addressof(c_char.from_buffer(array))


@cache
def _with_families(variant: Variant, families: frozenset[str]) -> tuple[Kernel, int]:
    """Return the kernel of a variant with families, and how many columns it fills."""
    kernel = statistics_kernel(variant._replace(families=families))
    return kernel, len(columns(families))


def statistics(problem: Problem, families: frozenset[str]) -> NDArray[np.float64]:
    """Return the sums of every row, float64 (N, C, K), columns as `constants.columns` names them.

    One read of every operand; nothing of the volume's size is allocated.
    """
    plan, words = _prepare(problem, None)
    kernel, width = _with_families(plan.variant, families)
    partial = np.empty((*problem.logits.shape[:2], plan.blocks, width))
    words[SUMS] = _address(partial)
    if problem.threshold != 0.0:
        words.view(np.float64)[THRESHOLD] = problem.threshold
    threads.run(kernel, _address(words), plan.tasks, plan.share)
    if plan.blocks == 1:
        return partial[:, :, 0]
    total: NDArray[np.float64] = partial.sum(axis=2)
    return total


def gradient(problem: Problem, coefficients: NDArray[np.float64], out: View) -> None:
    """Write dL/dlogits (or dL/dprobs) to ``out`` from the coefficients of every row (N, C, 4).

    One read of every operand and one write. ``out`` may be the logits themselves.
    """
    plan, words = _prepare(problem, out)
    assert coefficients.shape == (*problem.logits.shape[:2], COEFFICIENTS)
    coefficients = np.ascontiguousarray(coefficients)
    words[COEFFICIENT_TABLE] = _address(coefficients)
    if out.address == problem.logits.address:
        words[IN_PLACE] = 0  # LLVM's check for overlap would send the loop down its scalar path
    if not words[IN_PLACE]:
        words[STORE] = store_kernel(plan.variant.real).address
    threads.run(gradient_kernel(plan.variant), _address(words), plan.tasks, plan.share)
