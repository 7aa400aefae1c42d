"""Hard scores from logits, probabilities or label volumes, in one read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastseg.dispatch import backend_of
from fastseg.invalid_values import raise_for_invalid
from fastseg.libraries import common_library
from fastseg.libraries.base import Library
from fastseg.options import Options
from fastseg.problems import (
    as_stored,
    check_mask_dtype,
    is_representable,
    make_problem,
    matched,
    stand_in,
    with_row_axes,
)
from fastseg.statistics import Statistics
from fastseg_kernels.constants import FLOAT_DTYPES, columns
from fastseg_kernels.problem import Arrangement, Problem

Kind = Literal["logits", "probs", "labels"]
_NAMES = columns(frozenset({"hard"}))


def jaccard_index(
    pred: Any,
    targets: Any,
    *,
    kind: Kind | None = None,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    positive: Literal["nonzero"] | int | None = None,
    mask: Any = None,
    layout: Literal["NC", "N", "C", ""] = "NC",
    reduction: Literal["none", "mean", "sum"] = "mean",
    empty: float = math.nan,
) -> NDArray[np.float64] | np.float64:
    r"""Return the hard Jaccard index tp / (tp + fp + fn) of every sample and class.

    Parameters
    ----------
    pred
        Logits or probabilities ``(N, C, *spatial)`` or as ``layout`` says, or labels
        ``(N, *spatial)``.
    targets
        0 and 1 in the shape of ``pred`` (floats of at least 0.5 count as 1), or labels.
    kind
        What ``pred`` holds; by default "logits" for floats, "labels" for integers and booleans.
    threshold
        Probability from which on a voxel is foreground (q >= threshold); 0.5 by default, which is
        logit 0. Not for labels.
    num_classes
        Labels are 0 .. num_classes - 1. Without it they are 0 and 1, and the score of 1 is given.
    ignore_index, positive, mask, layout
        As in `fastseg.Options` and `fastseg.Loss`. Labels have no class axis: all axes but the
        first are spatial. Masks of several classes ``(N, C, *spatial)`` are scored per class as
        probabilities: ``pred.astype(np.float32), kind="probs"``.
    reduction
        "mean" or "sum" over the rows whose score is a number, or "none": (N, C).
    empty
        Score of a row in which neither prediction nor target has foreground.

    Returns
    -------
    float64 scalar, or float64 (N, C). A row with a prediction that is NaN scores NaN, and then so
    does the reduced score.

    Raises
    ------
    TypeError, ValueError
        For arrays and options that do not fit, and for labels outside the allowed values.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> pred = np.array([[1, 1, 0, 0]])
    >>> targets = np.array([[1, 0, 1, 0]])
    >>> round(float(fs.jaccard_index(pred, targets)), 4)
    0.3333
    """
    scores = HardScores(kind, threshold, num_classes, ignore_index, positive, layout)
    s = scores.statistics(pred, targets, mask)
    return s.jaccard_index(reduction=reduction, empty=empty)


def dice_score(
    pred: Any,
    targets: Any,
    *,
    kind: Kind | None = None,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    positive: Literal["nonzero"] | int | None = None,
    mask: Any = None,
    layout: Literal["NC", "N", "C", ""] = "NC",
    reduction: Literal["none", "mean", "sum"] = "mean",
    empty: float = math.nan,
) -> NDArray[np.float64] | np.float64:
    """Return the hard Dice score 2 tp / (2 tp + fp + fn); everything as in `jaccard_index`.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> float(fs.dice_score(np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])))
    0.5
    """
    scores = HardScores(kind, threshold, num_classes, ignore_index, positive, layout)
    s = scores.statistics(pred, targets, mask)
    return s.dice_score(reduction=reduction, empty=empty)


def stat_scores(
    pred: Any,
    targets: Any,
    *,
    kind: Kind | None = None,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    positive: Literal["nonzero"] | int | None = None,
    mask: Any = None,
    layout: Literal["NC", "N", "C", ""] = "NC",
) -> dict[str, NDArray[np.int64]]:
    """Return the counts tp, fp, fn and tn, each int64 (N, C); arguments as in `jaccard_index`.

    A prediction that is NaN is over no threshold and counts as background: counts cannot say that
    they are undefined, scores can (and are NaN then).

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> scores = fs.stat_scores(np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]]))
    >>> {name: int(count[0, 0]) for name, count in scores.items()}
    {'tp': 1, 'fp': 1, 'fn': 1, 'tn': 1}
    """
    scores = HardScores(kind, threshold, num_classes, ignore_index, positive, layout)
    return scores.statistics(pred, targets, mask).counts()


def hard_statistics(
    pred: Any,
    targets: Any,
    *,
    kind: Kind | None = None,
    threshold: float | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    positive: Literal["nonzero"] | int | None = None,
    mask: Any = None,
    layout: Literal["NC", "N", "C", ""] = "NC",
    track: Sequence[Literal["curve"]] = (),
    samples: str | Sequence[str] | None = None,
) -> Statistics:
    """Return the counts behind the hard scores as statistics, which add up over chunks.

    Parameters
    ----------
    pred, targets, kind, threshold, num_classes, ignore_index, positive, mask, layout
        As in `jaccard_index`.
    track
        ("curve",): a histogram of logits or probabilities besides, for `Statistics.jaccard_curve`.
    samples
        As in `Loss.statistics`: names of the samples, so that ``+`` knows whose voxels it adds.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> pred, targets = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0]])
    >>> halves = [
    ...     fs.hard_statistics(pred[:, k::2], targets[:, k::2], samples="a") for k in (0, 1)
    ... ]
    >>> round(float(sum(halves).jaccard_index()), 4)
    0.3333
    """
    scores = HardScores(kind, threshold, num_classes, ignore_index, positive, layout, track)
    return scores.statistics(pred, targets, mask, samples)


@dataclass(frozen=True)
class HardScores:
    """What hard scores count, and as what; fields are the arguments of `hard_statistics`.

    For whatever takes a loss for its statistics and nothing else, as `fastseg.blocks` does.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> pred, truth = np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]])
    >>> float(fs.HardScores(num_classes=3).statistics(pred, truth).jaccard_index())
    0.6666666666666666
    """

    kind: Kind | None = None
    threshold: float | None = None
    num_classes: int | None = None
    ignore_index: int | None = None
    positive: Literal["nonzero"] | int | None = None
    layout: Literal["NC", "N", "C", ""] = "NC"
    track: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check what does not depend on the arrays."""
        object.__setattr__(self, "track", tuple(self.track))
        self._options()
        if self.kind not in (None, "logits", "probs", "labels"):
            raise ValueError(f"kind must be 'logits', 'probs', 'labels' or None, got {self.kind!r}")
        if not {"curve"}.issuperset(self.track):
            raise ValueError(f"track must be ('curve',) or (), got {self.track!r}")

    def _options(self) -> Options:
        return Options(ignore_index=self.ignore_index, positive=self.positive, layout=self.layout)

    def kind_of(self, dtype: str) -> Kind:
        """Return what predictions of a dtype hold, or raise what that does not go with."""
        kind = self.kind or ("logits" if dtype in FLOAT_DTYPES else "labels")
        if kind != "labels":
            if self.num_classes is not None:
                raise ValueError(f"num_classes is for kind='labels' only, got kind={kind!r}")
            return kind
        for name in ("threshold", "positive", "track"):
            if getattr(self, name) not in (None, ()):
                hint = "; pass masks, as labels > 0" if name == "positive" else ""
                raise ValueError(f"{name} has no meaning for kind='labels'{hint}")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.layout == "C":
            raise ValueError(
                "labels have no class axis: layout must be 'N' (or 'NC') or '' for kind='labels', "
                "got 'C'"
            )
        return kind

    def axes(self, kind: Kind) -> Literal["NC", "N", "C", ""]:
        """Return the axes before the spatial ones: labels have none of classes."""
        if kind == "labels":
            return "N" if "N" in self.layout else ""
        return self.layout

    def leading_axes(self, dtype: str) -> int:
        """Return how many axes of predictions of a dtype come before the spatial ones."""
        return len(self.axes(self.kind_of(dtype)))

    def families(self, kind: Kind) -> frozenset[str]:
        """Return the families of sums that answer."""
        curve = "logit_curve" if kind == "logits" else "prob_curve"
        return frozenset({"hard", curve} if self.track else {"hard"})

    def check_arrays(self, *arrays: Any) -> None:
        """Raise for the shapes and dtypes of pred, targets and mask that are not there yet."""
        self.problem(*map(stand_in, arrays))

    def problem(self, pred: Any, targets: Any, mask: Any) -> tuple[Library, Problem, Kind]:
        """Check the arrays and describe them to a backend."""
        library = common_library(pred, "pred", targets=targets, mask=mask)
        kind = self.kind_of(library.view(pred, "pred").layout.dtype)
        if kind == "labels":
            return library, self._problem_of_labels(library, pred, targets, mask), kind
        level = 0.5 if self.threshold is None else float(self.threshold)
        if not 0.0 < level <= 1.0:
            raise ValueError(f"threshold must be a probability in (0, 1], got {self.threshold}")
        if kind == "probs":
            activation, cut = "probs", level
        else:
            activation = "sigmoid"
            cut = math.inf if level == 1.0 else math.log(level) - math.log1p(-level)
        return *make_problem(
            pred, targets, mask, None, self._options(), activation, cut, "pred"
        ), kind

    def _problem_of_labels(self, library: Library, pred: Any, targets: Any, mask: Any) -> Problem:
        layout = self.axes("labels")
        views = [library.view(pred, "pred"), library.view(targets, "targets")]
        if mask is not None:
            views.append(library.view(mask, "mask"))
            check_mask_dtype(views[2].dtype)
        rows = with_row_axes(views[0].layout, layout, "pred")
        truth, *rest = (
            matched(view.layout, name, rows, layout, broadcast=False)
            for view, name in zip(views[1:], ("targets", "mask"), strict=False)
        )
        keep = rest[0] if rest else None
        ignore = self.ignore_index
        if ignore is not None:
            known = is_representable(ignore, truth.dtype)
            ignore = as_stored(ignore, truth.dtype) if known else None
        return Problem(
            Arrangement(rows, truth, keep, ignore_index=ignore),
            (views[0].address, views[1].address, 0 if mask is None else views[2].address, 0),
            tuple(view.owner for view in views),
        )

    def statistics(
        self,
        pred: Any,
        targets: Any,
        mask: Any = None,
        samples: str | Sequence[str] | None = None,
    ) -> Statistics:
        """Return the counts."""
        library, problem, kind = self.problem(pred, targets, mask)
        backend = backend_of(library, pred)
        if kind == "labels":
            classes = self.num_classes or 2
            sums = _sums_of_labels(backend.count_labels(problem, classes), problem, classes)
            library.used(problem.owners)
            return Statistics(sums if self.num_classes else sums[:, 1:], _NAMES, samples)
        families = self.families(kind)
        sums = backend.to_host(backend.statistics(problem, families))
        library.used(problem.owners)
        invalid, count = (sums[:, :, _NAMES.index(name)] for name in ("invalid", "count"))
        if invalid.any():
            wrong, total = int(invalid.sum()), int(count.sum())
            readable = library.device(pred) == "cpu"
            raise_for_invalid(problem, wrong, total, metric=True, readable=readable)
        return Statistics(sums, columns(families), samples)


def _sums_of_labels(
    counts: NDArray[np.float64], problem: Problem, classes: int
) -> NDArray[np.float64]:
    """Return the columns of `_NAMES` from what a backend counted; raise for wrong labels."""
    tp, predicted, true, valid, wrong_pred, wrong_true = np.moveaxis(counts, 2, 0)
    for name, wrong in (("pred", wrong_pred), ("targets", wrong_true)):
        if wrong.any():
            hint = "; pass num_classes= for more classes than two"
            hint += f", and for 0/255 masks {name} > 0"
            hint = hint if classes == 2 else ""
            raise ValueError(
                f"{name} must hold labels in [0, {classes}), {int(wrong[:, 0].sum())} of "
                f"{int(valid[:, 0].sum())} valid voxels do not{hint}"
            )
    zeros = np.zeros(tp.shape)
    sums = {
        "voxels": zeros + math.prod(problem.shape[2:]),
        "count": valid,
        "invalid": zeros,
        "targets_sum": true,
        "hard_true_positives": tp,
        "hard_false_positives": predicted - tp,
        "hard_false_negatives": true - tp,
        "undefined": zeros,
    }
    return np.stack([sums[name] for name in _NAMES], axis=2)
