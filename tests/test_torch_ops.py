"""The operators that autograd and torch.compile know, and the modules that are made of them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastseg as fs
import fastseg.torch
from cases import make
from fastseg.torch import ops

LOSS = fs.BCE() + fs.SoftJaccard()
SORTED = fs.LovaszHinge()
# Dynamo warns of its own access to .grad, and Inductor of what it finds on this machine.
COMPILES = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def tensors(shape=(2, 3, 5, 7), dtype=torch.float32):
    logits, targets = make(shape, np.float64)
    return torch.from_numpy(logits).to(dtype), torch.from_numpy(targets)


@COMPILES
@pytest.mark.parametrize("loss", [LOSS, LOSS.replace(reduction="none"), fs.LovaszHinge(bins=1024)])
def test_operators_of_sums_keep_pytorchs_rules(loss):
    logits, targets = tensors()
    name, mask = ops.name_of(loss), torch.rand(2, 1, 5, 7) < 0.8
    torch.library.opcheck(ops.statistics, (logits, targets, mask, None, name, "hard"))
    sums = ops.statistics(logits, targets, mask, None, name, "")
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(ops.evaluate, (leaf, targets, mask, None, name, "hard", False))
    rest = (name, "", 0, 2.0)
    upstream = torch.rand(2, 3) if loss.options.reduction == "none" else torch.tensor(3.0)
    arrays = (targets, mask, None, sums)
    torch.library.opcheck(ops.value, (leaf, *arrays, *rest, False))
    torch.library.opcheck(ops.gradient, (logits, *arrays, upstream, *rest))
    torch.library.opcheck(ops.gradient_, (logits.clone(), *arrays, upstream, *rest))


@COMPILES
def test_operators_of_a_sorted_loss_keep_pytorchs_rules():
    logits, targets = tensors(dtype=torch.bfloat16)
    name = ops.name_of(SORTED)
    torch.library.opcheck(ops.sort, (logits.requires_grad_(), targets, None, None, name, "hard"))
    grad = ops.sort(logits.detach(), targets, None, None, name, "")[1]
    torch.library.opcheck(ops.scale, (logits.detach(), grad, torch.tensor(2.0), name))


@COMPILES
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("loss", [LOSS, SORTED], ids=repr)
def test_compiled_whole(loss, backend):
    """No graph break: fullgraph=True makes one an error."""
    torch._dynamo.reset()
    logits, targets = tensors()
    criterion, other = fastseg.torch.Loss(loss, track=("hard",)), fs.SoftDice()

    def step(x):
        return 2 * criterion(3 * x, targets) + fastseg.torch.compute_loss(other, x, targets)

    eager, compiled = (logits.clone().requires_grad_() for _ in range(2))
    expected = step(eager)
    score = criterion.last_statistics.jaccard_index()
    got = torch.compile(step, backend=backend, fullgraph=True)(compiled)
    expected.backward()
    got.backward()
    assert got.item() == expected.item()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-6, atol=1e-9)
    assert criterion.last_statistics.jaccard_index() == score


@COMPILES
def test_compiled_for_any_size():
    torch._dynamo.reset()
    criterion = fastseg.torch.Loss(LOSS)
    step = torch.compile(lambda x, p: criterion(x, p), backend="aot_eager", fullgraph=True)
    for size in (5, 6, 9):
        logits, targets = tensors((2, 3, size))
        assert step(logits, targets) == criterion(logits, targets)


def test_losses_with_one_name_are_kept_apart():
    """Two classes of users' may print alike; operators know losses by their names."""

    def made(errors):
        class Mine(fs.RegionTerm):
            ERRORS, SIZES = errors, (1.0, 0.0, 1.0)

        return Mine()

    losses = [made((1.0, 1.0)), made((0.5, 1.0))]
    assert repr(losses[0]) == repr(losses[1])
    logits, targets = tensors()
    for loss in losses:
        assert fastseg.torch.compute_loss(loss, logits, targets) == loss(logits, targets)
    assert ops.name_of(fs.BCE()) == ops.name_of(fs.BCE())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_checkpoint(dtype):
    """Logits of half precision come out of a layer; the layer is run again in backward."""
    logits, targets = tensors((2, 3, 8, 8))
    layer, criterion = torch.nn.Conv2d(3, 3, 1), fastseg.torch.Loss(LOSS)
    grads = []
    for again in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype):
            out = checkpoint(layer, logits, use_reentrant=False) if again else layer(logits)
            assert out.dtype == dtype
            value = criterion(out, targets)
        assert value.dtype == torch.float32
        (value * 1024).backward()
        grads.append(layer.weight.grad.clone())
    assert torch.equal(*grads)
    assert torch.count_nonzero(grads[0]) == grads[0].numel()


