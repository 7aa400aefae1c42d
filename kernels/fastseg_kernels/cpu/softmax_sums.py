"""What a tile adds to the sums of its classes: the loops of the statistics with softmax.

`softmax` has the mathematics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseg_kernels.constants import BASE_COLUMNS, BENT_FAMILIES, columns
from fastseg_kernels.cpu.compiled import function, inlined, pasted
from fastseg_kernels.cpu.elementary import Real, make_log1p
from fastseg_kernels.cpu.histograms import VOXELS, tally
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    carray,
    fma,
    is_same,
    pointer_to,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.cpu.point_parts import make_focal, make_short_and_excess, sums_needed
from fastseg_kernels.cpu.softmax_stage import LONGEST_TILE, MOST_CLASSES, NOBODY, UNIT
from fastseg_kernels.cpu.softmax_walk import Tops, make_exponential, make_largest, make_walk
from fastseg_kernels.cpu.tiles import LANES
from fastseg_kernels.cpu.variants import Variant

FILLED = frozenset(
    {
        *BASE_COLUMNS, "true_positive_sum", "false_negative_sum", "false_positive_sum", "ce_sum",
        "l1_true_positive_sum", "l1_false_negative_sum", "l1_false_positive_sum",
        "product_sum", "squared_error_sum",
        "ce_uniform_sum", "focal_ce_sum", "hard_true_positives", "hard_false_positives",
        "hard_false_negatives", "undefined",
    }
)  # fmt: skip
"""The columns that are filled here; others are refused."""


class Sums(NamedTuple):
    """The sums of one lane over voxels of one class."""

    inner: Any  # sum p q
    missed: Any  # sum p (1 - q)
    false_alarm: Any  # sum (1 - p) q
    common: Any  # sum min(p, q)
    short: Any  # sum max(p - q, 0)
    excess: Any  # sum max(q - p, 0)
    square: Any  # sum (p - q)^2
    target: Any  # sum p
    ce: Any  # sum p (-log q)
    uniform: Any  # sum -log q
    focal: Any  # sum p (1 - q)^gamma (-log q)
    hits: Any  # predicted and true
    predicted: Any
    true: Any


class Voxels(NamedTuple):
    """Pointers to what the voxels of a tile are known by, whatever the class."""

    target: Any  # its class
    predicted: Any  # the class of its largest logit
    weight: Any
    scaled: Any  # weight / (left + e_m)
    inverse: Any  # 1 / (left + e_m)
    left: Any
    missed: Any  # weight (1 - q) of the target's class
    nll: Any  # weight (-log q) of the target's class
    log: Any  # weight log1p(left / e_m)
    focal: Any  # weight (1 - q)^gamma (-log q) of the target's class
    top: Any
    largest: Any  # e_m


def _make_add(variant: Variant, real: Real) -> Any:
    """Return ``add(x, e, p, voxels, c, i, sums)``: the sums of class c with one voxel more."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, one, nothing, unit = T(0), T(1), I(0), I(1)
    families, indexed = variant.families, "indexed" in variant.targets
    overlap, l1, squared = sums_needed(families, indexed)
    hard = "hard" in families
    ce, uniform, focal = (name in families for name in ("ce", "ce_uniform", "focal_ce"))
    short_and_excess = make_short_and_excess(real)
    focal_of, _ = make_focal(real)

    @inlined
    def add(x, e, p, voxels, c, i, gamma, sums):  # type: ignore[no-untyped-def]
        (inner, missed, false_alarm, common, short, excess, square, target, ce_sum, uniform_sum,
         focal_sum, hits, predicted, true) = sums  # fmt: skip
        weight, scaled = voxels.weight[i], voxels.scaled[i]
        is_target = is_same(voxels.target[i], c)
        q = e[i] * scaled
        below = zero if x[i] == voxels.top[i] else voxels.top[i] - x[i]
        nll = voxels.log[i] + (weight * below if weight != zero else zero)
        if indexed:
            target += weight if is_target else zero
            if overlap:
                inner += q if is_target else zero
                missed += voxels.missed[i] if is_target else zero
                false_alarm += zero if is_target else q
            if squared:
                right = voxels.left[i] + (voxels.largest[i] - e[i])
                wrong = (right if is_target else e[i]) * voxels.inverse[i]
                square += weight * (wrong * wrong)
            if ce:
                ce_sum += voxels.nll[i] if is_target else zero
            if focal:
                focal_sum += voxels.focal[i] if is_target else zero
        else:
            target += weight * p[i]
            if overlap:
                inner += p[i] * q
                missed += p[i] * ((voxels.left[i] + (voxels.largest[i] - e[i])) * scaled)
                false_alarm += (one - p[i]) * q
            if l1 or squared or focal:
                rest = voxels.left[i] + (voxels.largest[i] - e[i])
                difference = (p[i] * rest - (one - p[i]) * e[i]) * voxels.inverse[i]
            if l1:
                under, over_by = short_and_excess(difference)
                common += q if difference > zero else weight * p[i]
                short += weight * under
                excess += weight * over_by
            if squared:
                square += weight * (difference * difference)
            if ce:
                ce_sum += p[i] * nll if p[i] != zero else zero  # 0 * inf is 0 here
            if focal and p[i] != zero and weight != zero:
                wrong = rest * voxels.inverse[i]
                focal_sum += p[i] * (weight * focal_of(wrong, nll / weight, gamma))
        if uniform:
            uniform_sum += nll
        if hard:
            is_predicted = is_same(voxels.predicted[i], c)
            hits = I(hits + (unit if is_predicted & is_target else nothing))
            predicted = I(predicted + (unit if is_predicted else nothing))
            true = I(true + (unit if is_target else nothing))
        return Sums(inner, missed, false_alarm, common, short, excess, square, target, ce_sum,
                    uniform_sum, focal_sum, hits, predicted, true)  # fmt: skip

    return add


