"""The examples run, and show what they say."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_monais_network_trains_alike_with_either_loss():
    theirs, ours = importlib.import_module("monai_unet").main(steps=6)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2e-6)
    assert len({round(loss, 4) for loss in ours.losses}) == 6


def test_two_processes_train_as_one():
    alone, together = importlib.import_module("ddp").main(steps=4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[-1][0] < alone[0][0]
