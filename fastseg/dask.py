"""The verbs and the hard scores over dask arrays: volumes larger than memory, chunk by chunk.

>>> import dask.array as da, fastseg as fs, fastseg.dask
>>> logits, targets = da.zeros((1, 1, 64), chunks=16), da.ones((1, 1, 64), chunks=20, dtype="u1")
>>> loss = fs.BCE() + fs.SoftJaccard()
>>> s = fastseg.dask.statistics(loss, logits, targets, track=("hard",))
>>> s.compute()
<Statistics of 1 samples, 1 classes, 64 valid voxels>
>>> round(float(fastseg.dask.value(loss, s).compute()), 5), s.jaccard_index().compute()
(1.19315, np.float64(1.0))
>>> labels = da.ones((1, 64), chunks=16, dtype="u1")
>>> fastseg.dask.jaccard_index(labels, targets[:, 0]).compute()
np.float64(1.0)

Everything is lazy: sums, values and scores are `dask.delayed` objects, gradients dask arrays in the
chunks of the logits. Chunks of the operands may differ: they are cut where any of them is, none is
joined (but for the class axis, which is one chunk). A chunk is read once by each verb.

Tasks that run at once in one process share the threads of `fastseg.get_num_threads`. A worker of
`dask.distributed` has as many as its ``nthreads``, unless ``FASTSEG_NUM_THREADS`` or
`fastseg.set_num_threads` says otherwise there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import dask.array as da
import numpy as np
from dask.delayed import delayed

from fastseg.losses import Loss, checked_loss
from fastseg.metrics import HardScores
from fastseg.statistics import Statistics
from fastseg.thread_shares import share_of_threads
from fastseg_kernels.constants import columns

__all__ = [
    "dice_score",
    "gradient",
    "hard_statistics",
    "jaccard_index",
    "stat_scores",
    "statistics",
    "value",
    "value_and_grad",
]

# Functions that dask has not typed.
_delayed: Any = delayed
_blockwise: Any = da.blockwise
_unify_chunks: Any = da.core.unify_chunks
_asarray: Any = da.asarray

SPLIT_EVERY = 16
"""Sums of so many chunks are added up at once, in one order."""


def statistics(
    loss: Loss,
    logits: da.Array,
    targets: da.Array,
    *,
    mask: da.Array | None = None,
    weight_map: da.Array | None = None,
    track: Sequence[str] = (),
    samples: str | Sequence[str] | None = None,
) -> Any:
    """Return the sums of all chunks, a delayed `fastseg.Statistics`; arguments as the verb's.

    The same chunks give the same bits, whatever the scheduler and its workers.

    Examples
    --------
    >>> import dask.array as da, fastseg as fs, fastseg.dask
    >>> loss = fs.SoftDice().replace(layout="")
    >>> logits, targets = da.zeros((8, 8), chunks=4), da.ones((8, 8), chunks=(2, 8), dtype="u1")
    >>> s = fastseg.dask.statistics(loss, logits, targets)
    >>> round(float(loss.value(s.compute())), 4)
    0.3333
    """
    checked_loss(loss)._require_sums("statistics")
    given = _given(logits, targets, mask, weight_map)
    loss._check_arrays(*_named(given, "logits", "targets", "mask", "weight_map"))
    return _summed(
        partial(loss.statistics, track=tuple(track)),
        given,
        loss.options.layout,
        loss.options.rows_of(logits.shape)[1],
        columns(loss.families(track)),
        samples,
    )


def value(loss: Loss, s: Any) -> Any:
    """Return the loss of delayed statistics, delayed.

    Examples
    --------
    >>> import dask.array as da, fastseg as fs, fastseg.dask
    >>> loss, x = fs.SoftDice().replace(layout=""), da.zeros(8, chunks=4)
    >>> s = fastseg.dask.statistics(loss, x, da.ones(8, chunks=4, dtype="u1"))
    >>> round(float(fastseg.dask.value(loss, s).compute()), 4)
    0.3333
    """
    return _delayed(checked_loss(loss).value)(s)


def gradient(
    loss: Loss,
    logits: da.Array,
    targets: da.Array,
    s: Any,
    *,
    mask: da.Array | None = None,
    weight_map: da.Array | None = None,
    grad_scale: float = 1.0,
) -> da.Array:
    """Return dL/dlogits as a dask array, where L is the loss of all that ``s`` sums up.

    ``s``: what `statistics` returned, or a `fastseg.Statistics`. The rest as the verb's.

    Examples
    --------
    >>> import dask.array as da, fastseg as fs, fastseg.dask
    >>> loss, x, p = fs.BCE().replace(layout=""), da.zeros(8, chunks=4), da.ones(8, chunks=4)
    >>> s = fastseg.dask.statistics(loss, x, p)
    >>> float(fastseg.dask.gradient(loss, x, p, s).sum())
    -0.5
    """
    checked_loss(loss)._require_sums("gradient")
    given = _given(logits, targets, mask, weight_map)
    loss._check_arrays(*_named(given, "logits", "targets", "mask", "weight_map"))
    letters, operands = _operands(given, loss.options.layout)
    if "n" in letters:
        x = operands[0]
        numbers = da.arange(x.shape[0], chunks=(x.chunks[letters.index("n")],))
        operands = [*operands, numbers, ("n",)]
    made: da.Array = _blockwise(
        _block_gradient,
        letters,
        *operands,
        s,
        None,
        meta=np.empty((0,) * len(letters), logits.dtype),
        concatenate=True,
        loss=loss,
        names=tuple(given)[2:],
        grad_scale=float(grad_scale),
    )
    return made


def value_and_grad(
    loss: Loss,
    logits: da.Array,
    targets: da.Array,
    *,
    mask: da.Array | None = None,
    weight_map: da.Array | None = None,
    grad_scale: float = 1.0,
) -> tuple[Any, da.Array]:
    """Return the value, delayed, and the gradient, a dask array; every chunk is read twice.

    Examples
    --------
    >>> import dask, dask.array as da, fastseg as fs, fastseg.dask
    >>> loss, x, p = fs.BCE().replace(layout=""), da.zeros(8, chunks=4), da.ones(8, chunks=4)
    >>> value, grad = fastseg.dask.value_and_grad(loss, x, p)
    >>> round(float(value.compute()), 4), grad.chunks
    (0.6931, ((4, 4),))
    """
    s = statistics(loss, logits, targets, mask=mask, weight_map=weight_map)
    grad = gradient(
        loss, logits, targets, s, mask=mask, weight_map=weight_map, grad_scale=grad_scale
    )
    return value(loss, s), grad


# Hard scores


def hard_statistics(
    pred: da.Array,
    targets: da.Array,
    *,
    mask: da.Array | None = None,
    samples: str | Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Return the counts of all chunks, a delayed `fastseg.Statistics`.

    Arguments are those of `fastseg.hard_statistics`, and so of `jaccard_index` and the others here.

    Examples
    --------
    >>> import dask.array as da, fastseg.dask
    >>> pred, truth = da.ones((4, 6), chunks=3, dtype="u1"), da.ones((4, 6), chunks=2, dtype="u1")
    >>> s = fastseg.dask.hard_statistics(pred, truth, num_classes=2, layout="")
    >>> s.counts()["tp"].compute().tolist()
    [[0, 24]]
    """
    what = HardScores(**options)
    given = _given(pred, targets, mask, None, name="pred")
    kind = what.kind_of(str(pred.dtype))
    what.check_arrays(*_named(given, "pred", "targets", "mask"))
    classes = pred.shape[what.layout.index("C")] if "C" in what.axes(kind) else 1
    return _summed(
        what.statistics,
        given,
        what.axes(kind),
        what.num_classes or classes,
        columns(what.families(kind)),
        samples,
    )