def _make_class_sums(variant: Variant, real: Real) -> Any:
    """Return what adds the voxels of a tile to the sums of one class."""
    T, I = real.scalar, real.integer  # noqa: E741
    zero, nothing = T(0), I(0)
    families = variant.families
    overlap, l1, squared = sums_needed(families, "indexed" in variant.targets)
    hard = "hard" in families
    ce, uniform, focal = (name in families for name in ("ce", "ce_uniform", "focal_ce"))
    names = columns(families, counts=False)
    at = {name: names.index(name) if name in names else -1 for name in FILLED}
    at_target, at_inner, at_missed = (
        at[n] for n in ("targets_sum", "true_positive_sum", "false_negative_sum")
    )
    at_false, at_ce, at_uniform = (
        at[n] for n in ("false_positive_sum", "ce_sum", "ce_uniform_sum")
    )
    at_common, at_short, at_excess = (
        at[f"l1_{n}_sum"] for n in ("true_positive", "false_negative", "false_positive")
    )
    at_product, at_square = at["product_sum"], at["squared_error_sum"]
    at_focal = at["focal_ce_sum"]
    at_hits, at_over, at_under = (
        at[f"hard_{n}"] for n in ("true_positives", "false_positives", "false_negatives")
    )
    add = _make_add(variant, real)
    none, half = Sums(*(zero,) * 11, *(nothing,) * 3), LANES // 2

    @inlined
    def four(x, e, p, voxels, c, i, gamma):  # type: ignore[no-untyped-def]
        sums = add(x, e, p, voxels, c, i, gamma, none)
        sums = add(x, e, p, voxels, c, i + LANES, gamma, sums)
        sums = add(x, e, p, voxels, c, i + 2 * LANES, gamma, sums)
        return add(x, e, p, voxels, c, i + 3 * LANES, gamma, sums)

    @pasted
    def wide(lanes):  # type: ignore[no-untyped-def]
        """Add up lanes in float64, in one order."""
        pairs = stack_array(half, np.float64)
        for j in range(half):
            pairs[j] = np.float64(lanes[j]) + np.float64(lanes[j + half])
        even, odd = pairs[0] + pairs[4], pairs[1] + pairs[5]
        return (even + (pairs[2] + pairs[6])) + (odd + (pairs[3] + pairs[7]))

    @pasted
    def class_sums(x, e, p, voxels, c, tile, gamma, out):  # type: ignore[no-untyped-def]
        inner, missed, false_alarm = (
            stack_array(LANES, T), stack_array(LANES, T), stack_array(LANES, T),
        )  # fmt: skip
        common, short, excess, square = (
            stack_array(LANES, T), stack_array(LANES, T), stack_array(LANES, T),
            stack_array(LANES, T),
        )  # fmt: skip
        target, ce_sum, uniform_sum, focal_sum = (
            stack_array(LANES, T), stack_array(LANES, T), stack_array(LANES, T),
            stack_array(LANES, T),
        )  # fmt: skip
        hits, predicted, true = (
            stack_array(LANES, I), stack_array(LANES, I), stack_array(LANES, I),
        )  # fmt: skip
        for j in range(LANES):
            inner[j] = missed[j] = false_alarm[j] = target[j] = ce_sum[j] = uniform_sum[j] = zero
            common[j] = short[j] = excess[j] = square[j] = focal_sum[j] = zero
            hits[j] = predicted[j] = true[j] = nothing
        for start in range(0, tile, UNIT):
            for j in range(LANES):  # vectorised: one lane each
                sums = four(x, e, p, voxels, c, start + j, gamma)
                target[j] += sums.target
                if overlap:
                    inner[j] += sums.inner
                    missed[j] += sums.missed
                    false_alarm[j] += sums.false_alarm
                if l1:
                    common[j] += sums.common
                    short[j] += sums.short
                    excess[j] += sums.excess
                if squared:
                    square[j] += sums.square
                if ce:
                    ce_sum[j] += sums.ce
                if uniform:
                    uniform_sum[j] += sums.uniform
                if focal:
                    focal_sum[j] += sums.focal
                if hard:
                    hits[j] = I(hits[j] + sums.hits)
                    predicted[j] = I(predicted[j] + sums.predicted)
                    true[j] = I(true[j] + sums.true)
        out[at_target] += wide(target)
        if at_inner >= 0:
            out[at_inner] += wide(inner)
            out[at_missed] += wide(missed)
            out[at_false] += wide(false_alarm)
        if l1:
            out[at_common] += wide(common)
            out[at_short] += wide(short)
            out[at_excess] += wide(excess)
        elif at_common >= 0:
            out[at_common] += wide(inner)
            out[at_short] += wide(missed)
            out[at_excess] += wide(false_alarm)
        if squared:
            out[at_product] += wide(inner)
            out[at_square] += wide(square)
        if ce:
            out[at_ce] += wide(ce_sum)
        if uniform:
            out[at_uniform] += wide(uniform_sum)
        if focal:
            out[at_focal] += wide(focal_sum)
        if hard:
            both = wide(hits)
            out[at_hits] += both
            out[at_over] += wide(predicted) - both
            out[at_under] += wide(true) - both

    return class_sums


