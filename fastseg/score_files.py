"""``fastseg score``: hard scores of predictions in files, against truth in files, as nnU-Net's.

`pairs` finds what belongs together, `Question` says what is asked of each pair, `score` answers
block by block, and `summary` is the document that nnU-Net's evaluate_folder writes, and more.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import fastseg as fs
from fastseg.blocks import BlockTable, statistics_per_block
from fastseg.formats import ENDINGS
from fastseg.score_sums import MOST_LABEL, LabelScores, ProbabilityScores, stored_top
from fastseg.scores import dice_from_counts, jaccard_from_counts
from fastseg.statistics import Statistics, concatenate_statistics
from fastseg.stores import Transposed, Volume, block_shape
from fastseg_kernels.constants import CURVE_BINS

Report = Callable[[str, int, int], None]
"""Told of a case how many of its blocks are done."""
Regions = dict[str, tuple[int, ...]]
"""Names of classes, and the labels that each consists of."""
SAME_PLACE = 1e-3
"""Difference of two affines' entries, in mm, from which on they are said to differ."""


# Classes


def parse_labels(text: str | None) -> tuple[Regions, int | None]:
    """Return the classes that ``--labels`` names, and the label to ignore if it names one.

    ``text``: the path of a dataset.json of nnU-Net's, ``1=liver,2=tumor,1+2=both``, or None, which
    is one class of label 1. Background, label 0, is no class.
    """
    if text is None:
        return {"1": (1,)}, None
    if text.endswith(".json"):
        return _labels_of_dataset(text)
    regions: Regions = {}
    for item in text.split(","):
        numbers, _, name = item.partition("=")
        try:
            if any(mark in name for mark in "=;:"):
                raise ValueError(name)
            labels = tuple(int(number) for number in numbers.split("+"))
        except ValueError:
            raise ValueError(
                f"labels must read like 1=liver,2=tumor,1+2=both, got {item!r}"
            ) from None
        _add(regions, name.strip() or numbers, labels)
    return _some_class(regions, text), None


def _some_class(regions: Regions, given: str) -> Regions:
    if not regions:
        raise ValueError(f"labels must name a class beside background, got {given!r}")
    return regions


def _labels_of_dataset(path: str) -> tuple[Regions, int | None]:
    try:
        labels = json.loads(Path(path).read_text())["labels"]
        pairs = [
            (str(name), tuple(map(int, value if isinstance(value, list) else [value])))
            for name, value in labels.items()
        ]
        ignored = next((numbers[0] for name, numbers in pairs if name == "ignore"), None)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no dataset.json with labels: {error!r}") from None
    regions: Regions = {}
    for name, numbers in pairs:
        if name != "ignore":
            _add(regions, name, numbers)
    return _some_class(regions, path), ignored


def _add(regions: Regions, name: str, labels: tuple[int, ...]) -> None:
    """Add a class, in nnU-Net's order of its labels; background is none."""
    if not all(0 <= label < MOST_LABEL for label in labels):
        raise ValueError(f"labels must be in [0, {MOST_LABEL}), got {labels} for {name!r}")
    if name in regions:
        raise ValueError(f"labels name {name!r} twice")
    labels = tuple(dict.fromkeys(labels))
    if labels in regions.values():
        raise ValueError(f"labels name {'+'.join(map(str, labels))} twice")
    if labels != (0,):
        regions[name] = labels


# Which files


class Pair(NamedTuple):
    """A prediction, its truth, and what they are called."""

    name: str
    pred: str
    target: str


def stem(name: str) -> str:
    """Return a file's name without its format's ending."""
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def pairs(pred: str, target: str, allow_missing: bool = False) -> tuple[list[Pair], list[str]]:
    """Return the pairs of two files, or of two directories by name, and what is to be warned of."""
    if not (_is_folder(pred) or _is_folder(target)):
        return [Pair(stem(Path(pred).name), pred, target)], []
    if not (_is_folder(pred) and _is_folder(target)):
        raise ValueError(f"{pred} and {target} must be two files or two directories")
    predictions, truths = _volumes_in(pred), _volumes_in(target)
    missing = sorted(truths.keys() - predictions.keys())
    extra = sorted(predictions.keys() - truths.keys())
    both = sorted(truths.keys() & predictions.keys())
    if not both:
        raise ValueError(f"{pred} and {target} have no volumes of the same names")
    if missing and not allow_missing:
        raise ValueError(
            f"{len(missing)} of the {len(truths)} volumes in {target} have no prediction in "
            f"{pred}: {_some(missing)}; --allow-missing leaves them out"
        )
    warnings = [f"{len(missing)} without a prediction are left out: {_some(missing)}"] * bool(
        missing
    )
    warnings += [f"{len(extra)} predictions have no truth: {_some(extra)}"] * bool(extra)
    return [Pair(name, predictions[name], truths[name]) for name in both], warnings


