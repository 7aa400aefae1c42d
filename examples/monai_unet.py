"""Train MONAI's 3D U-Net on patches of a real volume, with MONAI's loss and with fastseg's.

    python examples/monai_unet.py            # needs the extras demo and torch, and monai

The swap is one line: ``monai.losses.DiceCELoss(**OPTIONS)`` becomes
``fastseg.torch.Loss(presets.monai_dice_ce(**OPTIONS))``. From the same weights, on the same
patches, both trainings have the same losses up to rounding, which training amplifies slowly.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import fastseg.torch
from fastseg import presets
from fastseg.demo_data import load_scan

OPTIONS = {"sigmoid": True, "jaccard": True, "batch": True}
PATCH, BATCH = 32, 2


class Course(NamedTuple):
    """How a training went."""

    losses: list[float]
    seconds: float  # in the loss and its backward pass, the network's not included


def patches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of patches of the degraded MNI152 template and of its grey matter."""
    scan, rng = load_scan(quick=True), np.random.default_rng(0)
    ends = [size - PATCH for size in scan.image.shape]
    batches = []
    for _ in range(steps):
        corners = [[int(rng.integers(0, end + 1)) for end in ends] for _ in range(BATCH)]
        cubes = [tuple(slice(start, start + PATCH) for start in corner) for corner in corners]
        image = np.stack([scan.image[cube] for cube in cubes])[:, None] / 255
        truth = np.stack([scan.targets[cube] for cube in cubes])[:, None]
        batches.append((torch.from_numpy(image).float(), torch.from_numpy(truth).float()))
    return batches


def train(
    criterion: Callable[..., torch.Tensor], batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> Course:
    """Train a network from the same start; the loss is timed by itself."""
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), norm="instance")
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses, seconds = [], 0.0
    criterion(network(batches[0][0]), batches[0][1]).backward()  # compiles, once per machine
    network.zero_grad()
    for image, truth in batches:
        output = network(image)
        logits = output.detach().requires_grad_()
        start = time.perf_counter()
        value = criterion(logits, truth)
        value.backward()
        seconds += time.perf_counter() - start
        optimiser.zero_grad()
        output.backward(logits.grad)
        optimiser.step()
        losses.append(value.item())
    return Course(losses, seconds)


def main(steps: int = 30) -> tuple[Course, Course]:
    """Train twice and print both courses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's imports
        from monai.losses import DiceCELoss

    batches = patches(steps)
    theirs = train(DiceCELoss(**OPTIONS), batches)
    ours = train(fastseg.torch.Loss(presets.monai_dice_ce(**OPTIONS)), batches)
    for step in range(0, steps, max(1, steps // 10)):
        print(f"step {step:3}: MONAI {theirs.losses[step]:.6f}, fastseg {ours.losses[step]:.6f}")
    apart = np.abs(np.subtract(ours.losses, theirs.losses)).max()
    print(f"largest difference {apart:.1e}")
    print(f"loss and backward: MONAI {theirs.seconds:.2f} s, fastseg {ours.seconds:.2f} s")
    return theirs, ours


if __name__ == "__main__":
    main()
