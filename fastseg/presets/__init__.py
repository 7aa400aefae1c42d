"""Losses by other libraries' names and arguments, with their numbers.

Each function takes the arguments of a loss of MONAI, segmentation_models_pytorch, nnU-Net or
JDTLosses and returns the `fastseg.Loss` of the same value and gradient. An argument that a fused
loss cannot follow is refused here, and what differs is said in the notes. Throughout,

- targets and probabilities outside the allowed values are errors, where the peers compute on;
- rows (a sample and class, or a class of the batch) without a voxel that counts are left out of
  the mean, where the peers count the score that their smoothing gives;
- a loss for one class refuses logits of several, by a message that speaks of class weights.

In formulas p is the target and q the probability of a voxel, I = sum p q, P = sum p, Q = sum q.

>>> from fastseg import presets
>>> presets.monai_dice(sigmoid=True, smooth_nr=0, smooth_dr=0).replace(activation="auto")
SoftDice()
"""

from fastseg.presets.jdt import jdt_jml
from fastseg.presets.monai import monai_dice, monai_dice_ce
from fastseg.presets.nnunet import nnunet_dice_bce, nnunet_dice_ce
from fastseg.presets.smp import smp_dice, smp_jaccard, smp_lovasz, smp_soft_bce, smp_tversky

__all__ = [
    "jdt_jml",
    "monai_dice",
    "monai_dice_ce",
    "nnunet_dice_bce",
    "nnunet_dice_ce",
    "smp_dice",
    "smp_jaccard",
    "smp_lovasz",
    "smp_soft_bce",
    "smp_tversky",
]