def _is_folder(path: str) -> bool:
    """Tell whether a path is a directory of volumes, and not one that is a volume (zarr)."""
    place = Path(path)
    if not place.is_dir() or any(part.endswith(".zarr") for part in place.parts):
        return False
    return not any((place / mark).exists() for mark in ("zarr.json", ".zarray", ".zgroup"))


def _volumes_in(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in sorted(Path(folder).iterdir()):
        if not entry.name.lower().endswith(tuple(ENDINGS)) or entry.name.startswith("."):
            continue
        name = stem(entry.name)
        if name in found:
            raise ValueError(f"{folder} has two volumes called {name}")
        found[name] = str(entry)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# What is asked, and the answer

METRICS = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref")
"""nnU-Net's names."""


@dataclass(frozen=True)
class Question:
    """What is asked of every pair: the options of the command."""

    regions: Regions
    kind: Literal["logits", "probs", "labels"] | None = None
    ignore_index: int | None = None
    threshold: float | None = None
    best_threshold: bool = False
    transpose: bool = False

    def __post_init__(self) -> None:
        """Check what does not depend on files."""
        if self.kind not in (None, "logits", "probs", "labels"):
            raise ValueError(f"kind must be logits, probs or labels, got {self.kind!r}")
        if self.threshold is not None and self.best_threshold:
            raise ValueError("a threshold is given, or the best one looked for, not both")

    def kind_of(self, pred: Volume | Transposed) -> Literal["logits", "probs", "labels"]:
        """Return what a prediction holds: integers are labels, floats in files logits."""
        if self.kind is not None:
            return self.kind
        return "labels" if pred.dtype.kind in "bui" else "logits"

    def scores(self, pred: Volume | Transposed, target: Volume) -> LabelScores | ProbabilityScores:
        """Return what sums up the blocks of a pair; raise where the two do not fit."""
        kind, thresholded = self.kind_of(pred), self.threshold is not None
        thresholded |= self.best_threshold
        classes = pred.ndim == target.ndim + 1 and pred.shape[1:] == target.shape
        channel = classes and pred.shape[0] == 1
        if pred.shape != target.shape and not (classes and kind != "labels"):
            hint = ""
            if pred.shape == target.shape[::-1]:
                hint = "; their axes are in opposite order: --transpose"
                if self.transpose:
                    hint = " after --transpose, and would fit without"
            elif pred.shape[:-1] == target.shape and kind != "labels":
                hint = "; an axis of classes must be the first, not the last"
            raise ValueError(
                f"{pred.path} has shape {pred.shape} and {target.path} {target.shape}{hint}"
            )
        if kind != "labels" and (channel or not classes):
            if len(self.regions) != 1 or len(next(iter(self.regions.values()))) != 1:
                raise ValueError(
                    f"{pred.path} holds one {kind[:-1]} a voxel, and --labels names "
                    f"{len(self.regions)} classes"
                    + "; --kind labels if it holds labels"
                    * (self.kind is None)
                )
            if kind == "logits" and pred.dtype.kind != "f":
                raise ValueError(f"{pred.path} must hold floats as logits, got {pred.dtype}")
            (label,) = next(iter(self.regions.values()))
            if kind == "probs" and pred.dtype.kind in "bui":
                stored_top(pred.dtype)  # refuses integers that are none
            guessed = self.kind is None
            options = (label, self.ignore_index, self.best_threshold, channel, guessed)
            return ProbabilityScores(kind, self.threshold, *options)
        if thresholded:
            raise ValueError(
                f"a threshold is for one logit or probability a voxel, and {pred.path} holds "
                + ("scores of classes" if classes else "labels")
            )
        return LabelScores(tuple(self.regions.values()), self.ignore_index, classes)


class Answer(NamedTuple):
    """The sums of a pair, one class for each region."""

    pair: Pair
    statistics: Statistics
    table: BlockTable
    stored: np.dtype[Any]
    """Of the prediction."""
    warnings: list[str]


def open_pair(pair: Pair) -> tuple[Volume, Volume, list[str]]:
    """Open both files; return what is to be warned of besides."""
    pred, target = Volume(pair.pred), Volume(pair.target)
    warnings = []
    if pred.affine is not None and target.affine is not None:
        difference = float(np.abs(pred.affine - target.affine).max())
        if not difference <= SAME_PLACE:
            warnings.append(f"{pair.name}: the affines differ by up to {difference:g}")
    return pred, target, warnings


def score(
    pair: Pair,
    question: Question,
    *,
    executor: Executor | None = None,
    table: str | Path | None = None,
    report: Report | None = None,
) -> Answer:
    """Return the sums of a pair; memory is that of a few blocks."""
    pred: Volume | Transposed
    pred, target, warnings = open_pair(pair)
    if question.transpose:
        pred = Transposed(pred, target.ndim)
    scores = question.scores(pred, target)
    tell = None if report is None else partial(report, pair.name)
    block = block_shape(target) if target.sequential and not pred.sequential else None
    made = statistics_per_block(
        scores, pred, target, path=table, executor=executor, report=tell, block=block
    )
    s = made.total(pair.name)
    undefined = int(s["undefined"].sum())
    if undefined:
        raise ValueError(f"{pred.path} holds {undefined} NaN, which no score is made of")
    return Answer(pair, s, made, pred.dtype, warnings)


def common_threshold(answers: Sequence[Answer]) -> int:
    """Return which threshold of the curves has the largest mean Jaccard index over all cases."""
    curve = concatenate_statistics([answer.statistics for answer in answers]).jaccard_curve()
    threshold, _ = curve.best()
    if math.isnan(threshold):  # there is no foreground anywhere
        return len(curve.thresholds) // 2
    return int(np.searchsorted(curve.thresholds, threshold))


def metrics_of(answer: Answer, question: Question, at: int | None) -> dict[str, dict[str, float]]:
    """Return nnU-Net's metrics of each class, at a threshold of the curve if there is one.

    NaN where nothing is there or predicted.
    """
    counts = answer.statistics.counts()
    if at is not None:
        curve = answer.statistics.jaccard_curve()
        counts = {name: count[:, :, at] for name, count in curve.counts.items()}
    tp, fp, fn, tn = (counts[name] for name in ("tp", "fp", "fn", "tn"))
    scores = (dice_from_counts(counts, math.nan), jaccard_from_counts(counts, math.nan))
    columns = dict(zip(METRICS, (*scores, tp, fp, fn, tn, tp + fp, tp + fn), strict=True))
    return {
        name: {metric: column[0, k].item() for metric, column in columns.items()}
        for k, name in enumerate(question.regions)
    }


def _threshold_of(answer: Answer, at: int) -> float:
    """Return a threshold of the curve in the units of the stored prediction."""
    if answer.stored.kind in "bui":  # the first stored value at or above it
        return -(-(at + 1) * stored_top(answer.stored) // CURVE_BINS)
    return float(answer.statistics.jaccard_curve().thresholds[at])


# The document


def summary(
    answers: Sequence[Answer], question: Question, failed: Sequence[str] = ()
) -> dict[str, Any]:
    """Return nnU-Net's summary of all cases, with versions, options and inputs beside it.

    Classes have nnU-Net's keys: a label, or the tuple of a region's labels. A mean leaves out what
    is NaN, as nnU-Net's does.
    """
    at = common_threshold(answers) if question.best_threshold and answers else None
    keys = {name: _key(labels) for name, labels in question.regions.items()}
    found = [metrics_of(answer, question, at) for answer in answers]
    cases = [
        {
            "metrics": {keys[name]: values for name, values in metrics.items()},
            "prediction_file": answer.pair.pred,
            "reference_file": answer.pair.target,
            **({} if at is None else {"threshold": _threshold_of(answer, at)}),
        }
        for answer, metrics in zip(answers, found, strict=True)
    ]
    mean = {
        key: {metric: _mean([metrics[name][metric] for metrics in found]) for metric in METRICS}
        for name, key in keys.items()
    }
    return {
        "foreground_mean": {
            metric: float(np.mean([values[metric] for values in mean.values()]))
            for metric in METRICS
        },
        "mean": mean,
        "metric_per_case": cases,
        "fastseg": {
            "version": fs.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "options": asdict(question),
            "threshold": cases[0]["threshold"] if cases and at is not None else question.threshold,
            "classes": {key: name for name, key in keys.items()},
            "warnings": [line for answer in answers for line in answer.warnings],
            "failed": list(failed),
        },
    }


def _key(labels: tuple[int, ...]) -> str:
    return str(labels[0]) if len(labels) == 1 else str(labels)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
