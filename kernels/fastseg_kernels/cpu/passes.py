"""The two passes over a volume, as Python calls them: fill a job record and run it."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    BASE_COLUMNS,
    COEFFICIENTS,
    FLOAT_DTYPES,
    ITEM_SIZES,
    TARGETS_AS_STORED,
    coefficient_width,
    columns,
    gamma_of,
    lovasz_histogram,
    without_gamma,
)
from fastseg_kernels.cpu import overlap, softmax, sorting, threads
from fastseg_kernels.cpu.compiled import Kernel
from fastseg_kernels.cpu.conversions import conversion, to_labels
from fastseg_kernels.cpu.histograms import (
    prepare_counts,
    prepare_look_up,
    signed_slopes,
    task_words,
)
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.label_codes import codes_kernel
from fastseg_kernels.cpu.memory import own_address
from fastseg_kernels.cpu.operands import fill_operand
from fastseg_kernels.cpu.overlap import block_length
from fastseg_kernels.cpu.points import HAS_MASKS, Variant
from fastseg_kernels.cpu.softmax_stage import MOST_CLASSES, tile_load_kernel
from fastseg_kernels.cpu.stage import EXCLUDED_INPUT, load_kernel, store_kernel
from fastseg_kernels.cpu.threads import SHARED_FROM
from fastseg_kernels.problem import Arrangement, Evaluation, Problem
from fastseg_kernels.views import Geometry, Layout, View, in_order_of, merge_layouts


class Call(NamedTuple):
    """A kernel, and the job that it is called for: what depends on arrangement and families."""

    kernel: Kernel
    words: NDArray[np.int64]  # one job record, all but addresses and values filled in
    free: list[tuple[NDArray[np.int64], int]]  # copies, with their addresses, that no call uses now
    shape: tuple[int, ...] = ()  # of the sums of the statistics
    counted: int = 0  # columns of their histograms
    row_words: int = 0
    bins: int = 0  # of the histogram whose slopes a gradient looks up


class Plan(NamedTuple):
    """What of a call depends on its arrangement alone."""

    job: NDArray[Any]  # one record, all but addresses, values and what families need filled in
    module: Any  # whose kernels these are: `overlap` or `softmax`
    variant: Variant
    tasks: int
    blocks: int  # of a row
    task_rows: int  # rows that a task reads
    share: bool  # large enough for more than one thread
    statistics: dict[frozenset[str], Call]  # by the families that are added up
    gradients: dict[tuple[frozenset[str], bool], Call]  # by the loss's families, and by `keeps`
    keeps: bool = False  # arrays are such that statistics may keep something for the gradient


def _word(*path: str) -> int:
    """Return where a field lies in a job, counted in words of eight bytes."""
    dtype, position = JOB, 0
    for name in path:
        assert dtype.fields is not None
        dtype, offset = dtype.fields[name][:2]
        position += offset
    return position // 8


KEEPS = not HAS_MASKS
"""Whether statistics keep something for the gradient. That is 8 bytes a voxel more and a third of
the arithmetic less, which pays with vectors of 256 bits; with 512 it made no difference."""
NOT_KEPT = frozenset({"bce_flipped", "focal_bce", "sorted"})
"""Families whose gradient needs more of a voxel than is kept."""

# A call sets a few words of a flat copy: copying a nested record costs 16 us, this 0.3.
OPERANDS = ("logits", "targets", "mask", "weights", "out")
ADDRESSES = tuple(_word(name, "address") for name in OPERANDS)
STORE, IN_PLACE, SUMS, COUNTS, WORDS, PARTS, SIGNED, SLOPES, COEFFICIENT_TABLE = (
    _word(name)
    for name in (
        "store", "in_place", "sums", "counts", "words", "parts", "signed", "slopes", "coefficients"
    )
)  # fmt: skip


def _is_run(geometry: Geometry, k: int, layout: Layout) -> bool:
    """Tell whether operand ``k``'s rows are runs of memory in native byte order."""
    one_run = len(geometry.sizes) == 1 and geometry.strides[k][0] == ITEM_SIZES[layout.dtype]
    return not layout.swapped and (one_run or geometry.sizes == (1,))


def fill_geometry(record: Any, layouts: dict[str, Layout]) -> Geometry:
    """Write ``layouts`` (N, C, *spatial), by their names in the job, with merged spatial axes."""
    geometry = merge_layouts(layouts.values())
    record["ndim"] = len(geometry.sizes)
    record["sizes"][: len(geometry.sizes)] = geometry.sizes
    for (name, layout), strides in zip(layouts.items(), geometry.strides, strict=True):
        fill_operand(record[name], layout, strides)
    return geometry


