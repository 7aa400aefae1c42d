"""What fastseg is compared with: `fastseg.peers` on the arrays of a benchmark, and two more.

Each function raises ImportError where its library is absent.
"""

from __future__ import annotations

from typing import Any

from fastseg import peers
from fastseg.peers import adam, torch_module

from .common import Call, Volume

__all__ = ["adam"]


def eager(arrays: Volume) -> Call:
    """Return forward and backward of the loss written by hand in PyTorch."""
    return peers.eager(arrays.logits, arrays.targets)


def compiled(arrays: Volume) -> Call:
    """Return the same through torch.compile, which may fail for want of a C++ compiler."""
    torch = torch_module()
    torch._dynamo.reset()
    return _value_and_grad(torch.compile(peers.bce_and_jaccard(), dynamic=False), arrays)


def monai(arrays: Volume) -> Call:
    """Return forward and backward of MONAI's DiceCELoss with its Jaccard form."""
    return peers.monai(arrays.logits, arrays.targets)


def eager_softmax(arrays: Volume) -> Call:
    """Return forward and backward of cross-entropy + soft Jaccard over classes, by hand."""
    return peers.eager_softmax(arrays.logits, arrays.targets)


def monai_softmax(arrays: Volume) -> Call:
    """Return forward and backward of MONAI's DiceCELoss over classes with its Jaccard form."""
    return peers.monai_softmax(arrays.logits, arrays.targets)


def _value_and_grad(loss: Any, arrays: Volume, labels: bool = False) -> Call:
    return peers.value_and_grad(loss, arrays.logits, arrays.targets, labels)


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
