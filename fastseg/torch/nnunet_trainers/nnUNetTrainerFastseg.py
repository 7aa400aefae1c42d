"""The trainer that nnU-Net finds in this folder; see `fastseg.torch.nnunet`."""

from __future__ import annotations

import torch

from fastseg.torch.nnunet import build_loss

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    raise ImportError("nnUNetTrainerFastseg needs nnU-Net: pip install nnunetv2") from error


class nnUNetTrainerFastseg(nnUNetTrainer):  # type: ignore[misc]  # noqa: N801
    """nnU-Net's trainer with fastseg's loss."""

    def _build_loss(self) -> torch.nn.Module:
        return build_loss(self)
