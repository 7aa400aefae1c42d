"""Losses of segmentation_models_pytorch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import fastseg as fs
from fastseg.entropy_terms import BCE
from fastseg.losses import Loss
from fastseg.presets.arguments import (
    ONE_CLASS,
    choice,
    form_option,
    number,
    numbers,
    numbers_by_class,
    plain,
)
from fastseg.region_terms import Tversky

MODES = ("binary", "multiclass", "multilabel")


def smp_jaccard(
    mode: str,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    *,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    class_weights: Any = None,
) -> Loss:
    r"""Return ``segmentation_models_pytorch.losses.JaccardLoss``: `smp_tversky` of 1 and 1.

    .. math:: 1 - \frac{N + s}{\max(P + Q - N + s, eps)}

    ``eps`` has another place in different versions of the peer, so give it by name.

    References
    ----------
    segmentation_models_pytorch 0.6.0, losses/jaccard.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.smp_jaccard("multiclass", classes=[1])
    >>> float(loss(np.zeros((1, 2, 4), np.float32), np.array([[0, 1, 1, 1]])))  # 1 - 1.5 / 3.5
    0.5714285969734192
    """
    return smp_tversky(
        mode, classes, log_loss, from_logits, smooth,
        ignore_index=ignore_index, eps=eps, alpha=1.0, beta=1.0, class_weights=class_weights,
    )  # fmt: skip


def smp_dice(
    mode: str,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    *,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    class_weights: Any = None,
) -> Loss:
    r"""Return ``segmentation_models_pytorch.losses.DiceLoss``: `smp_tversky` of 0.5 and 0.5.

    .. math:: 1 - \frac{2 N + 2 s}{\max(P + Q + 2 s, 2 eps)}

    References
    ----------
    segmentation_models_pytorch 0.6.0, losses/dice.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.smp_dice("multiclass", classes=[1])
    >>> float(loss(np.zeros((1, 2, 4), np.float32), np.array([[0, 1, 1, 1]])))  # 1 - 3 / 5
    0.4000000059604645
    """
    return smp_tversky(
        mode, classes, log_loss, from_logits, smooth,
        ignore_index=ignore_index, eps=eps, class_weights=class_weights,
    )  # fmt: skip


def smp_tversky(
    mode: str,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    *,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    class_weights: Any = None,
) -> Loss:
    r"""Return ``segmentation_models_pytorch.losses.TverskyLoss`` with these arguments.

    .. math:: 1 - \frac{N + s}{\max(N + \alpha (Q - N) + \beta (P - N) + s, eps)},
              \qquad N = \tfrac12 \Bigl(P + Q - \sum_i |p_i - q_i|\Bigr)

    of each class over the batch, 0 for a class without foreground, and the mean over all classes.

    Parameters
    ----------
    mode
        "binary": logits ``(N, 1, *spatial)``. "multiclass": softmax, with class indices as targets.
        "multilabel": targets ``(N, C, *spatial)``.
    classes
        The classes that count, each once; None with "binary".
    log_loss
        -log(max(score, eps)) for 1 - score.
    from_logits
        False: probabilities; not with "multiclass", where targets are indices.
    smooth, eps, alpha, beta
        As in the peer.
    gamma
        Exponent, of a loss of one class (for more the peer raises their mean, which is no sum of
        terms), and 1 with ``log_loss``.
    ignore_index
        Label of voxels that do not count.
    class_weights
        One number per class, or None; the mean divides by the sum of those that count.

    Notes
    -----
    With "multilabel" and ``ignore_index`` a class all of whose voxels are ignored is left out of
    the mean; the peer counts it as 0.

    References
    ----------
    segmentation_models_pytorch 0.6.0, losses/tversky.py and losses/_functional.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.smp_tversky("multiclass", classes=[1], alpha=0.3, beta=0.7)
    >>> float(loss(np.zeros((1, 2, 4), np.float32), np.array([[0, 1, 1, 1]])))  # 1 - 1.5 / 2.7
    0.4444444477558136
    """
    choice("mode", mode, MODES)
    for name, value in (("classes", classes), ("class_weights", class_weights)):
        if mode == "binary" and value is not None:
            raise ValueError(f"{name} must be None with mode='binary', got {value!r}")
    if mode == "multiclass" and not from_logits:
        raise ValueError(
            "from_logits must be True with mode='multiclass': class indices as targets need a "
            "softmax; probabilities with one-hot targets are mode='multilabel'"
        )
    chosen = None if classes is None else _chosen(classes)
    single = mode == "binary" or (chosen is not None and len(chosen) == 1)
    if number("gamma", gamma) != 1 and (log_loss or not single):
        raise ValueError(
            f"gamma must be 1 with log_loss=True and for a loss of several classes, got {gamma!r}"
        )
    weights = ONE_CLASS if mode == "binary" else None
    return Tversky(
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        link="log" if log_loss else "one_minus" if gamma == 1 else "power",
        smooth_num=number("smooth", smooth),
        smooth_den=number("smooth", smooth),
        eps=eps,
        scope="batch",
        empty="one",
        classes=chosen,
        class_weights=weights if class_weights is None else _normalised(class_weights, chosen),
        # Indices are one-hot, for which N = I.
        **form_option("product" if mode == "multiclass" else "l1"),
    ).replace(activation=_activation(mode, from_logits), ignore_index=ignore_index)


def _chosen(classes: Any) -> tuple[int, ...]:
    """Return the classes that count; a class named twice would count twice in the peer's mean."""
    given = plain(classes)
    if not isinstance(given, list | tuple) or len(set(given)) < len(given):
        raise ValueError(f"classes must be a sequence that names each class once, got {classes!r}")
    return tuple(given)


