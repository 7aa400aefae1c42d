"""Counts of label volumes: hard Jaccard and Dice of many classes in one read."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cpu import threads
from fastseg_kernels.cpu.compiled import Kernel, function, pasted
from fastseg_kernels.cpu.conversions import to_labels
from fastseg_kernels.cpu.intrinsics import address_of, carray, pointer_to, stack_array
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.operands import SCRATCH_WORDS, STAGE, load_converted
from fastseg_kernels.cpu.overlap import block_length
from fastseg_kernels.cpu.plans import fill_geometry
from fastseg_kernels.cpu.threads import SHARED_FROM
from fastseg_kernels.problem import Problem

HITS, PREDICTED, TRUE, VALID, INVALID_PREDICTED, INVALID_TARGET = range(6)
COUNTS = 6
FEW = 32
"""Classes up to which pairs are counted: 4 tables of 33 x 33 fit the first-level cache."""
WAYS = 4
"""Tables that voxels go to in turn: the next of a class need not wait for the last one's count."""
PAIRS = WAYS * ((FEW + 1) ** 2 + 1)
"""Entries of the tables: of any label outside, too, and one for voxels that do not count."""


@function
def _empty_table(job, task):  # type: ignore[no-untyped-def]
    """Return the table of a task's block, of zeros."""
    size = COUNTS * job.classes
    table = pointer_to(job.sums + 8 * size * task, np.int64)
    for k in range(size):
        table[k] = 0
    return table


@pasted
def _bring(job, n, voxel, length, predicted, true, keep, scratch):  # type: ignore[no-untyped-def]
    """Bring labels, and the mask where there is one, into buffers."""
    load_converted(job.logits, job, n, 0, voxel, length, scratch, address_of(predicted))
    load_converted(job.targets, job, n, 0, voxel, length, scratch, address_of(true))
    if job.mask.address != 0:
        load_converted(job.mask, job, n, 0, voxel, length, scratch, address_of(keep))


