"""Counting voxels by a number that each has, and looking up the slopes of Lovasz terms by it.

`constants.Histogram` says what is counted. A kernel that reads voxels calls those of this file
through their addresses, as it calls those that load and store: they are compiled once, and not once
more for each set of sums that is added up in the same pass. A task counts in words of its own, a
count and a sum in each, and adds them to those of its row when it comes to another row, or when a
sum may be full. Counts are integers, so the order in which tasks do that does not matter.

Which word, and what is added to it, is worked out by vectors and without a branch for `CHUNK`
voxels; then they are added one by one (with branches it took 5 times as long). Word 0 has the
predictions that are NaN, the last one what belongs to no bin.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    COEFFICIENTS,
    CURVES,
    FRACTION_BITS,
    HISTOGRAMS,
    OCTAVES,
    Histogram,
    histograms,
)
from fastseg_kernels.cpu.compiled import Kernel, function, inlined, pasted
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.intrinsics import (
    add_atomically,
    address_of,
    bits_of,
    call_kernel,
    carray,
    is_same,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.jobs import JOB, MOST_TALLIES

SUM_BITS = 40
"""Bits of a word that hold the sum; those above hold the count."""
UNIT = 1 << SUM_BITS
MOST_VOXELS = 2**20
"""Counted between two times that words are added to the row's: neither part of a word overflows,
as a voxel's part of the sum is at most 2^19 (16 bins in an octave)."""
PIECE = 65536
"""Voxels that are counted while they are still in the cache."""
CHUNK = 1024

VOXELS = np.dtype(
    [
        ("x", np.int64),  # address of the predictions; with softmax of a class's exponentials
        ("p", np.int64),  # address of the targets
        ("count", np.int64),
        (
            "left_out",
            np.int64,
        ),  # how many of them do not count, and are in the buffers all the same
        ("words", np.int64),  # address of the task's words for the row
        ("flush_row", np.int64),  # row to whose counts the words are added before; -1: none
        ("row", np.int64),  # whose slopes are looked up
        ("out", np.int64),  # address of the reals to which slopes are added
        ("c", np.int64),  # with softmax: the class, and addresses of what voxels are known by
        ("inverse", np.int64),  # 1 / (left + e_m)
        ("left", np.int64),
        ("largest", np.int64),
        ("target", np.int64),
        ("keep", np.int64),  # 0: left out
    ]
)
"""Voxels of one row for the kernels of this file."""


class Bins(NamedTuple):
    """Where the bins of errors lie among the bits of a float, as a kernel works it out once."""

    base: Any  # bits above ``below`` where the first octave begins
    below: Any  # number of fraction bits within a bin
    mask: Any
    spare: Any  # fraction bits that are not kept
    whole: Any  # the sum's part of a whole bin
    last: Any  # number of the last bin
    second: Any  # the first word of the background
    none: Any  # the word of what belongs to no bin


def words_of(histogram: Histogram) -> int:
    """Return the number of words that a task counts in."""
    return 2 + 2 * histogram.bins


def task_words(families: frozenset[str]) -> int:
    """Return the number of words of all histograms, for one row."""
    return sum(words_of(HISTOGRAMS[family]) for family in histograms(families))


def make_bins_of(real: Real) -> Any:
    """Return ``bins_of(bins, octave_bits, lowest)``."""
    I = real.integer  # noqa: E741
    bias, fraction_bits = real.exponent_bias, real.fraction_bits
    spare = fraction_bits - FRACTION_BITS

    @inlined
    def bins_of(bins, octave_bits, lowest):  # type: ignore[no-untyped-def]
        below = fraction_bits - octave_bits
        return Bins(
            I((bias + lowest) << octave_bits),
            I(below),
            I((1 << below) - 1),
            I(spare),
            I(1 << (below - spare)),
            I(bins - 1),
            I(1 + bins),
            I(1 + 2 * bins),
        )

    return bins_of


