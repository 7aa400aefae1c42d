"""The two passes over a volume, as Python calls them: fill a job record and launch."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import (
    FLOAT_DTYPES,
    ITEM_SIZES,
    TARGETS_AS_STORED,
    columns,
)
from fastseg_kernels.cuda.job import JOB, MOST_TASKS, fill_geometry
from fastseg_kernels.cuda.modules import GROUP, THREADS, TYPES, kernel
from fastseg_kernels.cuda.runtime import blocks_for, runtime
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import Geometry, Layout, View

FILE = "overlap.cu"
SHORTEST_BLOCK = 4 * THREADS * GROUP
"""Voxels of a task: its epilogue, a sum over the threads for each column, stays below a tenth."""
MOST_BLOCKS = 4096
"""Tasks per row at the most: what the second kernel adds up, and 400 KB of partial sums."""


class _Plan(NamedTuple):
    """What of a call depends on its arrangement alone."""

    job: Any  # all but the addresses
    variant: str  # C++: element type, targets, activation
    in_place: str | None  # C++ type of the logits, if all arrays are runs of memory
    tasks: int
    blocks: int


def block_length(voxels: int) -> int:
    """Return the voxels per task for a row of ``voxels``."""
    length = max(SHORTEST_BLOCK, -(-voxels // MOST_BLOCKS))
    step = THREADS * GROUP
    return -(-length // step) * step


def _is_run(geometry: Geometry, k: int, layout: Layout) -> bool:
    one_run = len(geometry.sizes) == 1 and geometry.strides[k][0] == ITEM_SIZES[layout.dtype]
    return one_run or geometry.sizes == (1,)


@lru_cache(maxsize=1024)
def _plan(arrangement: Arrangement, out: Layout | None) -> _Plan:
    layouts = {
        name: layout
        for name, layout in zip(JOB.names or (), (*arrangement.layouts, out), strict=False)
        if layout is not None
    }
    logits, targets = arrangement.logits, arrangement.targets
    as_stored = arrangement.target_mode == TARGETS_AS_STORED
    labelled = targets.dtype not in FLOAT_DTYPES or not as_stored
    weighted, has_ignore = arrangement.weights is not None, arrangement.ignore_index is not None
    kind = "WEIGHTED" if weighted else ("BINARY" if labelled else "SOFT")

    job = np.zeros(1, JOB)
    record: Any = job[0]
    geometry = fill_geometry(record, layouts)
    voxels = prod(arrangement.shape[2:])
    block = block_length(voxels)
    blocks = -(-voxels // block)
    record["voxels"], record["block"], record["blocks"] = voxels, block, blocks
    tasks = prod(arrangement.shape[:2]) * blocks
    if tasks > MOST_TASKS:
        raise ValueError(f"at most {MOST_TASKS} rows are supported, got {arrangement.shape[:2]}")
    record["tasks"] = tasks
    record["labelled"], record["target_mode"] = labelled, arrangement.target_mode
    record["has_ignore"] = has_ignore
    of_labels = "real" if targets.dtype in FLOAT_DTYPES else "label"  # how they are compared
    record[f"ignore_{of_labels}"] = arrangement.ignore_index or 0
    record[f"positive_{of_labels}"] = arrangement.positive
    record["threshold"] = arrangement.threshold
    if arrangement.activation == "probs":  # above 0 also in the type that is compared in
        record["threshold"] = max(arrangement.threshold, float(np.finfo(arrangement.real).tiny))
    runs = all(_is_run(geometry, k, layout) for k, layout in enumerate(layouts.values()))
    in_place = (
        kind == "BINARY"
        and as_stored
        and not has_ignore
        and arrangement.mask is None
        and targets.dtype in ("bool", "uint8")
        and (out is None or out.dtype == logits.dtype)
        and runs
    )
    variant = f"{TYPES[arrangement.real]}, {kind}, {arrangement.activation.upper()}"
    element = TYPES[logits.dtype] if in_place else None
    return _Plan(job, variant, element, tasks, blocks)


def _job(plan: _Plan, addresses: tuple[int, ...]) -> Any:
    job = plan.job.copy()
    for name, address in zip(JOB.names or (), addresses, strict=False):
        job[name]["address"] = address
    return job


def _name(plan: _Plan, verb: str, families: frozenset[str] = frozenset()) -> str:
    names = " | ".join(sorted(family.upper() for family in families)) or "0"
    variant = f"Variant<{plan.variant}, {names}>"
    if plan.in_place is None:
        return f"{verb}_anywhere<{variant}>"
    return f"{verb}_in_place<{variant}, {plan.in_place}>"


def statistics(problem: Problem, families: frozenset[str]) -> Any:
    """Return the sums of every row, float64 (N, C, K), columns as `constants.columns` names them.

    One read of every operand. The answer is on the device.
    """
    plan = _plan(problem.arrangement, None)
    samples, classes = problem.shape[:2]
    width = len(columns(families))
    device = runtime()
    if plan.tasks == 0:
        return device.array(np.zeros((samples, classes, width)))
    sums = device.empty((samples, classes, plan.blocks, width), "float64")
    total = device.empty((samples, classes, width), "float64")
    job = _job(plan, problem.addresses)
    pass_ = kernel(FILE, _name(plan, "statistics", families))
    pass_((blocks_for(plan.tasks),), (THREADS,), (job, sums))
    rows = samples * classes
    kernel(FILE, "add_tasks")((rows,), (THREADS,), (sums, plan.blocks, np.int32(width), total))
    return total


def gradient(problem: Problem, coefficients: Any, out: View) -> None:
    """Write dL/dlogits (or dL/dprobs) to ``out`` from the coefficients of every row (N, C, 4).

    One read of every operand and one write; ``out`` may be the logits themselves.
    """
    plan = _plan(problem.arrangement, out.layout)
    if plan.tasks == 0:
        return
    job = _job(plan, (*problem.addresses, out.address))
    coefficients = runtime().array(coefficients)
    name = _name(plan, "gradient")
    kernel(FILE, name)((blocks_for(plan.tasks),), (THREADS,), (job, coefficients))
