"""The two passes over a volume, as Python calls them: fill a job record and launch."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import FLOAT_DTYPES, TARGETS_AS_STORED, columns
from fastseg_kernels.cuda import softmax
from fastseg_kernels.cuda.histograms import add_up, make_counts, with_slopes
from fastseg_kernels.cuda.job import OPERANDS, Jobs, counter, is_run, make_job
from fastseg_kernels.cuda.modules import TYPES, flags, slope_flags
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import Layout, View

FILE = "overlap.cu"
TARGETS = {
    "bool": "unsigned char",
    "uint8": "unsigned char",
    "int64": "long long",
    "float32": "float",
}
"""Targets that are read by vectors: masks, PyTorch's labels, and what MONAI makes of labels."""


class _Plan(NamedTuple):
    """What of a call depends on its arrangement alone."""

    jobs: Jobs  # all but the addresses
    variant: str  # C++: element type, targets, activation
    way: str  # "in_place" or "anywhere": the two sets of kernels
    argument: str  # C++: their last template arguments
    tasks: int
    row_tasks: int
    names: dict[tuple[str, frozenset[str]], str]  # of kernels, by verb and families


@lru_cache(maxsize=1024)
def _plan(arrangement: Arrangement, out: Layout | None) -> _Plan:
    layouts = {
        name: layout
        for name, layout in zip(OPERANDS, (*arrangement.layouts, out), strict=True)
        if layout is not None
    }
    logits, targets = arrangement.logits, arrangement.targets
    as_stored = arrangement.target_mode == TARGETS_AS_STORED
    labelled = targets.dtype not in FLOAT_DTYPES or not as_stored
    weighted, has_ignore = arrangement.weights is not None, arrangement.ignore_index is not None
    kind = "WEIGHTED" if weighted else ("BINARY" if labelled else "SOFT")

    job, geometry = make_job(layouts)
    record: Any = job[0]
    record["labelled"], record["target_mode"] = labelled, arrangement.target_mode
    record["has_ignore"] = has_ignore
    of_labels = "real" if targets.dtype in FLOAT_DTYPES else "label"  # how they are compared
    record[f"ignore_{of_labels}"] = arrangement.ignore_index or 0
    record[f"positive_{of_labels}"] = arrangement.positive
    record["threshold"] = arrangement.threshold
    if arrangement.activation == "probs":  # above 0 also in the type that is compared in
        record["threshold"] = max(arrangement.threshold, float(np.finfo(arrangement.real).tiny))
    in_place = (
        not weighted
        and as_stored
        and not has_ignore
        and arrangement.mask is None
        and targets.dtype in TARGETS
        and (out is None or out.dtype == logits.dtype)
        and all(is_run(geometry, k, layout) for k, layout in enumerate(layouts.values()))
    )
    variant = f"{TYPES[arrangement.real]}, {kind}, {arrangement.activation.upper()}"
    way = "in_place" if in_place else "anywhere"
    argument = counter(int(record["voxels"]))
    if in_place:
        argument = f"{TYPES[logits.dtype]}, {TARGETS[targets.dtype]}"
    tasks, row_tasks = int(record["tasks"]), int(record["row_tasks"])
    return _Plan(Jobs(job), variant, way, argument, tasks, row_tasks, {})


def _name(plan: _Plan, verb: str, families: frozenset[str]) -> str:
    """Return the name of the kernel of a verb for a loss that is made of ``families``."""
    name = plan.names.get((verb, families))
    if name is None:
        sums = flags(families) if verb == "statistics" else slope_flags(families)
        name = f"{verb}_{plan.way}<Variant<{plan.variant}, {sums}>, {plan.argument}>"
        plan.names[verb, families] = name
    return name


def keeps(device: Device, problem: Problem, families: frozenset[str], out: View) -> bool:
    """Return False: a GPU computes while it waits for memory, and what is kept would be written."""
    return False


def small_call(device: Device, *arguments: Any) -> None:
    """Return None: a graph does for a GPU what one call for all steps does for a CPU."""


def statistics(
    device: Device, problem: Problem, families: frozenset[str], keep: View | None = None
) -> Any:
    """Return the sums of every row, float64 (N, C, K), columns as `constants.columns` names them.

    One read of every operand. The answer is on the device.
    """
    if problem.arrangement.activation == "softmax":
        return softmax.statistics(device, problem, families)
    plan = _plan(problem.arrangement, None)
    samples, classes = problem.shape[:2]
    if plan.tasks == 0:
        return device.zeros((samples, classes, len(columns(families))), "float64")
    sums = device.empty((plan.tasks, len(columns(families, counts=False))))
    counts, record = make_counts(device, families, (samples, classes))
    name, grid = _name(plan, "statistics", families), device.grid(plan.tasks)
    of_tasks = device.memory.address(sums)
    plan.jobs.launch(device, FILE, name, grid, problem.addresses, of_tasks, record)
    return add_up(device, sums, plan.row_tasks, families, counts, (samples, classes))


def gradient(
    device: Device,
    problem: Problem,
    coefficients: Any,
    out: View,
    families: frozenset[str] = frozenset(),
    slopes: Any = None,
    kept: bool = False,
) -> None:
    """Write dL/dlogits (or dL/dprobs) to ``out`` from the coefficients of every row.

    ``coefficients`` are as `evaluation.evaluate` makes them for a loss that is made of
    ``families``. One read of every operand and one write; ``out`` may be the logits themselves.
    """
    if problem.arrangement.activation == "softmax":
        softmax.gradient(device, problem, coefficients, out, families, slopes)
        return
    plan = _plan(problem.arrangement, out.layout)
    if plan.tasks == 0:
        return
    grid, of_rows = device.grid(plan.tasks), device.memory.address(coefficients)
    addresses = (*problem.addresses, out.address)
    name = _name(plan, "gradient", families)
    record = with_slopes(families, 0 if slopes is None else device.memory.address(slopes))
    plan.jobs.launch(device, FILE, name, grid, addresses, of_rows, record)


def write_errors(device: Device, problem: Problem, address: int) -> None:
    """Launch the kernel that writes the errors of the Lovasz hinge, which `sorting` describes."""
    plan = _plan(problem.arrangement, None)
    if plan.tasks > 0:
        name = f"errors_anywhere<Variant<{plan.variant}, 0>, {counter(prod(problem.shape[2:]))}>"
        grid = device.grid(plan.tasks)
        plan.jobs.launch(device, FILE, name, grid, problem.addresses, address)
