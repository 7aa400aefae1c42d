"""Lovasz terms: from the histogram of a row's errors to the extension and its slopes."""

from __future__ import annotations

from functools import cache

import numpy as np

from fastseg_kernels.constants import COEFFICIENTS, FRACTION_BITS, OCTAVES
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.region_terms import is_empty, make_add
from fastseg_kernels.cpu.term_rows import (
    BINS,
    EMPTY_RULE,
    HISTOGRAM,
    LOWEST,
    ONE,
    UNDEFINED,
    WEIGHT,
    G,
    P,
    add_to,
    collect,
    factor_of,
    term_kernel,
)


@function
def _counted(w, n, c, batch, column):  # type: ignore[no-untyped-def]
    """Return a count of a row, or of the rows of all samples."""
    first, last = (0, w.samples) if batch else (n, n + 1)
    total = 0.0
    for sample in range(first, last):
        total += w.sums[(sample * w.classes + c) * w.columns + column]
    return total


@function
def lovasz(w, n, c, batch, foreground, part):  # type: ignore[no-untyped-def]
    """Return the Lovasz extension of a row's histogram; it has so many voxels of foreground.

    Add dL/de, times ``part`` and the scale of the row, to the coefficients of the row, or of those
    of all samples; not if ``part`` is 0.

    A bin is treated as voxels of equal errors: from f and b voxels of larger errors to f + n1 and
    b + n0, with the mean of the weights of both orders (``reference/lovasz.py``). The errors' sums
    are exact, so that what a bin loses is their order alone.
    """
    at, bins = np.int64(w.term[HISTOGRAM]), np.int64(w.term[BINS])
    lowest, per_octave = np.int64(w.term[LOWEST]), bins // OCTAVES
    first, last = (0, w.samples) if batch else (n, n + 1)
    inside, union, value = foreground, foreground, 0.0
    for k in range(bins - 1, -1, -1):
        n1 = _counted(w, n, c, batch, at + 1 + k)
        n0 = _counted(w, n, c, batch, at + 1 + bins + k)
        if union > 0.0:
            of_foreground = 0.5 / union + 0.5 / (union + n0)
            of_background = (0.5 * (inside + (inside - n1)) / union) / (union + n0)
        else:  # the first errors of a row without foreground, whose weights add up to 1
            of_foreground, of_background = 1.0, 1.0 / max(n0, 1.0)
        if n1 + n0 > 0.0 and part == 0.0:
            octave = 2.0 ** (lowest + k // per_octave)
            edge = octave * (1.0 + (k % per_octave) / per_octave) if k > 0 else 0.0
            unit = octave * 2.0**-FRACTION_BITS
            missed = _counted(w, n, c, batch, at + 1 + 2 * bins + k)
            false = _counted(w, n, c, batch, at + 1 + 3 * bins + k)
            value += of_foreground * (n1 * edge + unit * missed)
            value += of_background * (n0 * edge + unit * false)
        if part != 0.0:
            for sample in range(first, last):
                factor = factor_of(w, sample, c) * part
                add_to(w, sample, c, COEFFICIENTS + k, factor * of_foreground)
                add_to(w, sample, c, COEFFICIENTS + bins + k, factor * of_background)
        inside, union = inside - n1, union + n0
    return np.nan if _counted(w, n, c, batch, at) > 0.0 else value


@cache
def lovasz_kernel() -> Kernel:
    """Compile what evaluates a Lovasz term: counted in bins, or (0 bins) sorted elsewhere."""

    @function
    def fill_row(w, n, c, batch, row):  # type: ignore[no-untyped-def]
        """Collect a row; G is NaN if a prediction is, and 0 else."""
        collect(w, n, c, batch, row)
        undefined = row[UNDEFINED]
        if w.term[BINS] != 0.0:
            undefined = _counted(w, n, c, batch, np.int64(w.term[HISTOGRAM]))
        row[G] = np.nan if undefined > 0.0 else 0.0

    @function
    def value_of(w, n, c, batch, row):  # type: ignore[no-untyped-def]
        if is_empty(w.term, row):
            return 0.0 if w.term[EMPTY_RULE] == ONE else 1.0
        return lovasz(w, n, c, batch, row[P], 0.0) if w.term[BINS] != 0.0 else 0.0

    @function
    def add_slopes(w, n, c, batch, row, part):  # type: ignore[no-untyped-def]
        if is_empty(w.term, row):  # a constant
            return
        if w.term[BINS] == 0.0:
            add_to(w, n, c, COEFFICIENTS, w.term[WEIGHT] * part)
            add_to(w, n, c, COEFFICIENTS + 1, factor_of(w, n, c) * part)
        elif n == 0 or not batch:  # all samples at once
            lovasz(w, n, c, batch, row[P], part)

    return term_kernel(make_add(fill_row, value_of, add_slopes), "lovasz-term")
