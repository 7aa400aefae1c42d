"""What one voxel adds to the sums, and its gradient: the mathematics of the overlap family.

Two kinds of targets (``binary``: one byte, 0 or 1; ``soft``: a real p in [0, 1], with a weight)
and two of predictions (``sigmoid``: logits; ``probs``: probabilities) make four pairs. Each pair is

    sums_of(x, p, w, masses, settings) -> sums  the voxel's part of the sums
    slope(x, p, w, coefficients) -> dL/dx       its part of the gradient

Binary targets of logits have more: what a loop of its own may compute first,

    masses_of(x) -> (e, sigma(-|x|))            e = exp(-|x|)

and for a gradient whose statistics were taken just before, what these keep and what it makes of it,

    kept_of(x, p, masses) -> u                  sigma(-|x|), negative where x is on the wrong side
    slope_of_kept(u, p, w, coefficients)        the same bits as slope(x, p, w, coefficients)

With e = exp(-|x|), sigma(|x|) = 1 / (1 + e) and sigma(-|x|) = e / (1 + e), so that the mass on the
wrong side, p (1 - q) or (1 - p) q, is always formed from e and keeps its relative accuracy when
the network is right and sure (1 - q from a rounded q would not). Gradients take u = sigma(-|x|) as
e - e (e / (1 + e)), which hardly feels the rounding of 1 + e and of the quotient, and q (1 - q) as
u - u^2, rounded once; without either they missed 4 ulp.

The voxel's BCE is softplus(z) = max(z, 0) + log(1 + e), z being x with its sign turned where p = 1.
Sixteen voxels share one logarithm: ``product`` carries (1 + e1)(1 + e2)... - 1 as s + e + s e,
which stays exact where every e is tiny.

With z = -x on the foreground and x off it, the focal loss of a voxel is w^gamma softplus(z), where
w = sigma(z) is the mass on the wrong side, and its slope

    f'(z) = w^gamma (gamma (1 - w) softplus(z) + w)

w^gamma is a product of w, w^2, w^4 and of w^rest, which is 1 where gamma is a whole number below 8.

Coefficients (`constants.COEFFICIENTS`) are already scaled by everything that scales the gradient:

    dL/dq = on_target p + off_target (1 - p)           region terms, times dq/dx = q (1 - q)
            + (below if q < p, above if q > p, their mean if q = p) + square (q - p)
    dL/dx = ... - bce_target p (1 - q) + bce_other (1 - p) q
            + flipped_target p q - flipped_other (1 - p) (1 - q)        smoothed labels
            - focal_target p f'(-x) + focal_other (1 - p) f'(x)

p - q is formed as p (1 - q) - (1 - p) q, whose sign is exact, and which has its digits, wherever p
is 0 or 1. For binary targets ``below`` belongs to the foreground and ``above`` to the background:
the caller adds them to the first two.

Largest errors of one voxel's parts in float32, for targets 0 and 1 and |x| <= 87.683, by
``tests/test_elementary.py``: p (1 - q) and (1 - p) q 2.01 ulp, BCE 3.67, q (1 - q) in the gradient
2.41, the gradient of the BCE 2.01.
"""

from __future__ import annotations

import numpy as np

from fastseg_kernels.constants import BENT_FAMILIES
from fastseg_kernels.cpu.compiled import inlined
from fastseg_kernels.cpu.elementary import Real, make_log, make_log1p
from fastseg_kernels.cpu.intrinsics import fma, from_bits, has_sign
from fastseg_kernels.cpu.point_parts import (
    HALF_WORD,
    Point,
    Sums,
    bce_needed,
    make_bent,
    make_focal,
    make_is_allowed,
    make_join,
    make_log_sum,
    make_masses,
    make_short_and_excess,
    sums_needed,
)
from fastseg_kernels.cpu.stage import EXCLUDED_INPUT
from fastseg_kernels.cpu.variants import HAS_MASKS, Variant


def make_point(variant: Variant, real: Real) -> Point:
    """Build the point functions of ``variant``."""
    if variant.activation == "probs":
        return _probs_point(variant, real)
    if variant.targets == "binary":
        return _binary_point(variant, real)
    return _soft_point(variant, real)


