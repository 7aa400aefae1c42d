"""The record by which a kernel is told of its arrays; ``Job`` of operands.cuh, field by field."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np

from fastseg_kernels.constants import DTYPE_CODES, ITEM_SIZES, MAX_DIMS
from fastseg_kernels.cuda.modules import GROUP, THREADS
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.views import Geometry, Layout, merge_layouts

OPERAND = np.dtype(
    [
        ("address", np.int64),
        ("code", np.int64),
        ("stride_n", np.int64),
        ("stride_c", np.int64),
        ("strides", np.int64, (MAX_DIMS,)),
    ]
)
OPERANDS = ("logits", "targets", "mask", "weights", "out")
JOB = np.dtype(
    [
        *((name, OPERAND) for name in OPERANDS),
        ("ndim", np.int64),
        ("sizes", np.int64, (MAX_DIMS,)),
        ("samples", np.int64),
        ("classes", np.int64),
        ("voxels", np.int64),
        ("task_voxels", np.int64),
        ("row_tasks", np.int64),
        ("tasks", np.int64),
        ("labelled", np.int64),
        ("target_mode", np.int64),
        ("has_ignore", np.int64),
        ("ignore_label", np.int64),
        ("positive_label", np.int64),
        ("ignore_real", np.float64),
        ("positive_real", np.float64),
        ("threshold", np.float64),
    ]
)


MOST_TASKS = 2**31 - 1
"""Kernels count tasks in 32 bits."""
SHORTEST_TASK = 4 * THREADS * GROUP
"""Voxels of a task: its epilogue, a sum over the threads for each column, stays below a tenth."""
MOST_ROW_TASKS = 4096
"""Tasks per row at the most: what the second kernel adds up, and 400 KB of partial sums."""
ADDRESSES = tuple(OPERAND.itemsize // 8 * k for k in range(len(OPERANDS)))
"""Where the operands' addresses are in a job seen as words: setting them so is the fastest way."""


def task_length(voxels: int) -> int:
    """Return the voxels per task for a row of ``voxels``."""
    length = max(SHORTEST_TASK, -(-voxels // MOST_ROW_TASKS))
    step = THREADS * GROUP
    return -(-length // step) * step


def make_job(layouts: dict[str, Layout]) -> tuple[Any, Geometry]:
    """Return a job for ``layouts`` (N, C, *spatial), by their names in it, and their merged axes.

    All but the addresses of the operands is filled in, and what targets mean.
    """
    job = np.zeros(1, JOB)
    record: Any = job[0]
    first, geometry = next(iter(layouts.values())), merge_layouts(layouts.values())
    record["samples"], record["classes"] = first.shape[:2]
    record["ndim"] = len(geometry.sizes)
    record["sizes"][: len(geometry.sizes)] = geometry.sizes
    for (name, layout), strides in zip(layouts.items(), geometry.strides, strict=True):
        operand = record[name]
        operand["code"] = DTYPE_CODES[layout.dtype]
        operand["stride_n"], operand["stride_c"] = layout.strides[:2]
        operand["strides"][: len(strides)] = strides
    voxels = prod(first.shape[2:])
    length = task_length(voxels)
    record["voxels"], record["task_voxels"] = voxels, length
    record["row_tasks"] = -(-voxels // length)
    record["tasks"] = tasks = prod(first.shape[:2]) * int(record["row_tasks"])
    if tasks > MOST_TASKS:
        raise ValueError(f"at most {MOST_TASKS} rows are supported, got {first.shape[:2]}")
    return job, geometry


def counter(voxels: int) -> str:
    """Return the CUDA type that counts the voxels of a row."""
    return "unsigned" if voxels < 2**32 else "unsigned long long"


class Jobs:
    """Copies of a job, one for each call that is being launched: making one takes microseconds.

    A launch copies its arguments, so a job is free once it has returned. Taking and giving are
    single steps, so that threads may share the copies.
    """

    def __init__(self, job: Any) -> None:
        self._job = job
        self._free: list[tuple[Any, Any]] = []

    def launch(
        self, device: Device, file: str, name: str, grid: int, addresses: Iterable[int], *more: Any
    ) -> None:
        """Launch a kernel with the job, its operands at ``addresses``, as the first argument."""
        try:
            words, job = self._free.pop()
        except IndexError:
            words = self._job.view(np.int64).copy()
            job = words.view(JOB)
        for word, address in zip(ADDRESSES, addresses, strict=False):
            words[word] = address
        device.launch(file, name, grid, job, *more)
        self._free.append((words, job))


def is_run(geometry: Geometry, k: int, layout: Layout) -> bool:
    """Tell whether operand ``k``'s rows are runs of memory."""
    one_run = len(geometry.sizes) == 1 and geometry.strides[k][0] == ITEM_SIZES[layout.dtype]
    return one_run or geometry.sizes == (1,)
