"""The two passes where the classes of a voxel share one softmax, as Python calls them."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from fastseg_kernels.constants import columns
from fastseg_kernels.cuda.histograms import add_up, make_counts, with_slopes
from fastseg_kernels.cuda.job import MOST_ROW_TASKS, OPERANDS, Jobs, counter, is_run, make_job
from fastseg_kernels.cuda.modules import SOFTMAX_CLASSES, THREADS, TYPES, flags, slope_flags
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import Layout, View

FILE = "softmax.cu"
WARPS = THREADS // 32
HELD = {"float": 8, "double": 4}
"""Voxels that a thread holds while it walks over their classes; more would be spilled."""
SHORTEST_TASK = 16384
"""Logits of a task."""
INDICES = {"bool": "unsigned char", "uint8": "unsigned char", "int64": "long long"}
"""Class indices that are read by their type; others by their code."""


class _Plan(NamedTuple):
    """What of a call depends on its arrangement alone."""

    jobs: Jobs  # all but the addresses
    real: str  # C++: the type that is computed in
    variant: str  # C++: that, kind of targets, weights
    arguments: str  # C++: types of logits and indices, and of what counts voxels
    tasks: int
    row_tasks: int


def task_length(voxels: int, classes: int, held: int) -> int:
    """Return the voxels per task for a sample of ``voxels``."""
    step = THREADS * held
    length = max(SHORTEST_TASK // classes, -(-voxels // MOST_ROW_TASKS))
    return max(1, -(-length // step)) * step


@lru_cache(maxsize=1024)
def _plan(arrangement: Arrangement, out: Layout | None) -> _Plan:
    samples, classes = arrangement.shape[:2]
    if classes > SOFTMAX_CLASSES:
        raise ValueError(f"at most {SOFTMAX_CLASSES} classes are supported, got {classes}")
    layouts = {
        name: layout
        for name, layout in zip(OPERANDS, (*arrangement.layouts, out), strict=True)
        if layout is not None
    }
    job, geometry = make_job(layouts)
    record: Any = job[0]
    real, voxels = TYPES[arrangement.real], prod(arrangement.shape[2:])
    length = task_length(voxels, classes, HELD[real])
    record["task_voxels"], record["row_tasks"] = length, -(-voxels // length)
    record["tasks"] = samples * int(record["row_tasks"])
    record["has_ignore"] = arrangement.ignore_index is not None
    record["ignore_label"] = arrangement.ignore_index or 0
    logits, targets = arrangement.logits, arrangement.targets
    in_runs = all(is_run(geometry, k, layout) for k, layout in enumerate(layouts.values()))
    known = in_runs and arrangement.indexed and targets.dtype in INDICES
    element = TYPES[logits.dtype] if known and logits.dtype == arrangement.real else "Any"
    index = INDICES[targets.dtype] if element != "Any" else "Any"
    flags = [str(flag).lower() for flag in (arrangement.indexed, arrangement.weights is not None)]
    return _Plan(
        Jobs(job),
        real,
        ", ".join([real, *flags]),
        f"{element}, {index}, {counter(voxels)}",
        int(record["tasks"]),
        int(record["row_tasks"]),
    )


def statistics(device: Device, problem: Problem, families: frozenset[str]) -> Any:
    """Return the sums of every row, as `overlap.statistics`."""
    plan = _plan(problem.arrangement, None)
    samples, classes = problem.shape[:2]
    if plan.tasks == 0:
        return device.zeros((samples, classes, len(columns(families))), "float64")
    places = plan.row_tasks * WARPS
    sums = device.empty((samples, classes, places, len(columns(families, counts=False))))
    counts, record = make_counts(device, families, (samples, classes))
    variant = f"Softmax<{plan.variant}, {flags(families)}>"
    name = f"statistics_softmax<{variant}, {HELD[plan.real]}, {plan.arguments}>"
    of_warps, grid = device.memory.address(sums), device.grid(plan.tasks)
    plan.jobs.launch(device, FILE, name, grid, problem.addresses, of_warps, record)
    return add_up(device, sums, places, families, counts, (samples, classes))


def gradient(
    device: Device,
    problem: Problem,
    coefficients: Any,
    out: View,
    families: frozenset[str],
    slopes: Any = None,
) -> None:
    """Write dL/dlogits to ``out``, as `overlap.gradient`."""
    plan = _plan(problem.arrangement, out.layout)
    if plan.tasks == 0:
        return
    of_rows, addresses = device.memory.address(coefficients), (*problem.addresses, out.address)
    variant = f"Softmax<{plan.variant}, {slope_flags(families)}>"
    name = f"gradient_softmax<{variant}, {plan.arguments}>"
    grid = device.grid(plan.tasks)
    record = with_slopes(families, 0 if slopes is None else device.memory.address(slopes))
    plan.jobs.launch(device, FILE, name, grid, addresses, of_rows, record)


def write_errors(device: Device, problem: Problem, address: int) -> None:
    """Launch the kernel that writes abs(p - q), as `overlap.write_errors`."""
    plan = _plan(problem.arrangement, None)
    if plan.tasks > 0:
        name = f"errors_softmax<Softmax<{plan.variant}>, {plan.arguments}>"
        grid = device.grid(plan.tasks)
        plan.jobs.launch(device, FILE, name, grid, problem.addresses, address)