def make_place_error(real: Real) -> Any:
    """Return ``place(error, positive, bins)``: the word of an error, and its part of the sum."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, first, nothing = T(0), I(1), I(0)

    @inlined
    def place(error, positive, bins):  # type: ignore[no-untyped-def]
        bits = bits_of(error)
        k = I(I(bits >> bins.below) - bins.base)
        part = I(I(bits & bins.mask) >> bins.spare)
        part = nothing if k < first else part
        part = bins.whole if k > bins.last else part
        k = nothing if k < first else k
        k = bins.last if k > bins.last else k
        word = I(k + (first if positive else bins.second))
        word = word if error > zero else bins.none
        return (word if error == error else nothing), part

    return place


def make_place_prediction(histogram: Histogram, real: Real) -> Any:
    """Return ``place(prediction, positive, bins)``, as for errors; there is no sum."""
    T, I = real.scalar, real.integer  # noqa: E741
    logits = histogram.measure == "logits"
    scale, shift = (T(32), histogram.bins // 2) if logits else (T(histogram.bins), 0)
    least, most, shift = T(-shift), T(histogram.bins - 1 - shift), I(shift)
    first, second, nothing, unit = I(1), I(1 + histogram.bins), I(0), I(1)

    @inlined
    def place(prediction, positive, bins):  # type: ignore[no-untyped-def]
        scaled = prediction * scale  # exact; adding the shift to it would round
        inside = scaled if scaled > least else least  # NaN is the least here
        inside = inside if inside < most else most
        k = I(inside)
        k = I(k - (unit if T(k) > inside else nothing))
        word = I(I(k + shift) + (first if positive else second))
        return (word if scaled == scaled else nothing), nothing

    return place


def _measure_of(measure: str) -> Histogram:
    """Return a histogram of a measure: of predictions the one, of errors any."""
    return next(histogram for histogram in HISTOGRAMS.values() if histogram.measure == measure)


def make_place(measure: str, real: Real) -> Any:
    """Return what says where a voxel is counted: ``place(number, positive, bins) = word, part``."""
    if measure in ("logits", "probs"):
        return make_place_prediction(_measure_of(measure), real)
    return make_place_error(real)


@function
def add_words(places, parts, count, words):  # type: ignore[no-untyped-def]
    """Add voxels to words, which are a count and a sum each."""
    for i in range(count):
        words[places[i]] += UNIT + parts[i]


@function
def add_slopes(places, count, slopes, out):  # type: ignore[no-untyped-def]
    """Add the slopes of words to reals."""
    for i in range(count):
        out[i] += slopes[places[i]]


def _make_find(targets: str, measure: str, real: Real) -> Any:
    """Return ``find(voxels, start, count, bins, places, parts)``: the words of some voxels."""
    T = real.scalar
    zero, one, half = T(0), T(1), T(0.5)
    hinge, binary = measure == "hinge", targets == "binary"
    Target = np.uint8 if binary else T
    x_size, p_size = np.dtype(T).itemsize, np.dtype(Target).itemsize
    place = make_place(measure, real)

    @inlined
    def measured(x, p):  # type: ignore[no-untyped-def]
        if binary:
            positive = p != 0
        elif hinge:
            positive = p != zero
        else:
            positive = p >= half
        return (one - (x if positive else -x) if hinge else x), positive

    @pasted
    def find(voxels, start, count, bins, places, parts):  # type: ignore[no-untyped-def]
        x, p = (
            pointer_to(voxels.x + start * x_size, T),
            pointer_to(voxels.p + start * p_size, Target),
        )
        for i in range(count):
            number, positive = measured(x[i], p[i])
            places[i], parts[i] = place(number, positive, bins)

    return find


def _make_find_class(targets: str, measure: str, real: Real) -> Any:
    """Return what finds the words of voxels for one class, with softmax."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, size = T(0), np.dtype(T).itemsize
    errors, indexed = measure == "errors", targets == "indexed"
    place = make_place(measure, real)

    @pasted
    def find(voxels, start, count, bins, places, parts):  # type: ignore[no-untyped-def]
        shift, c = start * size, I(voxels.c)
        e, p = pointer_to(voxels.x + shift, T), pointer_to(voxels.p + shift, T)
        inverse, left = pointer_to(voxels.inverse + shift, T), pointer_to(voxels.left + shift, T)
        largest, keep = pointer_to(voxels.largest + shift, T), pointer_to(voxels.keep + shift, T)
        target = pointer_to(voxels.target + shift, I)
        for i in range(count):
            q = e[i] * inverse[i]
            rest = (left[i] + (largest[i] - e[i])) * inverse[i]
            is_target = is_same(target[i], c)
            positive = p[i] != zero if errors and not indexed else is_target
            number = rest if errors and positive else q
            inside = keep[i] != zero
            number = number if inside else zero
            places[i], parts[i] = place(number, positive if inside else False, bins)

    return find


