"""The examples run, and show what they say."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import fastseg as fs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let examples be imported, here and in the processes that they start."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    paths = [EXAMPLES.parent, EXAMPLES.parent / "kernels"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))


def test_a_trainer_in_numpy_learns():
    course = importlib.import_module("numpy_trainer").main(steps=40)
    losses, scores = zip(*course, strict=True)
    assert losses[-1] < 0.8 * losses[0]
    assert scores[-1] > 0.5 > scores[0]


def test_a_trainer_in_cupy_waits_for_nobody(cupy_stand_in, monkeypatch):
    """On the stand-in for CuPy: the kernels' text is run by the CPU, one slab like another."""
    from hostcuda import cupy

    sys.modules.pop("cupy_trainer", None)
    steps = []
    step = fs.Adam.step
    monkeypatch.setattr(
        fs.Adam, "step", lambda self, *a, **k: (steps.append(len(cupy.events)), step(self, *a, **k))
    )
    course = importlib.import_module("cupy_trainer").main(steps=30)
    losses, scores = zip(*course, strict=True)
    assert np.mean(losses[-5:]) < 0.85 * losses[0] and np.mean(scores[-5:]) > scores[0]
    assert steps == [0] * 30 and cupy.events  # what was fetched was fetched at the end


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_monais_network_trains_alike_with_either_loss():
    theirs, ours = importlib.import_module("monai_unet").main(steps=6)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2e-6)
    assert len({round(loss, 4) for loss in ours.losses}) == 6


def test_two_processes_train_as_one():
    alone, together = importlib.import_module("ddp").main(steps=4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[-1][0] < alone[0][0]
