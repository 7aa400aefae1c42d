"""Sums of several processes, so that their loss is that of one process with all of the batch."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

Split = Literal["samples", "voxels"]
SPLITS = get_args(Split)


def check(process_group: Any, split: str) -> None:
    """Refuse what is no way of combining sums."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not dist.is_available():
        raise RuntimeError("process_group needs a PyTorch with torch.distributed")
    if process_group is not True and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, True for the default one, or "
            f"None, got {type(process_group).__name__}"
        )


# Collectives are not traced: torch.compile leaves its graph here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def combine(
    sums: torch.Tensor, process_group: Any, split: Split, equal_samples: bool
) -> tuple[torch.Tensor, int, int]:
    """Return the sums of all processes, the row at which this one's begin, and how many they are.

    With ``split="samples"`` the processes' rows follow each other in the order of ranks; with
    "voxels" each process has a part of the same samples, and rows are added up.
    """
    group = None if process_group is True else process_group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = [sums.shape[0]] * ranks
    if not equal_samples:
        counts = [size[0] for size in _sizes(sums, group, ranks, split)]
    if split == "voxels":
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total, 0, ranks
    padded = sums.new_zeros((max(counts), *sums.shape[1:]))
    padded[: sums.shape[0]] = sums
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded, group=group)
    rows = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    return torch.cat(rows), sum(counts[:rank]), ranks


def _sizes(sums: torch.Tensor, group: Any, ranks: int, split: Split) -> list[tuple[int, ...]]:
    """Return the shapes of all processes' sums; ValueError, in each of them, if they do not fit."""
    shape = torch.tensor(sums.shape, device=sums.device)
    shapes = [torch.empty_like(shape) for _ in range(ranks)]
    dist.all_gather(shapes, shape, group=group)
    sizes = [tuple(s.tolist()) for s in shapes]  # which waits for the device
    wanted = 1 if split == "samples" else 0
    if len({size[wanted:] for size in sizes}) > 1:
        what = "classes" if split == "samples" else "samples and classes"
        raise ValueError(
            f"the processes' logits must have the same number of {what}, got the sums' shapes "
            f"{', '.join(map(str, sizes))}"
        )
    return sizes
