"""The two passes over a volume, as Python calls them: fill a job record and run it."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    BASE_COLUMNS,
    COEFFICIENTS,
    coefficient_width,
    columns,
    gamma_of,
    lovasz_histogram,
    without_gamma,
)
from fastseg_kernels.cpu import overlap, sorting, threads
from fastseg_kernels.cpu.histograms import (
    prepare_counts,
    prepare_look_up,
    signed_slopes,
    task_words,
)
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.memory import own_address
from fastseg_kernels.cpu.plans import OPERANDS, Call, Plan, plan_of
from fastseg_kernels.cpu.stage import store_kernel
from fastseg_kernels.problem import Arrangement, Evaluation, Problem
from fastseg_kernels.views import View, in_order_of


def _word(*path: str) -> int:
    """Return where a field lies in a job, counted in words of eight bytes."""
    dtype, position = JOB, 0
    for name in path:
        assert dtype.fields is not None
        dtype, offset = dtype.fields[name][:2]
        position += offset
    return position // 8


NOT_KEPT = frozenset({"bce_flipped", "focal_bce", "sorted"})
"""Families whose gradient needs more of a voxel than is kept."""

# A call sets a few words of a flat copy: copying a nested record costs 16 us, this 0.3.
ADDRESSES = tuple(_word(name, "address") for name in OPERANDS)
STORE, IN_PLACE, SUMS, COUNTS, WORDS, PARTS, SIGNED, SLOPES, COEFFICIENT_TABLE = (
    _word(name)
    for name in (
        "store", "in_place", "sums", "counts", "words", "parts", "signed", "slopes", "coefficients"
    )
)  # fmt: skip


def _take_job(call: Call, addresses: tuple[int, ...]) -> tuple[NDArray[np.int64], int]:
    """Return a job of the call and its address, with the operands' addresses filled in.

    The caller gives it back to ``call.free``. Making one takes a microsecond, as much as a small
    kernel. Taking and giving are single steps, so that threads may share a plan.
    """
    try:
        words, address = call.free.pop()
    except IndexError:
        words = call.words.copy()
        address = own_address(words)
    for word, operand in zip(ADDRESSES, addresses, strict=False):
        words[word] = operand
    return words, address


@lru_cache(maxsize=1024)
def _slopes_of_kept(families: frozenset[str]) -> bool:
    """Tell whether the gradient of a loss that is made of ``families`` needs only what is kept."""
    return not without_gamma(families) & NOT_KEPT and lovasz_histogram(families) is None


def keeps(problem: Problem, families: frozenset[str], out: View) -> bool:
    """Tell whether the statistics may keep in ``out`` what `gradient` then makes a gradient of.

    ``families``: the loss's.
    """
    plan = plan_of(problem.arrangement, out.layout)
    if not plan.keeps or out.address == problem.addresses[0]:
        return False
    return _slopes_of_kept(families)


def call_of_statistics(
    arrangement: Arrangement, plan: Plan, families: frozenset[str], keeping: bool
) -> Call:
    """Return the call that adds up the sums of ``families``."""
    variant, job = plan.variant, plan.job.copy()
    job["gamma"] = gamma_of(families)
    prepare_counts(job[0], (variant.real, variant.activation, variant.targets), families)
    width = len(columns(families, counts=False))
    kernel = plan.module.statistics_kernel(job[0], variant.adding(families)._replace(kept=keeping))
    return Call(
        kernel,
        job.view(np.int64),
        [],
        (*arrangement.shape[:2], plan.blocks, width),
        len(columns(families)) - width,
        task_words(families),
    )


def call_of_gradient(plan: Plan, families: frozenset[str], kept: bool) -> Call:
    """Return the call that writes the gradient of a loss made of ``families``."""
    variant, job = plan.variant, plan.job.copy()
    histogram = lovasz_histogram(families)
    if histogram is not None:
        prepare_look_up(job[0], (variant.real, variant.activation, variant.targets), histogram)
    job["coefficient_width"] = coefficient_width(families)
    kernel = plan.module.gradient_kernel(job[0], variant.sloping(families)._replace(kept=kept))
    return Call(kernel, job.view(np.int64), [], bins=histogram.bins if histogram else 0)


def statistics(
    problem: Problem, families: frozenset[str], keep: View | None = None
) -> NDArray[np.float64]:
    """Return the sums of every row, float64 (N, C, K), columns as `constants.columns` names them.

    One read of every operand; nothing of the volume's size is allocated. ``keep``: the ``out`` of
    the `gradient` that follows with ``kept=True``, where `keeps` allows it.
    """
    arrangement = problem.arrangement
    plan = plan_of(arrangement, None if keep is None else keep.layout)
    call = plan.statistics.get(families)
    if call is None:
        made = call_of_statistics(arrangement, plan, families, keep is not None)
        call = plan.statistics[families] = made
    job = _take_job(call, problem.addresses if keep is None else (*problem.addresses, keep.address))
    words, address = job
    partial = np.empty(call.shape)
    words[SUMS] = own_address(partial)
    counts = own = parts = None
    if call.counted:
        counts = np.zeros((*call.shape[:2], call.counted), np.int64)
        parts = threads.parts_of(plan.tasks, plan.share)
        own = np.zeros((parts, plan.task_rows, call.row_words), np.int64)
        words[COUNTS], words[WORDS], words[PARTS] = own_address(counts), own_address(own), 0
    memory = (job, partial, counts, own, problem)
    threads.run(call.kernel, address, plan.tasks, plan.share, memory, parts)
    call.free.append(job)
    total: NDArray[np.float64] = partial[:, :, 0] if plan.blocks == 1 else partial.sum(axis=2)
    return total if counts is None else np.concatenate([total, counts], axis=2)


def gradient(
    problem: Problem,
    coefficients: NDArray[np.float64],
    out: View,
    families: frozenset[str] = frozenset(),
    slopes: NDArray[Any] | None = None,
    kept: bool = False,
) -> None:
    """Write dL/dlogits (or dL/dprobs) to ``out`` from the coefficients of every row.

    ``coefficients`` are C-contiguous, as `evaluation.evaluate` makes them for a loss that is made
    of ``families``. One read of every operand and one write; ``out`` may be the logits themselves.
    ``slopes`` are those of a Lovasz term that sorts, as `sorted_slopes` makes them. ``kept``: the
    statistics were taken with ``keep=out``, and ``out`` is read in place of the logits.
    """
    plan = plan_of(problem.arrangement, out.layout)
    call = plan.gradients.get((families, kept))
    if call is None:
        call = plan.gradients[families, kept] = call_of_gradient(plan, families, kept)
    job = _take_job(call, (*problem.addresses, out.address))
    words, address = job
    words[COEFFICIENT_TABLE] = own_address(coefficients)
    signed = signed_slopes(coefficients, call.bins, plan.variant.real) if call.bins else None
    words[SIGNED] = 0 if signed is None else own_address(signed)
    words[SLOPES] = 0 if slopes is None else own_address(slopes)
    same = out.address == problem.addresses[0] and words[IN_PLACE] != 0
    over_itself = same and plan.module is overlap
    if over_itself:  # LLVM's check for overlap would send the loop down its scalar path
        words[IN_PLACE], words[STORE] = 0, store_kernel().address
    memory = (job, coefficients, signed, slopes, problem, out)
    threads.run(call.kernel, address, plan.tasks, plan.share, memory)
    if over_itself:
        words[IN_PLACE] = 1
    call.free.append(job)


def sorted_slopes(
    problem: Problem,
    sums: NDArray[np.float64],
    result: Evaluation,
    batch: bool,
    with_slopes: bool,
) -> tuple[Evaluation, NDArray[Any] | None]:
    """Sort the errors of a Lovasz term; return the evaluation with its value, and its slopes.

    Parameters
    ----------
    problem
        Predictions and targets.
    sums
        What `statistics` returned.
    result
        What `evaluation.evaluate` made of a table with the term.
    batch
        Whether the samples are sorted together.
    with_slopes
        Whether slopes are wanted.

    Returns
    -------
    result
        With the term in the value.
    slopes
        dL/dlogits, or with softmax dL/dq: (N, C, voxels) of the type that is computed in.
    """
    arrangement = problem.arrangement
    samples, classes, *spatial = arrangement.shape
    real = np.dtype(arrangement.real)
    errors = np.empty((samples, classes, prod(spatial)), real)
    layout = in_order_of(arrangement.logits, arrangement.real, real.itemsize)
    plan = plan_of(arrangement, layout)
    job = plan.job.copy()
    kernel = plan.module.errors_kernel(job[0], plan.variant)
    words = job.view(np.int64)
    for word, address in zip(ADDRESSES, (*problem.addresses, own_address(errors)), strict=True):
        words[word] = address
    nothing = np.zeros(COEFFICIENTS)  # for every row: their width is 0 in this job
    words[COEFFICIENT_TABLE] = own_address(nothing)
    threads.run(kernel, own_address(words), plan.tasks, plan.share, (job, nothing, errors, problem))
    coefficients = result.coefficients
    factors = np.ascontiguousarray(coefficients[:, :, COEFFICIENTS + 1]) if with_slopes else None
    foreground = np.ascontiguousarray(sums[:, :, BASE_COLUMNS.index("targets_sum")])
    values = sorting.weigh(errors, foreground, batch, factors)
    parts = coefficients[: len(values), :, COEFFICIENTS]
    more = np.where(parts == 0.0, 0.0, parts * values)
    value = result.value + (more if result.value.shape == more.shape else more.sum())
    return result._replace(value=value), errors if with_slopes else None