def _activation(mode: str, from_logits: bool) -> str | None:
    if not from_logits:
        return None
    return "softmax" if mode == "multiclass" else "sigmoid"


def _normalised(class_weights: Any, chosen: tuple[int, ...] | None) -> tuple[float, ...]:
    """Return class weights whose mean over the classes that count is 1."""
    weights = numbers("class_weights", class_weights)
    try:
        counted = weights if chosen is None else [weights[c] for c in chosen]
    except IndexError:
        raise ValueError(
            f"classes must be in [0, {len(weights)}), as class_weights has {len(weights)} entries, "
            f"got {chosen}"
        ) from None
    if not sum(counted) > 0:
        raise ValueError(f"class_weights must not all be 0, got {class_weights!r}")
    return tuple(w * len(counted) / sum(counted) for w in weights)


def smp_soft_bce(
    weight: Any = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    smooth_factor: float | None = None,
    pos_weight: Any = None,
) -> Loss:
    r"""Return ``segmentation_models_pytorch.losses.SoftBCEWithLogitsLoss`` with these arguments.

    .. math:: -w_c \left(v_c\, p \log q + (1 - p) \log(1 - q)\right)

    with w the ``weight`` and v the ``pos_weight``.

    Parameters
    ----------
    weight, pos_weight
        One number, or one per class in an array (C, 1, 1) or (1, C, 1, 1), for logits (N, C, H, W).
        Weights of voxels are ``weight_map=`` at the call.
    ignore_index
        Label of voxels that do not count.
    reduction
        "mean": over all voxels, ignored ones included, as the peer has it (for a mean over those
        that count take `fastseg.BCE`); or "sum". "none" is refused: no volume of losses is made.
    smooth_factor
        s: p (1 - 2 s) + s are the targets, at most 0.5.

    References
    ----------
    segmentation_models_pytorch 0.6.0, losses/soft_bce.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.smp_soft_bce(ignore_index=255)
    >>> targets = np.array([[[0, 1, 255, 255]]], np.uint8)
    >>> round(float(loss(np.zeros((1, 1, 4), np.float32), targets)), 5)  # log(2) / 2
    0.34657
    """
    choice("reduction", reduction, ("mean", "sum"))
    smoothing = 0.0 if smooth_factor is None else smooth_factor
    if not 0 <= smoothing <= 0.5:
        raise ValueError(f"smooth_factor must be None or in [0, 0.5], got {smooth_factor!r}")
    factors = 1.0 if weight is None else numbers_by_class("weight", weight)
    pos = 1.0 if pos_weight is None else numbers_by_class("pos_weight", pos_weight)
    options: dict[str, Any] = {
        "normalize": "all" if reduction == "mean" else None,
        "class_weights": factors if isinstance(factors, tuple) else None,
        "label_smoothing": 2 * smoothing,
    }
    loss: Loss
    if isinstance(pos, tuple):
        # Each term divides by the voxels of its class: the mean of these means is that of all.
        share = 1.0 / len(pos) if reduction == "mean" else 1.0
        options["class_weights"] = options["class_weights"] or (1.0,) * len(pos)
        terms = (share * BCE(pos_weight=v, classes=(c,), **options) for c, v in enumerate(pos))
        loss = reduce(operator.add, terms)
    else:
        loss = BCE(pos_weight=pos, **options)
    if isinstance(factors, float) and factors != 1.0:
        loss = factors * loss
    return loss.replace(reduction=reduction, ignore_index=ignore_index)


def smp_lovasz(
    mode: str,
    per_image: bool = False,
    ignore_index: int | None = None,
    from_logits: bool = True,
) -> Loss:
    r"""Return ``segmentation_models_pytorch.losses.LovaszLoss`` with these arguments.

    The Lovász hinge for "binary" and "multilabel", the Lovász softmax of the classes that are
    present for "multiclass"; over the batch, or over each image and then their mean.

    Parameters
    ----------
    mode
        "binary": logits ``(N, 1, *spatial)``. "multilabel": logits and targets
        ``(N, C, *spatial)``, all of whose classes are sorted together, as the peer does: the loss
        has ``layout="N"``.
        "multiclass": class indices as targets.
    per_image
        Whether each image has a loss of its own. One without a voxel that counts is left out of
        their mean; the peer counts it as 0, or fails ("multiclass").
    ignore_index
        Label of voxels that are left out.
    from_logits
        Must be True. (The peer takes False, and treats its probabilities as logits.)

    References
    ----------
    segmentation_models_pytorch 0.6.0, losses/lovasz.py; Berman, Triki and Blaschko, The
    Lovász-Softmax loss, CVPR 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.smp_lovasz("binary")
    >>> float(loss(np.zeros((1, 1, 4), np.float32), np.array([[[0, 1, 1, 1]]])))  # every e is 1
    1.0
    """
    choice("mode", mode, MODES)
    if not from_logits:
        raise ValueError("from_logits must be True: the hinge, and the softmax, are of logits")
    if mode == "multiclass":
        scope = "image" if per_image else "batch"
        loss: Loss = fs.LovaszSoftmax(classes="present", scope=scope)  # type: ignore[arg-type]
        return loss.replace(ignore_index=ignore_index)
    hinge: Loss = fs.LovaszHinge(scope="sample" if per_image else "batch", class_weights=ONE_CLASS)
    return hinge.replace(ignore_index=ignore_index, layout="NC" if mode == "binary" else "N")