@cache
def label_kernel() -> Kernel:
    """Compile the kernel that fills ``job.sums``, int64 (N, blocks, num_classes, COUNTS)."""

    def count(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        predicted, true = stack_array(STAGE, np.int64), stack_array(STAGE, np.int64)
        keep = stack_array(STAGE, np.int64)
        scratch = address_of(stack_array(SCRATCH_WORDS, np.int64))
        for task in range(first, last):
            n, block = task // job.blocks, task % job.blocks
            table = _empty_table(job, task)
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            while voxel < end:
                length = min(STAGE, end - voxel)
                _bring(job, n, voxel, length, predicted, true, keep, scratch)
                for i in range(length):
                    p, t = predicted[i], true[i]
                    if job.has_ignore != 0 and t == job.ignore_label:
                        continue
                    if job.mask.address != 0 and keep[i] == 0:
                        continue
                    table[VALID] += 1
                    known_p, known_t = 0 <= p < job.classes, 0 <= t < job.classes
                    if known_p:
                        table[COUNTS * p + PREDICTED] += 1
                    else:
                        table[INVALID_PREDICTED] += 1
                    if known_t:
                        table[COUNTS * t + TRUE] += 1
                    else:
                        table[INVALID_TARGET] += 1
                    if known_p and p == t:
                        table[COUNTS * p + HITS] += 1
                voxel += length

    return Kernel(count, "label-counts")


@cache
def pair_kernel() -> Kernel:
    """Compile the same for `FEW` classes: pairs of labels are counted, and sums made of those.

    One count a voxel instead of three. Pairs are added up over the blocks of a sample that one
    thread has, and go to the first of them.
    """

    def count_pairs(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        predicted, true = stack_array(STAGE, np.int64), stack_array(STAGE, np.int64)
        keep = stack_array(STAGE, np.int64)
        scratch = address_of(stack_array(SCRATCH_WORDS, np.int64))
        pairs = stack_array(PAIRS, np.int64)
        classes, side = job.classes, job.classes + 1  # the last of a side: any other label
        nowhere = side * side
        ways = nowhere + 1
        size = COUNTS * classes
        ignored = job.ignore_label if job.has_ignore != 0 else np.int64(-1)
        has_ignore, has_mask = job.has_ignore != 0, job.mask.address != 0
        owner = first
        for task in range(first, last):
            n, block = task // job.blocks, task % job.blocks
            table = _empty_table(job, task)
            if task == first or block == 0:
                owner = task
                for k in range(WAYS * ways):
                    pairs[k] = 0
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            while voxel < end:
                length = min(STAGE, end - voxel)
                _bring(job, n, voxel, length, predicted, true, keep, scratch)
                for i in range(length):
                    p, t = predicted[i], true[i]
                    p = p if (p >= 0) & (p < classes) else classes
                    code = p * side + (t if (t >= 0) & (t < classes) else classes)
                    predicted[i] = nowhere if has_ignore & (t == ignored) else code
                if has_mask:
                    for i in range(length):
                        predicted[i] = predicted[i] if keep[i] != 0 else nowhere
                whole = length - length % WAYS
                for i in range(0, whole, WAYS):
                    for way in range(WAYS):
                        pairs[way * ways + predicted[i + way]] += 1
                for i in range(whole, length):
                    pairs[predicted[i]] += 1
                voxel += length
            if task == last - 1 or block == job.blocks - 1:
                table = pointer_to(job.sums + 8 * size * owner, np.int64)
                for p in range(side):
                    for t in range(side):
                        number = np.int64(0)
                        for way in range(WAYS):
                            number += pairs[way * ways + p * side + t]
                        table[VALID] += number
                        if p < classes:
                            table[COUNTS * p + PREDICTED] += number
                        else:
                            table[INVALID_PREDICTED] += number
                        if t < classes:
                            table[COUNTS * t + TRUE] += number
                        else:
                            table[INVALID_TARGET] += number
                        if p == t and p < classes:
                            table[COUNTS * p + HITS] += number

    return Kernel(count_pairs, "label-pairs")


def count_labels(problem: Problem, num_classes: int) -> NDArray[np.float64]:
    """Return the counts of every sample and class, float64 (N, num_classes, COUNTS).

    The logits of ``problem`` are predicted labels here. The last axis holds true positives,
    predicted and true voxels, valid voxels, and how many predicted and true labels are outside
    [0, num_classes).
    """
    arrangement, shape = problem.arrangement, problem.shape
    job: Any = np.zeros(1, JOB)
    record = job[0]
    names = ("logits", "targets", "mask")
    present = dict(zip(names, arrangement.layouts, strict=False))
    fill_geometry(record, {name: layout for name, layout in present.items() if layout is not None})
    for name, address in zip(names, problem.addresses, strict=False):
        record[name]["address"] = address
        layout = present[name]
        record[name]["convert"] = 0 if layout is None else to_labels(layout.dtype)
    voxels = prod(shape[2:])
    # A block's table is num_classes rows: long blocks keep it small beside the labels it counts.
    block = max(block_length(voxels), 64 * num_classes)
    record["voxels"], record["block"], record["blocks"] = voxels, block, -(-voxels // block)
    record["classes"] = num_classes
    record["has_ignore"] = arrangement.ignore_index is not None
    record["ignore_label"] = arrangement.ignore_index or 0
    blocks = -(-voxels // block)
    tables = np.empty((shape[0], blocks, num_classes, COUNTS), np.int64)
    record["sums"] = tables.ctypes.data
    tasks = shape[0] * blocks
    kernel = pair_kernel() if num_classes <= FEW else label_kernel()
    threads.run(kernel, job.ctypes.data, tasks, prod(shape) >= SHARED_FROM, (job, tables, problem))
    counts: NDArray[np.float64] = tables.sum(axis=1).astype(np.float64)
    counts[:, :, VALID:] = counts[:, :1, VALID:]  # of the sample, whatever the class
    return counts
