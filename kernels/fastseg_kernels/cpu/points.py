"""What one voxel adds to the sums, and its gradient: the mathematics of the overlap family.

Two kinds of targets (``binary``: one byte, 0 or 1; ``soft``: a real p in [0, 1], with a weight)
and two of predictions (``sigmoid``: logits; ``probs``: probabilities) make four pairs. Each pair is

    add(x, p, w, sums) -> sums                  the voxel's part of the sums
    slope(x, p, w, coefficients) -> dL/dx       its part of the gradient

With e = exp(-|x|), sigma(|x|) = 1 / (1 + e) and sigma(-|x|) = e / (1 + e), so that the mass on the
wrong side, p (1 - q) or (1 - p) q, is always formed from e and keeps its relative accuracy when
the network is right and sure (1 - q from a rounded q would not). Gradients take u = sigma(-|x|) as
e - e (e / (1 + e)), which hardly feels the rounding of 1 + e and of the quotient, and q (1 - q) as
u - u^2, rounded once; without either they missed 4 ulp.

The voxel's BCE is softplus(z) = max(z, 0) + log(1 + e), z being x with its sign turned where p = 1.
Sixteen voxels share one logarithm: ``product`` carries (1 + e1)(1 + e2)... - 1 as s + e + s e,
which stays exact where every e is tiny.

Coefficients are (on_target, off_target, bce_target, bce_other, below, above, square), already
scaled by everything that scales the gradient:

    dL/dq = on_target p + off_target (1 - p)           region terms, times dq/dx = q (1 - q)
            + (below if q < p, above if q > p, their mean if q = p) + square (q - p)
    dL/dx = ... - bce_target p (1 - q) + bce_other (1 - p) q

p - q is formed as p (1 - q) - (1 - p) q, whose sign is exact, and which has its digits, wherever p
is 0 or 1. For binary targets ``below`` belongs to the foreground and ``above`` to the background:
the caller adds them to the first two.

Largest errors of one voxel's parts in float32, for targets 0 and 1 and |x| <= 87.683, by
``tests/test_elementary.py``: p (1 - q) and (1 - p) q 2.79 ulp, BCE 3.67, q (1 - q) in the gradient
2.41, the gradient of the BCE 2.01.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import FAMILY_COLUMNS, SLOPE_FAMILIES, lovasz_histogram
from fastseg_kernels.cpu.compiled import inlined
from fastseg_kernels.cpu.elementary import Real, make_exp_negative, make_log, make_log1p
from fastseg_kernels.cpu.intrinsics import fma


class Variant(NamedTuple):
    """Which machine code: the element type, the kinds of inputs, the families of sums."""

    real: str  # "float32" or "float64": the type that a voxel is computed in
    targets: str  # "binary", "soft" or "weighted" (soft, with a weight per voxel)
    activation: str  # "sigmoid" or "probs"
    families: frozenset[str] = frozenset()  # of what is code of its own in a kernel

    def adding(self, families: frozenset[str]) -> Variant:
        """Return the variant that adds up the sums of ``families``.

        Histograms have kernels of their own, and labels of whole numbers are checked in any case.
        """
        labels = {"labels"} if self.targets in ("soft", "weighted", "weighted_soft") else set()
        added = {name for name, sums in FAMILY_COLUMNS.items() if sums} | labels
        return self._replace(families=families & added)

    def sloping(self, families: frozenset[str]) -> Variant:
        """Return the variant that writes the gradient of a loss made of ``families``.

        With softmax the slopes of Lovasz terms, "given", come in the middle of the kernel.
        """
        own = families & SLOPE_FAMILIES
        if self.activation == "softmax" and ("sorted" in families or lovasz_histogram(families)):
            own |= {"given"}
        return self._replace(families=own)

    def name(self, verb: str) -> str:
        """Name the kernel of one verb."""
        return "-".join([verb, self.real, self.targets, self.activation, *sorted(self.families)])


class Coefficients(NamedTuple):
    """The coefficients of a row, in their order (`constants.COEFFICIENTS`)."""

    on_target: Any
    off_target: Any
    bce_target: Any
    bce_other: Any
    below: Any
    above: Any
    square: Any


class Point(NamedTuple):
    """The point functions of one variant; ``add`` returns the tuple of sums it was given."""

    add: Any
    join: Any  # join(sums, sums) -> the sums of both
    log_sum: Any  # log_sum(product, direct) -> the BCE that the sums hold
    slope: Any


class Sums(NamedTuple):
    """The sums of one lane; ``add`` returns them with one voxel more.

    What a variant does not ask for stays as it was, and the compiler leaves it out.
    """

    product_pos: Any  # BCE of foreground voxels (of all voxels, unless "bce_split") is
    bce_pos: Any  # bce_pos + log(1 + product_pos)
    product_neg: Any  # and likewise of background voxels
    bce_neg: Any
    inner: Any  # sum p q
    missed: Any  # sum p (1 - q)
    false_alarm: Any  # sum (1 - p) q
    common: Any  # sum min(p, q)
    short: Any  # sum max(p - q, 0)
    excess: Any  # sum max(q - p, 0)
    square: Any  # sum (p - q)^2
    target: Any  # sum p
    hits: Any  # voxels with q over the threshold and p
    predicted: Any  # with q over the threshold
    true: Any  # with p
    undefined: Any  # predictions that are NaN
    bad: Any  # not zero: there is an invalid target, prediction or weight to be counted


def no_voxels(real: Real) -> Sums:
    """Return the sums over nothing."""
    return Sums(*(real.scalar(0),) * 12, *(real.integer(0),) * 5)


def sums_needed(families: frozenset[str], binary: bool) -> tuple[bool, bool, bool]:
    """Return which sums are added up: p q and its errors, min(p, q) and its errors, (p - q)^2.

    With targets of 0 and 1 min(p, q) is p q: the first then serve as the second.
    """
    l1, squared = "overlap_l1" in families, "overlap_squared" in families
    return "overlap" in families or squared or (l1 and binary), l1 and not binary, squared


def make_point(variant: Variant, real: Real) -> Point:
    """Build the point functions of ``variant``."""
    if variant.activation == "probs":
        return _probs_point(variant, real)
    if variant.targets == "binary":
        return _binary_point(variant, real)
    return _soft_point(variant, real)


def _log_sum(real: Real) -> Any:
    log1p = make_log1p(real)

    @inlined
    def log_sum(product, direct):  # type: ignore[no-untyped-def]
        return direct + log1p(product)

    return log_sum


def _join(real: Real) -> Any:
    I = real.integer  # noqa: E741

    @inlined
    def join(a, b):  # type: ignore[no-untyped-def]
        return Sums(
            fma(a.product_pos, b.product_pos, a.product_pos + b.product_pos),
            a.bce_pos + b.bce_pos,
            fma(a.product_neg, b.product_neg, a.product_neg + b.product_neg),
            a.bce_neg + b.bce_neg,
            a.inner + b.inner,
            a.missed + b.missed,
            a.false_alarm + b.false_alarm,
            a.common + b.common,
            a.short + b.short,
            a.excess + b.excess,
            a.square + b.square,
            a.target + b.target,
            I(a.hits + b.hits),
            I(a.predicted + b.predicted),
            I(a.true + b.true),
            I(a.undefined + b.undefined),
            I(a.bad | b.bad),
        )

    return join


def _count(real: Real) -> Any:
    I = real.integer  # noqa: E741
    nothing, unit = I(0), I(1)

    @inlined
    def count(hits, predicted, undefined, over, is_target, no_answer):  # type: ignore[no-untyped-def]
        return (
            I(hits + (unit if over & is_target else nothing)),
            I(predicted + (unit if over else nothing)),
            I(undefined + (unit if no_answer else nothing)),
        )

    return count


def make_is_allowed(variant: Variant, real: Real) -> Any:
    """Return ``is_allowed(p)`` of targets that are reals."""
    zero, one = real.scalar(0), real.scalar(1)
    labels = "labels" in variant.families

    @inlined
    def is_allowed(p):  # type: ignore[no-untyped-def]
        if labels:
            return (p == zero) | (p == one)
        return zero <= p <= one

    return is_allowed


def make_short_and_excess(real: Real) -> Any:
    """Return ``short_and_excess(d) = max(d, 0), max(-d, 0)``; NaN is in the second."""
    zero = real.scalar(0)

    @inlined
    def short_and_excess(difference):  # type: ignore[no-untyped-def]
        short = difference if difference > zero else zero
        return short, zero if difference >= zero else -difference

    return short_and_excess


def make_bent(variant: Variant, real: Real) -> Any:
    """Return ``bent(p - q, below, above, square)``, what the l1 and squared forms add to dL/dq."""
    T = real.scalar
    zero, half = T(0), T(0.5)
    l1, squared = "overlap_l1" in variant.families, "overlap_squared" in variant.families

    @inlined
    def bent(difference, below, above, square):  # type: ignore[no-untyped-def]
        value = zero
        if l1:
            side = below if difference > zero else above
            value = side if difference != zero else half * (below + above)
        return fma(-square, difference, value) if squared else value

    return bent


def _binary_point(variant: Variant, real: Real) -> Point:
    T = real.scalar
    zero, one, background = T(0), T(1), np.uint8(0)
    exp_negative = make_exp_negative(real)
    bce = bool({"bce", "bce_split"} & variant.families)
    split = "bce_split" in variant.families
    overlap, _, squared = sums_needed(variant.families, binary=True)
    hard = "hard" in variant.families
    count = _count(real)

    @inlined
    def add(x, p, w, threshold, sums):  # type: ignore[no-untyped-def]
        (product_pos, bce_pos, product_neg, bce_neg, inner, missed, false_alarm, common, short,
         excess, square, target, hits, predicted, true, undefined, bad) = sums  # fmt: skip
        is_target = p != background
        size = abs(x)
        e = exp_negative(size)
        on_wrong_side = (x >= zero) != is_target
        if overlap:
            large = one / (one + e)
            small = e * large
            wrong = large if on_wrong_side else small
            right = small if on_wrong_side else large
            inner += right if is_target else zero
            missed += wrong if is_target else zero
            false_alarm += zero if is_target else wrong
        if squared:
            square = fma(wrong, wrong, square)
        if bce:
            beyond = size if on_wrong_side else zero
            if split:
                e_pos = e if is_target else zero
                e_neg = zero if is_target else e
                product_pos = fma(product_pos, e_pos, product_pos + e_pos)
                product_neg = fma(product_neg, e_neg, product_neg + e_neg)
                bce_pos += beyond if is_target else zero
                bce_neg += zero if is_target else beyond
            else:
                product_pos = fma(product_pos, e, product_pos + e)
                bce_pos += beyond
        if hard:
            over, no_answer = x >= threshold, x != x
            hits, predicted, undefined = count(
                hits, predicted, undefined, over, is_target, no_answer
            )
        return Sums(product_pos, bce_pos, product_neg, bce_neg, inner, missed, false_alarm, common,
                    short, excess, square, target, hits, predicted, true, undefined,
                    bad)  # fmt: skip

    @inlined
    def slope(x, p, w, k):  # type: ignore[no-untyped-def]
        is_target = p != background
        e = exp_negative(abs(x))
        large = one / (one + e)
        small = fma(-e, e * large, e)
        wrong = large if (x >= zero) != is_target else small
        region = k.on_target if is_target else k.off_target
        if squared:
            region = fma(k.square, -wrong if is_target else wrong, region)
        bce_weight = -k.bce_target if is_target else k.bce_other
        return fma(bce_weight, wrong, region * fma(-small, small, small))

    return Point(add, _join(real), _log_sum(real), slope)


def _soft_point(variant: Variant, real: Real) -> Point:
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, half, nothing, unit = T(0), T(1), T(0.5), I(0), I(1)
    exp_negative, log1p = make_exp_negative(real), make_log1p(real)
    bce = bool({"bce", "bce_split"} & variant.families)
    split = "bce_split" in variant.families
    overlap, l1, squared = sums_needed(variant.families, binary=False)
    hard = "hard" in variant.families
    count, short_and_excess, bent = (
        _count(real),
        make_short_and_excess(real),
        make_bent(variant, real),
    )
    weighted, is_bent = variant.targets == "weighted", bool(SLOPE_FAMILIES & variant.families)

    is_allowed = make_is_allowed(variant, real)

    @inlined
    def add(x, p, w, threshold, sums):  # type: ignore[no-untyped-def]
        (product_pos, bce_pos, product_neg, bce_neg, inner, missed, false_alarm, common, short,
         excess, square, target, hits, predicted, true, undefined, bad) = sums  # fmt: skip
        weight = w if weighted else one
        other = one - p
        over, no_answer = x >= threshold, x != x
        if weighted:
            x = x if w != zero else zero  # weight 0 leaves out whatever is stored there
        size = abs(x)
        e = exp_negative(size)
        if overlap or l1:
            large = one / (one + e)
            small = e * large
            q, rest = (large, small) if x >= zero else (small, large)
            difference = p * rest - other * q
        if overlap:
            inner += weight * p * q
            missed += weight * p * rest
            false_alarm += weight * other * q
        if l1:
            under, over_by = short_and_excess(difference)
            common += weight * (q if difference > zero else p)
            short += weight * under
            excess += weight * over_by
        if squared:
            square += weight * (difference * difference)
        if split:
            log_rest = log1p(e)
            excess_pos = size if x < zero and p != zero else zero  # 0 * inf is 0 here, not NaN
            excess_neg = size if x > zero and other != zero else zero
            bce_pos += weight * p * (excess_pos + log_rest)
            bce_neg += weight * other * (excess_neg + log_rest)
        elif bce:
            share = other if x > zero else p
            beyond = size * share if share != zero else zero
            if weighted:
                bce_pos += weight * (beyond + log1p(e))
            else:
                product_pos = fma(product_pos, e, product_pos + e)
                bce_pos += beyond
        if hard:
            is_target = p >= half
            true = I(true + (unit if is_target else nothing))
            hits, predicted, undefined = count(
                hits, predicted, undefined, over, is_target, no_answer
            )
        target += weight * p
        bad = I(bad | (nothing if is_allowed(p) else unit))
        if weighted:
            bad = I(bad | (nothing if w >= zero else unit))
        return Sums(product_pos, bce_pos, product_neg, bce_neg, inner, missed, false_alarm, common,
                    short, excess, square, target, hits, predicted, true, undefined,
                    bad)  # fmt: skip

    @inlined
    def slope(x, p, w, k):  # type: ignore[no-untyped-def]
        other = one - p
        if weighted:
            x = x if w != zero else zero
        e = exp_negative(abs(x))
        large = one / (one + e)
        small = fma(-e, e * large, e)
        q, rest = (large, small) if x >= zero else (small, large)
        region = k.on_target * p + k.off_target * other
        if is_bent:
            region += bent(p * rest - other * q, k.below, k.above, k.square)
        region *= fma(-small, small, small)
        value = fma(k.bce_other * other, q, region) - k.bce_target * p * rest
        return w * value if weighted else value

    return Point(add, _join(real), _log_sum(real), slope)


def _probs_point(variant: Variant, real: Real) -> Point:
    """Probabilities and soft targets; both logarithms are clamped at -100, as PyTorch does."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, half, nothing, unit = T(0), T(1), T(0.5), I(0), I(1)
    floor, smallest = T(-100), T(1e-12)
    log, log1p = make_log(real), make_log1p(real)
    bce = bool({"bce", "bce_split"} & variant.families)
    split = "bce_split" in variant.families
    overlap, l1, squared = sums_needed(variant.families, binary=False)
    hard = "hard" in variant.families
    count, short_and_excess, bent = (
        _count(real),
        make_short_and_excess(real),
        make_bent(variant, real),
    )
    weighted, is_bent = variant.targets == "weighted", bool(SLOPE_FAMILIES & variant.families)

    @inlined
    def add(x, p, w, threshold, sums):  # type: ignore[no-untyped-def]
        (product_pos, bce_pos, product_neg, bce_neg, inner, missed, false_alarm, common, short,
         excess, square, target, hits, predicted, true, undefined, bad) = sums  # fmt: skip
        weight = w if weighted else one
        p_real = T(p)
        over, no_answer, outside = x >= threshold, x != x, x < zero or x > one
        if weighted:
            x = x if w != zero else zero
        other, rest = one - p_real, one - x
        if overlap:
            inner += weight * p_real * x
            missed += weight * p_real * rest
            false_alarm += weight * other * x
        if l1:
            under, over_by = short_and_excess(p_real - x)
            common += weight * (x if p_real > x else p_real)
            short += weight * under
            excess += weight * over_by
        if squared:
            square += weight * ((p_real - x) * (p_real - x))
        if bce:
            log_q = log(x)
            log_rest = log1p(-x) if x < one else (floor if x == one else x)
            nll_pos = -p_real * (floor if log_q < floor else log_q)
            nll_neg = -other * (floor if log_rest < floor else log_rest)
            if split:
                bce_pos += weight * nll_pos
                bce_neg += weight * nll_neg
            else:
                bce_pos += weight * (nll_pos + nll_neg)
        if hard:
            is_target = p_real >= half
            true = I(true + (unit if is_target else nothing))
            hits, predicted, undefined = count(
                hits, predicted, undefined, over, is_target, no_answer
            )
        target += weight * p_real
        bad = I(bad | (nothing if zero <= p_real <= one else unit))
        bad = I(bad | (unit if outside else nothing))
        if weighted:
            bad = I(bad | (nothing if w >= zero else unit))
        return Sums(product_pos, bce_pos, product_neg, bce_neg, inner, missed, false_alarm, common,
                    short, excess, square, target, hits, predicted, true, undefined,
                    bad)  # fmt: skip

    @inlined
    def log_sum(product, direct):  # type: ignore[no-untyped-def]
        return direct

    @inlined
    def slope(x, p, w, k):  # type: ignore[no-untyped-def]
        p_real = T(p)
        if weighted:
            x = x if w != zero else zero
        other, rest = one - p_real, one - x
        spread = x * rest
        spread = smallest if spread < smallest else spread
        value = k.on_target * p_real + k.off_target * other
        if is_bent:
            value += bent(p_real - x, k.below, k.above, k.square)
        value += (k.bce_other * other * x - k.bce_target * p_real * rest) / spread
        return w * value if weighted else value

    return Point(add, _join(real), log_sum, slope)
