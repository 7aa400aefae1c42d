"""The contract's rows on the CUDA backend: the same tests, its kernels run on the CPU by g++.

The arrays are NumPy's, and the backend is put in the CPU's place: what is tested is every kernel's
text and every launcher. docs/cuda_without_gpu.md says what is not.
"""

from __future__ import annotations

import os
import shutil
import zlib

import numpy as np
import pytest

import cases
import fastseg as fs
import fastseg.formula
import fastseg.functional
import fastseg.losses
import fastseg.metrics
import fastseg.torch.ops
import fastseg.updater
from cuda_rows import *  # noqa: F403
from hostcuda.runtime import host_backend
from test_accuracy import check_gradient_of_constant_logits

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and os.environ.get("CI") is None,
    reason="the CUDA kernels are run on the CPU by g++, which is not installed",
)
BACKEND = host_backend()
PLACES = (
    fastseg.losses,
    fastseg.functional,
    fastseg.metrics,
    fastseg.updater,
    fastseg.torch.ops,
)


@pytest.fixture(autouse=True)
def in_the_place_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public package compute by the CUDA backend on the stand-in for a device."""
    for module in PLACES:
        monkeypatch.setattr(module, "backend_of", lambda library, array: BACKEND)
    monkeypatch.setattr(fastseg.formula, "cpu", lambda: BACKEND)


@pytest.fixture(autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the threads of a block, and the blocks, forward, reverse or shuffled.

    Each row has one of them, by its name; test_bits_depend_on_no_order has them all.
    """
    number = zlib.crc32(request.node.name.encode()) % 3
    monkeypatch.setenv("HOSTCUDA_ORDER", ("0", "1", "5")[number])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("target", [np.uint8, np.float32])
def test_bits_depend_on_no_order(monkeypatch, dtype, target):
    """Nor on how many blocks there are, nor on how many run at once."""
    logits, targets = cases.make((2, 2, 20_011), dtype, target)
    loss, answers = fs.BCE() + fs.SoftJaccard(), []
    for order, workers, processors in (("0", "1", 1), ("1", "2", 3), ("9", "3", 100)):
        monkeypatch.setenv("HOSTCUDA_ORDER", order)
        monkeypatch.setenv("HOSTCUDA_WORKERS", workers)
        monkeypatch.setattr(BACKEND.driver, "multiprocessors", processors)
        value, grad, s = loss.evaluate(logits, targets, track=("hard",))
        answers.append((float(value), grad.tobytes(), s.array.tobytes()))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradient_of_constant_logits_is_within_8_ulp(share):
    """Threads add voxels one after the other: in pairs it would take 3 instructions more of 36."""
    check_gradient_of_constant_logits(share, 8.0)