def test_gradient_over_the_logits():
    """It takes no memory of its own, and whoever else needs the logits is told."""
    image, targets = tensors((2, 3, 8, 8))
    layer = torch.nn.Conv2d(3, 3, 1)
    plain = fastseg.torch.Loss(LOSS)
    over = fastseg.torch.Loss(LOSS, overwrite_logits=True)
    plain(layer(image), targets).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    logits = layer(image)
    address, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    over(logits, targets).backward()
    assert torch.equal(layer.weight.grad, expected)
    assert seen == [address]
    assert logits._version > version
    logits = layer(image)
    penalty = logits.square().mean()  # made before, its backward comes after, and reads the logits
    value = penalty + over(logits, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    with pytest.raises(ValueError, match="needs logits that are computed, got a leaf"):
        over(image.requires_grad_(), targets)
    with pytest.raises(ValueError, match="overwrite_logits has no meaning for a loss that sorts"):
        fastseg.torch.Loss(SORTED, overwrite_logits=True)


def test_the_function_is_the_module():
    logits, targets = tensors()
    mask, weights = torch.rand(2, 3, 5, 7) < 0.8, torch.rand(2, 3, 5, 7)
    options = {"mask": mask, "weight_map": weights}
    got = fastseg.torch.compute_loss(LOSS, logits, targets, **options)
    assert got == fastseg.torch.Loss(LOSS)(logits, targets, **options)
    with pytest.raises(TypeError, match="loss must be a fastseg loss, got str"):
        fastseg.torch.compute_loss("dice", logits, targets)
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor, got numpy\.ndarray"):
        fastseg.torch.compute_loss(LOSS, logits.numpy(), targets)


def test_deep_supervision():
    fine, targets = tensors((1, 2, 8, 8))
    outputs = [fine, fine[..., ::2, ::2], fine[..., ::4, ::4]]
    coarse = [targets, targets[..., 1::2, 1::2], targets[..., 2::4, 2::4]]
    criterion = fastseg.torch.Loss(LOSS)
    deep = fastseg.torch.DeepSupervision(criterion)
    parts = [criterion(x, p) for x, p in zip(outputs, coarse, strict=True)]
    expected = (4 * parts[0] + 2 * parts[1] + parts[2]) / 7
    torch.testing.assert_close(deep(outputs, coarse), expected)
    torch.testing.assert_close(deep(outputs, targets), expected)  # brought to each size
    only = fastseg.torch.DeepSupervision(criterion, weights=(1.0, 0.0, 0.0))
    assert only([fine, None, None], [targets, None, None]) == parts[0]
    for other in (copy.deepcopy(deep), pickle.loads(pickle.dumps(deep))):
        assert other(outputs, coarse) == deep(outputs, coarse)
    with pytest.raises(ValueError, match="must be as many, got 3, 2 and 3"):
        deep(outputs, coarse[:2])
    with pytest.raises(ValueError, match="weights must not all be 0"):
        fastseg.torch.DeepSupervision(criterion, weights=(0.0,))([fine], [targets])
