"""Fused losses, gradients, metrics and parameter updates for segmentation.

>>> import numpy as np, fastseg as fs
>>> loss = fs.BCE() + fs.SoftJaccard()
>>> logits, targets = np.zeros((1, 1, 8, 8), np.float32), np.ones((1, 1, 8, 8), bool)
>>> value, grad = loss.value_and_grad(logits, targets)
>>> round(float(value), 4)
1.1931

Importing it imports NumPy and nothing else: a backend is loaded by the first call that needs it.
"""

from fastseg import presets
from fastseg.config import get_num_threads, set_num_threads, show_config
from fastseg.entropy_terms import BCE, CrossEntropy, FocalBCE, FocalCrossEntropy
from fastseg.functional import sigmoid
from fastseg.libraries import backend_name
from fastseg.losses import Loss
from fastseg.lovasz import LovaszHinge, LovaszSoftmax
from fastseg.metrics import HardScores, dice_score, hard_statistics, jaccard_index, stat_scores
from fastseg.optimizers import Adam, GradientDescent, Momentum
from fastseg.options import Options
from fastseg.region_terms import RegionTerm, SoftDice, SoftJaccard, Tversky
from fastseg.statistics import Statistics, concatenate_statistics
from fastseg.terms import Term

__version__ = "0.1.0"

__all__ = [
    "BCE",
    "Adam",
    "CrossEntropy",
    "FocalBCE",
    "FocalCrossEntropy",
    "GradientDescent",
    "HardScores",
    "Loss",
    "LovaszHinge",
    "LovaszSoftmax",
    "Momentum",
    "Options",
    "RegionTerm",
    "SoftDice",
    "SoftJaccard",
    "Statistics",
    "Term",
    "Tversky",
    "backend_name",
    "concatenate_statistics",
    "dice_score",
    "get_num_threads",
    "hard_statistics",
    "jaccard_index",
    "presets",
    "set_num_threads",
    "show_config",
    "sigmoid",
    "stat_scores",
]
