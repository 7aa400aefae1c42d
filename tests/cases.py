"""The cases that every promise is tested on, and the tolerances with their reasons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

import fastseg as fs
import oracle
from fastseg_kernels.reference import sigmoid

LOSSES = [
    fs.BCE(),
    fs.BCE(pos_weight=3.0, normalize="all"),
    fs.BCE(normalize=None),
    fs.BCE(label_smoothing=0.1, pos_weight=3.0),
    fs.FocalBCE(),
    fs.FocalBCE(gamma=1.5, alpha=0.25, normalize=None),
    fs.SoftJaccard(),
    fs.SoftJaccard(smooth_num=1e-5, smooth_den=1e-5, scope="batch"),
    fs.SoftDice(smooth_num=1.0, smooth_den=1.0),
    fs.SoftDice(link="log", eps=1e-7),
    fs.Tversky(alpha=0.3, beta=0.7, link="power", gamma=1.5),
    fs.Tversky(alpha=1.0, beta=0.0, link="negative", scope="batch"),
    fs.SoftJaccard(scope="image", empty="skip"),
    fs.SoftDice(scope="class", empty="skip"),
    fs.Tversky(alpha=0.3, beta=0.7, form="l1"),
    fs.BCE() + fs.SoftDice(form="squared", smooth_num=1e-5, smooth_den=1e-5),
    fs.SoftJaccard(form="squared"),
    fs.BCE() + 2.0 * fs.SoftJaccard(),
    fs.BCE(pos_weight=0.5) + fs.Tversky() + 0.25 * fs.SoftDice(empty="skip"),
]

SOFTMAX_LOSSES = [
    loss.replace(activation="softmax")
    for loss in (
        fs.CrossEntropy(),
        fs.CrossEntropy(label_smoothing=0.1, normalize=None),
        fs.CrossEntropy(class_weights=(1.0, 0.5, 3.0), normalize="weights"),
        fs.CrossEntropy(classes=(1, 2), normalize="all"),
        fs.FocalCrossEntropy(),
        fs.FocalCrossEntropy(gamma=1.5, class_weights=(1.0, 0.5, 3.0)) + fs.SoftDice(form="l1"),
        fs.SoftJaccard(),
        fs.SoftDice(classes=(1, 2), scope="batch", smooth_num=1e-5, smooth_den=1e-5),
        fs.Tversky(alpha=0.3, beta=0.7, form="l1"),
        fs.CrossEntropy() + fs.SoftDice(form="squared", smooth_num=1e-5, smooth_den=1e-5),
        fs.CrossEntropy() + 2.0 * fs.SoftJaccard(),
        fs.CrossEntropy(label_smoothing=0.2)
        + fs.Tversky(alpha=0.3, beta=0.7, link="log", eps=1e-7),
    )
]

# (N, C, *spatial): one voxel, primes, no spatial axes, several tiles (256) and stages (2048).
SHAPES = [
    (1, 1, 1),
    (1, 1, 255),
    (1, 1, 257),
    (2, 1, 2053),
    (2, 3, 7, 11, 13),
    (1, 2, 37, 251),
    (3, 4),
    (1, 1, 17, 5, 3, 2, 2),
]

LOGIT_DTYPES: list[Any] = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
TARGET_DTYPES: list[Any] = [
    np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
    np.float16, ml_dtypes.bfloat16, np.float32, np.float64,
]  # fmt: skip

# Relative error of the value: promised 1e-6 in float32 at any size. Half and bfloat16 logits are
# computed in float32 and the value is a float32 too.
VALUE_RTOL = {"float32": 1e-6, "float64": 1e-13, "float16": 1e-6, "bfloat16": 1e-6}

# Error of the gradient, in units of the spacing of its dtype at the sum of the magnitudes of the
# terms that are added up: promised 4. For half and bfloat16 that is 4 in float32 and one rounding.
# For float64 the reference, computed in float64 itself, errs more than the kernels: 1 - score
# cancels there. test_accuracy.py holds float64 to 8 against extended precision.
GRAD_ULP = {"float32": 4.0, "float64": 64.0, "float16": 0.51, "bfloat16": 0.51}
RESOLUTION = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def extra_ulp(loss: fs.Loss, dtype: Any) -> float:
    """Return how many units more than `GRAD_ULP` the gradient may err, by what the loss is made of.

    A focal term's w^gamma has gamma times the error of w, which an exponential and a quotient make:
    5.4 units were reached with gamma 2, 13.8 with 9.3. A squared form multiplies three numbers that
    err, q - p, q and 1 - q: 4.8 were. Rounded to half precision none of it is left.
    """
    if name_of(dtype) not in ("float32", "float64"):
        return 0.0
    extra = 0.0
    for _, term in loss.parts:
        if isinstance(term, fs.FocalBCE | fs.FocalCrossEntropy):
            extra = max(extra, 2.0 * term.gamma)
        if isinstance(term, fs.RegionTerm) and term.form == "squared":
            extra = max(extra, 2.0)
    return extra


def value_rtol(loss: fs.Loss, dtype: Any) -> float:
    """Return the relative error that a value may have: `VALUE_RTOL`, and more for focal terms."""
    gammas = [t.gamma for _, t in loss.parts if isinstance(t, fs.FocalBCE | fs.FocalCrossEntropy)]
    return VALUE_RTOL[name_of(dtype)] * (1 + 0.1 * max(gammas, default=0.0))


def name_of(dtype: Any) -> str:
    return np.dtype(dtype).name


def make(
    shape: tuple[int, ...], dtype: Any = np.float32, target: Any = np.uint8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian logits and targets, 40% foreground (soft for float dtypes), C-ordered."""
    rng = np.random.default_rng([seed, *shape])
    logits = rng.normal(0.0, 2.5, shape).astype(dtype)
    labels = rng.random(shape) < 0.4
    labels.reshape(*shape[:2], -1)[:, :, :1] = True  # never empty
    if np.dtype(target).kind in "biu":
        return logits, labels.astype(target)
    soft = np.where(rng.random(shape) < 0.5, labels, rng.integers(0, 9, shape) / 8)
    return logits, soft.astype(target)


