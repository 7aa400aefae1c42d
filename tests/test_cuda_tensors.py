"""Tensors of a GPU through the public face, without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cases
import fastseg as fs
import fastseg.torch
from cuda_device import LOSS, SHAPE
from fastseg import dispatch, libraries
from fastseg_kernels.cuda import Backend
from fastseg_kernels.cuda.runtime import TorchMemory
from hostcuda.runtime import HostDriver

pytestmark = pytest.mark.usefixtures("cupy_stand_in")


class HostTorchMemory(TorchMemory):
    """PyTorch's memory, on the CPU."""

    def __init__(self) -> None:
        super().__init__(0)
        self._device = torch.device("cpu")

    def stream(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False


@pytest.fixture
def tensors_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Let tensors of the CPU pass for tensors of a GPU."""
    backend = Backend(HostDriver(), HostTorchMemory())
    monkeypatch.setattr(libraries.Torch, "device", lambda self, array, name="": "cuda:0")
    real = dispatch._on_device
    monkeypatch.setattr(
        dispatch,
        "_on_device",
        lambda library, place: backend if library == "torch" else real(library, place),
    )
    return backend


@pytest.mark.parametrize("made_on", [0, 64])
def test_statistics_of_tensors_are_fetched_on_their_stream(made_on, monkeypatch):
    """ExternalStream(0) would be some stream of PyTorch's pool, which waits for nothing."""
    used = []
    memory = HostTorchMemory()
    fake = SimpleNamespace(
        default_stream=lambda device: "default",
        ExternalStream=lambda address, device: address,
        stream=lambda stream: used.append(stream) or contextlib.nullcontext(),
    )
    monkeypatch.setattr(memory, "_torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(memory, "stream", lambda: 128)
    assert memory.to_host(torch.ones(3), made_on).tolist() == [1, 1, 1]
    assert used == [made_on or "default"]
    assert hasattr(torch.cuda, "default_stream") and hasattr(torch.cuda, "ExternalStream")


def test_the_module_is_differentiable(tensors_on_a_device, monkeypatch):
    logits, targets = cases.make(SHAPE)
    expected = LOSS.value_and_grad(logits, targets, grad_scale=3.0)
    x = torch.tensor(logits, requires_grad=True)
    t = torch.tensor(targets)
    monkeypatch.setattr(  # nobody waits for the device
        HostTorchMemory, "to_host", lambda self, array: pytest.fail("copied to the host")
    )
    criterion = fastseg.torch.Loss(LOSS, track=("hard",))
    value = criterion(x, t)
    assert (value.shape, value.dtype) == ((), torch.float32)
    (3.0 * value).backward()
    np.testing.assert_allclose(value.detach().numpy(), expected[0], rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), expected[1], rtol=1e-5, atol=1e-9)
    monkeypatch.undo()
    there = criterion.last_statistics
    assert there.jaccard_index() == fs.jaccard_index(logits, targets)


def test_a_scaled_half_gradient_is_rounded_once(tensors_on_a_device):
    logits, targets = cases.make((1, 1, 20_000))
    x = torch.tensor(logits * 3).half().requires_grad_()
    criterion, scale = fastseg.torch.Loss(LOSS), torch.tensor(65536.0)
    (criterion(x, torch.tensor(targets)) * scale).backward()
    assert (x.grad != 0).float().mean() > 0.99


def test_optimisers_of_tensors(tensors_on_a_device):
    theta = torch.zeros(5, requires_grad=True)
    version = theta._version
    opt = fs.Adam([theta], lr=0.5)
    opt.step([torch.ones(5)], grad_scale=torch.tensor(0.5))
    torch.testing.assert_close(theta.detach(), torch.full((5,), -0.5))
    assert theta._version > version
    assert isinstance(opt.state_dict()["exp_avg"][0], np.ndarray)


def test_another_device_is_refused_before_anything_is_launched(tensors_on_a_device, monkeypatch):
    x, t = torch.zeros(1, 1, 5), torch.ones(1, 1, 5, dtype=torch.uint8)
    far = torch.zeros(1, 1, 5)
    monkeypatch.setattr(
        libraries.Torch, "device", lambda self, a, name="": "cpu" if a is far else "cuda:0"
    )
    for call in (
        lambda: LOSS.value_and_grad(x, t, out=far),
        lambda: LOSS.gradient(x, t, LOSS.statistics(x, t), out=far),
    ):
        with pytest.raises(TypeError, match="logits and out must be on one device, got cuda:0 and"):
            call()
    opt = fs.Adam([x])
    with pytest.raises(
        TypeError, match=r"grads\[0\] must be on the device of params, cuda:0, got cpu"
    ):
        opt.step([far])


def test_params_that_moved_to_another_device_are_refused(tensors_on_a_device, monkeypatch):
    theta = torch.zeros(5)
    opt = fs.Adam([theta])
    theta.data = torch.zeros(5)  # as module.cuda() does
    monkeypatch.setattr(libraries.Torch, "device", lambda self, a, name="": "cuda:1")
    with pytest.raises(ValueError, match="params were on cuda:0 and are on cuda:1 now"):
        opt.step([torch.ones(5)])


def test_tensors_of_other_devices_are_refused():
    logits = torch.zeros(1, 1, 3, device="meta")
    with pytest.raises(TypeError, match="logits is on meta: fastseg computes on the CPU and"):
        LOSS(logits, logits)
