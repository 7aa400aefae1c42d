"""Statistics and gradients of volumes larger than memory, block by block, with a table of both.

>>> import numpy as np, fastseg as fs, fastseg.blocks
>>> logits, targets = np.zeros((32, 8, 8), np.float32), np.ones((32, 8, 8), np.uint8)
>>> loss = (fs.BCE() + fs.SoftJaccard()).replace(layout="")
>>> table = fastseg.blocks.statistics_per_block(loss, logits, targets, block=(8, 8, 8))
>>> table.grid, round(float(loss.value(table.total())), 5)
((4, 1, 1), 1.19315)
>>> table.values(loss).ravel().round(5)
array([1.19315, 1.19315, 1.19315, 1.19315])

Each block's sums are a row of the table. Kept in zarr (``path=``), it is what a run that was
stopped goes on from, and what several processes fill that each compute a part (``part=``).
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastseg.block_table import BlockTable, Table, draw_error_map
from fastseg.formats import INDEX
from fastseg.losses import Loss
from fastseg.statistics import Statistics
from fastseg.stores import BLOCK_VOXELS, block_at, block_shape, blocks, count_blocks
from fastseg.thread_shares import share_of_threads

__all__ = [
    "BlockTable",
    "draw_error_map",
    "gradient_per_block",
    "read_table",
    "statistics_per_block",
]
READERS = 2
"""Blocks in work at once where no executor is given: one is read while another is summed."""
SAMPLE = 32
"""Edge of the blocks by which arrays that are no files are told apart."""
Report = Callable[[int, int], None]
"""Told how many blocks are done, and of how many."""


class Scores(Protocol):
    """What sums up blocks beside a `Loss`: `fastseg.HardScores`."""

    def leading_axes(self, dtype: str) -> int:
        """Return how many axes come before the spatial ones."""

    def statistics(self, pred: Any, targets: Any, mask: Any = None) -> Statistics:
        """Return the sums of a block."""


def statistics_per_block(
    loss: Loss | Scores,
    logits: Any,
    targets: Any,
    *,
    mask: Any = None,
    weight_map: Any = None,
    track: Sequence[str] = (),
    block: Sequence[int] | None = None,
    path: str | Path | None = None,
    part: tuple[int, int] = (0, 1),
    executor: Executor | None = None,
    report: Report | None = None,
) -> BlockTable:
    """Return the sums of every block, reading each block once.

    Parameters
    ----------
    loss
        A `Loss`, or `fastseg.HardScores`.
    logits, targets, mask, weight_map
        As for `Loss.statistics` by shape and dtype; anything that gives NumPy arrays for slices:
        `fastseg.stores.Volume`, arrays of zarr and h5py, memory maps.
    track
        As in `Loss.statistics`; for a loss alone.
    block
        Shape of the blocks, along the spatial axes; by default whole chunks of the logits, about
        16 million voxels.
    path
        A table in zarr. Where it exists its blocks are not computed again; that it was made by the
        same loss, from the same files and blocks, is checked: files by path, size and time of
        change, other arrays by shape, dtype and samples. Of more than 4096 blocks
        (``MOST_FILES`` in ``fastseg/block_table.py``) several are computed and written together.
    part
        (k, n): compute the k-th of n parts of the blocks; n processes with one path fill its table.
    executor
        Of `concurrent.futures`; by default two threads of this process. For one of processes or of
        ``dask.distributed`` (``client.get_executor()``) arrays must be small to pickle: a Volume is
        its path, a memory map would be all of its bytes.
    report
        Called with the number of blocks that are done, and of all (of the part).

    Raises
    ------
    ValueError
        As `Loss.statistics` does, with the block; and for a table of something else.

    Notes
    -----
    Blocks that were finished stay in the table whatever happens to others. The same blocks give the
    same bits, with any executor.

    Examples
    --------
    >>> import numpy as np, fastseg as fs, fastseg.blocks
    >>> loss = fs.SoftDice().replace(layout="")
    >>> logits, targets = np.zeros((4, 6), np.float32), np.ones((4, 6), np.uint8)
    >>> fastseg.blocks.statistics_per_block(loss, logits, targets, block=(2, 3))
    <BlockTable of (4, 6), 4 of 4 blocks done>
    """
    arrays = _named(logits=logits, targets=targets, mask=mask, weight_map=weight_map)
    lead = _leading_axes(loss, logits)
    _check(loss, arrays)
    if isinstance(loss, Loss):
        sum_up: Any = partial(loss.statistics, track=tuple(track))
    elif track or weight_map is not None:
        raise ValueError("track and weight_map are a loss's, and this is none")
    else:
        sum_up = loss.statistics
    shape = tuple(logits.shape)[lead:]
    block = _checked_block(block, shape, logits)
    total = count_blocks(shape, block)
    about = {
        "sums": repr(loss),
        "track": list(track),
        "shape": list(shape),
        "block": list(block),
        "arrays": {name: _identity(array) for name, array in arrays.items()},
    }
    table = Table(path, about, total)
    mine = table.units(part)
    units = table.pending(mine)
    total = sum(map(len, mine))
    done = total - sum(map(len, units))
    if report:
        report(done, total)
    work = partial(_sums_of_blocks, sum_up, arrays, len(shape))
    tasks = ([block_at(shape, block, number) for number in unit] for unit in units)
    for unit, (names, sums) in zip(units, _in_turn(executor, work, tasks), strict=True):
        table.write(unit, names, sums)
        done += len(unit)
        if report:
            report(done, total)
    return table.read()


def read_table(path: str | Path) -> BlockTable:
    """Return the table that `statistics_per_block` keeps at a path, as far as it is filled.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> import numpy as np, fastseg as fs, fastseg.blocks, tempfile
    >>> path, volume = tempfile.mkdtemp() + "/table.zarr", np.zeros(8, np.uint8)
    >>> what = fs.HardScores(num_classes=2, layout="")
    >>> _ = fastseg.blocks.statistics_per_block(what, volume, volume, block=(4,), path=path)
    >>> fastseg.blocks.read_table(path)
    <BlockTable of (8,), 2 of 2 blocks done>
    """
    return Table(path, None, 0).read()


def gradient_per_block(
    loss: Loss,
    logits: Any,
    targets: Any,
    s: Statistics,
    out: Any,
    *,
    mask: Any = None,
    weight_map: Any = None,
    grad_scale: float = 1.0,
    block: Sequence[int] | None = None,
    executor: Executor | None = None,
    report: Report | None = None,
) -> None:
    """Write dL/dlogits to ``out`` block by block, where L is the loss of all that ``s`` sums up.

    ``out``: an array of zarr or HDF5, a memory map, of the logits' shape. Blocks are whole chunks
    of it (shards, where it has any), so that no two write to one file. The gradient is computed by
    the executor and written here. The rest as in `statistics_per_block` and `Loss.gradient`.

    Raises
    ------
    ValueError
        If ``out`` has another shape, and as `Loss.gradient` does, with the block.

    Examples
    --------
    >>> import numpy as np, fastseg as fs, fastseg.blocks
    >>> loss, out = fs.BCE().replace(layout=""), np.zeros((4, 6), np.float32)
    >>> logits, targets = np.zeros((4, 6), np.float32), np.ones((4, 6), np.uint8)
    >>> s = fastseg.blocks.statistics_per_block(loss, logits, targets, block=(2, 3)).total()
    >>> fastseg.blocks.gradient_per_block(loss, logits, targets, s, out, block=(2, 3))
    >>> float(out.sum())
    -0.5
    """
    arrays = _named(logits=logits, targets=targets, mask=mask, weight_map=weight_map)
    if tuple(out.shape) != tuple(logits.shape):
        raise ValueError(f"out must have the shape of logits, {logits.shape}, got {out.shape}")
    lead = _leading_axes(loss, logits)
    _check(loss, arrays)
    shape = tuple(logits.shape)[lead:]
    block = _checked_block(block, shape, out)
    total = count_blocks(shape, block)
    verb = partial(loss.gradient, s=s, grad_scale=grad_scale)
    work = partial(_gradient_of_block, verb, arrays, len(shape))
    made = _in_turn(executor, work, blocks(shape, block))
    for number, (index, slopes) in enumerate(zip(blocks(shape, block), made, strict=True)):
        out[(slice(None),) * lead + index] = slopes.astype(out.dtype, copy=False)
        if report:
            report(number + 1, total)


# What is computed, here or elsewhere


def _sums_of_blocks(
    sum_up: Any, arrays: dict[str, Any], axes: int, indices: list[INDEX]
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return the names and the sums of some blocks, (len(indices), N, C, K)."""
    rows, names = [], ()
    for index in indices:
        parts = _parts(arrays, axes, index)
        with share_of_threads(), _saying_where(index):
            s = sum_up(parts.pop("logits"), parts.pop("targets"), **parts)
        rows.append(s.array)
        names = s.names
    return names, np.stack(rows)


