"""Several processes that combine their sums have the loss and the gradients of one process.

Processes of their own, on gloo, with the real DistributedDataParallel.
"""

from __future__ import annotations

import copy
import datetime
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastseg as fs
import fastseg.torch
from cases import make

LOSSES = {
    "sample": fs.BCE() + fs.SoftJaccard(),
    "batch": fs.BCE(normalize="all") + fs.SoftDice(scope="batch", smooth_den=1e-5),
    "sum": (fs.BCE(normalize=None) + fs.Tversky()).replace(reduction="sum"),
    "classes": fs.CrossEntropy(normalize="weights", class_weights=(1.0, 2.0))
    + fs.SoftJaccard(scope="class", empty="skip"),
    "bins": fs.LovaszHinge(bins=1024, scope="batch"),
}
SAMPLES, SHAPE = 7, (2, 6, 5)


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = make((SAMPLES, *SHAPE), np.float64)
    if name == "classes":
        targets = targets[:, 0].astype(np.int64)
        targets[0] = 0  # a class that is absent from a process, and is left out of the mean there
    return torch.from_numpy(images).float(), torch.from_numpy(targets)


def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(2, 2, 1)


def part(name: str, split: str, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a process has: 1, 2, ... samples, or rows of all of them."""
    images, targets = batch(name)
    if split == "voxels":
        rows = slice(rank * 5 // ranks + (rank > 0), (rank + 1) * 5 // ranks + 1)
        return images[..., rows, :], targets[..., rows, :]
    ends = [SAMPLES * (k * (k + 1)) // (ranks * (ranks + 1)) for k in range(ranks + 1)]
    return images[ends[rank] : ends[rank + 1]], targets[ends[rank] : ends[rank + 1]]


def work(rank: int, ranks: int, folder: str) -> None:
    """Compute every loss both ways and save what came of it."""
    torch.set_num_threads(1)
    fs.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=100),
    )
    results = {}
    for name, loss in LOSSES.items():
        for split in ("samples", "voxels"):
            model = torch.nn.parallel.DistributedDataParallel(layer())
            criterion = fastseg.torch.Loss(loss, track=("hard",), process_group=True, split=split)
            images, targets = part(name, split, rank, ranks)
            value = criterion(model(images), targets)
            value.backward()
            score = criterion.last_statistics.jaccard_index()
            results[name, split] = value.item(), model.module.weight.grad, score
    # As many in each process: nothing is exchanged first. The gradients are added up by hand.
    model = layer()
    criterion = fastseg.torch.Loss(
        LOSSES["sample"],
        process_group=dist.group.WORLD,
        equal_samples=True,
        ddp_average=False,
    )
    assert copy.deepcopy(criterion).process_group is dist.group.WORLD
    try:
        pickle.dumps(criterion)
    except TypeError as error:
        results["pickled"] = str(error)
    images, targets = batch("sample")
    value = criterion(model(images[2 * rank : 2 * rank + 2]), targets[2 * rank : 2 * rank + 2])
    value.backward()
    dist.all_reduce(model.weight.grad)
    results["equal"] = value.item(), model.weight.grad
    # Different numbers of classes: every process is told, none waits for ever.
    shape = (1, 1 + rank % 2, 3)
    bad = fastseg.torch.Loss(fs.BCE(), process_group=True)
    try:
        bad(torch.zeros(shape), torch.zeros(shape))
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def alone(loss: fs.Loss, images: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    model, criterion = layer(), fastseg.torch.Loss(loss)
    value = criterion(model(images), targets)
    value.backward()
    return value.item(), model.weight.grad


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_have_the_loss_and_the_gradients_of_one(ranks, tmp_path: Path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    paths = (root, root / "kernels", root / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    for name, loss in LOSSES.items():  # compiled here once, and not by each process
        alone(loss, *batch(name))
    mp.spawn(work, (ranks, str(tmp_path)), nprocs=ranks)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    for name, loss in LOSSES.items():
        images, targets = batch(name)
        value, grad = alone(loss, images, targets)
        score = loss.statistics(layer()(images).detach(), targets, track=("hard",)).jaccard_index()
        for split in ("samples", "voxels"):
            for got_value, got_grad, got_score in (r[name, split] for r in results):
                assert got_value == pytest.approx(value, rel=1e-6)
                torch.testing.assert_close(got_grad, grad, rtol=1e-5, atol=1e-7)
                assert got_score == score
    images, targets = batch("sample")
    value, grad = alone(LOSSES["sample"], images[: 2 * ranks], targets[: 2 * ranks])
    for result in results:
        assert result["equal"][0] == pytest.approx(value, rel=1e-6)
        torch.testing.assert_close(result["equal"][1], grad, rtol=1e-5, atol=1e-7)
        assert "must have the same number of classes" in result["error"]
        assert "only a Loss of the default group" in result["pickled"]


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(TypeError, match="process_group must be a torch"):
        fastseg.torch.Loss(fs.BCE(), process_group="gloo")
    with pytest.raises(ValueError, match="split must be one of"):
        fastseg.torch.Loss(fs.BCE(), process_group=True, split="classes")
    with pytest.raises(ValueError, match='needs reduction "mean" or "sum", got "none"'):
        fastseg.torch.Loss(fs.BCE().replace(reduction="none"), process_group=True)
    with pytest.raises(TypeError, match="process_group needs a loss that is a function of sums"):
        fastseg.torch.Loss(fs.LovaszHinge(), process_group=True)


def test_a_sharded_tensor_is_refused(tmp_path: Path):
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        logits = torch.zeros(2, 1, 4)
        sharded = DTensor.from_local(logits, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"logits is a DTensor; pass .* logits\.to_local\(\)"):
            fastseg.torch.Loss(fs.BCE())(sharded, logits)
    finally:
        dist.destroy_process_group()