def make_find(activation: str, targets: str, measure: str, real: Real) -> Any:
    """Return what finds the words of voxels."""
    make = _make_find_class if activation == "softmax" else _make_find
    return make(targets, measure, real)


@cache
def count_kernel(real_name: str, activation: str, targets: str, measure: str) -> Kernel:
    """Compile ``count(job, voxels, index)``: add voxels to the words of one histogram."""
    real = REALS[real_name]
    I = real.integer  # noqa: E741
    with_sums = measure in ("hinge", "errors")
    first_background = 0 if with_sums else 1 + _measure_of(measure).bins
    find, bins_of = make_find(activation, targets, measure, real), make_bins_of(real)
    low = UNIT - 1

    @function
    def flush(words, row, bins):  # type: ignore[no-untyped-def]
        for k in range(1 + 2 * bins):
            word = words[k]
            if word != 0:
                here = address_of(row) + 8 * k
                add_atomically(here, word >> SUM_BITS)
                if with_sums and k > 0:
                    add_atomically(here + 16 * bins, word & low)
                words[k] = 0

    def count(job_address, voxels_address, index):  # type: ignore[no-untyped-def]
        wide_vectors()
        job = carray(pointer_to(job_address, JOB), 1)[0]
        voxels = carray(pointer_to(voxels_address, VOXELS), 1)[0]
        own = job.tallies[index]
        words = pointer_to(voxels.words + 8 * own.first_word, np.int64)
        if voxels.flush_row >= 0:
            column = job.counted_columns * voxels.flush_row + own.first_column
            flush(words, pointer_to(job.counts + 8 * column, np.int64), own.bins)
        bins = bins_of(own.bins, own.octave_bits, own.lowest)
        places, parts = stack_array(CHUNK, I), stack_array(CHUNK, I)
        for start in range(0, voxels.count, CHUNK):
            here = min(CHUNK, voxels.count - start)
            find(voxels, start, here, bins, places, parts)
            add_words(places, parts, here, words)
        if not with_sums:  # in the buffers they are the least predictions of background
            words[first_background] -= UNIT * voxels.left_out

    return Kernel(count, f"count-{real_name}-{activation}-{targets}-{measure}")


