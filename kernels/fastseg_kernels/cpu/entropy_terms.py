"""Cross-entropies, binary and over classes, focal or not: their values and coefficients."""

from __future__ import annotations

from functools import cache

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.intrinsics import stack_array
from fastseg_kernels.cpu.term_rows import (
    BCE_ALL,
    BCE_NEG,
    BCE_OTHER,
    BCE_POS,
    BCE_TARGET,
    BY_ALL,
    BY_VALID,
    BY_WEIGHTS,
    CE,
    CE_UNIFORM,
    COUNT,
    FLIPPED_NEG,
    FLIPPED_OTHER,
    FLIPPED_POS,
    FLIPPED_TARGET,
    FOCAL_BCE,
    FOCAL_CE,
    FOCAL_CROSS_ENTROPY,
    FOCAL_GAMMA,
    FOCAL_NEG,
    FOCAL_POS,
    FOCAL_TARGET,
    GAMMA,
    KIND,
    MEAN,
    NEG_WEIGHT,
    NORMALIZATION,
    POS_WEIGHT,
    SMOOTHING,
    SUMS,
    VOXELS,
    P,
    add_to,
    collect,
    factor_of,
    is_selected,
    put_value,
    term_kernel,
)


@function
def set_gamma(w, n, c):  # type: ignore[no-untyped-def]
    """Tell the gradient of sample n and class c the focal term's gamma."""
    w.coefficients[(n * w.classes + c) * w.width + FOCAL_GAMMA] = w.term[GAMMA]


@function
def add_bce(w):  # type: ignore[no-untyped-def]
    """Evaluate a BCE term, focal or not.

    Labels that are smoothed by s are p (1 - s / 2) + (1 - p) s / 2.
    """
    samples, classes = w.samples, w.classes
    focal, half = w.term[KIND] == FOCAL_BCE, 0.5 * w.term[SMOOTHING]
    by = VOXELS if w.term[NORMALIZATION] == BY_ALL else COUNT
    summed = w.term[NORMALIZATION] != BY_ALL and w.term[NORMALIZATION] != BY_VALID
    pos_weight, neg_weight = w.term[POS_WEIGHT], w.term[NEG_WEIGHT]
    # of the sums BCE_POS, BCE_NEG, FLIPPED_POS, FLIPPED_NEG
    own = ((1.0 - half) * pos_weight, (1.0 - half) * neg_weight)
    other = (half * neg_weight, half * pos_weight)
    row = stack_array(SUMS, np.float64)
    kept, voxels = 0, 0.0
    for n in range(samples):
        for c in range(classes):
            collect(w, n, c, False, row)
            selected = is_selected(w, c)  # not NaN
            if selected and row[COUNT] > 0.0:
                kept += 1
            if selected and (row[COUNT] > 0.0 or by == VOXELS):
                voxels += row[by]
    total = 0.0
    for n in range(samples):
        for c in range(classes):
            collect(w, n, c, False, row)
            if not is_selected(w, c) or row[COUNT] == 0.0:
                continue
            if summed:
                share = 1.0 / kept if w.reduction == MEAN else 1.0
            else:
                share = 1.0 / (voxels if w.reduction == MEAN else row[by])
            pos, neg = row[BCE_POS], row[BCE_ALL] + row[BCE_NEG]
            if focal:
                pos, neg = row[FOCAL_POS], row[FOCAL_NEG]
            # 0 leaves its part out, infinite losses included
            value = own[0] * pos if own[0] != 0.0 else 0.0
            value += own[1] * neg if own[1] != 0.0 else 0.0
            value += other[0] * row[FLIPPED_POS] if other[0] != 0.0 else 0.0
            value += other[1] * row[FLIPPED_NEG] if other[1] != 0.0 else 0.0
            factor = w.class_weights[c] * share
            total += factor * value
            put_value(w, n, c, factor * value)
            factor *= factor_of(w, n, c)
            first = FOCAL_TARGET if focal else BCE_TARGET
            add_to(w, n, c, first, factor * own[0])
            add_to(w, n, c, first + 1, factor * own[1])
            add_to(w, n, c, FLIPPED_TARGET, factor * other[0])
            add_to(w, n, c, FLIPPED_OTHER, factor * other[1])
            if focal:
                set_gamma(w, n, c)
    return total


@function
def _ce_divisor(w, n, row):  # type: ignore[no-untyped-def]
    """Return what a sample's cross-entropy is divided by, and whether it has a voxel at all."""
    total, voxels = 0.0, 0.0
    for c in range(w.classes):
        collect(w, n, c, False, row)
        voxels = max(voxels, row[VOXELS] if w.term[NORMALIZATION] == BY_ALL else row[COUNT])
        if is_selected(w, c):  # not NaN
            total += w.class_weights[c] * row[P]
    if w.term[NORMALIZATION] == BY_WEIGHTS:
        return total, voxels > 0.0
    return voxels, voxels > 0.0


@function
def add_ce(w):  # type: ignore[no-untyped-def]
    """Evaluate a cross-entropy over softmax, focal or not; as `add_bce`."""
    samples, classes = w.samples, w.classes
    summed = w.term[NORMALIZATION] not in (BY_ALL, BY_VALID, BY_WEIGHTS)
    smoothing, focal = w.term[SMOOTHING], w.term[KIND] == FOCAL_CROSS_ENTROPY
    row = stack_array(SUMS, np.float64)
    kept, whole = 0, 0.0
    for n in range(samples):
        divisor, present = _ce_divisor(w, n, row)
        if present:
            kept += 1
            whole += divisor
    total = 0.0
    for n in range(samples):
        divisor, present = _ce_divisor(w, n, row)
        if not present:
            continue
        if summed:
            share = 1.0 / kept if w.reduction == MEAN else 1.0
        else:
            divisor = whole if w.reduction == MEAN else divisor
            share = 1.0 / divisor if divisor != 0.0 else 0.0
        for c in range(classes):
            if focal:
                set_gamma(w, n, c)  # of the voxel, whatever its class
            if not is_selected(w, c):
                continue
            collect(w, n, c, False, row)
            factor = w.class_weights[c] * share
            own, everyone = factor * (1.0 - smoothing), factor * smoothing / classes
            value = 0.0
            if own != 0.0:
                value += own * row[CE]
            if everyone != 0.0:
                value += everyone * row[CE_UNIFORM]
            if focal and own != 0.0:
                value = own * row[FOCAL_CE]
            total += value
            put_value(w, n, c, value)
            scaled = factor_of(w, n, c)
            if focal:
                add_to(w, n, c, FOCAL_TARGET, scaled * own)
            else:
                add_to(w, n, c, BCE_TARGET, scaled * own)
                add_to(w, n, c, BCE_OTHER, scaled * everyone)
    return total


@cache
def bce_kernel() -> Kernel:
    """Compile what evaluates a BCE term."""
    return term_kernel(add_bce, "bce-term")


@cache
def cross_entropy_kernel() -> Kernel:
    """Compile what evaluates a cross-entropy over softmax."""
    return term_kernel(add_ce, "cross-entropy-term")
