"""Counting voxels by a number that each has, and looking up the slopes of Lovasz terms by it.

`constants.Histogram` says what is counted. A task counts in words of its own, a count and a sum in
each, and adds them to those of its row when it comes to another row, or when a sum may be full.
Counts are integers, so the order in which tasks do that does not matter.

Which word, and what is added to it, is worked out by vectors and without a branch for `CHUNK`
voxels; then they are added one by one (with branches it took 5 times as long). Word 0 has the
predictions that are NaN, the last one what belongs to no bin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import FRACTION_BITS, HISTOGRAMS, OCTAVES, Histogram, histograms
from fastseg_kernels.cpu.compiled import function, inlined
from fastseg_kernels.cpu.elementary import REALS, Real
from fastseg_kernels.cpu.intrinsics import (
    add_atomically,
    address_of,
    bits_of,
    is_same,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.points import Variant

SUM_BITS = 40
"""Bits of a word that hold the sum; those above hold the count."""
UNIT = 1 << SUM_BITS
MOST_VOXELS = 2**20
"""Counted between two times that words are added to the row's: neither part of a word overflows,
as a voxel's part of the sum is at most 2^19 (16 bins in an octave)."""
PIECE = 65536
"""Voxels that are counted while they are still in the cache."""
CHUNK = 1024


class Counter(NamedTuple):
    """What counts the voxels of a task for all histograms of a variant."""

    families: tuple[str, ...]
    words: int  # of a task
    add: Any  # add(x, p, count, left_out, words); with softmax `ClassTile` for x
    flush: Any  # flush(words, row): add them to the counts of the row, and start anew


def words_of(family: str) -> int:
    """Return the number of words that a task counts in."""
    return 2 + 2 * HISTOGRAMS[family].bins


def task_words(families: frozenset[str]) -> int:
    """Return the number of words of all histograms."""
    return sum(words_of(family) for family in histograms(families))


