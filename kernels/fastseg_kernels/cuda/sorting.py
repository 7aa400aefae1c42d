"""Lovasz terms that sort, as Python calls them: errors, the array library's sort, weights."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from fastseg_kernels.constants import BASE_COLUMNS, COEFFICIENTS
from fastseg_kernels.cuda import overlap, softmax
from fastseg_kernels.cuda.modules import THREADS, TYPES
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import Evaluation, Problem

FILE = "sorting.cu"
TASK = 8 * THREADS
"""Elements of a task: a few for each thread, whose sum over threads costs little then."""
GROUPS = np.dtype(
    [
        (name, np.int64)
        for name in (
            "number",
            "length",
            "task_length",
            "tasks",
            "samples",
            "classes",
            "voxels",
            "batch",
        )
    ]
)
"""``Groups`` of sorting.cu, field by field."""


def sorted_slopes(
    device: Device,
    problem: Problem,
    sums: Any,
    result: Evaluation,
    batch: bool,
    with_slopes: bool,
) -> tuple[Evaluation, Any]:
    """Add a Lovasz term that sorts to an evaluation; as `fastseg_kernels.cpu.passes`.

    Nothing waits for the device, unless the array library's sort does. The value is changed where
    it lies.
    """
    samples, classes, *spatial = problem.shape
    voxels = prod(spatial)
    address, real = device.memory.address, problem.arrangement.real
    module = softmax if problem.arrangement.activation == "softmax" else overlap
    errors = device.empty((samples, classes, voxels), real)
    module.write_errors(device, problem, address(errors))
    number, length = (classes, samples * voxels) if batch else (samples * classes, voxels)
    if number * length == 0:
        return result, errors if with_slopes else None
    groups: Any = np.zeros(1, GROUPS)
    tasks = -(-length // TASK)
    groups[0] = (number, length, TASK, tasks, samples, classes, voxels, batch)
    grid, T = device.grid(number * tasks), TYPES[real]

    sizes = device.empty((number, length), real)
    of_errors = address(errors)
    device.launch(FILE, f"write_sizes<{T}>", grid, groups, of_errors, address(sizes))
    sizes, order = device.memory.descending(sizes)
    labels = device.empty((number, length), "int64")
    device.launch(
        FILE, f"write_labels<{T}>", grid, groups, of_errors, address(order), address(labels)
    )
    foreground = device.memory.cumulative(labels)
    del labels
    parts, width = address(result.coefficients) + 8 * COEFFICIENTS, result.coefficients.shape[2]
    of_tasks = device.empty((number, tasks))
    device.launch(
        FILE, f"weigh<{T}>", grid, groups, of_errors, address(sizes), address(order),
        address(foreground), address(sums) + 8 * BASE_COLUMNS.index("targets_sum"), sums.shape[2],
        parts + 8 if with_slopes else 0, width, address(of_tasks),
    )  # fmt: skip
    by_row, single = len(result.value.shape) > 0, "float32" in str(result.value.dtype)
    device.launch(
        FILE, f"add_extensions<{T}>", 1, groups, address(sizes), address(of_tasks), parts, width,
        by_row, single, address(result.value),
    )  # fmt: skip
    return result, errors if with_slopes else None