def stat_scores(pred: da.Array, targets: da.Array, **arguments: Any) -> Any:
    """Return the counts tp, fp, fn and tn, delayed; as `fastseg.stat_scores`.

    Examples
    --------
    >>> import dask.array as da, fastseg.dask
    >>> pred, truth = da.ones(6, chunks=3, dtype="u1"), da.zeros(6, chunks=2, dtype="u1")
    >>> fastseg.dask.stat_scores(pred, truth, num_classes=2, layout="").compute()["fp"].tolist()
    [[0, 6]]
    """
    return hard_statistics(pred, targets, **arguments).counts()


def jaccard_index(
    pred: da.Array,
    targets: da.Array,
    *,
    reduction: Literal["none", "mean", "sum"] = "mean",
    empty: float = math.nan,
    **arguments: Any,
) -> Any:
    """Return the hard Jaccard index, delayed; as `fastseg.jaccard_index`.

    Examples
    --------
    >>> import dask.array as da, fastseg.dask
    >>> pred = da.ones(6, chunks=3, dtype="u1")
    >>> float(fastseg.dask.jaccard_index(pred, pred, num_classes=2, layout="").compute())
    1.0
    """
    s = hard_statistics(pred, targets, **arguments)
    return s.jaccard_index(reduction=reduction, empty=empty)


