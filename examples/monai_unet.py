"""Train MONAI's 3D U-Net by MONAI's trainer on patches of a real volume, and swap in fastseg.

    python examples/monai_unet.py        # needs the extras demo and torch, monai, pytorch-ignite

Each swap is one line: ``monai.losses.DiceCELoss(**OPTIONS)`` becomes
``fastseg.torch.Loss(presets.monai_dice_ce(**OPTIONS))``, and ``torch.optim.Adam``
``fastseg.torch.Adam``. From the same weights, on the same patches, both trainings have the same
losses up to rounding, which training amplifies slowly.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

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
    seconds: float


def patches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of patches of the degraded MNI152 template and of its grey matter."""
    scan, rng = load_scan(quick=True), np.random.default_rng(0)
    ends = [size - PATCH for size in scan.image.shape]
    batches = []
    for _ in range(steps):
        corners = [[int(rng.integers(0, end + 1)) for end in ends] for _ in range(BATCH)]
        cubes = [tuple(slice(start, start + PATCH) for start in corner) for corner in corners]
        image = np.stack([scan.image[cube] for cube in cubes])[:, None] / 255
        truth = np.stack([scan.targets[cube] for cube in cubes])[:, None]
        image, truth = torch.from_numpy(image).float(), torch.from_numpy(truth).float()
        batches.append({"image": image, "label": truth})
    return batches


def train(
    criterion: Callable[..., torch.Tensor],
    optimiser: type[torch.optim.Optimizer],
    batches: list[dict[str, torch.Tensor]],
) -> Course:
    """Train a network from the same start."""
    from monai.engines import SupervisedTrainer
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), norm="instance")
    losses: list[float] = []

    def record(engine: Any) -> None:
        losses.append(engine.state.output["loss"].item())

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=optimiser(network.parameters(), lr=1e-3),
        loss_function=criterion,
        decollate=False,  # the output stays that of the batch
    )
    trainer.add_event_handler("ITERATION_COMPLETED", record)
    start = time.perf_counter()
    trainer.run()
    return Course(losses, time.perf_counter() - start)


def main(steps: int = 30) -> tuple[Course, Course]:
    """Train twice and print both courses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's imports
        from monai.losses import DiceCELoss

    batches = patches(steps)
    theirs = train(DiceCELoss(**OPTIONS), torch.optim.Adam, batches)
    criterion = fastseg.torch.Loss(presets.monai_dice_ce(**OPTIONS))
    train(criterion, fastseg.torch.Adam, batches[:1])  # compiles, once per machine
    ours = train(criterion, fastseg.torch.Adam, batches)
    for step in range(0, steps, max(1, steps // 10)):
        print(f"step {step:3}: MONAI {theirs.losses[step]:.6f}, fastseg {ours.losses[step]:.6f}")
    apart = np.abs(np.subtract(ours.losses, theirs.losses)).max()
    print(f"largest difference {apart:.1e}")
    print(f"seconds, the network's included: {theirs.seconds:.2f}, fastseg {ours.seconds:.2f}")
    return theirs, ours


if __name__ == "__main__":
    main()
