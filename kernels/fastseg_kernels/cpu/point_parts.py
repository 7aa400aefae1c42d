"""What the points of several variants share: their sums, and the steps that they have in common.

``points.py`` has the mathematics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastseg_kernels.cpu.compiled import inlined
from fastseg_kernels.cpu.elementary import Real, make_exp_negative, make_log1p, make_power
from fastseg_kernels.cpu.intrinsics import fma
from fastseg_kernels.cpu.variants import Variant

HALF_WORD = 16
"""Bits of a count in `Sums.predicted` of binary targets; hits are counted in the upper bits."""


class Coefficients(NamedTuple):
    """The coefficients of a row, in their order (`constants.COEFFICIENTS`)."""

    on_target: Any
    off_target: Any
    bce_target: Any
    bce_other: Any
    below: Any
    above: Any
    square: Any
    flipped_target: Any
    flipped_other: Any
    focal_target: Any
    focal_other: Any
    gamma: Any


class Settings(NamedTuple):
    """Numbers that the sums of a voxel depend on."""

    threshold: Any
    gamma: Any


@inlined
def no_masses(x):  # type: ignore[no-untyped-def]
    """Stand for `Point.masses_of` where a variant has none."""
    return x, x


@inlined
def nothing_kept(x, *others):  # type: ignore[no-untyped-def]
    """Stand for `Point.kept_of` and `Point.slope_of_kept` where a variant keeps nothing."""
    return x


class Point(NamedTuple):
    """The point functions of one variant."""

    sums_of: Any
    join: Any  # join(sums, sums) -> the sums of both
    log_sum: Any  # log_sum(product, direct) -> the BCE that the sums hold
    slope: Any
    has_masses: bool = False
    masses_of: Any = no_masses
    kept_of: Any = nothing_kept
    slope_of_kept: Any = nothing_kept


class Sums(NamedTuple):
    """The sums of some voxels of one lane.

    What a variant does not ask for is 0, and the compiler leaves it out.
    """

    product_pos: Any  # BCE of foreground voxels (of all voxels, unless "bce_split") is
    bce_pos: Any  # bce_pos + log(1 + product_pos)
    product_neg: Any  # and likewise of background voxels
    bce_neg: Any
    flipped_pos: Any  # what bce_pos is if the foreground's labels are 0 (with the same product)
    flipped_neg: Any
    focal_pos: Any  # focal loss of foreground voxels
    focal_neg: Any
    inner: Any  # sum p q
    missed: Any  # sum p (1 - q)
    false_alarm: Any  # sum (1 - p) q
    common: Any  # sum min(p, q)
    short: Any  # sum max(p - q, 0)
    excess: Any  # sum max(q - p, 0)
    square: Any  # sum (p - q)^2
    target: Any  # sum p
    hits: Any  # voxels with q over the threshold and p
    predicted: Any  # with q over the threshold (of binary targets hits are in the same number)
    true: Any  # with p
    undefined: Any  # predictions that are NaN
    bad: Any  # not zero: there is an invalid target, prediction or weight to be counted


def bce_needed(families: frozenset[str]) -> tuple[bool, bool, bool, bool]:
    """Return which of the BCE's sums are added up: any, both apart, flipped; and the focal ones."""
    flipped = "bce_flipped" in families
    split = flipped or "bce_split" in families
    return split or "bce" in families, split, flipped, "focal_bce" in families


def sums_needed(families: frozenset[str], binary: bool) -> tuple[bool, bool, bool]:
    """Return which sums are added up: p q and its errors, min(p, q) and its errors, (p - q)^2.

    With targets of 0 and 1 min(p, q) is p q: the first then serve as the second.
    """
    l1, squared = "overlap_l1" in families, "overlap_squared" in families
    return "overlap" in families or squared or (l1 and binary), l1 and not binary, squared


def make_log_sum(real: Real) -> Any:
    """Return ``log_sum(product, direct)``, the BCE that two of the sums hold together."""
    log1p = make_log1p(real)

    @inlined
    def log_sum(product, direct):  # type: ignore[no-untyped-def]
        return direct + log1p(product)

    return log_sum


def make_join(real: Real) -> Any:
    """Return ``join(sums, sums)``, the sums of the voxels of both."""
    I = real.integer  # noqa: E741

    @inlined
    def join(a, b):  # type: ignore[no-untyped-def]
        return Sums(
            fma(a.product_pos, b.product_pos, a.product_pos + b.product_pos),
            a.bce_pos + b.bce_pos,
            fma(a.product_neg, b.product_neg, a.product_neg + b.product_neg),
            a.bce_neg + b.bce_neg,
            a.flipped_pos + b.flipped_pos,
            a.flipped_neg + b.flipped_neg,
            a.focal_pos + b.focal_pos,
            a.focal_neg + b.focal_neg,
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


def make_focal(real: Real) -> tuple[Any, Any]:
    """Return the focal loss of a voxel and its slope with respect to z.

    Both take sigma(z), softplus(z) and gamma, the slope also sigma(-z).
    """
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, most, nothing = T(0), T(1), T(7), I(0)
    rest_power, bit0, bit1, bit2 = make_power(real), I(1), I(2), I(4)

    @inlined
    def power(wrong, gamma):  # type: ignore[no-untyped-def]
        whole = I(gamma if gamma < most else most)
        square = wrong * wrong
        value = wrong if I(whole & bit0) != nothing else one
        value *= square if I(whole & bit1) != nothing else one
        value *= square * square if I(whole & bit2) != nothing else one
        return value * rest_power(wrong, gamma - T(whole))

    @inlined
    def focal(wrong, nll, gamma):  # type: ignore[no-untyped-def]
        return power(wrong, gamma) * nll if wrong != zero else nll

    @inlined
    def slope(wrong, right, nll, gamma):  # type: ignore[no-untyped-def]
        moved = right * nll if right != zero else zero
        return power(wrong, gamma) * fma(gamma, moved, wrong)

    return focal, slope


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


def make_masses(real: Real) -> Any:
    """Return ``masses_of(x) = exp(-|x|), sigma(-|x|)``."""
    one, exp_negative = real.scalar(1), make_exp_negative(real)

    @inlined
    def masses_of(x):  # type: ignore[no-untyped-def]
        e = exp_negative(abs(x))
        return e, fma(-e, e * (one / (one + e)), e)

    return masses_of