def _binary_point(variant: Variant, real: Real) -> Point:
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, background, nothing, unit = T(0), T(1), np.uint8(0), I(0), I(1)
    half_word = I(HALF_WORD)
    sign_bit = I(8 * np.dtype(T).itemsize - 1)
    masses_of, log1p = make_masses(real), make_log1p(real)
    bce, split, flipped, focal = bce_needed(variant.families)
    overlap, _, squared = sums_needed(variant.families, binary=True)
    hard = "hard" in variant.families
    focal_of, focal_slope = make_focal(real)
    excluded = T(EXCLUDED_INPUT["sigmoid"])

    @inlined
    def is_foreground(p):  # type: ignore[no-untyped-def]
        # Either is one instruction, where there are mask registers and where signs choose.
        return p != background if HAS_MASKS else has_sign(from_bits(I(I(p) << sign_bit)))

    @inlined
    def turned(x, is_target):  # type: ignore[no-untyped-def]
        """Return z, whose sign is set where x is on the right side; at 0 both are alike."""
        return -x if is_target else x

    @inlined
    def sums_of(x, p, w, masses, settings):  # type: ignore[no-untyped-def]
        product_pos = bce_pos = product_neg = bce_neg = flipped_pos = flipped_neg = zero
        focal_pos = focal_neg = inner = missed = false_alarm = square = zero
        hits = predicted = undefined = nothing
        e, small = masses
        is_target = is_foreground(p)
        z = turned(x, is_target)
        on_wrong_side = not has_sign(z)
        size = abs(x)
        if overlap or focal:
            large = one - small
            wrong = large if on_wrong_side else small
            right = small if on_wrong_side else large
        if overlap:
            inner = right if is_target else zero
            missed = wrong if is_target else zero
            false_alarm = zero if is_target else wrong
        if squared:
            square = wrong * wrong
        if bce:
            beyond = z if z > zero else zero
            if split:
                product_pos = e if is_target else zero
                product_neg = zero if is_target else e
                bce_pos = beyond if is_target else zero
                bce_neg = zero if is_target else beyond
            else:
                product_pos, bce_pos = e, beyond
        if flipped:
            over = zero if on_wrong_side or x == excluded else size
            flipped_pos = over if is_target else zero
            flipped_neg = zero if is_target else over
        if focal:
            log = log1p(e)
            nll = log + (size if on_wrong_side else zero)
            value = focal_of(wrong, nll, settings.gamma)
            focal_pos = value if is_target else zero
            focal_neg = zero if is_target else value
        if hard:  # one number for both counts: the sums of a tile fit the halves of 32 bits
            both = I(I(I(p) << half_word) | unit)
            predicted = both if x >= settings.threshold else nothing
            undefined = unit if x != x else nothing
        return Sums(product_pos, bce_pos, product_neg, bce_neg, flipped_pos, flipped_neg, focal_pos,
                    focal_neg, inner, missed, false_alarm, zero, zero, zero, square, zero, hits,
                    predicted, nothing, undefined, nothing)  # fmt: skip

    @inlined
    def plain_slope(wrong, small, is_target, k):  # type: ignore[no-untyped-def]
        region = k.on_target if is_target else k.off_target
        if squared:
            region = fma(k.square, -wrong if is_target else wrong, region)
        bce_weight = -k.bce_target if is_target else k.bce_other
        return fma(bce_weight, wrong, region * fma(-small, small, small))

    @inlined
    def slope(x, p, w, k):  # type: ignore[no-untyped-def]
        is_target = is_foreground(p)
        size = abs(x)
        e, small = masses_of(x)
        on_wrong_side = not has_sign(turned(x, is_target))
        large = one - small
        wrong = large if on_wrong_side else small
        value = plain_slope(wrong, small, is_target, k)
        right = small if on_wrong_side else large
        if flipped:
            value = fma(k.flipped_target if is_target else -k.flipped_other, right, value)
        if focal:
            log = log1p(e)
            nll = log + (size if on_wrong_side else zero)
            of_z = focal_slope(wrong, right, nll, k.gamma)
            value = fma(-k.focal_target if is_target else k.focal_other, of_z, value)
        return value

    @inlined
    def kept_of(x, p, masses):  # type: ignore[no-untyped-def]
        return masses[1] if has_sign(turned(x, is_foreground(p))) else -masses[1]

    @inlined
    def slope_of_kept(u, p, w, k):  # type: ignore[no-untyped-def]
        wrong = one + u if has_sign(u) else u
        return plain_slope(wrong, abs(u), is_foreground(p), k)

    return Point(
        sums_of, make_join(real), make_log_sum(real), slope, True, masses_of, kept_of, slope_of_kept
    )


