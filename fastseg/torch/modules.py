"""Losses as modules and as a function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from fastseg.losses import Loss as _Loss
from fastseg.losses import checked_loss
from fastseg.statistics import Statistics
from fastseg.torch import distributed, ops


def _plain(name: str, tensor: Any) -> Any:
    """Return a tensor without its subclass (MONAI's MetaTensor), whose memory operators read."""
    if tensor is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    if not isinstance(tensor, torch.Tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}")
    if hasattr(tensor, "to_local"):
        raise TypeError(f"{name} is a DTensor; pass its local part, {name}.to_local()")
    return tensor.as_subclass(torch.Tensor)


class Loss(torch.nn.Module):
    """A fastseg loss as a module: ``criterion(logits, targets)`` is differentiable by itself.

    Memory is shared with the tensors: nothing is copied. The gradient is computed in backward, by
    one read of logits and targets and one write; what comes from above is multiplied in before
    the gradient is rounded to the logits' dtype. A second differentiation raises a RuntimeError.
    torch.compile takes the module without a graph break: its steps are operators of PyTorch.

    Parameters
    ----------
    loss
        Any `fastseg.Loss`.
    track
        Families of sums to keep beside those that the loss needs, see `fastseg.Loss.statistics`.
    overwrite_logits
        Let backward write the gradient over the logits, and so need no memory. They must be the
        output of an operation that does not need them for its own backward (as a convolution);
        where one does, autograd raises an error. Compiled graphs make a new array all the same.
    process_group
        Combine the sums of the processes of this group (True: the default one) before the value is
        taken: the loss, and its gradients, are then those of one process that has all of the batch,
        whatever the processes' shares are. Every process must call the module as often.
    split
        What a process has: "samples" of its own, or "voxels" of the samples that all have.
    ddp_average
        Whether gradients are averaged over the processes afterwards, as DistributedDataParallel
        does: each is then multiplied by the number of processes. False where they are added up.
    equal_samples
        Promise that every process has as many samples, and classes, in each call. Otherwise their
        numbers are exchanged first, for which a GPU is waited for.

    Attributes
    ----------
    last_statistics
        `fastseg.Statistics` of the last forward pass: with ``track=("hard",)`` its
        ``.jaccard_index()`` reads no voxel again. On a GPU, asking waits for that pass. Of all
        processes, where they are combined.

    Examples
    --------
    >>> import torch, fastseg as fs, fastseg.torch
    >>> criterion = fastseg.torch.Loss(fs.BCE() + fs.SoftJaccard(), track=("hard",))
    >>> logits = torch.ones(1, 1, 4, 4, requires_grad=True)
    >>> criterion(logits, torch.ones(1, 1, 4, 4)).backward()
    >>> float(criterion.last_statistics.jaccard_index())
    1.0
    """

    def __init__(
        self,
        loss: _Loss,
        *,
        track: Sequence[str] = (),
        overwrite_logits: bool = False,
        process_group: Any = None,
        split: distributed.Split = "samples",
        ddp_average: bool = True,
        equal_samples: bool = False,
    ) -> None:
        super().__init__()
        self.loss = checked_loss(loss)
        loss.families(track)
        self.track = tuple(track)
        self._last: Statistics | torch.Tensor | None = None
        self._name, self._track = ops.name_of(loss), " ".join(self.track)
        self._sorts, self.overwrite_logits = bool(loss._sorting), bool(overwrite_logits)
        if self._sorts and self.overwrite_logits:
            raise ValueError("overwrite_logits has no meaning for a loss that sorts")
        self.process_group, self.split = process_group, split
        self.ddp_average, self.equal_samples = bool(ddp_average), bool(equal_samples)
        if process_group is not None:
            distributed.check(process_group, split)
            loss._require_sums("process_group")
            if loss.options.reduction == "none":
                raise ValueError('process_group needs reduction "mean" or "sum", got "none"')

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group not in (None, True):
            raise TypeError(
                "a process_group belongs to its process: only a Loss of the default group, "
                "process_group=True, can be pickled"
            )
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
        state = {
            name: value if name == "process_group" else copy.deepcopy(value, memo)
            for name, value in self.__dict__.items()
        }
        made = Loss.__new__(type(self))
        made.__setstate__(state)
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._name = ops.name_of(self.loss)  # which this process may not know yet

    @property
    def last_statistics(self) -> Statistics | None:
        """Statistics of the last forward pass, None before the first."""
        last = self._last
        if isinstance(last, torch.Tensor):
            self._last = last = ops.statistics_of(last, self._name, self._track)
        return last

    def forward(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        weight_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, 0-d (or (N, C)): float32, or float64 for float64 logits.

        ``targets`` and the rest are not differentiated: one that requires grad is refused.
        """
        arrays = _checked(logits, targets, mask, weight_map)
        if self.overwrite_logits and logits.is_leaf and logits.requires_grad:
            raise ValueError("overwrite_logits needs logits that are computed, got a leaf")
        value, sums = self._evaluate(arrays)
        if torch.compiler.is_compiling():
            self._last = sums
        else:  # now, while the stream is known that writes them
            self._last = ops.statistics_of(sums, self._name, self._track)
        return value

    def _evaluate(self, arrays: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the value and the sums, of all processes."""
        named = self._name, self._track
        if self.process_group is None:
            return _evaluate(arrays, *named, self._sorts, self.overwrite_logits)
        sums, first, ranks = distributed.combine(
            ops.statistics(arrays[0].detach(), *arrays[1:], *named),
            self.process_group,
            self.split,
            self.equal_samples,
        )
        factor = float(ranks) if self.ddp_average else 1.0
        return ops.value(*arrays, sums, *named, first, factor, self.overwrite_logits), sums

    def extra_repr(self) -> str:
        """Show the formula."""
        return repr(self.loss)


def _checked(logits: Any, targets: Any, mask: Any, weight_map: Any) -> tuple[Any, ...]:
    """Return the tensors as operators take them."""
    for what, tensor in (("targets", targets), ("mask", mask), ("weight_map", weight_map)):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise TypeError(f"{what} must not require grad; pass {what}.detach()")
    return (
        _plain("logits", logits),
        _plain("targets", targets),
        _plain("mask", mask),
        _plain("weight_map", weight_map),
    )


def _evaluate(
    arrays: tuple[Any, ...], name: str, track: str, sorts: bool, overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value and the sums."""
    if sorts:
        value, _, sums = ops.sort(*arrays, name, track)
        return value, sums.detach()
    value, sums = ops.evaluate(*arrays, name, track, overwrite)
    return value, sums.detach()


def compute_loss(
    loss: _Loss,
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    weight_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a loss that autograd follows: the function to the module `Loss`.

    Examples
    --------
    >>> import torch, fastseg as fs, fastseg.torch
    >>> logits = torch.zeros(1, 1, 4, requires_grad=True)
    >>> value = fastseg.torch.compute_loss(fs.BCE(), logits, torch.ones(1, 1, 4))
    >>> value.backward()
    >>> logits.grad[0, 0, 0].item()
    -0.125
    """
    arrays, name = _checked(logits, targets, mask, weight_map), ops.name_of(checked_loss(loss))
    return _evaluate(arrays, name, "", bool(loss._sorting))[0]


class DeepSupervision(torch.nn.Module):
    """The weighted sum of a loss over outputs of several resolutions.

    Parameters
    ----------
    criterion
        A module that takes (outputs, targets), such as `Loss`.
    weights
        One per output; 1, 1/2, 1/4, ... over their sum by default. An output of weight 0 is not
        read.

    Examples
    --------
    >>> import torch, fastseg as fs, fastseg.torch
    >>> criterion = fastseg.torch.DeepSupervision(fastseg.torch.Loss(fs.BCE()))
    >>> outputs = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    >>> round(criterion(outputs, torch.ones(1, 1, 8, 8)).item(), 5)  # (2 + 1) / 3 of log 2
    0.69315
    """

    def __init__(self, criterion: torch.nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.criterion = criterion
        self.weights = None if weights is None else tuple(map(float, weights))

    def forward(
        self,
        outputs: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor] | torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Return the weighted sum.

        ``targets``: one per output, or one that is brought to each output's size by its nearest
        voxels. ``options`` go to the criterion: a mask of one size is for outputs of that size.
        """
        count = len(outputs)
        weights = self.weights
        if weights is None:
            weights = tuple(2.0 ** (count - 1 - k) / (2.0**count - 1) for k in range(count))
        if isinstance(targets, torch.Tensor):
            targets = [_nearest(targets, output) for output in outputs]
        if not count == len(weights) == len(targets):
            raise ValueError(
                f"outputs, targets and weights must be as many, got {count}, {len(targets)} and "
                f"{len(weights)}"
            )
        parts = zip(weights, outputs, targets, strict=True)
        kept = [w * self.criterion(x, p, **options) for w, x, p in parts if w != 0]
        if not kept:
            raise ValueError("weights must not all be 0")
        return torch.stack(kept).sum(0)


def _nearest(targets: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return targets of an output's size, each voxel that of the nearest one."""
    size = output.shape[2:]
    if targets.shape[2:] == size:
        return targets
    wide = targets if targets.is_floating_point() else targets.float()
    made = torch.nn.functional.interpolate(wide, size, mode="nearest-exact")
    return made.to(targets.dtype)
