"""The exact Lovasz weights of arrays of errors, by sorting them.

An error is a float whose sign says that its voxel is foreground. A group (a row, or a class of all
samples) is sorted in five steps, of which threads share all but the third:

1. survey: the extremes of each block's errors, and how many there are;
2. partition: each block is put into buckets, by the largest bits in which its group differs;
3. the numbers of voxels before each bucket, from those of the blocks;
4. walk: each bucket is sorted in the cache and walked, and slopes take the places of its errors;
5. restore: each block brings its slopes back, in the order in which it had put errors there.

A bucket that the cache does not hold is a group of the next level, which begins at its voxels. Each
level's range is a share of the last one's, of one bucket, so at most 3 levels of float32 and 6 of
float64 end in groups of equal errors, which need no sort. A small group is one bucket as it is.

Blocks and buckets depend on the errors alone, and sums are added in the order of the buckets: the
number of threads does not matter. Beside the array there is the storage, as large as what of it is
not 0 (once more for what is in large buckets), and tables of up to half a byte for each element.

[Xeon, 2 threads, float32, 2x1x128^3 errors of the hinge: 5.5 ns per voxel with slopes, 3.7 without,
where np.argsort alone takes 31 on one.]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cpu import threads
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.sorting_blocks import (
    BLOCK,
    BUCKET,
    GROUP,
    JOB,
    MOST_BUCKETS,
    RUN,
    partition_kernel,
    restore_kernel,
    survey_kernel,
)
from fastseg_kernels.cpu.sorting_walk import scratch_size, walk_kernel
from fastseg_kernels.cpu.threads import SHARED_FROM

MOST_ELEMENTS = 2**32 - 1
"""Of a group: the sort of more would take minutes, bins seconds."""
SMALL = 16384
"""Elements of a group up to which it is one bucket."""
SHORTEST_BLOCK, LONGEST_BLOCK = 16384, 65536
"""Elements of a block: the second cache holds it and its part of the storage. Beyond 65536 the two
passes take 1.3 times as long."""
LARGEST_BUCKET = 65536
"""Elements that are sorted in the cache: of float32 with 24 bytes each, 1.5 MB."""
BUCKET_LENGTH = 1024
"""Elements of a bucket, on average and about."""
ITEM_LENGTH = 4096
"""Elements of a task that sorts buckets."""


class _Level(NamedTuple):
    """Groups, the blocks that they are made of, and the runs that those are made of."""

    runs: NDArray[Any]
    blocks: NDArray[Any]
    groups: NDArray[Any]
    memory: object  # what owns the runs


def _job(level: _Level) -> Any:
    job: Any = np.zeros(1, JOB)
    for name in ("runs", "blocks", "groups"):
        job[name] = getattr(level, name).ctypes.data
    return job


def _walk(
    job: Any,
    listed: NDArray[Any],
    counts: NDArray[np.int64],
    real: str,
    slopes: bool,
    memory: object,
) -> None:
    """Sort and walk the listed buckets, of ``counts`` elements each."""
    if listed.size == 0:
        return
    share = int(counts.sum()) >= SHARED_FROM
    passed = np.cumsum(counts + 16)  # an empty bucket costs something, too
    tasks = int(min(listed.size, max(1, passed[-1] // ITEM_LENGTH)))
    items = np.searchsorted(passed, passed[-1] * np.arange(tasks + 1) // tasks)
    items[-1] = listed.size
    capacity = -(-(int(counts.max()) + 1) // 16) * 16
    size = -(-scratch_size(real, capacity) // 64) * 64
    parts = threads.parts_of(tasks, share)
    scratch = np.empty(size * parts + 64, np.uint8)
    job["listed"], job["items"] = listed.ctypes.data, items.ctypes.data
    job["scratch"], job["scratch_size"] = -(-scratch.ctypes.data // 64) * 64, size
    job["capacity"], job["parts"] = capacity, 0
    owners = (job, listed, items, scratch, memory)
    threads.run(walk_kernel(real, slopes), job.ctypes.data, tasks, share, owners, parts)


def _weigh_small(level: _Level, real: str, slopes: bool) -> NDArray[np.float64]:
    """Return the values of groups that are one bucket each, and its pieces the rows themselves."""
    job = _job(level)
    ends = level.runs["count"].astype(np.int32)
    job["table"], job["raw"] = ends.ctypes.data, 1
    listed: Any = np.zeros(level.groups.size, BUCKET)
    listed["group"] = np.arange(level.groups.size)
    counts = np.add.reduceat(level.runs["count"], level.groups["first_block"])
    _walk(job, listed, counts, real, slopes, (level, ends))
    values: NDArray[np.float64] = listed["value"]
    return values


def _survey(level: _Level, job: Any, real: str) -> tuple[NDArray[Any], bool]:
    """Fill in what groups are found to be; return how many elements and foreground they have."""
    blocks, groups = level.blocks, level.groups
    share = int(level.runs["count"].sum()) >= SHARED_FROM
    threads.run(survey_kernel(real), job.ctypes.data, blocks.size, share, (level, job))
    first = groups["first_block"]
    least = np.minimum.reduceat(blocks["least"], first)
    groups["top"] = np.maximum.reduceat(blocks["most"], first)
    groups["constant"] = groups["top"] <= least
    counts = [np.add.reduceat(blocks[name], first) for name in ("filled", "foreground", "nans")]
    span = (groups["top"] - least).tolist()
    length = int(counts[0].max())
    buckets = 64
    while buckets < min(MOST_BUCKETS, length // BUCKET_LENGTH):
        buckets *= 2
    job["buckets"] = buckets
    bits = buckets.bit_length() - 1
    groups["shift"] = [max(0, s.bit_length() - bits) if s > 0 else 0 for s in span]
    return np.stack(counts), share


def _weigh_equal(groups: NDArray[Any], counts: NDArray[Any], real: str) -> NDArray[np.float64]:
    """Return the value of each group as if its errors were equal, and set its weights."""
    n1 = counts[1]
    n0 = counts[0] - n1
    U, common = groups["foreground"] + groups["b"], groups["foreground"] - groups["f"]
    after = U + n0
    with np.errstate(divide="ignore", invalid="ignore"):
        w1 = np.where(U == 0, 0.0, (1.0 / U + 1.0 / after) / 2)
        w0 = np.where(U == 0, 1.0 / after, (2 * common - n1) / (2.0 * U * after))
        weight = np.where(n1 > 0, w1 * n1, 0.0) + np.where(n0 > 0, w0 * n0, 0.0)
    groups["foreground_weight"], groups["background_weight"] = w1, w0
    error = groups["top"].astype(REALS[real].integer).view(real).astype(np.float64)
    values: NDArray[np.float64] = weight * error
    return values


def _weigh(level: _Level, real: str, slopes: bool) -> NDArray[np.float64]:
    """Return the values of groups, and replace their errors if slopes are wanted."""
    blocks, groups = level.blocks, level.groups
    job = _job(level)
    counts, share = _survey(level, job, real)
    values = _weigh_equal(groups, counts, real)
    buckets, T = int(job["buckets"][0]), np.dtype(real)
    in_storage = np.where(
        groups["constant"][blocks["group"]] != 0, 0, blocks["filled"] + blocks["nans"]
    )
    places = np.cumsum(in_storage) - in_storage
    storage = np.empty(int(in_storage.sum()), T)
    blocks["storage"] = storage.ctypes.data + T.itemsize * places
    ends = np.zeros((blocks.size, buckets + 1), np.int32)
    labels = np.zeros((blocks.size, buckets + 1), np.int32)
    job["table"], job["labels"] = ends.ctypes.data, labels.ctypes.data
    memory = (level, job, storage, ends, labels)
    if storage.size > 0:
        threads.run(partition_kernel(real), job.ctypes.data, blocks.size, share, memory)
        parts = _weigh_buckets(level, job, (storage, ends, labels), real, slopes)
        values = np.where(groups["constant"] != 0, values, parts)
    values = np.where(counts[2] > 0, np.nan, values)
    if slopes:
        threads.run(restore_kernel(real), job.ctypes.data, blocks.size, share, memory)
    return values


def _weigh_buckets(
    level: _Level, job: Any, arrays: tuple[NDArray[Any], ...], real: str, slopes: bool
) -> NDArray[np.float64]:
    """Return the sums of the buckets of each group, and put slopes into the storage."""
    groups, (storage, ends, labels) = level.groups, arrays
    first, buckets = groups["first_block"], ends.shape[1] - 1
    totals = np.add.reduceat(ends, first, axis=0, dtype=np.int64)  # up to the end of each bucket
    totals = np.diff(totals, axis=1, prepend=0)[:, :buckets]
    foreground = np.add.reduceat(labels, first, axis=0, dtype=np.int64)[:, :buckets]
    background = totals - foreground
    f = np.cumsum(foreground, axis=1) - foreground + groups["f"][:, None]
    b = np.cumsum(background, axis=1) - background + groups["b"][:, None]
    parts = np.zeros(totals.shape)

    where = np.nonzero((totals > 0) & (totals <= LARGEST_BUCKET))
    listed: Any = np.zeros(where[0].size, BUCKET)
    listed["group"], listed["index"] = where
    listed["f"], listed["b"] = f[where], b[where]
    _walk(job, listed, totals[where], real, slopes, (level, arrays))
    parts[where] = listed["value"]

    where = np.nonzero(totals > LARGEST_BUCKET)
    if where[0].size > 0:
        below = _level_below(level, ends, where, storage)
        below.groups["f"], below.groups["b"] = f[where], b[where]
        parts[where] = _weigh(below, real, slopes)
    total: NDArray[np.float64] = parts.sum(axis=1)
    return total


def _level_below(
    level: _Level, ends: NDArray[np.int32], where: tuple[NDArray[Any], ...], storage: NDArray[Any]
) -> _Level:
    """Return the level that has these buckets as groups, and their pieces as runs."""
    groups: Any = np.zeros(where[0].size, GROUP)
    runs, block_of_run, factors = [], [], []
    blocks = 0
    for k, (g, j) in enumerate(zip(*where, strict=True)):
        of_group = slice(level.groups["first_block"][g], level.groups["last_block"][g])
        start = ends[of_group, j - 1] if j > 0 else np.zeros_like(ends[of_group, 0])
        count = (ends[of_group, j] - start).astype(np.int64)
        run: Any = np.zeros(count.size, RUN)
        run["address"] = level.blocks["storage"][of_group] + storage.itemsize * start
        run["count"] = count
        factor = level.blocks["factor"][of_group]
        filling = (np.cumsum(count) - count) // LONGEST_BLOCK
        new = (np.diff(filling, prepend=0) != 0) | (np.diff(factor, prepend=factor[0]) != 0)
        block = np.cumsum(new)
        groups["first_block"][k] = blocks
        groups["last_block"][k] = blocks + block[-1] + 1
        runs.append(run)
        block_of_run.append(blocks + block)
        factors.append(factor)
        blocks += int(block[-1]) + 1
    groups["foreground"] = level.groups["foreground"][where[0]]
    first_run = np.searchsorted(np.concatenate(block_of_run), np.arange(blocks + 1))
    first_of_block = first_run[:-1]
    return _Level(
        np.concatenate(runs),
        _blocks(groups, first_run, np.concatenate(factors)[first_of_block]),
        groups,
        storage,
    )


def _blocks(
    groups: NDArray[Any], first_run: NDArray[Any], factors: NDArray[np.float64] | float
) -> NDArray[Any]:
    """Return blocks that are runs ``first_run[k]`` to ``first_run[k + 1]``."""
    blocks: NDArray[Any] = np.zeros(first_run.size - 1, BLOCK)
    blocks["group"] = np.repeat(
        np.arange(groups.size), groups["last_block"] - groups["first_block"]
    )
    blocks["first_run"], blocks["last_run"] = first_run[:-1], first_run[1:]
    blocks["factor"] = factors
    return blocks


def _block_length(of_group: int) -> int:
    return min(LONGEST_BLOCK, max(SHORTEST_BLOCK, of_group // 16))


def _level_of_rows(
    errors: NDArray[Any],
    foreground: NDArray[np.float64],
    batch: bool,
    factors: NDArray[np.float64] | None,
) -> tuple[_Level, bool]:
    """Return the groups of an array, and whether they are small.

    A block is a part of a row, or several rows that are shorter than a block, with one factor.
    """
    N, C, V = errors.shape
    rows = np.arange(N * C).reshape(N, C)
    of_group = rows.T.copy() if batch else rows.reshape(-1, 1)  # (groups, rows of each)
    small = of_group.shape[1] * V <= SMALL
    longest = V if small else _block_length(of_group.shape[1] * V)
    parts = -(-V // longest)
    length = -(-V // parts)  # no part is much shorter than the others
    start = length * np.arange(-(-V // length))
    runs: Any = np.zeros(rows.size * start.size, RUN)
    in_row = of_group.reshape(-1, 1) * V + start  # (rows, runs of each)
    runs["address"] = errors.ctypes.data + errors.itemsize * in_row.ravel()
    runs["count"] = np.tile(np.minimum(length, V - start), rows.size)

    groups: Any = np.zeros(of_group.shape[0], GROUP)
    runs_of_group, runs_of_block = of_group.shape[1] * start.size, max(1, longest // V)
    first_run = np.arange(0, runs_of_group, runs_of_block)
    groups["first_block"] = first_run.size * np.arange(groups.size)
    groups["last_block"] = groups["first_block"] + first_run.size
    groups["foreground"] = foreground.ravel()[of_group].sum(axis=1)
    first_run = (runs_of_group * np.arange(groups.size)[:, None] + first_run).ravel()
    row_of_block = of_group.ravel()[first_run // start.size]
    factor = 0.0 if factors is None else factors.ravel()[row_of_block]
    blocks = _blocks(groups, np.append(first_run, runs.size), factor)
    if small:
        blocks["storage"] = runs["address"]  # they stay where they are
    return _Level(runs, blocks, groups, errors), small


def _weigh_short_rows(
    errors: NDArray[Any], foreground: NDArray[np.float64], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weigh groups of rows that are shorter than a block, and have factors of their own.

    Blocks of one row would have more buckets than elements. So the weights are sorted out first, in
    float64, which is what they are computed in, and multiplied and rounded then. (Their buckets are
    others than those of float32: the value's last bit may differ from that without slopes.)
    """
    weights = errors.astype(np.float64)
    values = weigh(weights, foreground, True, np.ones_like(factors))
    # a weight of 0 stays 0, whatever the factor
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(weights, factors[:, :, None], out=weights, where=weights != 0)
        errors[...] = weights
    return values


