"""Counts of label volumes: hard Jaccard and Dice of many classes in one read."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from fastseg_kernels.cuda.job import JOB, fill_geometry
from fastseg_kernels.cuda.modules import THREADS, kernel
from fastseg_kernels.cuda.overlap import block_length
from fastseg_kernels.cuda.runtime import blocks_for, runtime
from fastseg_kernels.problem import Problem

VALID, COUNTS = 3, 6


def count_labels(problem: Problem, num_classes: int) -> Any:
    """Return the counts of every sample and class; as `fastseg_kernels.cpu.labels.count_labels`."""
    arrangement, shape = problem.arrangement, problem.shape
    job: Any = np.zeros(1, JOB)
    record = job[0]
    names = ("logits", "targets", "mask")
    present = dict(zip(names, arrangement.layouts, strict=False))
    fill_geometry(record, {name: layout for name, layout in present.items() if layout is not None})
    for name, address in zip(names, problem.addresses, strict=False):
        record[name]["address"] = address
    voxels = prod(shape[2:])
    block = block_length(voxels)
    blocks = -(-voxels // block)
    record["voxels"], record["block"], record["blocks"] = voxels, block, blocks
    record["classes"] = num_classes
    record["has_ignore"] = arrangement.ignore_index is not None
    record["ignore_label"] = arrangement.ignore_index or 0
    counts = runtime().array(np.zeros((shape[0], num_classes, COUNTS), np.uint64))
    tasks = shape[0] * blocks
    if tasks > 0:
        kernel("labels.cu", "count_labels")((blocks_for(tasks),), (THREADS,), (job, counts))
    numbers = counts.astype(np.float64)
    numbers[:, :, VALID:] = numbers[:, :1, VALID:]  # of the sample, whatever the class
    return numbers