def magnitude(loss: fs.Loss, logits: Any, targets: Any) -> np.ndarray:
    """Return the sum of the magnitudes of what is added up to the gradient of each voxel.

    That is |gradient| of each term for binary targets. For soft (or smoothed) ones a term is itself
    a sum, of p times its slope on the foreground and 1 - p times the one off it: BCE's slopes are
    those of targets 1 and 0, a region's are at most the largest of the row.
    """
    x, p = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    binary = np.all((p == 0) | (p == 1))
    total: Any = 0.0
    for weight, term in loss.parts:
        smoothing = getattr(term, "label_smoothing", 0.0)
        part = fs.losses.WeightedSum(((abs(weight), term),), loss.options)
        if binary and smoothing == 0:
            size = np.abs(oracle.evaluate(part, x, p)[1])
        elif isinstance(term, fs.BCE | fs.FocalBCE):
            if smoothing > 0:
                term = replace(term, label_smoothing=0.0)
                part = fs.losses.WeightedSum(((abs(weight), term),), loss.options)
            on, off = (np.abs(oracle.evaluate(part, x, np.full(x.shape, t))[1]) for t in (1.0, 0.0))
            moved = p * (1 - smoothing) + smoothing / 2
            size = moved * on + (1 - moved) * off
        else:
            slope = sigmoid(x) * sigmoid(-x)
            row = tuple(range(2, x.ndim))
            steepness = np.abs(oracle.evaluate(part, x, p)[1]) / slope
            size = slope * steepness.max(axis=row, keepdims=True)
        total = total + size
    return np.asarray(total)


def ulp_error(
    got: np.ndarray, expected: np.ndarray, scale: np.ndarray, dtype: Any
) -> tuple[float, float]:
    """Return the largest error in ulp of ``dtype`` at ``scale``, and the bound for it."""
    name = name_of(dtype)
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(scale), 1e-300)))) * RESOLUTION[name]
    spacing = np.maximum(spacing, SMALLEST[name])
    error = np.abs(np.asarray(got, np.float64) - expected) / spacing
    return float(error.max(initial=0.0)), GRAD_ULP[name]
