"""Losses for PyTorch's autograd. Importing this module imports torch.

>>> import torch, fastseg as fs, fastseg.torch
>>> criterion = fastseg.torch.Loss(fs.BCE() + fs.SoftJaccard())
>>> logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
>>> criterion(logits, torch.ones(1, 1, 4, 4)).backward()
>>> tuple(logits.grad.shape)
(1, 1, 4, 4)
"""

from __future__ import annotations

from typing import Any

import torch

from fastseg.losses import Loss as _Loss
from fastseg.statistics import Statistics


class _Function(torch.autograd.Function):
    """Forward: statistics and value. Backward: the gradient verb, scaled from above."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        weight_map: torch.Tensor | None,
        module: Loss,
    ) -> torch.Tensor:
        loss = module.loss
        if loss._sorting:
            return _sorted_forward(ctx, logits, targets, mask, weight_map, module)
        s = loss.statistics(logits, targets, mask=mask, weight_map=weight_map, track=module.track)
        ctx.save_for_backward(logits, targets, mask, weight_map)
        ctx.loss, ctx.statistics = loss, s
        module.last_statistics = s
        double = "float64" in (loss.options.compute_dtype, str(logits.dtype).removeprefix("torch."))
        dtype = "float64" if double else "float32"
        value = loss._value_of(s, dtype)
        return torch.as_tensor(value, dtype=getattr(torch, dtype), device=logits.device)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.loss._sorting:
            return _Scaled.apply(*ctx.saved_tensors, upstream, ctx), *(None,) * 4  # type: ignore[no-untyped-call]
        logits, targets, mask, weight_map = ctx.saved_tensors
        grad = _Gradient.apply(  # type: ignore[no-untyped-call]
            logits, upstream, targets, mask, weight_map, ctx.loss, ctx.statistics
        )
        return grad, None, None, None, None


def _sorted_forward(
    ctx: Any,
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    weight_map: torch.Tensor | None,
    module: Loss,
) -> torch.Tensor:
    """Compute the value and the gradient of a loss that sorts, which has no sums to keep instead.

    The gradient waits in float32 (or float64), as it is yet to be scaled.
    """
    loss, x = module.loss, logits.detach()
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty_like(x, dtype=wide)
    value, grad, s = loss.evaluate(
        x, targets, mask=mask, weight_map=weight_map, track=module.track, out=out
    )
    module.last_statistics = s
    ctx.save_for_backward(logits, grad)
    ctx.loss, ctx.dtype = loss, logits.dtype
    return value  # type: ignore[no-any-return]


class _Scaled(torch.autograd.Function):
    """A gradient that is known, times what comes from above; a node of the logits, as below."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, grad: torch.Tensor, upstream: torch.Tensor, made: Any
    ) -> torch.Tensor:
        if upstream.ndim > 0:  # (N, C)
            layout = made.loss.options.layout
            lead = [upstream.shape["NC".index(axis)] for axis in layout]
            upstream = upstream.reshape(*lead, *(1,) * (grad.ndim - len(layout)))
        return (grad * upstream).to(made.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        raise RuntimeError("fastseg losses can be differentiated once, not twice")


class _Gradient(torch.autograd.Function):
    """The gradient as a node of its own, so that differentiating it raises and is never silent."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        upstream: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        weight_map: torch.Tensor | None,
        loss: _Loss,
        s: Statistics,
    ) -> torch.Tensor:
        grad = loss.gradient(
            logits.detach(), targets, s, mask=mask, weight_map=weight_map, grad_scale=upstream
        )
        return grad  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        raise RuntimeError("fastseg losses can be differentiated once, not twice")


class Loss(torch.nn.Module):
    """A fastseg loss as a module: ``criterion(logits, targets)`` is differentiable by itself.

    Memory is shared with the tensors: nothing is copied. The gradient is computed in backward, by
    one read of logits and targets and one write; what comes from above is multiplied in before
    the gradient is rounded to the logits' dtype. A second differentiation raises a RuntimeError.
    Inside torch.compile the module runs as it is, between the compiled parts.

    Parameters
    ----------
    loss
        Any `fastseg.Loss`.
    track
        Families of sums to keep beside those that the loss needs, see `fastseg.Loss.statistics`.

    Attributes
    ----------
    last_statistics
        `fastseg.Statistics` of the last forward pass: with ``track=("hard",)`` its
        ``.jaccard_index()`` reads no voxel again. On a GPU, asking waits for that pass.
    """

    last_statistics: Statistics | None

    def __init__(self, loss: _Loss, *, track: tuple[str, ...] = ()) -> None:
        super().__init__()
        if not isinstance(loss, _Loss):
            raise TypeError(f"loss must be a fastseg loss, got {type(loss).__name__}")
        loss.families(track)
        self.loss = loss
        self.track = tuple(track)
        self.last_statistics = None

    # Dynamo cannot look into NumPy records: torch.compile calls this as it is, between its graphs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        for name, tensor in (("targets", targets), ("mask", mask), ("weight_map", weight_map)):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                raise TypeError(f"{name} must not require grad; pass {name}.detach()")
        result = _Function.apply(logits, targets, mask, weight_map, self)  # type: ignore[no-untyped-call]
        return result  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Show the formula."""
        return repr(self.loss)
