"""PyTorch on the CPU: the plain verbs on tensors, and the module that autograd follows."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional

import fastseg as fs
import fastseg.torch
from cases import make

LOSS = fs.BCE() + fs.SoftJaccard()
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def monai_losses():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import monai.losses
    return monai.losses


def tensors(shape=(2, 3, 5, 67), dtype=torch.float32, target=np.uint8):
    logits, targets = make(shape, np.float64, target)
    return torch.from_numpy(logits).to(dtype), torch.from_numpy(targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_verbs_answer_in_torch(dtype):
    logits, targets = tensors(dtype=dtype)
    value, grad = LOSS.value_and_grad(logits, targets)
    assert isinstance(value, torch.Tensor)
    assert value.ndim == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (grad.dtype, grad.shape) == (dtype, logits.shape)
    wide = logits.double().numpy()
    expected = LOSS(wide, targets.numpy())
    np.testing.assert_allclose(value.item(), expected, rtol=1e-6)
    q = fs.sigmoid(logits)
    assert isinstance(q, torch.Tensor)
    assert q.dtype == dtype


def test_nothing_is_copied():
    logits, targets = tensors((1, 1, 64, 64))
    out = torch.empty_like(logits)
    before = out.data_ptr(), out._version
    grad = LOSS.value_and_grad(logits, targets, out=out)[1]
    assert grad is out
    assert out.data_ptr() == before[0]
    assert out._version == before[1] + 1  # autograd is told of the write


def test_channels_last_is_read_and_written_in_place():
    logits, targets = tensors((2, 3, 4, 6, 8))
    expected, expected_grad = LOSS.value_and_grad(logits, targets)
    last = logits.contiguous(memory_format=torch.channels_last_3d)
    value, grad = LOSS.value_and_grad(last, targets)
    assert grad.stride() == last.stride()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        LOSS,
        fs.BCE(pos_weight=2.0) + fs.Tversky(alpha=0.3, beta=0.7, link="power", gamma=1.3),
        LOSS.replace(reduction="none"),
        fs.SoftDice(scope="batch"),
        LOSS.replace(activation=None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("target", [np.uint8, np.float64])
def test_gradcheck(loss, target):
    logits, targets = tensors((2, 2, 5), torch.float64, target)
    if loss.options.activation is None:
        logits = torch.sigmoid(logits)
    criterion = fastseg.torch.Loss(loss)
    weights = torch.rand(2, 5, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: criterion(x, targets), (logits,))
    assert torch.autograd.gradcheck(
        lambda x: criterion(x, targets, weight_map=weights, mask=weights > 0.2), (logits,)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_is_applied_before_rounding(dtype):
    logits, targets = tensors((1, 1, 999), dtype)
    logits.requires_grad_()
    (fastseg.torch.Loss(1e-6 * LOSS)(logits, targets) * 2.0**20).backward()
    expected = LOSS.value_and_grad(logits.detach(), targets, grad_scale=1e-6 * 2.0**20)[1]
    torch.testing.assert_close(
        logits.grad, expected, rtol=1e-6 if dtype in DTYPES[:2] else 1e-2, atol=1e-7
    )
    assert torch.count_nonzero(logits.grad) > 900


@pytest.mark.parametrize("follow_upstream", [True, False])
def test_second_differentiation_raises(follow_upstream):
    logits, targets = tensors((1, 1, 9), torch.float64)
    logits.requires_grad_()
    value = fastseg.torch.Loss(LOSS)(logits, targets)
    if follow_upstream:
        value = value * logits.sum()
    (grad,) = torch.autograd.grad(value, logits, create_graph=True)
    penalty = grad.square().sum() + logits.square().sum()
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        penalty.backward()


def test_module_keeps_statistics_and_copies():
    logits, targets = tensors()
    criterion = fastseg.torch.Loss(LOSS, track=("hard",))
    assert criterion.last_statistics is None
    criterion(logits, targets)
    assert criterion.last_statistics.jaccard_index() == fs.jaccard_index(logits, targets)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(other(logits, targets), criterion(logits, targets))
    assert "BCE() + SoftJaccard()" in repr(criterion)


def test_gradients_accumulate_and_graphs_free():
    logits, targets = tensors()
    logits.requires_grad_()
    criterion = fastseg.torch.Loss(LOSS)
    criterion(logits, targets).backward()
    once = logits.grad.clone()
    criterion(logits, targets).backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_module_refuses_what_it_cannot_differentiate():
    logits, targets = tensors()
    criterion = fastseg.torch.Loss(LOSS)
    with pytest.raises(TypeError, match="targets must not require grad"):
        criterion(logits, targets.float().requires_grad_())
    with pytest.raises(TypeError, match="loss must be a fastseg loss, got str"):
        fastseg.torch.Loss("dice")
    with pytest.raises(ValueError, match="track must be a tuple"):
        fastseg.torch.Loss(LOSS, track=("nonsense",))
    with torch.no_grad():  # nothing to follow: the plain verb takes it
        LOSS(logits.requires_grad_(), targets)


def test_modified_logits_are_noticed_by_autograd():
    weight = torch.ones((1, 1, 9), requires_grad=True)
    logits = weight * 2
    value = fastseg.torch.Loss(LOSS)(logits, torch.ones(1, 1, 9))
    LOSS.value_and_grad(logits.detach(), torch.ones(1, 1, 9), out=logits.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# Peers as oracles


@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_bce_equals_torch(pos_weight):
    logits, targets = tensors((2, 3, 5, 67), torch.float64)
    logits.requires_grad_()
    weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
    expected = functional.binary_cross_entropy_with_logits(
        logits, targets.double(), pos_weight=weight
    )
    expected.backward()
    value, grad = fs.BCE(pos_weight=pos_weight or 1.0).value_and_grad(logits.detach(), targets)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, logits.grad, rtol=1e-12, atol=1e-18)


def test_bce_of_probabilities_equals_torch():
    probs = torch.tensor([[[0.0, 1.0, 1.0, 0.0, 0.3, 1e-30, 0.999999]]], dtype=torch.float64)
    targets = torch.tensor([[[0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.25]]], dtype=torch.float64)
    probs.requires_grad_()
    expected = functional.binary_cross_entropy(probs, targets)
    expected.backward()
    value, grad = fs.BCE().replace(activation=None).value_and_grad(probs.detach(), targets)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    # torch's clamp of the denominator is 1e-12 rounded to float32.
    torch.testing.assert_close(grad, probs.grad, rtol=5e-9, atol=0)


@pytest.mark.parametrize("jaccard", [True, False])
@pytest.mark.parametrize("batch", [True, False])
def test_region_losses_equal_monai(monai_losses, jaccard, batch):
    logits, targets = tensors((2, 3, 5, 67), torch.float64)
    logits.requires_grad_()
    smooth = 0.125
    peer = monai_losses.DiceLoss(
        sigmoid=True, jaccard=jaccard, batch=batch, smooth_nr=smooth, smooth_dr=smooth
    )
    expected = peer(logits, targets.double())
    expected.backward()
    # MONAI's Jaccard is 2 I / (2 union): its smoothing is halved.
    cls, s = (fs.SoftJaccard, smooth / 2) if jaccard else (fs.SoftDice, smooth)
    loss = cls(smooth_num=s, smooth_den=s, scope="batch" if batch else "sample")
    value, grad = loss.value_and_grad(logits.detach(), targets)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, logits.grad, rtol=1e-10, atol=1e-18)


def test_monai_metatensors_are_tensors(monai_losses):
    from monai.data import MetaTensor

    logits, targets = tensors((1, 1, 5, 67))
    expected = LOSS(logits, targets)
    meta = MetaTensor(logits.clone()).requires_grad_()
    value = fastseg.torch.Loss(LOSS)(meta, MetaTensor(targets.float()))
    value.backward()
    np.testing.assert_allclose(value.detach().item(), expected.item(), rtol=1e-6)
    assert meta.grad.shape == meta.shape


def test_answers_stay_with_the_logits_whatever_the_default_device():
    logits, targets = torch.randn(2, 1, 9, requires_grad=True), torch.rand(2, 1, 9) < 0.5
    loss = fs.BCE() + fs.SoftJaccard()
    with torch.device("meta"):
        value = fastseg.torch.Loss(loss)(logits, targets)
        plain = loss(logits.detach(), targets)
        value.backward()
    assert value.device == plain.device == logits.grad.device == torch.device("cpu")
    assert value == plain


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own, hidden else
def test_torch_compile_calls_the_module_as_it_is():
    criterion = fastseg.torch.Loss(fs.BCE() + fs.SoftJaccard())
    logits, targets = torch.randn(2, 1, 9), torch.rand(2, 1, 9) < 0.5

    def step(x):
        return 2 * criterion(3 * x, targets)

    eager, compiled = (logits.clone().requires_grad_() for _ in range(2))
    expected, got = step(eager), torch.compile(step, backend="eager")(compiled)
    assert got == expected
    expected.backward()
    got.backward()
    assert torch.equal(compiled.grad, eager.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grad_scale_may_be_a_tensor(dtype):
    logits, targets = torch.randn(2, 1, 9), torch.rand(2, 1, 9) < 0.5
    scale = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    loss = fs.BCE()
    got = loss.value_and_grad(logits, targets, grad_scale=scale)[1]
    assert torch.equal(got, loss.value_and_grad(logits, targets, grad_scale=2.0)[1])


@pytest.mark.parametrize("loss", [fs.LovaszHinge(), fs.BCE() + fs.LovaszHinge(scope="batch")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_sorts_is_differentiable(loss, dtype):
    logits = torch.randn(2, 3, 7, 11, generator=torch.Generator().manual_seed(0))
    logits = logits.to(dtype).requires_grad_()
    targets = (torch.arange(2 * 3 * 77).reshape(2, 3, 7, 11) % 3 == 0).to(torch.uint8)
    criterion = fastseg.torch.Loss(loss, track=("hard",))
    value = criterion(logits, targets)
    (1024 * value).backward()
    expected, grad = loss.value_and_grad(logits.detach(), targets, grad_scale=1024.0)
    assert value == expected and criterion.last_statistics.jaccard_index() > 0
    torch.testing.assert_close(
        logits.grad, grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    with pytest.raises(RuntimeError, match="once, not twice"):
        first = torch.autograd.grad(criterion(logits, targets), logits, create_graph=True)[0]
        first.sum().backward()
    with pytest.raises(ValueError, match="weight_map has no meaning for LovaszHinge"):
        criterion(logits, targets, weight_map=torch.ones(logits.shape))
    rows = fastseg.torch.Loss(loss.replace(reduction="none")) if loss == fs.LovaszHinge() else None
    if rows is not None:
        logits.grad = None
        scale = torch.arange(6.0).reshape(2, 3)
        (scale * rows(logits, targets)).sum().backward()
        other = loss.replace(reduction="none")
        grad = other.value_and_grad(logits.detach(), targets, grad_scale=scale)[1]
        torch.testing.assert_close(logits.grad, grad, rtol=1e-2, atol=1e-6)
