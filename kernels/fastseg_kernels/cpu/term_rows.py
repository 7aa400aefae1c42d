"""What evaluates a term is told, and how it finds the sums of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import (
    COEFFICIENTS,
    EMPTY,
    FORMS,
    KINDS,
    LINKS,
    NORMALIZE,
    PICKED,
    SCOPES,
    TERM_FIELDS,
)
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.intrinsics import carray, pointer_to

_AT = {name: index for index, name in enumerate(TERM_FIELDS)}
KIND, WEIGHT, EPS, LINK, GAMMA = (_AT[n] for n in ("kind", "weight", "eps", "link", "gamma"))
HITS_I, HITS_F, HITS_G, HITS_0 = (_AT[f"hits_{n}"] for n in "ifg0")
ERRORS_F, ERRORS_G, ERRORS_0 = (_AT[f"errors_{n}"] for n in "fg0")
SCOPE, EMPTY_RULE = _AT["scope"], _AT["empty"]
POS_WEIGHT, NEG_WEIGHT, NORMALIZATION = (_AT[n] for n in ("pos_weight", "neg_weight", "normalize"))
SMOOTHING, FORM = _AT["smoothing"], _AT["form"]
HISTOGRAM, BINS, LOWEST = (_AT[n] for n in ("histogram", "bins", "lowest"))
NEGATIVE, LOG, POWER = LINKS.index("negative"), LINKS.index("log"), LINKS.index("power")
LOVASZ, FOCAL_BCE, FOCAL_CROSS_ENTROPY = (
    KINDS.index(name) for name in ("lovasz", "focal_bce", "focal_cross_entropy")
)
L1, SQUARED = FORMS.index("l1"), FORMS.index("squared")
BATCH, IMAGE, CLASS = (SCOPES.index(name) for name in ("batch", "image", "class"))
FORMULA, ONE, SKIP = EMPTY.index("formula"), EMPTY.index("one"), EMPTY.index("skip")
BY_VALID, BY_ALL, BY_WEIGHTS = (NORMALIZE.index(n) for n in ("valid", "all", "weights"))
NONE, MEAN = 0, 1  # of constants.REDUCTIONS
(
    ON, OFF, BCE_TARGET, BCE_OTHER, BELOW, ABOVE, SQUARE, FLIPPED_TARGET, FLIPPED_OTHER,
    FOCAL_TARGET, FOCAL_OTHER, FOCAL_GAMMA,
) = range(COEFFICIENTS)  # fmt: skip

(
    VOXELS, COUNT, P, INNER, F, G, BCE_ALL, BCE_POS, BCE_NEG, _, CE, CE_UNIFORM,
    L1_INNER, L1_F, L1_G, PRODUCT, SQUARED_ERROR, UNDEFINED, FLIPPED_POS, FLIPPED_NEG, FOCAL_POS,
    FOCAL_NEG, FOCAL_CE,
) = range(len(PICKED))  # fmt: skip
SUMS, FIELDS = len(PICKED), len(TERM_FIELDS)

EVALUATION = np.dtype(
    [
        ("terms", np.int64),  # address of float64 (number of terms, TERM_FIELDS)
        ("kernels", np.int64),  # address of int64 (number of terms): which kernel evaluates each
        ("number", np.int64),
        ("class_weights", np.int64),  # address of float64 (number of terms, classes)
        ("picked", np.int64),  # address of int64 (PICKED): their columns
        ("reduction", np.int64),
        ("width", np.int64),  # coefficients of a row
        ("samples", np.int64),
        ("classes", np.int64),
        ("columns", np.int64),
        ("sums", np.int64),  # address of float64 (samples, classes, columns)
        ("scale", np.int64),  # address of float64 (samples, classes)
        # Address of float64 (samples, classes), or (1, 1), then as many for each term, then
        # (samples, classes, width): the value, those of the terms, the coefficients.
        ("results", np.int64),
    ]
)
"""What `evaluation.evaluation_kernel` is told."""


class Work(NamedTuple):
    """One term, the sums that it is made of, and where its value and coefficients go.

    All but the numbers are pointers to float64 (``picked``: int64).
    """

    term: Any  # (TERM_FIELDS,)
    class_weights: Any  # (classes,); NaN: the class is left out
    sums: Any  # (samples, classes, columns)
    picked: Any  # (PICKED,): their columns; -1: absent
    scale: Any  # (samples, classes)
    values: Any  # (samples, classes) for reduction "none", else one
    coefficients: Any  # (samples, classes, width), added to
    samples: Any
    classes: Any
    columns: Any
    width: Any
    reduction: Any


@function
def work_of(address, k):  # type: ignore[no-untyped-def]
    """Return the `Work` of the k-th term of the `EVALUATION` at an address."""
    own = carray(pointer_to(address, EVALUATION), 1)[0]
    rows = own.samples * own.classes
    lines = rows if own.reduction == NONE else 1
    of_values = own.results + 8 * lines
    return Work(
        pointer_to(own.terms + 8 * FIELDS * k, np.float64),
        pointer_to(own.class_weights + 8 * own.classes * k, np.float64),
        pointer_to(own.sums, np.float64),
        pointer_to(own.picked, np.int64),
        pointer_to(own.scale, np.float64),
        pointer_to(of_values + 8 * lines * k, np.float64),
        pointer_to(of_values + 8 * lines * own.number, np.float64),
        own.samples,
        own.classes,
        own.columns,
        own.width,
        own.reduction,
    )


def term_kernel(add: Callable[..., Any], name: str) -> Kernel:
    """Compile ``term(evaluation, k, unused)``: ``add(work)`` of the k-th term.

    ``add`` returns the reduced value, fills ``values`` for reduction "none", and adds to the
    coefficients.
    """

    def term(address, k, unused):  # type: ignore[no-untyped-def]
        w = work_of(address, k)
        total = add(w)
        if w.reduction != NONE:
            w.values[0] = total

    return Kernel(term, name)


@function
def is_selected(w, c):  # type: ignore[no-untyped-def]
    """Tell whether the term has class c."""
    return w.class_weights[c] == w.class_weights[c]


@function
def factor_of(w, n, c):  # type: ignore[no-untyped-def]
    """Return what the gradient of sample n and class c is multiplied by, the term's weight too."""
    return w.term[WEIGHT] * w.scale[n * w.classes + c]


@function
def add_to(w, n, c, k, part):  # type: ignore[no-untyped-def]
    """Add to the k-th coefficient of sample n and class c."""
    w.coefficients[(n * w.classes + c) * w.width + k] += part


@function
def put_value(w, n, c, value):  # type: ignore[no-untyped-def]
    """Keep the value of sample n and class c, where these are not reduced."""
    if w.reduction == NONE:
        w.values[n * w.classes + c] = value


@function
def collect(w, n, c, batch, row):  # type: ignore[no-untyped-def]
    """Copy the sums of sample n and class c to ``row``, or add up those of all samples."""
    first, last = (0, w.samples) if batch else (n, n + 1)
    for k in range(SUMS):
        row[k] = 0.0
        if w.picked[k] >= 0:
            for sample in range(first, last):
                row[k] += w.sums[(sample * w.classes + c) * w.columns + w.picked[k]]
