"""Losses of nnU-Net."""

from __future__ import annotations

from typing import Any

from fastseg.entropy_terms import BCE, CrossEntropy
from fastseg.losses import Loss
from fastseg.presets.arguments import number, numbers
from fastseg.region_terms import SoftDice
from fastseg.terms import Scope

EPS = 1e-8
"""Least denominator of its Dice score."""


def nnunet_dice_ce(
    batch_dice: bool = False,
    do_bg: bool = False,
    smooth: float = 1e-5,
    ddp: bool = False,
    weight_ce: float = 1.0,
    weight_dice: float = 1.0,
    ignore_label: int | None = None,
    weight: Any = None,
    label_smoothing: float = 0.0,
) -> Loss:
    r"""Return nnU-Net's ``DC_and_CE_loss`` with ``MemoryEfficientSoftDiceLoss``.

    .. math:: w_{ce} \mathrm{CE} - w_{dice} \frac{2 I + s}{\max(P + Q + s, 10^{-8})}

    The defaults are those of nnU-Net's trainer.

    Parameters
    ----------
    batch_dice, do_bg, smooth
        Of its ``soft_dice_kwargs``: whether sums are over the batch, and whether class 0 counts.
    ddp
        True is refused with ``batch_dice``, where it adds up the sums of all processes: add their
        `fastseg.Statistics` up between `Loss.statistics` and `Loss.gradient`.
    weight_ce, weight_dice, ignore_label
        As there. Targets are class indices, and ignored voxels count in neither part.
    weight, label_smoothing
        Of its ``ce_kwargs``.

    References
    ----------
    nnunetv2 2.8.1, training/loss/compound_losses.py and dice.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.nnunet_dice_ce()
    >>> logits, targets = np.zeros((1, 2, 8), np.float32), np.ones((1, 1, 8), int)
    >>> round(float(loss(logits, targets)), 4)  # log 2 - 2/3
    0.0265
    """
    class_weights = None if weight is None else numbers("weight", weight)
    entropy = CrossEntropy(
        label_smoothing=label_smoothing,
        normalize="valid" if class_weights is None else "weights",
        class_weights=class_weights,
    )
    dice = _nnunet_dice(batch_dice, do_bg, smooth, ddp)
    loss = number("weight_ce", weight_ce) * entropy + number("weight_dice", weight_dice) * dice
    return loss.replace(ignore_index=ignore_label)


def nnunet_dice_bce(
    batch_dice: bool = False,
    do_bg: bool = True,
    smooth: float = 1e-5,
    ddp: bool = False,
    weight_ce: float = 1.0,
    weight_dice: float = 1.0,
    use_ignore_label: bool = False,
) -> Loss:
    r"""Return nnU-Net's ``DC_and_BCE_loss``, for regions that may overlap; as `nnunet_dice_ce`.

    Parameters
    ----------
    batch_dice, do_bg, smooth, ddp, weight_ce, weight_dice
        As in `nnunet_dice_ce`. Targets have the shape of the logits.
    use_ignore_label
        Must be False. Instead of a last channel of ignored voxels give ``targets[:, :-1]`` and
        ``mask=targets[:, -1:] == 0``. nnU-Net, which else takes the mean over voxels and regions,
        then divides its cross-entropy by the voxels alone: for its numbers multiply ``weight_ce``
        by the number of regions.

    References
    ----------
    nnunetv2 2.8.1, training/loss/compound_losses.py and dice.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.nnunet_dice_bce()
    >>> logits, targets = np.zeros((1, 2, 8), np.float32), np.ones((1, 2, 8), bool)
    >>> round(float(loss(logits, targets)), 4)  # log 2 - 2/3
    0.0265
    """
    if use_ignore_label:
        raise ValueError(
            "use_ignore_label must be False: call the loss with targets[:, :-1] and "
            "mask=targets[:, -1:] == 0"
        )
    dice = _nnunet_dice(batch_dice, do_bg, smooth, ddp)
    return number("weight_ce", weight_ce) * BCE() + number("weight_dice", weight_dice) * dice


def _nnunet_dice(batch_dice: bool, do_bg: bool, smooth: float, ddp: bool) -> SoftDice:
    if ddp and batch_dice:
        raise ValueError(
            "ddp must be False with batch_dice=True: add up the statistics of the processes"
        )
    scope: Scope = "batch" if batch_dice else "sample"
    smooth = number("smooth", smooth)
    return SoftDice(
        smooth_num=smooth,
        smooth_den=smooth,
        eps=EPS,
        link="negative",
        scope=scope,
        include_background=do_bg,
    )
