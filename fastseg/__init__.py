"""Fused losses, gradients, metrics and updates for segmentation.

>>> import numpy as np, fastseg as fs
>>> loss = fs.BCE() + fs.SoftJaccard()
"""
