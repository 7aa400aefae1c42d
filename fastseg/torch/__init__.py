"""Losses and optimisers for PyTorch: autograd, torch.compile, torch.optim. Imports torch.

>>> import torch, fastseg as fs, fastseg.torch
>>> criterion = fastseg.torch.Loss(fs.BCE() + fs.SoftJaccard())
>>> logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
>>> criterion(logits, torch.ones(1, 1, 4, 4)).backward()
>>> tuple(logits.grad.shape)
(1, 1, 4, 4)
"""

from fastseg.torch.modules import DeepSupervision, Loss, compute_loss
from fastseg.torch.optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "DeepSupervision", "Loss", "compute_loss"]
