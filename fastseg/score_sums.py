"""What `fastseg score` sums up of a block: labels, or the logits or probabilities of one class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastseg.metrics import HardScores
from fastseg.statistics import Statistics
from fastseg_kernels.constants import CURVE_BINS

MOST_LABEL = 2**16
"""Labels are below this: every label up to the largest is counted."""


@dataclass(frozen=True)
class LabelScores:
    """Counts of regions of label volumes; predictions may be scores of classes, ``(C, *spatial)``.

    What `fastseg.blocks.statistics_per_block` asks of what sums up. Of scores the class with the
    largest is predicted.
    """

    regions: tuple[tuple[int, ...], ...]
    ignore_index: int | None = None
    scores: bool = False

    def leading_axes(self, dtype: str) -> int:
        """Return 1 where predictions have an axis of classes."""
        return int(self.scores)

    def statistics(self, pred: Any, targets: Any, mask: Any = None) -> Statistics:
        """Return the sums of a block, one class for each region."""
        if self.scores and pred.dtype.kind == "f" and np.isnan(pred).any():
            raise ValueError("predictions must be numbers, got NaN")
        given = _integers(np.argmax(pred, axis=0) if self.scores else pred, "predictions")
        truth = _integers(targets, "targets")
        known = {0, *(label for region in self.regions for label in region)}
        most = max(2, *(label + 1 for label in known))
        counts = HardScores("labels", None, most, self.ignore_index, layout="")
        keep = np.True_ if mask is None else mask != 0
        if self.ignore_index is not None:
            keep = keep & (truth != self.ignore_index)
        try:
            every = counts.statistics(given, truth, mask)
        except ValueError:
            _refuse(given, "predictions", known, keep)
            _refuse(truth, "targets", known, keep)
            raise
        predicted = every["hard_true_positives"] + every["hard_false_positives"]
        if any(k not in known for k in np.flatnonzero(predicted + every["targets_sum"]).tolist()):
            _refuse(given, "predictions", known, keep)
            _refuse(truth, "targets", known, keep)
        if all(len(region) == 1 for region in self.regions):
            picked = [region[0] for region in self.regions]
            return Statistics(every.array[:, picked], every.names)
        parts = []
        for region in self.regions:
            inside = np.zeros(most + 1, np.bool_)
            inside[list(region)] = True
            # What lies where nothing counts may be any number.
            a, b = (inside[labels.clip(0, most)] for labels in (given, truth))
            whole = keep is np.True_
            parts.append(HardScores(layout="").statistics(a, b, None if whole else keep))
        return Statistics(np.concatenate([s.array for s in parts], axis=1), parts[0].names)


def _refuse(labels: NDArray[Any], name: str, known: set[int], keep: Any) -> None:
    """Raise for a label that is no class's, and say what it may be."""
    strange = ~np.isin(labels, list(known)) & keep
    if strange.any():
        label, count = labels[strange].flat[0], int(strange.sum())
        named = ",".join(map(str, sorted(known - {0})))
        hints = ["--ignore-index leaves it out"]
        if name == "predictions":
            hints = ["--kind probs if these are probabilities"]
        if 0 < label < MOST_LABEL:
            is_mask = set(np.unique(labels).tolist()) <= {0, int(label)}
            hints = [f"--labels {label}" if is_mask else f"add {label} to --labels", *hints]
        raise ValueError(
            f"{name} hold {label} ({count} voxels), which is none of the labels {named}: "
            + "; ".join(hints)
        )


def _integers(labels: NDArray[Any], name: str) -> NDArray[Any]:
    """Return labels that may be stored as floats as integers."""
    if labels.dtype.kind != "f":
        return labels
    with np.errstate(invalid="ignore"):  # NaN is no label: it is not equal below
        numbers = labels.astype(np.int32)
    if not np.array_equal(numbers, labels):
        wrong = labels[numbers != labels].flat[0]
        raise ValueError(f"{name} must be labels, got {wrong}; --kind says what they are")
    return numbers


@dataclass(frozen=True)
class ProbabilityScores:
    """Counts of one class from logits or probabilities; integers are stored probabilities.

    ``channel``: predictions are ``(1, *spatial)``. ``guessed``: nobody said that they are logits,
    and those that look like labels are refused.
    """

    kind: Literal["logits", "probs"]
    threshold: float | None = None
    label: int = 1
    ignore_index: int | None = None
    curve: bool = False
    channel: bool = False
    guessed: bool = False

    def leading_axes(self, dtype: str) -> int:
        """Return 1 where predictions have an axis for their one class."""
        return int(self.channel)

    def statistics(self, pred: Any, targets: Any, mask: Any = None) -> Statistics:
        """Return the sums of a block."""
        pred = pred[0] if self.channel else pred
        stored = pred.dtype.kind in "bui"
        if self.guessed and _are_whole(pred):
            raise ValueError("predictions are whole numbers: --kind says whether they are labels")
        if self.curve:
            scores = self._scores("probs" if stored else self.kind, track=("curve",))
            return scores.statistics(_in_bins(pred) if stored else pred, targets, mask)
        if stored or (self.threshold is not None and self.kind == "logits"):
            return self._compared(pred, targets, mask)
        return self._scores(self.kind, self.threshold).statistics(pred, targets, mask)

    def _scores(self, kind: Any, threshold: float | None = None, **options: Any) -> HardScores:
        ignore = self.ignore_index
        return HardScores(kind, threshold, None, ignore, self.label, layout="", **options)

    def _compared(self, pred: Any, targets: Any, mask: Any) -> Statistics:
        """Return the sums of what is at the threshold or above, in the units of the file."""
        level: Any = self.threshold
        if pred.dtype.kind in "bui":
            top = stored_top(pred.dtype)
            given, level = level, math.ceil(top / 2 if level is None else level)
            if not 0 <= level <= top or 0 < (given or 0) < 1 < top:
                raise ValueError(
                    f"a threshold of {pred.dtype} must be in [0, {top}], {top} being probability "
                    f"1, got {given}"
                )
        keep = None if mask is None else mask != 0
        if self.ignore_index is not None:
            counts = targets != self.ignore_index
            keep = counts if keep is None else keep & counts
        if pred.dtype.kind == "f":
            strange = np.isnan(pred) if keep is None else np.isnan(pred) & keep
            if strange.any():
                raise ValueError("predictions must be numbers, got NaN")
        foreground = HardScores("labels", layout="")
        return foreground.statistics(pred >= level, targets == self.label, keep)


def _are_whole(pred: NDArray[Any]) -> bool:
    """Tell whether predictions are whole numbers from 0 on, and not all 0."""
    few = pred[(slice(None, None, 7),) * pred.ndim]  # of most predictions these will do
    parts = (few, pred)
    return bool(pred.max(initial=0) > 0) and all(
        np.array_equal(part, np.abs(np.rint(part))) for part in parts
    )


def _in_bins(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored probabilities as the middle of the curve's bin that each is in, exactly."""
    top = stored_top(stored.dtype)
    bins = np.minimum(np.arange(top + 1) * CURVE_BINS // top, CURVE_BINS - 1)
    table: NDArray[np.float32] = ((bins + 0.5) / CURVE_BINS).astype(np.float32)
    return np.asarray(table[stored.astype(np.uint16, copy=False)])


def stored_top(dtype: np.dtype[Any]) -> int:
    """Return the stored value of probability 1."""
    if dtype.kind == "b":
        return 1
    if dtype.itemsize > 2 or dtype.kind != "u":
        raise ValueError(f"stored probabilities must be bool, uint8 or uint16, got {dtype}")
    return int(np.iinfo(dtype).max)