@cache
def look_up_kernel(real_name: str, activation: str, targets: str, measure: str) -> Kernel:
    """Compile ``look_up(job, voxels, index)``: add the slopes of a Lovasz term to ``voxels.out``.

    They are those of the words, as `signed_slopes` writes them.
    """
    real = REALS[real_name]
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    find, bins_of = make_find(activation, targets, measure, real), make_bins_of(real)

    def look_up(job_address, voxels_address, index):  # type: ignore[no-untyped-def]
        wide_vectors()
        job = carray(pointer_to(job_address, JOB), 1)[0]
        voxels = carray(pointer_to(voxels_address, VOXELS), 1)[0]
        own = job.tallies[index]
        slopes = pointer_to(job.signed + size * (2 + 2 * own.bins) * voxels.row, T)
        bins = bins_of(own.bins, own.octave_bits, own.lowest)
        places, parts = stack_array(CHUNK, I), stack_array(CHUNK, I)
        for start in range(0, voxels.count, CHUNK):
            here = min(CHUNK, voxels.count - start)
            find(voxels, start, here, bins, places, parts)
            add_slopes(places, here, slopes, pointer_to(voxels.out + start * size, T))

    return Kernel(look_up, f"look-up-{real_name}-{activation}-{targets}-{measure}")


@function
def tally(job, job_address, voxels):  # type: ignore[no-untyped-def]
    """Call what a job has for voxels: that counts them, or that looks their slopes up."""
    for index in range(job.tallied):
        call_kernel(job.tallies[index].kernel, job_address, voxels, index)


@inlined
def is_full(group, counted, in_words, count):  # type: ignore[no-untyped-def]
    """Tell whether the words of ``counted`` (-1: none) are flushed before more are counted."""
    return counted >= 0 and (group != counted or in_words + count > MOST_VOXELS)


@function
def flush_rows(job, job_address, voxels_address, words, first_row, rows):  # type: ignore[no-untyped-def]
    """Add the words of a task's last rows to their counts."""
    voxels = carray(pointer_to(voxels_address, VOXELS), 1)[0]
    voxels.count, voxels.left_out = 0, 0
    for k in range(rows):
        voxels.words = words + 8 * job.row_words * k
        voxels.flush_row = first_row + k
        tally(job, job_address, voxels_address)


def _fill(record: Any, histogram: Histogram, kernel: Kernel) -> None:
    """Write a histogram to ``record``, one of ``job.tallies``."""
    record["kernel"], record["bins"] = kernel.address, histogram.bins
    record["octave_bits"] = (histogram.bins // OCTAVES).bit_length() - 1
    record["lowest"] = histogram.lowest


def prepare_counts(record: Any, kind: tuple[str, str, str], families: frozenset[str]) -> None:
    """Write to a job what counts for ``families``; ``kind``: real, activation, targets."""
    names = histograms(families)
    if len(names) > MOST_TALLIES:
        raise ValueError(f"at most {MOST_TALLIES} histograms are counted at once, got {names}")
    words = column = 0
    for index, name in enumerate(names):
        histogram, own = HISTOGRAMS[name], record["tallies"][index]
        _fill(own, histogram, count_kernel(*kind, histogram.measure))
        own["first_word"], own["first_column"] = words, column
        words, column = words + words_of(histogram), column + histogram.width
    record["tallied"], record["row_words"], record["counted_columns"] = len(names), words, column
    record["curve"] = bool({*names} & {*CURVES})


def prepare_look_up(record: Any, kind: tuple[str, str, str], histogram: Histogram) -> None:
    """Write to a job what looks up the slopes of a histogram; ``kind`` as above."""
    _fill(record["tallies"][0], histogram, look_up_kernel(*kind, histogram.measure))
    record["tallied"] = 1


def signed_slopes(coefficients: NDArray[np.float64], bins: int, real: str) -> NDArray[Any]:
    """Return what is added to dL/dx (with softmax dL/dq) of a voxel of each word.

    From the slopes dL/de that follow the other coefficients of each row: an error of the foreground
    falls where its prediction rises.
    """
    slopes = np.zeros((*coefficients.shape[:2], 2 + 2 * bins), real)
    slopes[:, :, 0] = np.nan
    of_errors = coefficients[:, :, COEFFICIENTS:]
    np.negative(of_errors[:, :, :bins], out=slopes[:, :, 1 : 1 + bins], casting="same_kind")
    slopes[:, :, 1 + bins : -1] = of_errors[:, :, bins:]
    return slopes
