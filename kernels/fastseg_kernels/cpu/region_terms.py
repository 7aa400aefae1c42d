"""Region terms: from the sums of a row to a score, its loss and the slopes of that.

What joins rows (scopes, rules for empty targets, means) serves the Lovasz terms too.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.intrinsics import stack_array
from fastseg_kernels.cpu.term_rows import (
    ABOVE,
    BATCH,
    BELOW,
    CLASS,
    COUNT,
    EMPTY_RULE,
    EPS,
    ERRORS_0,
    ERRORS_F,
    ERRORS_G,
    FORM,
    FORMULA,
    GAMMA,
    HITS_0,
    HITS_F,
    HITS_G,
    HITS_I,
    IMAGE,
    INNER,
    L1,
    L1_F,
    L1_G,
    L1_INNER,
    LINK,
    LOG,
    MEAN,
    NEGATIVE,
    OFF,
    ON,
    ONE,
    POWER,
    PRODUCT,
    SCOPE,
    SKIP,
    SQUARE,
    SQUARED,
    SQUARED_ERROR,
    SUMS,
    F,
    G,
    P,
    add_to,
    collect,
    factor_of,
    is_selected,
    put_value,
    term_kernel,
)


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
    """Return (value, d value/d F, d value/d G) of a region term for a row of sums that is kept."""
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
        return value, 0.0, 0.0
    return value, outer * slope_f, outer * slope_g


def make_add(fill_row: Any, value_of: Any, add_slopes: Any) -> Any:
    """Return ``add(w)`` of terms whose rows have a score each.

    ``fill_row(w, n, c, batch, row)`` collects the sums of sample n (of all samples, if ``batch``)
    and class c, ``value_of(w, n, c, batch, row)`` is the loss of that row, and
    ``add_slopes(w, n, c, batch, row, part)`` adds its gradient, times ``part``, to coefficients.
    """

    @function
    def kept_in_line(w, n, c):  # type: ignore[no-untyped-def]
        """Return how many rows are kept of sample n (scope "image"), or of class c ("class")."""
        row = stack_array(SUMS, np.float64)
        along_classes = w.term[SCOPE] == IMAGE
        kept = 0
        for k in range(w.classes if along_classes else w.samples):
            i, j = (n, k) if along_classes else (k, c)
            if is_selected(w, j):
                fill_row(w, i, j, False, row)
                kept += is_kept(w.term, row)
        return kept

    @function
    def kept_lines(w):  # type: ignore[no-untyped-def]
        """Return how many samples ("image") or classes ("class") have a row that is kept."""
        lines = 0
        for k in range(w.samples if w.term[SCOPE] == IMAGE else w.classes):
            lines += kept_in_line(w, k, k) > 0
        return lines

    @function
    def add(w):  # type: ignore[no-untyped-def]
        # Two rounds over the rows: how many count must be known before the coefficients are.
        scope = w.term[SCOPE]
        batch = scope == BATCH
        in_lines = w.reduction == MEAN and (scope == IMAGE or scope == CLASS)  # noqa: SIM109
        lines = kept_lines(w) if in_lines else 1
        groups = min(1, w.samples) if batch else w.samples
        row = stack_array(SUMS, np.float64)
        kept, total = 0, 0.0
        for n in range(groups):
            for c in range(w.classes):
                fill_row(w, n, c, batch, row)
                if is_selected(w, c) and is_kept(w.term, row):
                    kept += 1
                    value = w.class_weights[c] * value_of(w, n, c, batch, row)
                    total += value / kept_in_line(w, n, c) if in_lines else value
                    put_value(w, n, c, value)
        share = 1.0
        if in_lines:
            share = 1.0 / lines if lines > 0 else 0.0
        elif w.reduction == MEAN:
            share = 1.0 / kept if kept > 0 else 0.0
        for n in range(w.samples):
            for c in range(w.classes):
                fill_row(w, n, c, batch, row)
                if is_selected(w, c) and is_kept(w.term, row):
                    part = share * w.class_weights[c]
                    if in_lines:
                        part /= kept_in_line(w, n, c)
                    add_slopes(w, n, c, batch, row, part)
        return total * share

    return add


@cache
def region_kernel() -> Kernel:
    """Compile what evaluates a region term."""

    @function
    def fill_row(w, n, c, batch, row):  # type: ignore[no-untyped-def]
        """Collect a row with I, F and G of the term's form."""
        collect(w, n, c, batch, row)
        if w.term[FORM] == L1:
            row[INNER], row[F], row[G] = row[L1_INNER], row[L1_F], row[L1_G]
        elif w.term[FORM] == SQUARED:
            row[INNER], row[F], row[G] = row[PRODUCT], 0.0, row[SQUARED_ERROR]

    @function
    def value_of(w, n, c, batch, row):  # type: ignore[no-untyped-def]
        return region(w.term, row)[0]

    @function
    def add_slopes(w, n, c, batch, row, part):  # type: ignore[no-untyped-def]
        _, slope_f, slope_g = region(w.term, row)
        factor = factor_of(w, n, c) * part
        if w.term[FORM] == L1:
            add_to(w, n, c, BELOW, -factor * slope_f)
            add_to(w, n, c, ABOVE, factor * slope_g)
        elif w.term[FORM] == SQUARED:
            add_to(w, n, c, ON, -factor * slope_f)
            add_to(w, n, c, SQUARE, 2.0 * factor * slope_g)
        else:
            add_to(w, n, c, ON, -factor * slope_f)
            add_to(w, n, c, OFF, factor * slope_g)

    return term_kernel(make_add(fill_row, value_of, add_slopes), "region-term")