@lru_cache(maxsize=1024)
def plan_of(arrangement: Arrangement, out: Layout | None) -> Plan:
    """Return what calls that are arranged alike share."""
    if arrangement.activation == "softmax":
        return _softmax_plan(arrangement, out)
    logits, targets, shape = arrangement.logits, arrangement.targets, arrangement.shape
    real = arrangement.real
    as_stored = arrangement.target_mode == TARGETS_AS_STORED
    labelled = targets.dtype not in FLOAT_DTYPES or not as_stored
    weighted, has_ignore = arrangement.weights is not None, arrangement.ignore_index is not None
    kind = "weighted" if weighted else ("binary" if labelled else "soft")

    job = np.zeros(1, JOB)
    record = job[0]
    layouts = {
        name: layout
        for name, layout in zip(OPERANDS, (*arrangement.layouts, out), strict=True)
        if layout is not None
    }
    geometry = fill_geometry(record, layouts)
    voxels = prod(shape[2:])
    interleaved = shape[1] > 1 and 0 < abs(logits.strides[1]) < abs(geometry.strides[0][-1])
    record["classes"], record["voxels"] = shape[1], voxels
    record["block"] = block_length(voxels)
    record["blocks"] = -(-voxels // block_length(voxels))
    record["inner_classes"] = shape[1] if interleaved else 1
    wanted = ("bool", "uint8", "int8") if kind == "binary" else (real,)  # -1 is invalid as 255
    record["direct"] = (
        not weighted
        and arrangement.mask is None
        and not has_ignore
        and logits.dtype == real
        and targets.dtype in wanted
        and as_stored
        and _is_run(geometry, 0, logits)
        and _is_run(geometry, 1, targets)
        and not interleaved
    )
    record["labelled"], record["target_mode"] = labelled, arrangement.target_mode
    record["has_ignore"] = has_ignore
    of_labels = "real" if targets.dtype in FLOAT_DTYPES else "label"  # how they are compared
    record[f"ignore_{of_labels}"] = arrangement.ignore_index or 0
    record[f"positive_{of_labels}"] = arrangement.positive
    record["threshold"] = arrangement.threshold
    record["excluded_input"] = EXCLUDED_INPUT[arrangement.activation]
    if not record["direct"]:
        record["load"] = load_kernel(real, kind == "binary").address
        record["logits"]["convert"] = conversion(logits.dtype, real)
        if labelled:
            record["classify"] = codes_kernel(targets.dtype).address
        else:
            record["targets"]["convert"] = conversion(targets.dtype, real)
        _fill_conversions(record, arrangement)
    if out is not None:
        in_place = out.dtype == real and _is_run(geometry, len(layouts) - 1, out)
        record["in_place"] = in_place
        record["out"]["convert"] = conversion(real, out.dtype)
        if not in_place:
            record["store"] = store_kernel().address
    groups = shape[1] // int(record["inner_classes"]) if shape[1] else 0
    blocks = int(record["blocks"])
    tasks = shape[0] * groups * blocks
    variant = Variant(real, kind, arrangement.activation)
    share = prod(shape) >= SHARED_FROM
    task_rows = int(record["inner_classes"])
    lies_right = bool(record["direct"] and record["in_place"])
    keeps = KEEPS and lies_right and variant.of_binary_logits
    return Plan(job, overlap, variant, tasks, blocks, task_rows, share, {}, {}, keeps)


def _fill_conversions(record: Any, arrangement: Arrangement) -> None:
    """Write how a mask and a weight map become reals; masks of one byte are looked at as such."""
    mask, weights, real = arrangement.mask, arrangement.weights, arrangement.real
    if mask is not None and (ITEM_SIZES[mask.dtype] > 1 or arrangement.activation == "softmax"):
        record["mask"]["convert"] = conversion(mask.dtype, real)
    if weights is not None:
        record["weights"]["convert"] = conversion(weights.dtype, real)


def _softmax_plan(arrangement: Arrangement, out: Layout | None) -> Plan:
    """Return the plan where a task is a block of voxels with all of its classes."""
    logits, targets, shape = arrangement.logits, arrangement.targets, arrangement.shape
    real = arrangement.real
    if shape[1] > MOST_CLASSES:
        raise ValueError(f"at most {MOST_CLASSES} classes are supported, got {shape[1]}")
    job = np.zeros(1, JOB)
    record = job[0]
    layouts = {
        name: layout
        for name, layout in zip(OPERANDS, (*arrangement.layouts, out), strict=True)
        if layout is not None
    }
    geometry = fill_geometry(record, layouts)
    voxels, tile = prod(shape[2:]), softmax.tile_length(shape[1])
    record["classes"], record["voxels"], record["inner_classes"] = shape[1], voxels, tile
    record["block"] = block = softmax.block_length(voxels, shape[1])
    record["blocks"] = blocks = -(-voxels // block)
    is_plain = arrangement.mask is None and arrangement.weights is None
    has_ignore = arrangement.ignore_index is not None
    record["direct"] = (
        is_plain and not has_ignore and logits.dtype == real and _is_run(geometry, 0, logits)
    )
    record["has_ignore"], record["ignore_label"] = has_ignore, arrangement.ignore_index or 0
    record["load"] = tile_load_kernel(real, arrangement.indexed).address
    record["logits"]["convert"] = conversion(logits.dtype, real)
    if not arrangement.indexed:
        record["targets"]["convert"] = conversion(targets.dtype, real)
    elif targets.dtype not in ("bool", "uint8"):
        record["targets"]["convert"] = to_labels(targets.dtype)
    _fill_conversions(record, arrangement)
    if out is not None:
        record["in_place"] = out.dtype == real and _is_run(geometry, len(layouts) - 1, out)
        record["out"]["convert"] = conversion(real, out.dtype)
        record["store"] = store_kernel().address
    kind = "indexed" if arrangement.indexed else "soft"
    weighted = "weighted_" if arrangement.weights is not None else ""
    variant = Variant(real, weighted + kind, "softmax")
    tasks, share = shape[0] * blocks, prod(shape) >= SHARED_FROM
    return Plan(job, softmax, variant, tasks, blocks, shape[1], share, {}, {})


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