def weigh(
    errors: NDArray[Any],
    foreground: NDArray[np.float64],
    batch: bool,
    factors: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    r"""Return the Lovasz extension of each group of errors, and replace errors by their slopes.

    .. math:: L(e) = \sum_i w_i e_i

    with the weights of `reference.lovasz_weights`: equal errors share theirs.

    Parameters
    ----------
    errors : ndarray of float32 or float64
        (N, C, V), C-contiguous, overwritten. The sign bit of an element is set for foreground, its
        magnitude is the error. A voxel of error 0 has slope 0.
    foreground : ndarray of float64
        P, the number of all foreground voxels of each row, (N, C).
    batch : bool
        Whether the rows of all samples of a class are one group.
    factors : ndarray of float64, optional
        (N, C): then a foreground voxel is replaced by -w times the factor of its row, a background
        voxel by w times it, rounded once. If not given, the array is left in any state.

    Returns
    -------
    ndarray of float64
        (N, C), or (1, C) for ``batch``: NaN where an error is NaN. The slope of such a voxel is
        NaN, those of others are as if it were not there.

    Raises
    ------
    ValueError
        If a group has more than 2^32 - 1 elements.
    """
    N, C, V = errors.shape
    of_group = (N if batch else 1) * V
    if of_group > MOST_ELEMENTS:
        raise ValueError(
            f"a group that is sorted must have at most {MOST_ELEMENTS} voxels, got {of_group}: "
            "count its errors in bins instead"
        )
    shape = (1 if batch else N, C)
    if errors.size == 0:
        return np.zeros(shape)
    short = batch and of_group > SMALL and _block_length(of_group) >= 2 * V
    if short and factors is not None and not (factors == factors[0]).all():
        return _weigh_short_rows(errors, foreground, factors)
    level, small = _level_of_rows(errors, foreground, batch, factors)
    solve = _weigh_small if small else _weigh
    return solve(level, errors.dtype.name, factors is not None).reshape(shape)
