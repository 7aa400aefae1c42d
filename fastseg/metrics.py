"""Hard scores from logits, probabilities or label volumes, in one read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastseg.dispatch import backend_of
from fastseg.libraries import Library, common_library
from fastseg.options import Options
from fastseg.problems import (
    as_stored,
    check_mask_dtype,
    is_representable,
    make_problem,
    matched,
    raise_for_invalid,
    with_row_axes,
)
from fastseg.scores import dice_from_counts, jaccard_from_counts, reduce_scores
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
        Logits or probabilities (N, C, *spatial) or as ``layout`` says, or labels (N, *spatial).
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
        first are spatial. Masks of several classes (N, C, *spatial) are scored per class as
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
    counts, undefined = _counts(
        pred, targets, kind, threshold, num_classes, ignore_index, positive, mask, layout
    )
    return reduce_scores(jaccard_from_counts(counts, empty), undefined, reduction)


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
    counts, undefined = _counts(
        pred, targets, kind, threshold, num_classes, ignore_index, positive, mask, layout
    )
    return reduce_scores(dice_from_counts(counts, empty), undefined, reduction)


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
    counts, _ = _counts(
        pred, targets, kind, threshold, num_classes, ignore_index, positive, mask, layout
    )
    return dict(counts)


def _counts(
    pred: Any,
    targets: Any,
    kind: str | None,
    threshold: float | None,
    num_classes: int | None,
    ignore_index: int | None,
    positive: Literal["nonzero"] | int | None,
    mask: Any,
    layout: Literal["NC", "N", "C", ""],
) -> tuple[Mapping[str, NDArray[np.int64]], NDArray[np.float64]]:
    """Return the counts of every row, and how many of its predictions are NaN."""
    options = Options(ignore_index=ignore_index, positive=positive, layout=layout)
    if kind not in (None, "logits", "probs", "labels"):
        raise ValueError(f"kind must be 'logits', 'probs', 'labels' or None, got {kind!r}")
    library = common_library(pred, "pred", targets=targets, mask=mask)
    if kind is None:
        layout_of_pred = library.view(pred, "pred").layout
        kind = "logits" if layout_of_pred.dtype in FLOAT_DTYPES else "labels"
    if kind == "labels":
        if threshold is not None or positive is not None:
            name = "threshold" if threshold is not None else "positive"
            raise ValueError(f"{name} has no meaning for kind='labels'")
        return _label_counts(library, pred, targets, mask, options, num_classes)
    if num_classes is not None:
        raise ValueError(f"num_classes is for kind='labels' only, got kind={kind!r}")
    level = 0.5 if threshold is None else float(threshold)
    if not 0.0 < level <= 1.0:
        raise ValueError(f"threshold must be a probability in (0, 1], got {threshold}")
    if kind == "logits":
        cut = math.inf if level == 1.0 else math.log(level) - math.log1p(-level)
        library, problem = make_problem(pred, targets, mask, None, options, "sigmoid", cut, "pred")
    else:
        library, problem = make_problem(pred, targets, mask, None, options, "probs", level, "pred")
    backend = backend_of(library, pred)
    sums = backend.to_host(backend.statistics(problem, frozenset({"hard"})))
    library.used(problem.owners)
    at = {name: sums[:, :, k] for k, name in enumerate(_NAMES)}
    if at["invalid"].any():
        count, total = int(at["invalid"].sum()), int(at["count"].sum())
        readable = library.device(pred) == "cpu"
        raise_for_invalid(problem, count, total, metric=True, readable=readable)
    hits, over = at["hard_true_positives"], at["hard_false_positives"]
    under = at["hard_false_negatives"]
    rest = at["count"] - hits - over - under
    return _integers(tp=hits, fp=over, fn=under, tn=rest), at["undefined"]


def _integers(**counts: NDArray[np.float64]) -> dict[str, NDArray[np.int64]]:
    return {name: count.astype(np.int64) for name, count in counts.items()}


def _label_counts(
    library: Library,
    pred: Any,
    targets: Any,
    mask: Any,
    options: Options,
    num_classes: int | None,
) -> tuple[Mapping[str, NDArray[np.int64]], NDArray[np.float64]]:
    classes = 2 if num_classes is None else num_classes
    if classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if options.layout == "C":
        raise ValueError(
            "labels have no class axis: layout must be 'N' (or 'NC') or '' for kind='labels', "
            "got 'C'"
        )
    layout = "N" if "N" in options.layout else ""
    views = [library.view(pred, "pred"), library.view(targets, "targets")]
    if mask is not None:
        views.append(library.view(mask, "mask"))
        check_mask_dtype(views[2].dtype)
    rows = with_row_axes(views[0].layout, layout, "pred")
    truth = matched(views[1].layout, "targets", rows, layout, broadcast=False)
    keep = None if mask is None else matched(views[2].layout, "mask", rows, layout, broadcast=False)
    ignore = options.ignore_index
    if ignore is not None:
        ignore = as_stored(ignore, truth.dtype) if is_representable(ignore, truth.dtype) else None
    problem = Problem(
        Arrangement(rows, truth, keep, ignore_index=ignore),
        (views[0].address, views[1].address, 0 if mask is None else views[2].address, 0),
        tuple(view.owner for view in views),
    )
    counts = backend_of(library, pred).count_labels(problem, classes)
    library.used(problem.owners)
    tp, predicted, true, valid, wrong_pred, wrong_true = np.moveaxis(counts, 2, 0)
    for name, wrong in (("pred", wrong_pred), ("targets", wrong_true)):
        if wrong.any():
            hint = "" if num_classes else "; pass num_classes= for more classes than two"
            raise ValueError(
                f"{name} must hold labels in [0, {classes}), {int(wrong[:, 0].sum())} of "
                f"{int(valid[:, 0].sum())} valid voxels do not{hint}"
            )
    if num_classes is None:
        tp, predicted, true, valid = (a[:, 1:] for a in (tp, predicted, true, valid))
    tn = valid - predicted - true + tp
    return _integers(tp=tp, fp=predicted - tp, fn=true - tp, tn=tn), np.zeros(tp.shape)