def make_place_error(histogram: Histogram, real: Real) -> Any:
    """Return ``place(error, positive)``: the word of an error, and its part of the sum."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero = T(0)
    per_octave = histogram.bins // OCTAVES
    below = real.fraction_bits - (per_octave.bit_length() - 1)  # fraction bits within a bin
    bias = 127 if real.fraction_bits == FRACTION_BITS else 1023
    base, bins = I((bias + histogram.lowest) * per_octave), I(histogram.bins)
    shift, mask, spare = I(below), I((1 << below) - 1), I(real.fraction_bits - FRACTION_BITS)
    whole = I(1 << (below - (real.fraction_bits - FRACTION_BITS)))
    first, second = I(1), I(1 + histogram.bins)
    nothing, last, none = I(0), I(histogram.bins - 1), I(1 + 2 * histogram.bins)

    @inlined
    def place(error, positive):  # type: ignore[no-untyped-def]
        bits = bits_of(error)
        k = I(I(bits >> shift) - base)
        part = I(I(bits & mask) >> spare)
        part = nothing if k < first else part
        part = whole if k >= bins else part
        k = nothing if k < first else k
        k = last if k >= bins else k
        word = I(k + (first if positive else second))
        word = word if error > zero else none
        return (word if error == error else nothing), part

    return place


def make_place_prediction(histogram: Histogram, real: Real) -> Any:
    """Return ``place(prediction, positive)``, as for errors; there is no sum."""
    T, I = real.scalar, real.integer  # noqa: E741
    logits = histogram.measure == "logits"
    scale, shift = (T(32), histogram.bins // 2) if logits else (T(histogram.bins), 0)
    least, most, shift = T(-shift), T(histogram.bins - 1 - shift), I(shift)
    first, second, nothing, unit = I(1), I(1 + histogram.bins), I(0), I(1)

    @inlined
    def place(prediction, positive):  # type: ignore[no-untyped-def]
        scaled = prediction * scale  # exact; adding the shift to it would round
        inside = scaled if scaled > least else least  # NaN is the least here
        inside = inside if inside < most else most
        k = I(inside)
        k = I(k - (unit if T(k) > inside else nothing))
        word = I(I(k + shift) + (first if positive else second))
        return (word if scaled == scaled else nothing), nothing

    return place


def make_place(histogram: Histogram, real: Real) -> Any:
    """Return what says where a voxel is counted: ``place(number, positive) = (word, part)``."""
    if histogram.measure in ("logits", "probs"):
        return make_place_prediction(histogram, real)
    return make_place_error(histogram, real)


@function
def add_words(places, parts, count, words):  # type: ignore[no-untyped-def]
    """Add voxels to words, which are a count and a sum each."""
    for i in range(count):
        words[places[i]] += UNIT + parts[i]


def _make_measure(histogram: Histogram, variant: Variant, real: Real) -> Any:
    """Return ``measure(x, p) = (number, positive)`` of a voxel."""
    T = real.scalar
    zero, one, half = T(0), T(1), T(0.5)
    hinge, binary = histogram.measure == "hinge", variant.targets == "binary"

    @inlined
    def measure(x, p):  # type: ignore[no-untyped-def]
        if binary:
            positive = p != 0
        elif hinge:
            positive = p != zero
        else:
            positive = p >= half
        return (one - (x if positive else -x) if hinge else x), positive

    return measure


def _make_add(family: str, variant: Variant, real: Real) -> Any:
    """Return what counts voxels in one histogram."""
    T, I = real.scalar, real.integer  # noqa: E741
    histogram = HISTOGRAMS[family]
    measure, place = _make_measure(histogram, variant, real), make_place(histogram, real)
    Target = np.uint8 if variant.targets == "binary" else T
    x_size, p_size = np.dtype(T).itemsize, np.dtype(Target).itemsize
    least_background = 1 + histogram.bins if histogram.measure in ("logits", "probs") else 0

    @function
    def add(x, p, count, left_out, words):  # type: ignore[no-untyped-def]
        wide_vectors()
        places, parts = stack_array(CHUNK, I), stack_array(CHUNK, I)
        for start in range(0, count, CHUNK):
            here = min(CHUNK, count - start)
            x_here = pointer_to(address_of(x) + start * x_size, T)
            p_here = pointer_to(address_of(p) + start * p_size, Target)
            for i in range(here):
                number, positive = measure(x_here[i], p_here[i])
                places[i], parts[i] = place(number, positive)
            add_words(places, parts, here, words)
        if least_background > 0:  # in the buffers those are the least predictions of background
            words[least_background] -= UNIT * left_out

    return add


def make_class_measure(histogram: Histogram, variant: Variant, real: Real) -> Any:
    """Return ``measure(q, rest, is_target, p)`` of a class of a voxel, as `_make_measure`."""
    zero = real.scalar(0)
    errors, indexed = histogram.measure == "errors", "indexed" in variant.targets

    @inlined
    def measure(q, rest, is_target, p):  # type: ignore[no-untyped-def]
        positive = (p != zero) if errors and not indexed else is_target
        return (rest if errors and positive else q), positive

    return measure


def _make_add_class(family: str, variant: Variant, real: Real) -> Any:
    """Return what counts the voxels of a tile for one class, with softmax."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero = T(0)
    histogram = HISTOGRAMS[family]
    indexed, errors = "indexed" in variant.targets, histogram.measure == "errors"
    measure, place = make_class_measure(histogram, variant, real), make_place(histogram, real)
    least_background = 0 if errors else 1 + histogram.bins

    @function
    def add(tile, p, count, left_out, words):  # type: ignore[no-untyped-def]
        """``tile``: the voxels, see `ClassTile`."""
        wide_vectors()
        places, parts = stack_array(CHUNK, I), stack_array(CHUNK, I)
        for i in range(count):
            q = tile.e[i] * tile.inverse[i]
            rest = (tile.left[i] + (tile.largest[i] - tile.e[i])) * tile.inverse[i]
            is_target = is_same(tile.target[i], tile.c)
            number, positive = measure(q, rest, is_target, zero if indexed else p[i])
            inside = tile.keep[i] != zero
            number = number if inside else zero
            places[i], parts[i] = place(number, positive if inside else False)
        add_words(places, parts, count, words)
        if least_background > 0:
            words[least_background] -= UNIT * left_out

    return add


class ClassTile(NamedTuple):
    """Pointers to what is known of the voxels of a tile, and of one class of them."""

    e: Any
    inverse: Any  # 1 / (left + e_m)
    left: Any
    largest: Any
    target: Any
    keep: Any
    c: Any


def _make_flush(family: str) -> Any:
    """Return what adds a task's words to the row's counts."""
    histogram = HISTOGRAMS[family]
    bins, with_sums = histogram.bins, len(histogram.parts) == 4
    low = UNIT - 1

    @function
    def flush(words, row):  # type: ignore[no-untyped-def]
        for k in range(1 + 2 * bins):
            word = words[k]
            if word != 0:
                here = address_of(row) + 8 * k
                add_atomically(here, word >> SUM_BITS)
                if with_sums and k > 0:
                    add_atomically(here + 16 * bins, word & low)
                words[k] = 0

    return flush