def make_tile_statistics(variant: Variant, real: Real) -> Any:
    """Return the function that adds a tile to the sums of its block."""
    T, I = real.scalar, real.integer  # noqa: E741
    size = np.dtype(T).itemsize
    zero, one, nobody = T(0), T(1), I(NOBODY)
    families, indexed = variant.families, "indexed" in variant.targets
    hard = "hard" in families
    focal = "focal_ce" in families
    logs = bool({"ce", "ce_uniform", "focal_ce"} & families)
    inverted = focal or bool(BENT_FAMILIES & families)
    names = columns(families, counts=False)
    at_undefined = names.index("undefined") if hard else 0
    walk, class_sums = make_walk(variant, real, False), _make_class_sums(variant, real)
    largest_class, log1p = make_largest(real), make_log1p(real)
    _, exponential = make_exponential(real)
    focal_of, _ = make_focal(real)

    @function
    def tile_statistics(  # type: ignore[no-untyped-def]
        x, x_step, p, e, tile, classes, label, keep, weight, out, out_step, job, job_address,
        voxels_address,
    ):  # fmt: skip
        wide_vectors()
        true_class, predicted = stack_array(LONGEST_TILE, I), stack_array(LONGEST_TILE, I)
        scaled, left = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        missed, inverse = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        nll, log = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        of_focal, gamma = stack_array(LONGEST_TILE, T), T(job.gamma)
        top, ties = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        own, unused = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        group = stack_array(LONGEST_TILE, T)
        base, near = stack_array(LONGEST_TILE, T), stack_array(LONGEST_TILE, T)
        reference, largest = stack_array(LONGEST_TILE, I), stack_array(LONGEST_TILE, T)
        tops = Tops(top, base, near, reference, largest)
        no_slopes = stack_array(MOST_CLASSES, T)
        walk(x, x_step, p, tile, classes, label, weight, e, tops, ties, left, group, own,
             no_slopes, no_slopes, unused)  # fmt: skip
        for i in range(tile):
            left[i] = fma(ties[i] - one, largest[i], left[i] + group[i])
            scaled[i] = weight[i] / (left[i] + largest[i])
            if inverted:
                inverse[i] = one / (left[i] + largest[i])
            e_own = exponential(own[i], own[i] == top[i], tops, i)
            missed[i] = (left[i] + (largest[i] - e_own)) * scaled[i]
            if focal and indexed:
                wrong = (left[i] + (largest[i] - e_own)) * inverse[i]
                below = zero if own[i] == top[i] else top[i] - own[i]
                own_nll = log1p(left[i] / largest[i]) + below
                value = focal_of(wrong, own_nll, gamma)
                of_focal[i] = weight[i] * value if weight[i] != zero else zero
        if logs:
            for i in range(tile):
                below = zero if own[i] == top[i] else top[i] - own[i]
                log[i] = weight[i] * log1p(left[i] / largest[i])
                nll[i] = log[i] + (weight[i] * below if weight[i] != zero else zero)
        undefined = 0
        if hard or job.curve != 0:
            if indexed:
                for i in range(tile):
                    true_class[i] = label[i]
            else:
                largest_class(p, tile * size, tile, classes, unused, true_class)
        if hard:
            largest_class(x, x_step, tile, classes, unused, predicted)
            for i in range(tile):
                absent, nan = keep[i] == zero, unused[i] != unused[i]
                predicted[i] = nobody if absent or nan else predicted[i]
                true_class[i] = nobody if absent else true_class[i]
                undefined += nan and not absent
        target = true_class if hard else label
        counted = carray(pointer_to(voxels_address, VOXELS), 1)[0]
        words, flush_row = counted.words, counted.flush_row
        if job.tallied != 0:
            if not inverted:
                for i in range(tile):
                    inverse[i] = one / (left[i] + largest[i])
            counted.inverse, counted.left = address_of(inverse), address_of(left)
            counted.largest, counted.keep = address_of(largest), address_of(keep)
            counted.target = address_of(true_class if job.curve != 0 else target)
        voxels = Voxels(target, predicted, weight, scaled, inverse, left, missed, nll, log,
                        of_focal, top, largest)  # fmt: skip
        for c in range(classes):
            sums = pointer_to(out + c * out_step, np.float64)
            x_row = pointer_to(x + c * x_step, T)
            p_row = pointer_to(p + c * tile * size, T)
            e_row = pointer_to(e + c * tile * size, T)
            class_sums(x_row, e_row, p_row, voxels, I(c), tile, gamma, sums)
            if hard:
                sums[at_undefined] += undefined
            if job.tallied != 0:
                counted.x, counted.p, counted.c = address_of(e_row), address_of(p_row), c
                counted.words = words + 8 * job.row_words * c
                counted.flush_row = flush_row + c if flush_row >= 0 else -1
                tally(job, job_address, voxels_address)

    return tile_statistics
