"""Sizes and codes that every backend shares, each with its reason."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_DIMS = 6
"""Spatial axes that a kernel walks after neighbouring axes were merged. Merging leaves more than
three only for views that were sliced along several axes; past six the caller copies."""

DTYPE_CODES = {
    name: code
    for code, name in enumerate(
        (
            *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
            *("float16", "bfloat16", "float32", "float64"),
        )
    )
}
"""How a kernel is told the element type of an operand at run time."""

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
ITEM_SIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4,
    "uint64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip

# How the elements of ``targets`` become targets.
TARGETS_AS_STORED = 0  # 0 and 1 are the classes (or [0, 1] for soft targets)
TARGETS_NONZERO = 1  # every label but 0 is the foreground
TARGETS_EQUAL = 2  # one label is the foreground

# Column groups ("families") of the statistics. A loss names what it needs and nobody pays for more.
BASE_COLUMNS = ("voxels", "count", "invalid", "targets_sum")
FAMILY_COLUMNS = {
    "overlap": ("true_positive_sum", "false_negative_sum", "false_positive_sum"),
    "overlap_l1": ("l1_true_positive_sum", "l1_false_negative_sum", "l1_false_positive_sum"),
    "overlap_squared": ("product_sum", "squared_error_sum"),
    "bce": ("bce_sum",),
    "bce_split": ("bce_pos_sum", "bce_neg_sum"),
    "bce_flipped": ("bce_flipped_pos_sum", "bce_flipped_neg_sum"),
    "focal_bce": ("focal_bce_pos_sum", "focal_bce_neg_sum"),
    "ce": ("ce_sum",),
    "ce_uniform": ("ce_uniform_sum",),
    "focal_ce": ("focal_ce_sum",),
    "labels": (),  # no sums: targets must be 0 or 1, soft ones are invalid
    "sorted": (),  # no sums either: the gradient has a part that is given for each voxel
    "hard": ("hard_true_positives", "hard_false_positives", "hard_false_negatives", "undefined"),
}


class Histogram(NamedTuple):
    """A family of counts: how many voxels of each label have a number in each bin.

    ``measure`` says which number. "logits" and "probs": predictions, in bins of equal width.
    "hinge" and "errors": the errors of the Lovasz hinge, 1 - x (2 p - 1), and of probabilities,
    abs(p - q), where they are above 0; in `OCTAVES` octaves from 2^``lowest`` on, each of equal
    bins. There is also the sum of what the errors have beyond the lower edge of their bin, in
    units of the last of 23 fraction bits at that edge. (Errors below the first octave are counted
    in the first bin, as 0, and those above the last in the last bin, as its upper edge.) So all
    columns hold integers: adding histograms is exact.

    Columns: "undefined", the predictions that are NaN; the counts of the foreground and of the
    background; of errors also the sums of either.
    """

    measure: str
    bins: int
    lowest: int = 0  # exponent of the first octave

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the groups of ``bins`` columns after the first column."""
        counts = ("foreground", "background")
        return counts if self.measure in ("logits", "probs") else (*counts, "missed", "false")

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return 1 + len(self.parts) * self.bins


CURVE_BINS = 1024
"""Bins of predictions: probabilities 1/1024 apart, logits 1/32 apart from -16 to 16."""
LOVASZ_BINS = (1024, 2048, 4096, 8192)
"""Bins of errors that there may be: a power of two for each octave, and counts of both labels that
stay in the second cache."""
OCTAVES = 64
FRACTION_BITS = 23
"""Of an error that are kept; all of a float32."""
HISTOGRAMS = {
    "logit_curve": Histogram("logits", CURVE_BINS),
    "prob_curve": Histogram("probs", CURVE_BINS),
    **{f"hinge_{bins}": Histogram("hinge", bins, -24) for bins in LOVASZ_BINS},
    **{f"errors_{bins}": Histogram("errors", bins, -64) for bins in LOVASZ_BINS},
}
"""Families of counts, whose columns come after all others, in this order."""
CURVES = ("logit_curve", "prob_curve")
"""Those of predictions."""


FOCAL = ("focal_bce", "focal_ce")
"""Families whose name a number completes, "focal_bce_2.0": sums of another gamma are others."""


@cache
def gamma_of(families: frozenset[str]) -> float:
    """Return the gamma of the focal sums among ``families``, 0 if there are none."""
    named = (f.rpartition("_") for f in families)
    return next((float(gamma) for name, _, gamma in named if name in FOCAL), 0.0)


@cache
def without_gamma(families: frozenset[str]) -> frozenset[str]:
    """Return the families without that number: what code they need."""
    names = {family: family.rpartition("_")[0] for family in families}
    return frozenset(name if name in FOCAL else family for family, name in names.items())


@cache
def family_columns(family: str) -> tuple[str, ...]:
    """Return the names of a family's columns."""
    if family in FAMILY_COLUMNS:
        return FAMILY_COLUMNS[family]
    name, _, gamma = family.rpartition("_")
    if name in FOCAL:
        return tuple(f"{column}_{gamma}" for column in FAMILY_COLUMNS[name])
    histogram = HISTOGRAMS[family]
    named = (f"{family}_{part}_{k}" for part in histogram.parts for k in range(histogram.bins))
    return (f"{family}_undefined", *named)


