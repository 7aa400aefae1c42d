"""Losses evaluated by the float64 reference: what every kernel is compared with.

Nothing here goes through the table of terms, the statistics or the kernels: values come from the
formulas of ``fastseg_kernels.reference`` and gradients from its quotient and chain rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastseg as fs
from fastseg_kernels import reference as ref


def _spatial(x: np.ndarray) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def evaluate(
    loss: fs.Loss,
    logits: Any,
    targets: Any,
    *,
    mask: Any = None,
    weight_map: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the value, () or (N, C), and the gradient of its sum, for arrays (N, C, *spatial)."""
    x = np.asarray(logits, np.float64)
    valid = np.ones(x.shape, bool)
    options = loss.options
    softmax = loss.activation == "softmax"
    if softmax and np.shape(targets) != x.shape:  # class indices
        y = np.asarray(targets, np.float64).reshape(x.shape[0], *x.shape[2:])
        if options.ignore_index is not None:
            valid &= (y != options.ignore_index)[:, None]
        p = ref.one_hot(y, x.shape[1])
    else:
        p = np.broadcast_to(np.asarray(targets, np.float64), x.shape)
        if options.ignore_index is not None:
            valid &= p != options.ignore_index
    if mask is not None:
        valid &= np.broadcast_to(np.asarray(mask), x.shape) != 0
    if options.positive == "nonzero":
        p = (p != 0).astype(np.float64)
    elif options.positive is not None:
        p = (p == options.positive).astype(np.float64)
    weight = np.ones(x.shape) if weight_map is None else np.asarray(weight_map, np.float64)
    weight = np.where(valid, np.broadcast_to(weight, x.shape), 0.0)
    probs = options.activation is None
    p = np.where(valid, p, 0.0)
    x = np.where(valid, x, 0.5 if probs else 0.0)

    value: Any = 0.0
    grad = np.zeros(x.shape)
    for factor, term in loss.parts:
        part = _ce if softmax else _bce
        if isinstance(term, fs.RegionTerm):
            part = _region
        term_value, term_grad = part(term, x, p, weight, valid, loss.activation, options.reduction)
        value = value + factor * term_value
        grad += factor * term_grad
    return np.asarray(value), np.where(valid, grad, 0.0)


