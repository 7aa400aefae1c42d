"""What fastseg is compared with, by `fastseg bench` and by asv: the losses as people have them.

Each function makes what a peer needs (float32 targets, parameters with gradients) and returns a
call without arguments; ImportError where its library is absent. PyTorch gets as many threads as
fastseg has.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastseg as fs
from fastseg.clock import Call


def torch_module() -> Any:
    """Import PyTorch and give it as many threads as fastseg has."""
    torch: Any = import_module("torch")
    torch.set_num_threads(fs.get_num_threads())
    return torch


def bce_and_jaccard() -> Any:
    """Return BCE + the mean over the samples of one minus the soft Jaccard index, in PyTorch."""
    torch = torch_module()  # out here: torch.compile would break the graph at it

    def loss(logits: Any, targets: Any) -> Any:
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        probs = torch.sigmoid(logits)
        axes = tuple(range(1, logits.ndim))
        intersection = (probs * targets).sum(axes)
        union = probs.sum(axes) + targets.sum(axes) - intersection
        return bce + (1.0 - intersection / union).mean()

    return loss


def value_and_grad(
    loss: Any, logits: Any, targets: Any, labels: bool = False, device: str = "cpu"
) -> Call:
    """Return forward and backward of a loss of PyTorch's, of arrays that NumPy made."""
    torch = torch_module()
    x = torch.from_numpy(logits).clone().to(device).requires_grad_()
    kind = torch.int64 if labels else torch.float32
    y = torch.from_numpy(targets).to(device=device, dtype=kind)

    def call() -> Any:
        x.grad = None  # what zero_grad(set_to_none=True) does
        value = loss(x, y)
        value.backward()
        return value.detach()

    call()
    return call


def eager(logits: Any, targets: Any, device: str = "cpu") -> Call:
    """Return forward and backward of the loss written by hand in PyTorch."""
    return value_and_grad(bce_and_jaccard(), logits, targets, device=device)


def monai(logits: Any, targets: Any, device: str = "cpu") -> Call:
    """Return forward and backward of MONAI's DiceCELoss with its Jaccard form."""
    losses: Any = import_module("monai.losses")
    loss = losses.DiceCELoss(sigmoid=True, jaccard=True)
    return value_and_grad(loss, logits, targets, device=device)


def eager_softmax(logits: Any, targets: Any, device: str = "cpu") -> Call:
    """Return forward and backward of cross-entropy + soft Jaccard over classes, by hand."""
    torch = torch_module()

    def loss(x: Any, labels: Any) -> Any:
        truth = torch.nn.functional.one_hot(labels, x.shape[1]).movedim(-1, 1)
        probs = torch.softmax(x, 1)
        axes = tuple(range(2, x.ndim))
        intersection = (probs * truth).sum(axes)
        union = probs.sum(axes) + truth.sum(axes) - intersection
        jaccard = 1.0 - intersection / union
        return torch.nn.functional.cross_entropy(x, labels) + jaccard.mean()

    return value_and_grad(loss, logits, targets, labels=True, device=device)


def monai_softmax(logits: Any, targets: Any, device: str = "cpu") -> Call:
    """Return forward and backward of MONAI's DiceCELoss over classes with its Jaccard form."""
    losses: Any = import_module("monai.losses")
    loss = losses.DiceCELoss(to_onehot_y=True, softmax=True, jaccard=True)
    return value_and_grad(
        lambda x, y: loss(x, y[:, None]), logits, targets, labels=True, device=device
    )


def numpy_loss(logits: NDArray[Any], targets: NDArray[Any]) -> Call:
    """Return value and gradient of BCE + soft Jaccard as one writes them in NumPy."""

    def call() -> Any:
        x, p = logits, targets.astype(logits.dtype)
        axes = tuple(range(1, x.ndim))
        q = 1.0 / (1.0 + np.exp(-x))
        bce = np.mean(np.maximum(x, 0) - x * p + np.log1p(np.exp(-np.abs(x))))
        intersection = (p * q).sum(axes, keepdims=True)
        union = p.sum(axes, keepdims=True) + q.sum(axes, keepdims=True) - intersection
        slope = -(p * union - intersection * (1.0 - p)) / union**2
        grad = (q - p) / x.size + q * (1.0 - q) * slope / x.shape[0]
        return bce + np.mean(1.0 - intersection / union), grad

    return lambda: call()[0]


def numpy_labels(pred: NDArray[Any], targets: NDArray[Any], classes: int) -> Call:
    """Return the mean Jaccard index of label volumes as one writes it in NumPy."""

    def call() -> Any:
        scores = []
        for label in range(classes):
            a, b = pred == label, targets == label
            scores.append((a & b).sum() / (a | b).sum())
        return np.mean(scores)

    return call


def adam(
    params: Sequence[NDArray[Any]],
    grads: Sequence[NDArray[Any]],
    implementation: str,
    device: str = "cpu",
) -> Call:
    """Return a step of torch.optim.Adam on copies; ``implementation`` is "fused" or "foreach"."""
    torch = torch_module()
    tensors = [torch.from_numpy(param).clone().to(device).requires_grad_() for param in params]
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = torch.from_numpy(grad).clone().to(device)
    optimizer = torch.optim.Adam(tensors, lr=1e-3, **{implementation: True})
    optimizer.step()
    step: Call = optimizer.step
    return step