def _soft_point(variant: Variant, real: Real) -> Point:
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, half, nothing, unit = T(0), T(1), T(0.5), I(0), I(1)
    masses_of, log1p = make_masses(real), make_log1p(real)
    bce, split, flipped, focal = bce_needed(variant.families)
    overlap, l1, squared = sums_needed(variant.families, binary=False)
    hard = "hard" in variant.families
    short_and_excess, bent = make_short_and_excess(real), make_bent(variant, real)
    focal_of, focal_slope = make_focal(real)
    weighted, is_bent = variant.targets == "weighted", bool(BENT_FAMILIES & variant.families)
    is_allowed, excluded = make_is_allowed(variant, real), T(EXCLUDED_INPUT["sigmoid"])

    @inlined
    def sums_of(x, p, w, masses, settings):  # type: ignore[no-untyped-def]
        product_pos = bce_pos = bce_neg = flipped_pos = flipped_neg = focal_pos = focal_neg = zero
        inner = missed = false_alarm = common = short = excess = square = zero
        hits = predicted = true = undefined = nothing
        weight = w if weighted else one
        other = one - p
        over, no_answer = x >= settings.threshold, x != x
        if weighted:
            x = x if w != zero else zero  # weight 0 leaves out whatever is stored there
        size = abs(x)
        e, small = masses_of(x) if weighted else masses
        if overlap or l1 or focal:
            large = one - small
            q, rest = (large, small) if x >= zero else (small, large)
            difference = p * rest - other * q
        if overlap:
            inner = weight * p * q
            missed = weight * p * rest
            false_alarm = weight * other * q
        if l1:
            under, over_by = short_and_excess(difference)
            common = weight * (q if difference > zero else p)
            short = weight * under
            excess = weight * over_by
        if squared:
            square = weight * (difference * difference)
        if split or focal:
            log_rest = log1p(e)
            # softplus(x) and softplus(-x); NaN is in both
            high = log_rest + (zero if x < zero else size)
            low = log_rest + (zero if x > zero else size)
        if split:
            bce_pos = weight * p * low if p != zero else zero * e  # 0 * inf is 0 here, not NaN
            bce_neg = weight * other * high if other != zero else zero * e
        elif bce:
            share = other if x > zero else p
            beyond = size * share if share != zero else zero
            if weighted:
                bce_pos = weight * (beyond + log1p(e))
            else:
                product_pos, bce_pos = e, beyond
        if flipped:
            flipped_pos = weight * p * high if p != zero else zero
            flipped_neg = weight * other * low if other != zero and x != excluded else zero
        if focal:
            of_target = focal_of(rest, low, settings.gamma)
            of_other = focal_of(q, high, settings.gamma)
            focal_pos = weight * p * of_target if p != zero else zero * e
            focal_neg = weight * other * of_other if other != zero else zero * e
        if hard:
            is_target = p >= half
            true = unit if is_target else nothing
            hits = unit if over & is_target else nothing
            predicted = unit if over else nothing
            undefined = unit if no_answer else nothing
        target = weight * p
        bad = nothing if is_allowed(p) else unit
        if weighted:
            bad = I(bad | (nothing if w >= zero else unit))
        return Sums(product_pos, bce_pos, zero, bce_neg, flipped_pos, flipped_neg, focal_pos,
                    focal_neg, inner, missed, false_alarm, common, short, excess, square, target,
                    hits, predicted, true, undefined, bad)  # fmt: skip

    @inlined
    def slope(x, p, w, k):  # type: ignore[no-untyped-def]
        other = one - p
        if weighted:
            x = x if w != zero else zero
        size = abs(x)
        e, small = masses_of(x)
        large = one - small
        q, rest = (large, small) if x >= zero else (small, large)
        region = k.on_target * p + k.off_target * other
        if is_bent:
            region += bent(p * rest - other * q, k.below, k.above, k.square)
        region *= fma(-small, small, small)
        value = fma(k.bce_other * other, q, region) - k.bce_target * p * rest
        if flipped:
            value += k.flipped_target * p * q - k.flipped_other * other * rest
        if focal:
            log = log1p(e)
            low, high = log + (size if x < zero else zero), log + (size if x > zero else zero)
            value += k.focal_other * other * focal_slope(q, rest, high, k.gamma)
            value -= k.focal_target * p * focal_slope(rest, q, low, k.gamma)
        return w * value if weighted else value

    return Point(sums_of, make_join(real), make_log_sum(real), slope, not weighted, masses_of)


