"""Counts of label volumes: hard Jaccard and Dice of many classes in one read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cuda.job import OPERANDS, Jobs, counter, make_job
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import Problem

VALID, COUNTS = 3, 6


def count_labels(device: Device, problem: Problem, num_classes: int) -> NDArray[np.float64]:
    """Return the counts of every sample and class, on the host.

    As `fastseg_kernels.cpu.labels.count_labels`.
    """
    arrangement, samples = problem.arrangement, problem.shape[0]
    layouts = {
        name: layout
        for name, layout in zip(OPERANDS, arrangement.layouts, strict=False)
        if layout is not None
    }
    job, _ = make_job(layouts)
    record: Any = job[0]
    tasks, voxels = int(record["tasks"]), int(record["voxels"])
    record["classes"] = num_classes
    record["has_ignore"] = arrangement.ignore_index is not None
    record["ignore_label"] = arrangement.ignore_index or 0
    counts = device.zeros((samples, num_classes, COUNTS), "int64")
    if tasks > 0:
        name = f"count_labels<{counter(voxels)}>"
        grid, of_classes = device.grid(tasks), device.memory.address(counts)
        Jobs(job).launch(device, "labels.cu", name, grid, problem.addresses, of_classes)
    numbers = device.memory.to_host(counts).astype(np.float64)
    numbers[:, :, VALID:] = numbers[:, :1, VALID:]  # of the sample, whatever the class
    return numbers
