"""Losses of MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastseg.entropy_terms import BCE, CrossEntropy
from fastseg.losses import Loss
from fastseg.presets.arguments import (
    ONE_CLASS,
    choice,
    form_option,
    number,
    numbers,
    only_number,
    plain,
)
from fastseg.region_terms import SoftDice, SoftJaccard


def monai_dice(
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[..., Any] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Any = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
) -> Loss:
    r"""Return ``monai.losses.DiceLoss`` with these arguments.

    .. math:: 1 - \frac{2 I + nr}{P + Q + dr}, \qquad
              1 - \frac{2 I + nr}{2 (P + Q - I) + dr} \text{ for jaccard}

    of each sample and class (of each class with ``batch``), times the class's ``weight``.

    Parameters
    ----------
    include_background, squared_pred, jaccard, smooth_nr, smooth_dr, batch, soft_label
        As in MONAI: ``soft_label`` puts (P + Q - sum of abs(p - q)) / 2 for I, ``squared_pred``
        sums of squares for P and Q.
    to_onehot_y
        With softmax True and False are the same: targets are class indices or
        ``(N, C, *spatial)``, by their shape. Else it must be False: targets have the shape of the
        logits.
    sigmoid, softmax
        One of them, or neither for probabilities.
    other_act
        Must be None.
    reduction
        "mean", "sum" or "none": (N, C) without MONAI's axes of length 1, and 0 for a background
        that does not count; not with ``batch``.
    weight
        One number, or one for each class that counts.
    ignore_index
        Label of voxels that do not count, for softmax with class indices or for one class alone.
        MONAI's rules for one-hot targets are masks at the call: ``mask=targets[:, k] == 0`` for
        class k, and ``mask=targets.any(1)`` for a label that is no class.

    Notes
    -----
    With one class MONAI ignores ``weight`` without a word, and ``softmax`` and
    ``include_background=False`` with a warning. Here the first counts and the others are errors.

    References
    ----------
    MONAI 1.6.1, monai/losses/dice.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.monai_dice(sigmoid=True, jaccard=True)
    >>> round(float(loss(np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 8), bool))), 5)
    0.5
    """
    if other_act is not None:
        raise ValueError(
            f"other_act must be None, got {other_act!r}; apply it first: without sigmoid and "
            "softmax the loss takes probabilities"
        )
    if sigmoid and softmax:
        raise ValueError("sigmoid and softmax must not both be True")
    if to_onehot_y and not softmax:
        raise ValueError(
            "to_onehot_y must be False unless softmax=True: without softmax targets have the "
            "shape of the logits"
        )
    reduction = choice("reduction", str(reduction), ("mean", "sum", "none"))
    if batch and reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' with batch=True, got 'none'")
    factor: float = 1.0
    class_weights: tuple[float, ...] | None = None
    if isinstance(plain(weight), list | tuple):
        class_weights = numbers("weight", weight)
        if not include_background:
            class_weights = (1.0, *class_weights)
    elif weight is not None:
        factor = number("weight", weight)
    if ignore_index is not None and not softmax:
        if class_weights is not None:
            raise ValueError(
                f"weight must be None or one number with ignore_index={ignore_index} unless "
                f"softmax=True, got {weight!r}: the label is that of one class"
            )
        class_weights = ONE_CLASS
    term = _monai_term(
        jaccard,
        smooth_nr,
        smooth_dr,
        form="squared" if squared_pred else "l1" if soft_label else "product",
        scope="batch" if batch else "sample",
        class_weights=class_weights,
        include_background=include_background,
    )
    return (term if factor == 1.0 else factor * term).replace(
        activation="sigmoid" if sigmoid else "softmax" if softmax else None,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def monai_dice_ce(
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[..., Any] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Any = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
) -> Loss:
    r"""Return ``monai.losses.DiceCELoss`` with these arguments.

    .. math:: \lambda_{dice} \mathrm{Dice} + \lambda_{ce} \mathrm{CE}

    Parameters
    ----------
    include_background, other_act, squared_pred, jaccard, smooth_nr, smooth_dr, batch
        As in `monai_dice`; the cross-entropy is of all classes.
    to_onehot_y
        True: targets are class indices, and the cross-entropy's mean divides by the sum of their
        weights. False: they are one-hot or soft, and it divides by the voxels.
    sigmoid
        The loss is for one class, with binary cross-entropy. (For several, which are refused, MONAI
        puts a sigmoid into the one part and a softmax into the other.) Then
        ``include_background=False``, ``to_onehot_y`` and ``label_smoothing``, which MONAI ignores,
        are refused.
    softmax
        The loss is for several classes. One of ``sigmoid`` and ``softmax`` must be True: MONAI's
        Dice would take the logits for probabilities.
    reduction
        "mean" or "sum" (of voxels in the cross-entropy, of rows in the Dice loss).
    weight
        One number per class; with sigmoid one number, the weight of the foreground in the
        cross-entropy (``pos_weight``) alone.
    lambda_dice, lambda_ce, label_smoothing
        As in MONAI.

    References
    ----------
    MONAI 1.6.1, monai/losses/dice.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.monai_dice_ce(to_onehot_y=True, softmax=True, lambda_ce=0.5)
    >>> logits, targets = np.zeros((1, 2, 8), np.float32), np.ones((1, 1, 8), int)
    >>> round(float(loss(logits, targets)), 4)  # 0.5 log 2 and the mean of 1 and 1/3
    1.0132
    """
    if bool(sigmoid) == bool(softmax):
        raise ValueError(
            f"one of sigmoid and softmax must be True, got {bool(sigmoid)} and {bool(softmax)}"
        )
    if other_act is not None:
        raise ValueError(f"other_act must be None, got {other_act!r}")
    reduction = choice("reduction", str(reduction), ("mean", "sum"))
    ignored = {
        "include_background": (include_background, True),
        "to_onehot_y": (to_onehot_y, False),
        "label_smoothing": (label_smoothing, 0),
    }
    for name, (value, default) in ignored.items():
        if sigmoid and value != default:
            raise ValueError(
                f"{name} must be {default} with sigmoid=True, which is for one class, got {value!r}"
            )
    class_weights = None if weight is None or sigmoid else numbers("weight", weight)
    by_weights = to_onehot_y and class_weights is not None
    entropy: BCE | CrossEntropy
    if sigmoid:
        entropy = BCE(
            pos_weight=1.0 if weight is None else only_number("weight", weight),
            normalize="valid" if reduction == "mean" else None,
            class_weights=ONE_CLASS,
        )
    else:
        entropy = CrossEntropy(
            label_smoothing=label_smoothing,
            normalize=("weights" if by_weights else "valid") if reduction == "mean" else None,
            class_weights=class_weights,
        )
    dice = _monai_term(
        jaccard,
        smooth_nr,
        smooth_dr,
        form="squared" if squared_pred else "product",
        scope="batch" if batch else "sample",
        class_weights=ONE_CLASS if sigmoid else class_weights,
        include_background=include_background,
    )
    loss = number("lambda_dice", lambda_dice) * dice + number("lambda_ce", lambda_ce) * entropy
    return loss.replace(reduction=reduction)


def _monai_term(
    jaccard: bool, smooth_nr: float, smooth_dr: float, form: str, **options: Any
) -> SoftJaccard | SoftDice:
    """Return MONAI's region term; its Jaccard index has twice the sums and the same smoothing."""
    smooth_nr, smooth_dr = number("smooth_nr", smooth_nr), number("smooth_dr", smooth_dr)
    options |= form_option(form)
    if jaccard:
        return SoftJaccard(smooth_num=smooth_nr / 2, smooth_den=smooth_dr / 2, **options)
    return SoftDice(smooth_num=smooth_nr, smooth_den=smooth_dr, **options)
