"""nnU-Net's loss by fastseg: what the trainer `nnUNetTrainerFastseg` builds.

nnU-Net finds a trainer by its class's name in the folders that an environment variable names:

    export nnUNet_extTrainer=$(python -c "import fastseg.torch.nnunet as n; print(n.TRAINERS)")
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerFastseg

This module itself does not need nnU-Net.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastseg import presets
from fastseg.torch.modules import DeepSupervision, Loss

__all__ = ["TRAINERS", "build_loss"]

TRAINERS = Path(__file__).parent / "nnunet_trainers"
"""The folder for ``nnUNet_extTrainer``."""


class RegionsLoss(torch.nn.Module):
    """A loss of regions whose targets may have a last channel of voxels that are ignored."""

    def __init__(self, criterion: torch.nn.Module, ignored_last: bool) -> None:
        super().__init__()
        self.criterion, self.ignored_last = criterion, ignored_last

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of the regions."""
        if not self.ignored_last:
            return self.criterion(logits, targets)  # type: ignore[no-any-return]
        mask = targets[:, -1:] == 0
        return self.criterion(logits, targets[:, :-1], mask=mask)  # type: ignore[no-any-return]


def build_loss(trainer: Any) -> torch.nn.Module:
    """Return the loss of an ``nnUNetTrainer``, of nnunetv2 2.8: what its ``_build_loss`` returns.

    Parameters
    ----------
    trainer
        Its ``label_manager``, ``configuration_manager.batch_dice``, ``is_ddp``,
        ``enable_deep_supervision``, ``_get_deep_supervision_scales()`` and ``_do_i_compile()``
        are read.

    Notes
    -----
    In several processes the sums of all are combined where nnU-Net does it for the Dice score,
    with ``batch_dice``; the cross-entropy is then the mean over all of their voxels, too.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import fastseg.torch.nnunet as n
    >>> trainer = SimpleNamespace(
    ...     label_manager=SimpleNamespace(has_regions=False, ignore_label=None),
    ...     configuration_manager=SimpleNamespace(batch_dice=True),
    ...     is_ddp=False,
    ...     enable_deep_supervision=False,
    ... )
    >>> type(n.build_loss(trainer)).__name__
    'Loss'
    """
    labels, batch_dice = trainer.label_manager, bool(trainer.configuration_manager.batch_dice)
    group = True if trainer.is_ddp and batch_dice else None
    loss: torch.nn.Module
    if labels.has_regions:
        ignored = labels.ignore_label is not None
        # nnU-Net takes the mean over voxels and regions, but over voxels alone where it has a mask.
        factor = len(labels.foreground_regions) if ignored else 1
        formula = presets.nnunet_dice_bce(batch_dice=batch_dice, weight_ce=factor)
        loss = RegionsLoss(Loss(formula, process_group=group), ignored)
    else:
        formula = presets.nnunet_dice_ce(batch_dice=batch_dice, ignore_label=labels.ignore_label)
        loss = Loss(formula, process_group=group)
    if not trainer.enable_deep_supervision:
        return loss
    weights = [0.5**k for k in range(len(trainer._get_deep_supervision_scales()))]
    # DistributedDataParallel refuses parameters without a gradient, as nnU-Net notes at this place.
    weights[-1] = 1e-6 if trainer.is_ddp and not trainer._do_i_compile() else 0.0
    return DeepSupervision(loss, [weight / sum(weights) for weight in weights])