@cache
def columns(families: frozenset[str], counts: bool = True) -> tuple[str, ...]:
    """Return the names of the columns that ``families`` need, in the order they are stored.

    Without ``counts`` those of `HISTOGRAMS` are left out.
    """
    names = list(BASE_COLUMNS)
    completed = {family.rpartition("_")[0]: family for family in families}
    for name in (*FAMILY_COLUMNS, *(HISTOGRAMS if counts else ())):
        family = completed.get(name, name) if name in FOCAL else name
        if family in families:
            names.extend(family_columns(family))
    return tuple(names)


@cache
def histograms(families: frozenset[str]) -> tuple[str, ...]:
    """Return those of the families that are histograms, in the order they are stored."""
    return tuple(family for family in HISTOGRAMS if family in families)


@cache
def lovasz_histogram(families: frozenset[str]) -> Histogram | None:
    """Return the histogram whose slopes a gradient looks up, if there is one."""
    return next((HISTOGRAMS[f] for f in histograms(families) if f not in CURVES), None)


# One row of the table of terms. A Lovasz term is a function of a histogram, whose first column and
# whose bins and first octave the row names; without bins it sorts. A region term is a function of
# score = H / (H + E) and of 1 - score = E / (H + E), where
#   H = hits_i I + hits_f F + hits_g G + hits_0        E = errors_f F + errors_g G + errors_0
# Neither is formed as a difference: a loss near 0 keeps its digits, and a score near 0 too. What I,
# F and G are, its form says:
#   product   sum p q,        sum p (1 - q),    sum (1 - p) q
#   l1        sum min(p, q),  sum max(p - q, 0),  sum max(q - p, 0)
#   squared   sum p q,        0,                sum (p - q)^2
TERM_FIELDS = (
    "kind", "weight", "hits_i", "hits_f", "hits_g", "hits_0", "errors_f", "errors_g", "errors_0",
    "eps", "link", "gamma", "scope", "empty", "form", "pos_weight", "neg_weight", "normalize",
    "smoothing", "histogram", "bins", "lowest",
)  # fmt: skip
KINDS = ("bce", "region", "cross_entropy", "lovasz", "focal_bce", "focal_cross_entropy")
FORMS = ("product", "l1", "squared")
LINKS = ("one_minus", "negative", "log", "power")
SCOPES = ("sample", "batch", "image", "class")
EMPTY = ("formula", "one", "zero", "skip")
NORMALIZE = ("sum", "valid", "all", "weights")
REDUCTIONS = ("none", "mean", "sum")

COEFFICIENT_NAMES = (
    "on_target", "off_target", "bce_target", "bce_other", "below", "above", "square",
    "flipped_target", "flipped_other", "focal_target", "focal_other", "gamma",
)  # fmt: skip
COEFFICIENTS = len(COEFFICIENT_NAMES)
"""Per row, what the gradient kernel needs (``cpu/points.py`` has the formula): dL/dq of the region
terms on the foreground and off it; the weight of the BCE on the foreground and off it (with
softmax, ``cpu/softmax.py``, that of the cross-entropy of the target's class and of every class);
dL/dq of the l1 form where q < p and where q > p; what q - p is multiplied by for the squared form;
the weight of the BCE with the other label, on the foreground and off it; the weight of the focal
loss, likewise (with softmax, that of the target's class and nothing), and its gamma.

Where a Lovasz term is added there follow the slopes of its errors, dL/de, for the bins of the
foreground and then of the background. For one that sorts they are two numbers instead: what the
row's extension is multiplied by in the loss, and what its slopes are."""
BENT_FAMILIES = frozenset({"overlap_l1", "overlap_squared"})
"""Those with which dL/dq depends on q."""
SLOPE_FAMILIES = BENT_FAMILIES | {"bce_flipped", *FOCAL}
"""Families of sums whose gradient is code of its own in a kernel, which others do without."""


@cache
def coefficient_width(families: frozenset[str]) -> int:
    """Return how many coefficients a row has in the gradient of a loss made of ``families``."""
    histogram = lovasz_histogram(families)
    return COEFFICIENTS + (2 * histogram.bins if histogram else 2 if "sorted" in families else 0)


def more_coefficients(terms: NDArray[np.float64]) -> int:
    """Return how many coefficients of a row a table of terms has beside these."""
    lovasz = terms[terms[:, TERM_FIELDS.index("kind")] == KINDS.index("lovasz")]
    bins = lovasz[:, TERM_FIELDS.index("bins")]
    return 0 if bins.size == 0 else max(2, 2 * int(bins.max()))


PICKED = (
    "voxels", "count", "targets_sum", "true_positive_sum", "false_negative_sum",
    "false_positive_sum", "bce_sum", "bce_pos_sum", "bce_neg_sum", "invalid", "ce_sum",
    "ce_uniform_sum", "l1_true_positive_sum", "l1_false_negative_sum", "l1_false_positive_sum",
    "product_sum", "squared_error_sum", "undefined", "bce_flipped_pos_sum", "bce_flipped_neg_sum",
    "focal_bce_pos_sum", "focal_bce_neg_sum", "focal_ce_sum",
)  # fmt: skip
"""The sums that terms are made of, in the order in which ``evaluate`` takes them."""
