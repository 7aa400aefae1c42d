"""Train in several processes on unequal shares of the batch, as one process would with all of it.

    python examples/ddp.py                   # needs the extras demo and torch, and monai

Dice and Jaccard scores of a batch are no means over its samples: averaging what each process has by
itself trains another loss. With ``process_group=True`` the sums are combined first.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monai_unet import patches

import fastseg as fs
import fastseg.torch

LOSS = fs.BCE() + fs.SoftJaccard(scope="batch", smooth_num=1e-5, smooth_den=1e-5)


def work(rank: int, ranks: int, steps: int, folder: str) -> None:
    """Train one process's copy of the network on its share of each batch."""
    threads = max(1, (os.cpu_count() or 1) // ranks)  # or each process would use all cores
    torch.set_num_threads(threads)
    fs.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(minutes=2),
    )
    torch.manual_seed(0)
    network: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 1, 3, padding=1)
    )
    network = torch.nn.parallel.DistributedDataParallel(network)
    optimiser = fastseg.torch.Adam(network.parameters(), lr=1e-2)
    criterion = fastseg.torch.Loss(LOSS, track=("hard",), process_group=True)
    course = []
    batches = patches(2 * steps)
    for pair in zip(batches[::2], batches[1::2], strict=True):
        # Four patches: with two processes the first has one of them, and the second three.
        images, truths = (torch.cat([batch[key] for batch in pair]) for key in ("image", "label"))
        first, end = (0, 4) if ranks == 1 else ((0, 1), (1, 4))[rank]
        value = criterion(network(images[first:end]), truths[first:end])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        course.append((value.item(), float(criterion.last_statistics.jaccard_index())))
    if rank == 0:
        torch.save(course, f"{folder}/course.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def train(ranks: int, steps: int) -> Any:
    """Return the loss and the hard Jaccard index of each step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, steps, folder), nprocs=ranks)
        return torch.load(f"{folder}/course.pt")


def main(steps: int = 8) -> tuple[Any, Any]:
    """Train with one process and with two, and print both courses."""
    alone, together = train(1, steps), train(2, steps)
    for step, ((loss, score), (its_loss, its_score)) in enumerate(
        zip(alone, together, strict=True)
    ):
        print(
            f"step {step}: one process {loss:.6f} ({score:.4f}), "
            f"two {its_loss:.6f} ({its_score:.4f})"
        )
    apart = np.abs(np.subtract(alone, together)).max()
    print(f"largest difference {apart:.1e}")
    return alone, together


if __name__ == "__main__":
    main()
