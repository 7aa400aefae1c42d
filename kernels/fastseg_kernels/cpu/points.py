"""What one voxel adds to the sums, and its gradient: the mathematics of the overlap family.

Two kinds of targets (``binary``: one byte, 0 or 1; ``soft``: a real p in [0, 1], with a weight)
and two of predictions (``sigmoid``: logits; ``probs``: probabilities) make four pairs. Each pair is

    add(x, p, w, sums) -> sums                  the voxel's part of the sums
    slope(x, p, w, coefficients) -> dL/dx       its part of the gradient

With e = exp(-|x|), sigma(|x|) = 1 / (1 + e) and sigma(-|x|) = e / (1 + e), so that the mass on the
wrong side, p (1 - q) or (1 - p) q, is always formed from e and keeps its relative accuracy when
the network is right and sure (1 - q from a rounded q would not). q (1 - q) is u - u^2 with
u = sigma(-|x|), rounded once: u (1 - u) as a product of two rounded factors missed 4 ulp.

The voxel's BCE is softplus(z) = max(z, 0) + log(1 + e), z being x with its sign turned where p = 1.
Eight voxels share one logarithm: ``product`` carries (1 + e1)(1 + e2)... - 1 as s + e + s e, which
stays exact where every e is tiny.

Coefficients are (on_target, off_target, bce_target, bce_other), already scaled by everything that
scales the gradient:

    dL/dq = on_target p + off_target (1 - p)           region terms, times dq/dx = q (1 - q)
    dL/dx = ... - bce_target p (1 - q) + bce_other (1 - p) q
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.cpu.compiled import inlined
from fastseg_kernels.cpu.elementary import Real, make_exp_negative, make_log, make_log1p
from fastseg_kernels.cpu.intrinsics import bits_of, fma, from_bits


class Variant(NamedTuple):
    """Which machine code: the element type, the kinds of inputs, the families of sums."""

    real: str  # "float32" or "float64": the type that a voxel is computed in
    targets: str  # "binary", "soft" or "weighted" (soft, with a weight per voxel)
    activation: str  # "sigmoid" or "probs"
    families: frozenset[str] = frozenset()

    def name(self, verb: str) -> str:
        """Name the kernel of one verb."""
        return "-".join([verb, self.real, self.targets, self.activation, *sorted(self.families)])


class Point(NamedTuple):
    """The point functions of one variant; ``add`` returns the tuple of sums it was given."""

    add: Any
    log_sum: Any  # log_sum(product, direct) -> the BCE that the sums hold
    slope: Any


# The sums of one lane, in the order in which ``add`` takes and returns them:
#   product_pos, bce_pos   BCE of foreground voxels (of all voxels, unless "bce_split")
#   product_neg, bce_neg   BCE of background voxels
#   missed, false_alarm    sum p (1 - q), sum (1 - p) q
#   target                 sum p
#   hits, predicted, true  voxels with p and q over the threshold; with q; with p
#   undefined              predictions that are NaN
#   bad                    not zero: there is an invalid target or prediction to be counted
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


def _binary_point(variant: Variant, real: Real) -> Point:
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, nothing, unit = T(0), T(1), I(0), I(1)
    sign_shift = I(8 * np.dtype(T).itemsize - 1)
    exp_negative = make_exp_negative(real)
    bce = bool({"bce", "bce_split"} & variant.families)
    split = "bce_split" in variant.families
    overlap, hard = "overlap" in variant.families, "hard" in variant.families

    @inlined
    def add(x, p, w, threshold, sums):  # type: ignore[no-untyped-def]
        (product_pos, bce_pos, product_neg, bce_neg, missed, false_alarm, target,
         hits, predicted, true, undefined, bad) = sums  # fmt: skip
        label = I(p)
        is_target = label != nothing
        e = exp_negative(abs(x))
        z = from_bits(I(bits_of(x) ^ I(label << sign_shift)))  # positive: on the wrong side
        if overlap:
            r = one / (one + e)
            wrong = r if z >= zero else e * r
            missed += wrong if is_target else zero
            false_alarm += zero if is_target else wrong
        if bce:
            excess = z if z > zero else zero
            if split:
                e_pos = e if is_target else zero
                e_neg = zero if is_target else e
                product_pos = fma(product_pos, e_pos, product_pos + e_pos)
                product_neg = fma(product_neg, e_neg, product_neg + e_neg)
                bce_pos += excess if is_target else zero
                bce_neg += zero if is_target else excess
            else:
                product_pos = fma(product_pos, e, product_pos + e)
                bce_pos += excess
        if hard:
            over = x >= threshold
            predicted = I(predicted + (unit if over else nothing))
            hits = I(hits + (label if over else nothing))
            undefined = I(undefined + (unit if x != x else nothing))
        target = I(target + label)
        bad = I(bad | I(label >> unit))
        return (product_pos, bce_pos, product_neg, bce_neg, missed, false_alarm, target,
                hits, predicted, true, undefined, bad)  # fmt: skip

    @inlined
    def slope(x, p, w, on_target, off_target, bce_target, bce_other):  # type: ignore[no-untyped-def]
        label = I(p)
        is_target = label != nothing
        e = exp_negative(abs(x))
        r = one / (one + e)
        small = e * r
        z = from_bits(I(bits_of(x) ^ I(label << sign_shift)))
        wrong = r if z >= zero else small
        region = on_target if is_target else off_target
        bce_weight = -bce_target if is_target else bce_other
        return fma(bce_weight, wrong, region * fma(-small, small, small))

    return Point(add, _log_sum(real), slope)


def _soft_point(variant: Variant, real: Real) -> Point:
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, half, nothing, unit = T(0), T(1), T(0.5), I(0), I(1)
    exp_negative, log1p = make_exp_negative(real), make_log1p(real)
    bce = bool({"bce", "bce_split"} & variant.families)
    split = "bce_split" in variant.families
    overlap, hard = "overlap" in variant.families, "hard" in variant.families
    weighted = variant.targets == "weighted"

    @inlined
    def add(x, p, w, threshold, sums):  # type: ignore[no-untyped-def]
        (product_pos, bce_pos, product_neg, bce_neg, missed, false_alarm, target,
         hits, predicted, true, undefined, bad) = sums  # fmt: skip
        weight = w if weighted else one
        other = one - p
        e = exp_negative(abs(x))
        size = abs(x)
        if overlap:
            r = one / (one + e)
            small = e * r
            missed += weight * p * (small if x >= zero else r)
            false_alarm += weight * other * (r if x >= zero else small)
        if split:
            rest = log1p(e)
            excess_pos = size if x < zero and p != zero else zero  # 0 * inf is 0 here, not NaN
            excess_neg = size if x > zero and other != zero else zero
            bce_pos += weight * p * (excess_pos + rest)
            bce_neg += weight * other * (excess_neg + rest)
        elif bce:
            share = other if x > zero else p
            excess = size * share if share != zero else zero
            if weighted:
                bce_pos += weight * (excess + log1p(e))
            else:
                product_pos = fma(product_pos, e, product_pos + e)
                bce_pos += excess
        if hard:
            over, is_target = x >= threshold, p >= half
            predicted = I(predicted + (unit if over else nothing))
            true = I(true + (unit if is_target else nothing))
            hits = I(hits + (unit if over and is_target else nothing))
            undefined = I(undefined + (unit if x != x else nothing))
        target += weight * p
        bad = I(bad | (nothing if zero <= p <= one else unit))
        return (product_pos, bce_pos, product_neg, bce_neg, missed, false_alarm, target,
                hits, predicted, true, undefined, bad)  # fmt: skip

    @inlined
    def slope(x, p, w, on_target, off_target, bce_target, bce_other):  # type: ignore[no-untyped-def]
        other = one - p
        e = exp_negative(abs(x))
        r = one / (one + e)
        small = e * r
        q, rest = (r, small) if x >= zero else (small, r)
        region = (on_target * p + off_target * other) * fma(-small, small, small)
        value = fma(bce_other * other, q, region) - bce_target * p * rest
        return w * value if weighted else value

    return Point(add, _log_sum(real), slope)


def _probs_point(variant: Variant, real: Real) -> Point:
    """Probabilities and soft targets; both logarithms are clamped at -100, as PyTorch does."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, half, nothing, unit = T(0), T(1), T(0.5), I(0), I(1)
    floor, smallest = T(-100), T(1e-12)
    log, log1p = make_log(real), make_log1p(real)
    bce = bool({"bce", "bce_split"} & variant.families)
    split = "bce_split" in variant.families
    overlap, hard = "overlap" in variant.families, "hard" in variant.families
    weighted = variant.targets == "weighted"

    @inlined
    def add(x, p, w, threshold, sums):  # type: ignore[no-untyped-def]
        (product_pos, bce_pos, product_neg, bce_neg, missed, false_alarm, target,
         hits, predicted, true, undefined, bad) = sums  # fmt: skip
        weight = w if weighted else one
        p_real = T(p)
        other, rest = one - p_real, one - x
        if overlap:
            missed += weight * p_real * rest
            false_alarm += weight * other * x
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
            over, is_target = x >= threshold, p_real >= half
            predicted = I(predicted + (unit if over else nothing))
            true = I(true + (unit if is_target else nothing))
            hits = I(hits + (unit if over and is_target else nothing))
            undefined = I(undefined + (unit if x != x else nothing))
        target += weight * p_real
        bad = I(bad | (nothing if zero <= p_real <= one else unit))
        bad = I(bad | (unit if x < zero or x > one else nothing))
        return (product_pos, bce_pos, product_neg, bce_neg, missed, false_alarm, target,
                hits, predicted, true, undefined, bad)  # fmt: skip

    @inlined
    def log_sum(product, direct):  # type: ignore[no-untyped-def]
        return direct

    @inlined
    def slope(x, p, w, on_target, off_target, bce_target, bce_other):  # type: ignore[no-untyped-def]
        p_real = T(p)
        other, rest = one - p_real, one - x
        spread = x * rest
        spread = smallest if spread < smallest else spread
        value = on_target * p_real + off_target * other
        value += (bce_other * other * x - bce_target * p_real * rest) / spread
        return w * value if weighted else value

    return Point(add, log_sum, slope)