def _gradient_of_block(verb: Any, arrays: dict[str, Any], axes: int, index: INDEX) -> Any:
    parts = _parts(arrays, axes, index)
    with share_of_threads(), _saying_where(index):
        return verb(parts.pop("logits"), parts.pop("targets"), **parts)


def _parts(arrays: dict[str, Any], axes: int, index: INDEX) -> dict[str, Any]:
    """Return the same block of all arrays, whole along the axes before the spatial ones."""
    return {
        name: np.asarray(array[(slice(None),) * (len(array.shape) - axes) + index])
        for name, array in arrays.items()
    }


@contextmanager
def _saying_where(index: INDEX) -> Iterator[None]:
    """Add the block to what an error says."""
    try:
        yield
    except ValueError as error:
        where = ", ".join(f"{each.start}:{each.stop}" for each in index)
        raise ValueError(f"{error} [in the block {where}]") from error


def _in_turn(
    executor: Executor | None, work: Callable[[Any], Any], tasks: Iterable[Any]
) -> Iterator[Any]:
    """Yield what ``work`` makes of each task, in their order, a few being in work at once."""
    if executor is None:
        with ThreadPoolExecutor(READERS) as pool:
            yield from _in_turn(pool, work, tasks)
        return
    tasks = iter(tasks)
    ahead = 2 * _workers(executor)
    waiting = deque(executor.submit(work, task) for task in itertools.islice(tasks, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(executor.submit(work, task) for task in itertools.islice(tasks, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def _workers(executor: Executor) -> int:
    """Return how many tasks an executor runs at once, as far as it can be asked."""
    client = getattr(executor, "_client", None)  # of dask.distributed
    if client is not None:
        return max(1, int(sum(client.nthreads().values())))
    return int(getattr(executor, "_max_workers", 8))


# What a caller gave


def _named(**arrays: Any) -> dict[str, Any]:
    for name, array in arrays.items():
        if isinstance(array, str | Path):
            raise TypeError(
                f"{name} must be an array or a Volume, got the path {array}: pass "
                "fastseg.stores.Volume of it"
            )
    return {name: array for name, array in arrays.items() if array is not None}


def _leading_axes(loss: Loss | Scores, logits: Any) -> int:
    if isinstance(loss, Loss):
        return len(loss.options.layout)
    return loss.leading_axes(str(logits.dtype))


def _check(loss: Loss | Scores, arrays: dict[str, Any]) -> None:
    """Refuse shapes and dtypes before anything is read."""
    if isinstance(loss, Loss):
        loss._check_arrays(
            *(arrays.get(name) for name in ("logits", "targets", "mask", "weight_map"))
        )
    elif hasattr(loss, "check_arrays"):
        loss.check_arrays(*(arrays.get(name) for name in ("logits", "targets", "mask")))


def _checked_block(block: Any, shape: tuple[int, ...], array: Any) -> tuple[int, ...]:
    if block is None:
        rows = math.prod(tuple(array.shape)[: len(array.shape) - len(shape)])
        return block_shape(array, len(shape), max(1, BLOCK_VOXELS // max(1, rows)))
    given: tuple[Any, ...] = (block,) if isinstance(block, Integral) else tuple(block)
    if len(given) != len(shape) or min(given, default=1) < 1:
        raise ValueError(
            f"block must have a positive number for each of the {len(shape)} spatial axes, got "
            f"{given}; axes before these are those of the loss's layout, layout='' for none"
        )
    return tuple(int(min(pair)) for pair in zip(given, shape, strict=True))


def _identity(array: Any) -> list[Any]:
    """Return what tells an array from another, as JSON has it: of a file, or of samples."""
    if hasattr(array, "identity"):
        return [list(array.shape), str(array.dtype), *array.identity()]
    sums = []
    for share in (0.0, 0.5, 1.0):  # small blocks at both ends and between
        starts = (int(share * max(0, size - SAMPLE)) for size in array.shape)
        part = array[tuple(slice(start, start + SAMPLE) for start in starts)]
        sums.append(zlib.crc32(np.ascontiguousarray(part).tobytes()))
    return [list(array.shape), str(array.dtype), *sums]
