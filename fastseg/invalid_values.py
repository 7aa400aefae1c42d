"""What is said of invalid targets, probabilities and weights.

Which values are invalid is decided where they are read, by ``bad`` in ``cpu/points.py``; what is
here looks for the first of them once that has counted some.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.outputs import as_numpy
from fastseg_kernels.constants import BASE_COLUMNS, FLOAT_DTYPES, TARGETS_AS_STORED
from fastseg_kernels.problem import Arrangement, Problem
from fastseg_kernels.views import View

_INVALID, _COUNT = BASE_COLUMNS.index("invalid"), BASE_COLUMNS.index("count")


def invalid_message(count: int, total: int, metric: bool = False) -> str:
    """Say that voxels are invalid where it cannot be told which and what they hold."""
    return (
        "targets must be 0 or 1 (in [0, 1] if they are floats), probabilities in [0, 1] and "
        f"weights at least 0; {count} of {total} voxels have others" + _use_positive(metric)
    )


def _use_positive(metric: bool) -> str:
    option = 'positive="nonzero"' if metric else 'loss.replace(positive="nonzero")'
    return USE_POSITIVE.format(option)


USE_POSITIVE = (
    "; label volumes and 0/255 masks: use {} or positive=<label>, and ignore_index= for voxels "
    "that do not count"
)


def raise_for_sums(
    problem: Problem, sums: NDArray[np.float64], families: frozenset[str], keep: View | None
) -> None:
    """Raise for what sums on the host count as invalid; ``keep``: where something was kept."""
    if keep is not None:  # what was kept is no gradient, and must not be taken for one
        owner: Any = keep.owner
        owner[...] = np.nan
    rows = sums[:, :1] if problem.arrangement.indexed else sums
    invalid, total = rows[:, :, (_INVALID, _COUNT)].sum(axis=(0, 1)).astype(int)
    raise_for_invalid(problem, invalid, total, labels="labels" in families)


def raise_for_invalid(
    problem: Problem,
    count: int,
    total: int,
    metric: bool = False,
    readable: bool = True,
    labels: bool = False,
) -> None:
    """Find the first invalid target, probability or weight and say what it is; only for errors.

    What is not ``readable`` from the host is not looked at. ``labels``: no target may be soft.
    """
    arrangement = problem.arrangement
    if not readable:
        raise ValueError(invalid_message(count, total, metric))
    logits, targets, mask, weights = (
        None if layout is None else as_numpy(address, layout)
        for address, layout in zip(problem.addresses, arrangement.layouts, strict=True)
    )
    assert logits is not None and targets is not None
    voxels = f"(invalid voxels: {count} of {total})"
    indexed = arrangement.indexed
    shape = (arrangement.shape[0], 1, *arrangement.shape[2:]) if indexed else arrangement.shape
    for index in _slabs(shape):
        seen = _readable(targets[index], arrangement.targets.dtype)
        kept = np.ones(seen.shape, bool)
        if arrangement.ignore_index is not None:
            wraps = arrangement.targets.dtype == "uint64"
            kept &= seen != (
                arrangement.ignore_index % 2**64 if wraps else arrangement.ignore_index
            )
        if mask is not None:
            kept &= mask[index] != 0
        _raise_for_targets(arrangement, seen[kept], voxels, metric, labels)
        if arrangement.activation == "probs":
            probs = _readable(logits[index], arrangement.logits.dtype)
            wrong = probs[kept & ((probs < 0) | (probs > 1))]
            if wrong.size:
                what = "pred must hold" if metric else "with activation=None logits must be"
                raise ValueError(f"{what} probabilities in [0, 1], got {wrong[0]} {voxels}")
        if weights is not None:
            assert arrangement.weights is not None
            factors = _readable(weights[index], arrangement.weights.dtype)
            wrong = factors[kept & ~(factors >= 0)]
            if wrong.size:
                raise ValueError(f"weight_map must be at least 0, got {wrong[0]} {voxels}")
    raise ValueError(f"targets or probabilities have invalid values ({count} of {total} voxels)")


def _raise_for_targets(
    arrangement: Arrangement, seen: NDArray[Any], voxels: str, metric: bool, labels: bool
) -> None:
    """Raise if one of the targets that count is none; ``voxels`` says how many are."""
    classes = arrangement.shape[1]
    if arrangement.indexed:
        wrong = seen[~((seen >= 0) & (seen < classes) & (seen == np.floor(seen)))]
        if wrong.size:
            raise ValueError(
                f"targets must be class indices in [0, {classes}), got {wrong[0]} {voxels}; "
                "ignore_index= leaves out a label that is no class"
            )
        return
    as_stored = arrangement.target_mode == TARGETS_AS_STORED
    soft = arrangement.targets.dtype in FLOAT_DTYPES and as_stored and not labels
    allowed = (seen >= 0) & (seen <= 1) if soft else (seen == 0) | (seen == 1)
    wrong = seen[~allowed] if as_stored else seen[seen != seen]  # any number is a label
    if wrong.size:
        raise ValueError(
            f"targets must be {'in [0, 1]' if soft else '0 or 1'}, got {wrong[0]} {voxels}"
            + ("" if arrangement.activation == "softmax" else _advice(wrong[0], metric))
        )


def _advice(wrong: Any, metric: bool) -> str:
    """Say what is probably meant by targets that hold ``wrong``."""
    number = float(wrong)  # float16 does not compare with large numbers
    if not abs(number) < 2**63:  # NaN too
        return ""
    if number != np.floor(number):
        return "; are the arguments exchanged?"
    if number < 0:
        option = f"ignore_index={int(wrong)}"
        return f"; {option if metric else f'loss.replace({option})'} leaves such voxels out"
    return _use_positive(metric)


def _slabs(shape: tuple[int, ...], voxels: int = 2**20) -> Iterator[tuple[Any, ...]]:
    """Yield indices of parts of a volume that need little memory each."""
    for n, c in np.ndindex(*shape[:2]):
        if len(shape) == 2:
            yield n, c
            continue
        step = max(1, voxels // max(1, prod(shape[3:])))
        for start in range(0, shape[2], step):
            yield n, c, slice(start, start + step)


def _readable(values: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Return an array; bfloat16, which NumPy sees as uint16, is widened to float32."""
    if dtype != "bfloat16":
        return np.asarray(values)
    return (np.asarray(values).astype(np.uint32) << 16).view(np.float32)
