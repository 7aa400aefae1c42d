"""From the sums to the value and the coefficients of the gradient: one table of terms.

A loss is data here: a row per term (`constants.TERM_FIELDS`), weights and choice of classes. It
costs the same few microseconds whatever the size of the volume.
"""

from __future__ import annotations

import math
from ctypes import addressof, c_char
from functools import cache, lru_cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    COEFFICIENTS,
    EMPTY,
    FORMS,
    FRACTION_BITS,
    KINDS,
    LINKS,
    NORMALIZE,
    OCTAVES,
    PICKED,
    SCOPES,
    TERM_FIELDS,
    more_coefficients,
)
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.intrinsics import carray, pointer_to, stack_array
from fastseg_kernels.cpu.memory import own_address
from fastseg_kernels.problem import Evaluation

_AT = {name: index for index, name in enumerate(TERM_FIELDS)}
KIND, WEIGHT, EPS, LINK, GAMMA = (_AT[n] for n in ("kind", "weight", "eps", "link", "gamma"))
HITS_I, HITS_F, HITS_G, HITS_0 = (_AT[f"hits_{n}"] for n in "ifg0")
ERRORS_F, ERRORS_G, ERRORS_0 = (_AT[f"errors_{n}"] for n in "fg0")
SCOPE, EMPTY_RULE = _AT["scope"], _AT["empty"]
POS_WEIGHT, NEG_WEIGHT, NORMALIZATION = (_AT[n] for n in ("pos_weight", "neg_weight", "normalize"))
SMOOTHING, FORM = _AT["smoothing"], _AT["form"]
HISTOGRAM, BINS, LOWEST = (_AT[n] for n in ("histogram", "bins", "lowest"))
NEGATIVE, LOG, POWER = LINKS.index("negative"), LINKS.index("log"), LINKS.index("power")
BCE, REGION, CROSS_ENTROPY, LOVASZ, FOCAL_BCE, FOCAL_CROSS_ENTROPY = (
    KINDS.index(n)
    for n in ("bce", "region", "cross_entropy", "lovasz", "focal_bce", "focal_cross_entropy")
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
SUMS = len(PICKED)


@function
def is_empty(term, sums):  # type: ignore[no-untyped-def]
    """Tell whether a rule stands for the formula, as there is no foreground.

    NaN stays NaN, whatever the rule: only predictions can be the cause, P is a number.
    """
    return sums[P] == 0.0 and term[EMPTY_RULE] != FORMULA and sums[G] == sums[G]


@function
def is_kept(term, sums):  # type: ignore[no-untyped-def]
    """Tell whether a row has a part in the mean."""
    return sums[COUNT] != 0.0 and not (is_empty(term, sums) and term[EMPTY_RULE] == SKIP)


@function
def region(term, sums):  # type: ignore[no-untyped-def]
    """Return (value, d value/d F, d value/d G, kept) of one region term for one row of sums."""
    if not is_kept(term, sums):
        return 0.0, 0.0, 0.0, False
    rule = term[EMPTY_RULE]
    empty = is_empty(term, sums)
    hits = term[HITS_I] * sums[INNER] + term[HITS_F] * sums[F] + term[HITS_G] * sums[G]
    hits += term[HITS_0]
    errors = term[ERRORS_F] * sums[F] + term[ERRORS_G] * sums[G] + term[ERRORS_0]
    size = hits + errors
    slope_f, slope_g = 0.0, 0.0  # of 1 - score; I = P - F falls as F grows
    if empty:
        score, r = (1.0, 0.0) if rule == ONE else (0.0, 1.0)
    elif size < term[EPS]:
        # The score stays a quotient of its own, hits / eps.
        size = term[EPS]
        score, r = hits / size, 1.0 - hits / size
        slope_f, slope_g = (term[HITS_I] - term[HITS_F]) / size, -term[HITS_G] / size
    else:
        score, r = hits / size, errors / size
        slope_f = (score * term[ERRORS_F] + r * (term[HITS_I] - term[HITS_F])) / size
        slope_g = (score * term[ERRORS_G] - r * term[HITS_G]) / size
    link = term[LINK]
    if link == NEGATIVE:
        value, outer = -score, 1.0
    elif link == LOG:
        # Held at -log(eps), as peers do, if an eps is given. Near 1 the digits are those of r.
        value = -math.log(score) if score < 0.5 else -math.log1p(-r)
        outer = 1.0 / score
        if term[EPS] > 0.0 and score < term[EPS]:
            value, outer = -math.log(term[EPS]), 0.0
    elif link == POWER:
        base = max(r, 0.0)
        value = base ** term[GAMMA]
        outer = term[GAMMA] * base ** (term[GAMMA] - 1.0) if base > 0.0 else 0.0
        if r != r:
            value, outer = r, r
        elif r == 0.0 and term[GAMMA] == 1.0:
            outer = 1.0
    else:
        value, outer = r, 1.0
    if empty:  # a constant, whatever the link's derivative is there
        return value, 0.0, 0.0, True
    return value, outer * slope_f, outer * slope_g, True


@function
def add_region(term, sums, columns, class_weights, reduction, scale, values, coefficients):  # type: ignore[no-untyped-def]
    """Evaluate a region or Lovasz term; return its reduced value.

    Fill ``values`` and add to the coefficients. Two rounds over the rows: how many count must be
    known before the coefficients are.
    """
    samples, classes = sums.shape[0], sums.shape[1]
    batch, of_bins = term[SCOPE] == BATCH, term[KIND] == LOVASZ
    in_lines = reduction == MEAN and (term[SCOPE] == IMAGE or term[SCOPE] == CLASS)
    lines = _kept_lines(term, sums, columns, class_weights) if in_lines else 1
    groups = min(1, samples) if batch else samples
    row = stack_array(SUMS, np.float64)
    kept, total = 0, 0.0
    for n in range(groups):
        for c in range(classes):
            _collect_region(term, sums, columns, n, c, batch, row)
            value, _, _, keep = region(term, row)
            if keep and of_bins and not is_empty(term, row):
                value = lovasz(term, sums, n, c, batch, row[P], 0.0, scale, coefficients)
            if keep and class_weights[c] == class_weights[c]:  # NaN: the class is left out
                kept += 1
                part = class_weights[c] * value
                if in_lines:
                    part /= _kept_in_line(term, sums, columns, class_weights, n, c)
                total += part
                if reduction == NONE:
                    values[n, c] = class_weights[c] * value
    share = 1.0
    if in_lines:
        share = 1.0 / lines if lines > 0 else 0.0
    elif reduction == MEAN:
        share = 1.0 / kept if kept > 0 else 0.0
    for n in range(samples):
        for c in range(classes):
            _collect_region(term, sums, columns, n, c, batch, row)
            _, slope_f, slope_g, keep = region(term, row)
            if keep and class_weights[c] == class_weights[c]:
                part = share * class_weights[c]
                if in_lines:
                    part /= _kept_in_line(term, sums, columns, class_weights, n, c)
                factor = term[WEIGHT] * part * scale[n, c]
                if of_bins and term[BINS] == 0.0 and not is_empty(term, row):
                    coefficients[n, c, COEFFICIENTS] += term[WEIGHT] * part
                    coefficients[n, c, COEFFICIENTS + 1] += factor
                elif of_bins and not is_empty(term, row):
                    if n == 0 or not batch:  # all samples at once
                        lovasz(term, sums, n, c, batch, row[P], term[WEIGHT] * part, scale,
                               coefficients)  # fmt: skip
                elif of_bins:
                    pass
                elif term[FORM] == L1:
                    coefficients[n, c, BELOW] -= factor * slope_f
                    coefficients[n, c, ABOVE] += factor * slope_g
                elif term[FORM] == SQUARED:
                    coefficients[n, c, ON] -= factor * slope_f
                    coefficients[n, c, SQUARE] += 2.0 * factor * slope_g
                else:
                    coefficients[n, c, ON] -= factor * slope_f
                    coefficients[n, c, OFF] += factor * slope_g
    return total * share


@function
def _kept_in_line(term, sums, columns, class_weights, n, c):  # type: ignore[no-untyped-def]
    """Return how many rows are kept of sample n (scope "image"), or of class c ("class")."""
    row = stack_array(SUMS, np.float64)
    along_classes = term[SCOPE] == IMAGE
    kept = 0
    for k in range(sums.shape[1] if along_classes else sums.shape[0]):
        i, j = (n, k) if along_classes else (k, c)
        if class_weights[j] == class_weights[j]:
            _collect_region(term, sums, columns, i, j, False, row)
            kept += is_kept(term, row)
    return kept


@function
def _kept_lines(term, sums, columns, class_weights):  # type: ignore[no-untyped-def]
    """Return how many samples ("image") or classes ("class") have a row that is kept."""
    lines = 0
    for k in range(sums.shape[0] if term[SCOPE] == IMAGE else sums.shape[1]):
        lines += _kept_in_line(term, sums, columns, class_weights, k, k) > 0
    return lines


@function
def _collect(sums, columns, n, c, batch, row):  # type: ignore[no-untyped-def]
    """Copy a row of sums, or add up those of all samples."""
    for k in range(SUMS):
        row[k] = 0.0
        first, last = (0, sums.shape[0]) if batch else (n, n + 1)
        if columns[k] >= 0:
            for sample in range(first, last):
                row[k] += sums[sample, c, columns[k]]


@function
def _collect_region(term, sums, columns, n, c, batch, row):  # type: ignore[no-untyped-def]
    """Copy a row of sums with I, F and G of the term's form."""
    _collect(sums, columns, n, c, batch, row)
    if term[FORM] == L1:
        row[INNER], row[F], row[G] = row[L1_INNER], row[L1_F], row[L1_G]
    elif term[FORM] == SQUARED:
        row[INNER], row[F], row[G] = row[PRODUCT], 0.0, row[SQUARED_ERROR]
    if term[KIND] == LOVASZ:  # NaN if a prediction is
        undefined = row[UNDEFINED]
        if term[BINS] != 0.0:
            undefined = _counted(sums, n, c, batch, int(term[HISTOGRAM]))
        row[G] = np.nan if undefined > 0.0 else 0.0


@function
def _counted(sums, n, c, batch, column):  # type: ignore[no-untyped-def]
    """Return a count of a row, or of the rows of all samples."""
    first, last = (0, sums.shape[0]) if batch else (n, n + 1)
    total = 0.0
    for sample in range(first, last):
        total += sums[sample, c, column]
    return total


@function
def lovasz(term, sums, n, c, batch, P, part, scale, coefficients):  # type: ignore[no-untyped-def]
    """Return the Lovasz extension of a row's histogram.

    Add dL/de, times ``part`` and the scale of the row, to the coefficients of the row, or of those
    of all samples; not if ``part`` is 0.

    A bin is treated as voxels of equal errors: from f and b voxels of larger errors to f + n1 and
    b + n0, with the mean of the weights of both orders (``reference/lovasz.py``). The errors' sums
    are exact, so that what a bin loses is their order alone.
    """
    at, bins, lowest = int(term[HISTOGRAM]), int(term[BINS]), int(term[LOWEST])
    per_octave = bins // OCTAVES
    if bins == 0:  # it sorts
        return 0.0
    first, last = (0, sums.shape[0]) if batch else (n, n + 1)
    inside, union, value = P, P, 0.0
    for k in range(bins - 1, -1, -1):
        n1 = _counted(sums, n, c, batch, at + 1 + k)
        n0 = _counted(sums, n, c, batch, at + 1 + bins + k)
        if union > 0.0:
            of_foreground = 0.5 / union + 0.5 / (union + n0)
            of_background = (0.5 * (inside + (inside - n1)) / union) / (union + n0)
        else:  # the first errors of a row without foreground, whose weights add up to 1
            of_foreground, of_background = 1.0, 1.0 / max(n0, 1.0)
        if n1 + n0 > 0.0 and part == 0.0:
            octave = 2.0 ** (lowest + k // per_octave)
            edge = octave * (1.0 + (k % per_octave) / per_octave) if k > 0 else 0.0
            unit = octave * 2.0**-FRACTION_BITS
            missed = _counted(sums, n, c, batch, at + 1 + 2 * bins + k)
            false = _counted(sums, n, c, batch, at + 1 + 3 * bins + k)
            value += of_foreground * (n1 * edge + unit * missed)
            value += of_background * (n0 * edge + unit * false)
        if part != 0.0:
            for sample in range(first, last):
                factor = part * scale[sample, c]
                coefficients[sample, c, COEFFICIENTS + k] += factor * of_foreground
                coefficients[sample, c, COEFFICIENTS + bins + k] += factor * of_background
        inside, union = inside - n1, union + n0
    return np.nan if _counted(sums, n, c, batch, at) > 0.0 else value


@function
def add_bce(term, sums, columns, class_weights, reduction, scale, values, coefficients):  # type: ignore[no-untyped-def]
    """Evaluate a BCE term, focal or not; return its reduced value.

    Fill ``values`` and add to coefficients. Labels that are smoothed by s are
    p (1 - s / 2) + (1 - p) s / 2.
    """
    samples, classes = sums.shape[0], sums.shape[1]
    focal, half = term[KIND] == FOCAL_BCE, 0.5 * term[SMOOTHING]
    by = VOXELS if term[NORMALIZATION] == BY_ALL else COUNT
    summed = term[NORMALIZATION] != BY_ALL and term[NORMALIZATION] != BY_VALID
    pos_weight, neg_weight = term[POS_WEIGHT], term[NEG_WEIGHT]
    # of the sums BCE_POS, BCE_NEG, FLIPPED_POS, FLIPPED_NEG
    own = ((1.0 - half) * pos_weight, (1.0 - half) * neg_weight)
    other = (half * neg_weight, half * pos_weight)
    row = stack_array(SUMS, np.float64)
    kept, voxels = 0, 0.0
    for n in range(samples):
        for c in range(classes):
            _collect(sums, columns, n, c, False, row)
            selected = class_weights[c] == class_weights[c]  # not NaN
            if selected and row[COUNT] > 0.0:
                kept += 1
            if selected and (row[COUNT] > 0.0 or by == VOXELS):
                voxels += row[by]
    total = 0.0
    for n in range(samples):
        for c in range(classes):
            _collect(sums, columns, n, c, False, row)
            if class_weights[c] != class_weights[c] or row[COUNT] == 0.0:
                continue
            if summed:
                share = 1.0 / kept if reduction == MEAN else 1.0
            else:
                share = 1.0 / (voxels if reduction == MEAN else row[by])
            pos, neg = row[BCE_POS], row[BCE_ALL] + row[BCE_NEG]
            if focal:
                pos, neg = row[FOCAL_POS], row[FOCAL_NEG]
            # 0 leaves its part out, infinite losses included
            value = own[0] * pos if own[0] != 0.0 else 0.0
            value += own[1] * neg if own[1] != 0.0 else 0.0
            value += other[0] * row[FLIPPED_POS] if other[0] != 0.0 else 0.0
            value += other[1] * row[FLIPPED_NEG] if other[1] != 0.0 else 0.0
            factor = class_weights[c] * share
            total += factor * value
            if reduction == NONE:
                values[n, c] = factor * value
            factor *= term[WEIGHT] * scale[n, c]
            first = FOCAL_TARGET if focal else BCE_TARGET
            coefficients[n, c, first] += factor * own[0]
            coefficients[n, c, first + 1] += factor * own[1]
            coefficients[n, c, FLIPPED_TARGET] += factor * other[0]
            coefficients[n, c, FLIPPED_OTHER] += factor * other[1]
            if focal:
                coefficients[n, c, FOCAL_GAMMA] = term[GAMMA]
    return total


@function
def _ce_divisor(term, sums, columns, class_weights, n, row):  # type: ignore[no-untyped-def]
    """Return what a sample's cross-entropy is divided by, and whether it has a voxel at all."""
    total, voxels = 0.0, 0.0
    for c in range(sums.shape[1]):
        _collect(sums, columns, n, c, False, row)
        voxels = max(voxels, row[VOXELS] if term[NORMALIZATION] == BY_ALL else row[COUNT])
        if class_weights[c] == class_weights[c]:  # not NaN
            total += class_weights[c] * row[P]
    if term[NORMALIZATION] == BY_WEIGHTS:
        return total, voxels > 0.0
    return voxels, voxels > 0.0


@function
def add_ce(term, sums, columns, class_weights, reduction, scale, values, coefficients):  # type: ignore[no-untyped-def]
    """Evaluate a cross-entropy over softmax, focal or not; as `add_bce`."""
    samples, classes = sums.shape[0], sums.shape[1]
    summed = term[NORMALIZATION] not in (BY_ALL, BY_VALID, BY_WEIGHTS)
    smoothing, focal = term[SMOOTHING], term[KIND] == FOCAL_CROSS_ENTROPY
    row = stack_array(SUMS, np.float64)
    kept, whole = 0, 0.0
    for n in range(samples):
        divisor, present = _ce_divisor(term, sums, columns, class_weights, n, row)
        if present:
            kept += 1
            whole += divisor
    total = 0.0
    for n in range(samples):
        divisor, present = _ce_divisor(term, sums, columns, class_weights, n, row)
        if not present:
            continue
        if summed:
            share = 1.0 / kept if reduction == MEAN else 1.0
        else:
            divisor = whole if reduction == MEAN else divisor
            share = 1.0 / divisor if divisor != 0.0 else 0.0
        for c in range(classes):
            if focal:
                coefficients[n, c, FOCAL_GAMMA] = term[GAMMA]  # of the voxel, whatever its class
            if class_weights[c] != class_weights[c]:
                continue
            _collect(sums, columns, n, c, False, row)
            factor = class_weights[c] * share
            own, everyone = factor * (1.0 - smoothing), factor * smoothing / classes
            value = 0.0
            if own != 0.0:
                value += own * row[CE]
            if everyone != 0.0:
                value += everyone * row[CE_UNIFORM]
            if focal and own != 0.0:
                value = own * row[FOCAL_CE]
            total += value
            if reduction == NONE:
                values[n, c] = value
            scaled = term[WEIGHT] * scale[n, c]
            if focal:
                coefficients[n, c, FOCAL_TARGET] += scaled * own
            else:
                coefficients[n, c, BCE_TARGET] += scaled * own
                coefficients[n, c, BCE_OTHER] += scaled * everyone
    return total


EVALUATION = np.dtype(
    [
        ("terms", np.int64),  # address of float64 (number of terms, TERM_FIELDS)
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
"""What `evaluation_kernel` is told."""
_PACK = Struct(f"{len(EVALUATION.names or ())}q")


@cache
def evaluation_kernel() -> Kernel:
    """Compile ``evaluate(record, unused, unused)`` of an `EVALUATION`."""
    fields = len(TERM_FIELDS)

    @function
    def matrix(address, rows, columns):  # type: ignore[no-untyped-def]
        return carray(pointer_to(address, np.float64), (rows, columns))

    @function
    def cube(address, rows, lines, columns):  # type: ignore[no-untyped-def]
        return carray(pointer_to(address, np.float64), (rows, lines, columns))

    @function
    def evaluate_terms(terms, weights, sums, columns, reduction, scale, value, by_term, out):  # type: ignore[no-untyped-def]
        value[:], by_term[:], out[:] = 0.0, 0.0, 0.0
        for k in range(terms.shape[0]):
            term, values = terms[k], by_term[k]
            total = np.nan
            if term[KIND] == BCE or term[KIND] == FOCAL_BCE:
                total = add_bce(term, sums, columns, weights[k], reduction, scale, values, out)
            elif term[KIND] == CROSS_ENTROPY or term[KIND] == FOCAL_CROSS_ENTROPY:
                total = add_ce(term, sums, columns, weights[k], reduction, scale, values, out)
            elif term[KIND] == REGION or term[KIND] == LOVASZ:
                total = add_region(term, sums, columns, weights[k], reduction, scale, values, out)
            else:  # nobody wrote a branch for it
                values[:], out[:] = np.nan, np.nan
            if reduction != NONE:
                values[0, 0] = total
            for n in range(value.shape[0]):
                for c in range(value.shape[1]):
                    value[n, c] += term[WEIGHT] * values[n, c]

    def evaluate_record(address, first, last):  # type: ignore[no-untyped-def]
        own = carray(pointer_to(address, EVALUATION), 1)[0]
        samples, classes = own.samples, own.classes
        rows, lines = (samples, classes) if own.reduction == NONE else (1, 1)
        of_terms = own.results + 8 * rows * lines
        of_coefficients = of_terms + 8 * rows * lines * own.number
        evaluate_terms(
            matrix(own.terms, own.number, fields),
            matrix(own.class_weights, own.number, classes),
            cube(own.sums, samples, classes, own.columns),
            carray(pointer_to(own.picked, np.int64), (SUMS,)),
            own.reduction,
            matrix(own.scale, samples, classes),
            matrix(own.results, rows, lines),
            cube(of_terms, own.number, rows, lines),
            cube(of_coefficients, samples, classes, own.width),
        )

    return Kernel(evaluate_record, "evaluate")


class Table(NamedTuple):
    """A table of terms, as the kernel takes it."""

    # The first fields of an `EVALUATION`, in their order
    terms: int
    number: int
    class_weights: int
    picked: int
    reduction: int
    width: int
    owners: tuple[NDArray[Any], ...]  # keep the memory alive

    @property
    def per_row(self) -> bool:
        """Tell whether there is a value for every row."""
        return self.reduction == NONE

    def record(self, shape: tuple[int, ...], *addresses: int) -> bytes:
        """Return the `EVALUATION` of sums (N, C, K); ``addresses``: from the sums' on."""
        return _PACK.pack(*self[:-1], *shape, *addresses)


def prepare(
    terms: NDArray[np.float64],
    class_weights: NDArray[np.float64],
    columns: NDArray[np.int64],
    reduction: int,
) -> Table:
    """Make a table of terms.

    Parameters
    ----------
    terms
        float64 (T, len(TERM_FIELDS)).
    class_weights
        float64 (T, C); NaN says that the term leaves the class out.
    columns
        int64 (len(PICKED),): in which column of the sums each of `constants.PICKED` is; -1: absent.
    reduction
        Index into `constants.REDUCTIONS`.
    """
    owners = tuple(map(np.ascontiguousarray, (terms, class_weights, columns)))
    of_terms, of_weights, of_columns = (own_address(array) for array in owners)
    width = COEFFICIENTS + more_coefficients(terms)
    return Table(of_terms, len(terms), of_weights, of_columns, reduction, width, owners)


def evaluate(
    table: Table,
    sums: NDArray[np.float64],
    scale: float | NDArray[np.float64],
    dtype: str = "float64",
    by_term: bool = False,
) -> Evaluation:
    """Evaluate a table of terms.

    Parameters
    ----------
    table
        What `prepare` made.
    sums
        float64 (N, C, K).
    scale
        A number, or float64 (N, C), multiplied into the coefficients.
    dtype, by_term
        Not used here: the value is float64, and its caller rounds it; the terms are always there.
    """
    rows = sums.shape[:2]
    shape = rows if table.per_row else (1, 1)
    values = shape[0] * shape[1]
    of_coefficients = values * (1 + table.number)
    results = np.empty(of_coefficients + rows[0] * rows[1] * table.width)
    # Both are held until the kernel has read them: another call may drop what is remembered.
    factors, of_scale = (
        _constant(rows, scale) if isinstance(scale, float) else (scale, own_address(scale))
    )
    sums = np.ascontiguousarray(sums)
    record = table.record(sums.shape, own_address(sums), of_scale, own_address(results))
    memory = c_char.from_buffer(bytearray(record))
    evaluation_kernel().call(addressof(memory), 0, 0)
    del factors
    return Evaluation(
        np.ndarray(shape, np.float64, results),
        np.ndarray((table.number, *shape), np.float64, results, 8 * values),
        np.ndarray((*rows, table.width), np.float64, results, 8 * of_coefficients),
    )


@lru_cache(maxsize=64)
def _constant(rows: tuple[int, ...], value: float) -> tuple[NDArray[np.float64], int]:
    """Return the factor of every row, and its address; shared by all calls, and never written."""
    factors = np.full(rows, value)
    return factors, own_address(factors)