def dice_score(
    pred: da.Array,
    targets: da.Array,
    *,
    reduction: Literal["none", "mean", "sum"] = "mean",
    empty: float = math.nan,
    **arguments: Any,
) -> Any:
    """Return the hard Dice score, delayed; as `fastseg.dice_score`.

    Examples
    --------
    >>> import dask.array as da, fastseg.dask
    >>> pred = da.ones(6, chunks=3, dtype="u1")
    >>> float(fastseg.dask.dice_score(pred, pred, num_classes=2, layout="").compute())
    1.0
    """
    s = hard_statistics(pred, targets, **arguments)
    return s.dice_score(reduction=reduction, empty=empty)


# What is where


def _given(
    first: Any, targets: Any, mask: Any, weight_map: Any, name: str = "logits"
) -> dict[str, Any]:
    """Return the arrays that a call was given, as dask arrays, by their names."""
    if not isinstance(first, da.Array):
        raise TypeError(f"{name} must be a dask array, got {type(first).__name__}")
    arrays = {name: first, "targets": targets, "mask": mask, "weight_map": weight_map}
    return {key: _asarray(array) for key, array in arrays.items() if array is not None}


def _named(given: dict[str, Any], *names: str) -> list[Any]:
    return [given.get(name) for name in names]


def _operands(given: dict[str, Any], layout: str) -> tuple[tuple[str, ...], list[Any]]:
    """Return the names of the first array's axes, and the arrays, cut alike, each with its own."""
    first = next(iter(given.values()))
    space = first.ndim - len(layout)
    letters = (*layout.lower(), *(f"x{k}" for k in range(space)))
    pairs: list[Any] = []
    for array in given.values():
        axes = _axes_of(array, first, letters)
        if "c" in axes:
            array = array.rechunk({axes.index("c"): -1})
        pairs += [array, axes]
    _, arrays = _unify_chunks(*pairs)
    return letters, [item for pair in zip(arrays, pairs[1::2], strict=True) for item in pair]


def _axes_of(array: Any, first: Any, letters: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes of an operand: those of the first, with one class or without that axis."""
    if array.ndim < first.ndim:
        return tuple(axis for axis in letters if axis != "c")
    if array.shape == first.shape:
        return letters
    return tuple("one" if axis == "c" else axis for axis in letters)  # every class has it whole


def _summed(
    statistics: Callable[..., Statistics],
    given: dict[str, Any],
    layout: str,
    classes: int,
    names: Sequence[str],
    samples: str | Sequence[str] | None,
) -> Any:
    """Return the delayed sum of the statistics of all chunks; the samples stay apart."""
    letters, operands = _operands(given, layout)
    rows = tuple(axis for axis in letters if axis == "n")
    space = tuple(axis for axis in letters if axis not in "nc")
    blocks = _blockwise(
        _block_sums,
        (*rows, *space, "classes", "sums"),
        *operands,
        new_axes={"classes": classes, "sums": len(names)},
        adjust_chunks=dict.fromkeys(space, 1),
        meta=np.empty((0,) * (len(rows) + len(space) + 2)),
        concatenate=True,
        statistics=statistics,
        names=tuple(given)[2:],
        lead=(-1,) * len(rows) + (1,) * len(space),
    )
    axes = tuple(range(len(rows), len(rows) + len(space)))
    sums = blocks.sum(axis=axes, split_every=SPLIT_EVERY) if axes else blocks
    return _delayed(_statistics_of)(sums, names, samples)


# What a chunk's task does


def _block_sums(
    first: Any,
    targets: Any,
    *others: Any,
    statistics: Callable[..., Statistics],
    names: Sequence[str],
    lead: tuple[int, ...],
) -> Any:
    """Return the sums of a chunk, with an axis of length 1 for each spatial one."""
    with share_of_threads():
        s = statistics(first, targets, **dict(zip(names, others, strict=True)))
    return s.array.reshape(*lead, *s.array.shape[1:])


def _statistics_of(sums: Any, names: Sequence[str], samples: Any) -> Any:
    return Statistics(sums if sums.ndim == 3 else sums[None], names, samples)


def _block_gradient(
    logits: Any,
    targets: Any,
    *others: Any,
    loss: Loss,
    names: Sequence[str],
    grad_scale: float,
) -> Any:
    *rest, s = others
    rows = None
    if "N" in loss.options.layout:
        numbers = rest.pop()
        first = int(numbers[0]) if len(numbers) else 0
        rows = slice(first, first + len(numbers))
    options = dict(zip(names, rest, strict=True))
    with share_of_threads():
        return loss.gradient(logits, targets, s, rows=rows, grad_scale=grad_scale, **options)
