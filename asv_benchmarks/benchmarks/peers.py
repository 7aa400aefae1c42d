"""What fastseg is compared with; each function raises ImportError where its library is absent.

A peer gets what it needs (float32 targets, parameters with gradients), made outside the timing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastseg as fs

from .common import Call, Volume


def torch_module() -> Any:
    """Import PyTorch and give it as many threads as fastseg has."""
    import torch

    torch.set_num_threads(fs.get_num_threads())
    return torch


def _bce_and_jaccard() -> Any:
    """Return BCE + the mean over the samples of one minus the soft Jaccard index, by hand."""
    torch = torch_module()  # out here: torch.compile would break the graph at it

    def loss(logits: Any, targets: Any) -> Any:
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        probs = torch.sigmoid(logits)
        axes = tuple(range(1, logits.ndim))
        intersection = (probs * targets).sum(axes)
        union = probs.sum(axes) + targets.sum(axes) - intersection
        return bce + (1.0 - intersection / union).mean()

    return loss


def _value_and_grad(loss: Any, arrays: Volume, labels: bool = False) -> Call:
    torch = torch_module()
    logits = torch.from_numpy(arrays.logits).clone().requires_grad_()
    targets = torch.from_numpy(arrays.targets).to(torch.int64 if labels else torch.float32)

    def call() -> Any:
        logits.grad = None  # what zero_grad(set_to_none=True) does
        value = loss(logits, targets)
        value.backward()
        return value.detach()

    call()
    return call


def eager(arrays: Volume) -> Call:
    """Return forward and backward of the loss written by hand in PyTorch."""
    return _value_and_grad(_bce_and_jaccard(), arrays)


def compiled(arrays: Volume) -> Call:
    """Return the same through torch.compile, which may fail for want of a C++ compiler."""
    torch = torch_module()
    torch._dynamo.reset()
    return _value_and_grad(torch.compile(_bce_and_jaccard(), dynamic=False), arrays)


def monai(arrays: Volume) -> Call:
    """Return forward and backward of MONAI's DiceCELoss with its Jaccard form."""
    from monai.losses import DiceCELoss

    return _value_and_grad(DiceCELoss(sigmoid=True, jaccard=True), arrays)


def eager_softmax(arrays: Volume) -> Call:
    """Return forward and backward of cross-entropy + soft Jaccard over classes, by hand."""
    torch = torch_module()

    def loss(logits: Any, labels: Any) -> Any:
        targets = torch.nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)
        probs = torch.softmax(logits, 1)
        axes = tuple(range(2, logits.ndim))
        intersection = (probs * targets).sum(axes)
        union = probs.sum(axes) + targets.sum(axes) - intersection
        jaccard = 1.0 - intersection / union
        return torch.nn.functional.cross_entropy(logits, labels) + jaccard.mean()

    return _value_and_grad(loss, arrays, labels=True)


def monai_softmax(arrays: Volume) -> Call:
    """Return forward and backward of MONAI's DiceCELoss over classes with its Jaccard form."""
    from monai.losses import DiceCELoss

    loss = DiceCELoss(to_onehot_y=True, softmax=True, jaccard=True)
    return _value_and_grad(lambda x, y: loss(x, y[:, None]), arrays, labels=True)


def _lovasz(torch: Any, errors: Any, truth: Any) -> Any:
    """Return the Lovász extension as Berman's code and its copies have it: sort, cumsum, diff."""
    errors, order = errors.sort(descending=True)
    truth = truth[order]
    total = truth.sum()
    loss = 1.0 - (total - truth.cumsum(0)) / (total + (1.0 - truth).cumsum(0))
    return (errors * torch.cat([loss[:1], loss[1:] - loss[:-1]])).sum()


def lovasz_hinge(arrays: Volume) -> Call:
    """Return forward and backward of the Lovász hinge over the batch."""
    torch = torch_module()

    def loss(logits: Any, targets: Any) -> Any:
        x, p = logits.reshape(-1), targets.reshape(-1)
        return _lovasz(torch, torch.relu(1.0 - x * (2.0 * p - 1.0)), p)

    return _value_and_grad(loss, arrays)


def lovasz_softmax(arrays: Volume) -> Call:
    """Return forward and backward of the Lovász softmax over the batch, all classes present."""
    torch = torch_module()

    def loss(logits: Any, labels: Any) -> Any:
        probs, y = torch.softmax(logits, 1), labels.reshape(-1)
        losses = []
        for c in range(logits.shape[1]):
            truth = (y == c).float()
            losses.append(_lovasz(torch, (truth - probs[:, c].reshape(-1)).abs(), truth))
        return torch.stack(losses).mean()

    return _value_and_grad(loss, arrays, labels=True)


def adam(params: list[np.ndarray], grads: list[np.ndarray], implementation: str) -> Call:
    """Return a step of torch.optim.Adam on copies; ``implementation`` is "fused" or "foreach"."""
    torch = torch_module()
    tensors = [torch.from_numpy(param).clone().requires_grad_() for param in params]
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = torch.from_numpy(grad).clone()
    optimizer = torch.optim.Adam(tensors, lr=1e-3, **{implementation: True})
    optimizer.step()
    return optimizer.step