def make_counter(variant: Variant) -> Counter:
    """Return what counts for a variant; for one without histograms it does nothing."""
    families, real = histograms(variant.families), REALS[variant.real]
    softmax = variant.activation == "softmax"
    make_add = _make_add_class if softmax else _make_add
    adds = [make_add(family, variant, real) for family in families]
    flushes = [_make_flush(family) for family in families]
    sizes = [words_of(family) for family in families]
    if not families:

        @inlined
        def nothing(x, p, count, left_out, words):  # type: ignore[no-untyped-def]
            return

        @inlined
        def no_flush(words, row):  # type: ignore[no-untyped-def]
            return

        return Counter((), 1, nothing, no_flush)
    if len(families) == 1:
        return Counter(families, sizes[0], adds[0], flushes[0])
    if len(families) > 2:
        raise ValueError(f"at most two histograms are counted at once, got {', '.join(families)}")
    (add_first, add_second), (flush_first, flush_second) = adds, flushes
    size, width = sizes[0], HISTOGRAMS[families[0]].width

    @function
    def add(x, p, count, left_out, words):  # type: ignore[no-untyped-def]
        second = pointer_to(address_of(words) + 8 * size, np.int64)
        add_first(x, p, count, left_out, words)
        add_second(x, p, count, left_out, second)

    @function
    def flush(words, row):  # type: ignore[no-untyped-def]
        flush_first(words, row)
        second = pointer_to(address_of(words) + 8 * size, np.int64)
        flush_second(second, pointer_to(address_of(row) + 8 * width, np.int64))

    return Counter(families, sum(sizes), add, flush)


def lovasz_family(families: frozenset[str]) -> str | None:
    """Return the histogram whose slopes the gradient looks up, if there is one."""
    found = [f for f in histograms(families) if HISTOGRAMS[f].measure in ("hinge", "errors")]
    return found[0] if found else None


def make_class_look_up(variant: Variant, real: Real) -> Any:
    """Return what adds the slopes of the errors of a class of a tile to its h_c."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, indexed = T(0), "indexed" in variant.targets
    family = lovasz_family(variant.families)
    if family is None:

        @inlined
        def nothing(tile, p, count, table, h):  # type: ignore[no-untyped-def]
            return

        return nothing
    histogram = HISTOGRAMS[family]
    bins, last = histogram.bins, 2 * histogram.bins - 1
    measure, place = make_class_measure(histogram, variant, real), make_place(histogram, real)

    @function
    def look_up(tile, p, count, table, h):  # type: ignore[no-untyped-def]
        wide_vectors()
        places = stack_array(CHUNK, I)
        for i in range(count):
            q = tile.e[i] * tile.inverse[i]
            rest = (tile.left[i] + (tile.largest[i] - tile.e[i])) * tile.inverse[i]
            is_target = is_same(tile.target[i], tile.c)
            number, positive = measure(q, rest, is_target, zero if indexed else p[i])
            places[i], _ = place(number, positive)
        for i in range(count):  # where the error is 0, or NaN, any slope will do
            k = min(max(places[i] - 1, 0), last)
            h[i] += T(-table[k]) if k < bins else T(table[k])

    return look_up


def make_look_up(variant: Variant, real: Real) -> Any:
    """Return what adds the slopes of the Lovasz hinge to a gradient.

    ``slopes`` are those of the words, signed, as `make_signed` writes them.
    """
    T, I = real.scalar, real.integer  # noqa: E741
    family = lovasz_family(variant.families)
    if family is None:

        @inlined
        def nothing(x, p, count, slopes, out):  # type: ignore[no-untyped-def]
            return

        return nothing
    Target = np.uint8 if variant.targets == "binary" else T
    x_size, p_size = np.dtype(T).itemsize, np.dtype(Target).itemsize
    histogram = HISTOGRAMS[family]
    measure, place = _make_measure(histogram, variant, real), make_place(histogram, real)

    @function
    def look_up(x, p, count, slopes, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        places = stack_array(CHUNK, I)
        for start in range(0, count, CHUNK):
            here = min(CHUNK, count - start)
            x_here = pointer_to(address_of(x) + start * x_size, T)
            p_here = pointer_to(address_of(p) + start * p_size, Target)
            out_here = pointer_to(address_of(out) + start * x_size, T)
            for i in range(here):
                number, positive = measure(x_here[i], p_here[i])
                word, _ = place(number, positive)
                places[i] = word
            for i in range(here):
                out_here[i] += slopes[places[i]]

    return look_up


def make_signed(variant: Variant, real: Real) -> Any:
    """Return ``signed(table, slopes)``: what is added to dL/dx of a voxel of each word."""
    family = lovasz_family(variant.families)
    T = real.scalar
    bins, nan, zero = HISTOGRAMS[family].bins if family else 0, T(np.nan), T(0)

    @function
    def signed(table, slopes):  # type: ignore[no-untyped-def]
        slopes[0], slopes[1 + 2 * bins] = nan, zero
        for k in range(bins):
            slopes[1 + k], slopes[1 + bins + k] = T(-table[k]), T(table[bins + k])

    return signed