def _probs_point(variant: Variant, real: Real) -> Point:
    """Probabilities and soft targets; both logarithms are clamped at -100, as PyTorch does."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, half, nothing, unit = T(0), T(1), T(0.5), I(0), I(1)
    most, smallest = T(100), T(1e-12)
    log, log1p = make_log(real), make_log1p(real)
    bce, split, flipped, focal = bce_needed(variant.families)
    if flipped:
        raise NotImplementedError("labels of probabilities are not smoothed")
    overlap, l1, squared = sums_needed(variant.families, binary=False)
    hard = "hard" in variant.families
    short_and_excess, bent = make_short_and_excess(real), make_bent(variant, real)
    focal_of, focal_slope = make_focal(real)
    weighted, is_bent = variant.targets == "weighted", bool(BENT_FAMILIES & variant.families)

    @inlined
    def logs(x):  # type: ignore[no-untyped-def]
        """Return -log q and -log(1 - q)."""
        low = -log(x)
        high = -log1p(-x) if x < one else (most if x == one else x)
        return (most if low > most else low), (most if high > most else high)

    @inlined
    def sums_of(x, p, w, masses, settings):  # type: ignore[no-untyped-def]
        bce_pos = bce_neg = focal_pos = focal_neg = zero
        inner = missed = false_alarm = common = short = excess = square = zero
        hits = predicted = true = undefined = nothing
        weight = w if weighted else one
        p_real = T(p)
        over, no_answer, outside = x >= settings.threshold, x != x, x < zero or x > one
        if weighted:
            x = x if w != zero else zero
        other, rest = one - p_real, one - x
        if overlap:
            inner = weight * p_real * x
            missed = weight * p_real * rest
            false_alarm = weight * other * x
        if l1:
            under, over_by = short_and_excess(p_real - x)
            common = weight * (x if p_real > x else p_real)
            short = weight * under
            excess = weight * over_by
        if squared:
            square = weight * ((p_real - x) * (p_real - x))
        if bce or focal:
            low, high = logs(x)
        if split:
            bce_pos = weight * (p_real * low)
            bce_neg = weight * (other * high)
        elif bce:
            bce_pos = weight * (p_real * low + other * high)
        if focal:
            focal_pos = weight * (p_real * focal_of(rest, low, settings.gamma))
            focal_neg = weight * (other * focal_of(x, high, settings.gamma))
        if hard:
            is_target = p_real >= half
            true = unit if is_target else nothing
            hits = unit if over & is_target else nothing
            predicted = unit if over else nothing
            undefined = unit if no_answer else nothing
        target = weight * p_real
        bad = nothing if zero <= p_real <= one else unit
        bad = I(bad | (unit if outside else nothing))
        if weighted:
            bad = I(bad | (nothing if w >= zero else unit))
        return Sums(zero, bce_pos, zero, bce_neg, zero, zero, focal_pos, focal_neg,
                    inner, missed, false_alarm, common, short, excess, square, target, hits,
                    predicted, true, undefined, bad)  # fmt: skip

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
        of_logit = k.bce_other * other * x - k.bce_target * p_real * rest
        if focal:
            low, high = logs(x)
            of_logit += k.focal_other * other * focal_slope(x, rest, high, k.gamma)
            of_logit -= k.focal_target * p_real * focal_slope(rest, x, low, k.gamma)
        value += of_logit / spread
        return w * value if weighted else value

    return Point(sums_of, make_join(real), log_sum, slope)