def _expand(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    return rows.reshape(rows.shape + (1,) * (x.ndim - 2))


def _class_weights(term: fs.Term, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (selected, weight), both (1, C)."""
    weights = np.ones(classes) if term.class_weights is None else np.array(term.class_weights)
    selected = np.zeros(classes, bool)
    selected[list(range(classes) if term.classes is None else term.classes)] = True
    selected[0] &= term.include_background
    return selected[None], weights[None]


def _ce(term, x, p, weight, valid, activation, reduction):
    sums, share, T = _ce_parts(term, x, p, weight, valid, reduction)
    value = share[:, None] * sums
    grad = _expand(np.broadcast_to(share[:, None], sums.shape), x)
    grad = grad * ref.cross_entropy_gradient(x, T)
    return (value if reduction == "none" else value.sum()), grad


def _ce_parts(term, x, p, weight, valid, reduction):
    """Return the sums of rows, the factor of each sample, and the targets."""
    selected, class_weight = _class_weights(term, x.shape[1])
    used = np.where(selected, class_weight, 0.0).reshape(1, -1, *(1,) * (x.ndim - 2))
    share = getattr(term, "label_smoothing", 0.0)
    T = weight * used * ((1 - share) * p + np.where(valid, share / x.shape[1], 0.0))
    focal = isinstance(term, fs.FocalCrossEntropy)
    nll = ref.focal_nll(x, term.gamma) if focal else ref.softmax_nll(x)
    sums = np.where(T > 0, T * nll, 0.0).sum(_spatial(x))
    if focal:
        T = T * ref.focal_steepness(x, term.gamma)
    count = valid[:, 0].reshape(len(x), -1).sum(1)
    divisor = {
        "valid": count,
        "all": np.full(count.shape, np.prod(x.shape[2:])),
        "weights": (weight * used * p).reshape(len(x), -1).sum(1),
        None: np.ones(count.shape),
    }[term.normalize]
    kept = count > 0
    if reduction == "mean":
        total = kept.sum() if term.normalize is None else divisor[kept].sum()
        divisor = np.full(count.shape, total, np.float64)
    with np.errstate(divide="ignore"):
        share = np.where(kept & (divisor > 0), 1.0 / divisor, 0.0)
    return sums, share, T


def _bce(term, x, p, weight, valid, activation, reduction):
    probs = activation == "probs"
    if isinstance(term, fs.FocalBCE):
        voxel = ref.focal_bce if probs else ref.focal_bce_with_logits
        slope = ref.focal_bce_gradient if probs else ref.focal_bce_with_logits_gradient
        options: tuple = (term.gamma, term.alpha)
    else:
        voxel = ref.bce if probs else ref.bce_with_logits
        slope = ref.bce_gradient if probs else ref.bce_with_logits_gradient
        options = (term.pos_weight,)
        p = p * (1 - term.label_smoothing) + term.label_smoothing / 2
    sums = np.where(weight > 0, weight * voxel(x, p, *options), 0.0).sum(_spatial(x))
    count = valid.sum(_spatial(x))
    voxels = np.full(count.shape, np.prod(x.shape[2:]))
    selected, class_weight = _class_weights(term, x.shape[1])
    used = selected & (count > 0)
    divisor = {"valid": count, "all": voxels, None: np.ones(count.shape)}[term.normalize]
    if reduction == "mean":
        if term.normalize is None:
            total = used.sum()
        else:
            total = (divisor * (used if term.normalize == "valid" else selected)).sum()
        share = np.full(count.shape, 1.0 / total if total else 0.0)
    else:
        share = 1.0 / np.maximum(divisor, 1)
    share = np.where(used, share * class_weight, 0.0)
    value = share * sums
    grad = _expand(share, x) * weight * slope(x, p, *options)
    return (value if reduction == "none" else value.sum()), grad


def _region(term, x, p, weight, valid, activation, reduction):
    value, dq = _region_of_probs(term, x, p, weight, valid, activation, reduction)
    if activation == "softmax":
        return value, ref.softmax_gradient(dq, x)
    return value, (dq if activation == "probs" else ref.gradient_wrt_logits(dq, x))


def _region_of_probs(term, x, p, weight, valid, activation, reduction):
    q = {"probs": lambda x: x, "sigmoid": ref.sigmoid, "softmax": ref.softmax}[activation](x)
    batch = term.scope == "batch"
    if batch:  # all voxels of the batch are one sample
        fold = lambda a: np.moveaxis(a, 0, 1).reshape(1, a.shape[1], -1)  # noqa: E731
        q_, p_, w_, valid_ = fold(q), fold(p), fold(weight), fold(valid)
    else:
        q_, p_, w_, valid_ = q, p, weight, valid
    smooth = {"smooth_num": term.smooth_num, "smooth_den": term.smooth_den, "eps": term.eps}
    sums = ref.overlap_sums(q_, p_, w_, term.form)
    form = {**smooth, "form": term.form}
    if isinstance(term, fs.Tversky):
        ab = (term.alpha, term.beta)
        score = ref.tversky_index(*sums, *ab, **smooth)
        dscore = ref.tversky_index_gradient(q_, p_, *ab, weights=w_, **form)
    elif isinstance(term, fs.SoftJaccard):
        score = ref.soft_jaccard_index(*sums, **smooth)
        dscore = ref.soft_jaccard_index_gradient(q_, p_, w_, **form)
    elif isinstance(term, fs.SoftDice):
        score = ref.soft_dice_score(*sums, **smooth)
        dscore = ref.soft_dice_score_gradient(q_, p_, w_, **form)
    else:
        raise TypeError(f"give {type(term).__name__} a branch here, from the reference")
    link = term.link
    if link == "log" and term.eps > 0:
        held = score < term.eps
        value = ref.link_value(np.maximum(score, term.eps), link, term.gamma)
        outer = np.where(held, 0.0, ref.link_derivative(np.maximum(score, term.eps), link, 1.0))
    else:
        value = ref.link_value(score, link, term.gamma)
        outer = ref.link_derivative(score, link, term.gamma)
    selected, class_weight = _class_weights(term, x.shape[1])
    used = selected & (valid_.sum(_spatial(valid_)) > 0)
    empty = sums[1] == 0
    if term.empty in ("one", "zero"):
        fixed = ref.link_value(np.array(float(term.empty == "one")), link, term.gamma)
        value, outer = np.where(empty, fixed, value), np.where(empty, 0.0, outer)
    elif term.empty == "skip":
        used &= ~empty
    kept = used.sum()
    share = np.where(used, class_weight, 0.0)
    if reduction == "mean" and term.scope in ("image", "class"):
        axis = 1 if term.scope == "image" else 0
        in_line = used.sum(axis, keepdims=True)
        share = share / np.maximum(in_line, 1) / max(1, (in_line > 0).sum())
    elif reduction == "mean":
        share = share / kept if kept else share * 0.0
    value = np.where(used, share * np.where(used, value, 0.0), 0.0)
    dvalue = np.where(used, share * np.where(used, outer, 0.0), 0.0)
    dq = _expand(dvalue, dscore) * np.where(_expand(dvalue != 0, dscore), dscore, 0.0)
    if batch:
        dq = np.moveaxis(dq.reshape(x.shape[1], x.shape[0], *x.shape[2:]), 1, 0)
    return (value if reduction == "none" else value.sum()), dq


def softmax_magnitude(loss: fs.Loss, logits: Any, targets: Any) -> np.ndarray:
    """Return the sum of the magnitudes of what is added up to the gradient, by class and voxel."""
    x = np.asarray(logits, np.float64)
    p = np.asarray(targets, np.float64)
    if p.shape != x.shape:
        p = ref.one_hot(p.reshape(x.shape[0], *x.shape[2:]), x.shape[1])
    ones, q = np.ones(x.shape), ref.softmax(x)
    rest = 1 - q
    top = np.expand_dims(x.argmax(1), 1)
    is_top = np.arange(x.shape[1]).reshape(1, -1, *(1,) * (x.ndim - 2)) == top
    total = np.zeros(x.shape)
    for factor, term in loss.parts:
        arguments = (term, x, p, ones, ones > 0, "softmax", loss.options.reduction)
        if isinstance(term, fs.RegionTerm):
            h = _region_of_probs(*arguments)[1]
            # h_c - h_top of the class, and of all classes in their mean; each h was rounded.
            sizes = np.where(is_top, 0.0, np.abs(h) + np.abs(np.take_along_axis(h, top, 1)))
            total += abs(factor) * q * (sizes + (q * sizes).sum(1, keepdims=True))
        else:
            _, share, T = _ce_parts(term, x, p, ones, ones > 0, loss.options.reduction)
            parts = q * (T.sum(1, keepdims=True) - T) + T * rest
            total += abs(factor) * _expand(np.broadcast_to(share[:, None], x.shape[:2]), x) * parts
    return total
