"""The examples run, and show what they say."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_trainer_in_numpy_learns():
    course = example("numpy_trainer").main(steps=40)
    losses, scores = zip(*course, strict=True)
    assert losses[-1] < 0.8 * losses[0]
    assert scores[-1] > 0.5 > scores[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_monais_network_trains_alike_with_either_loss():
    theirs, ours = example("monai_unet").main(steps=6)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=2e-6)
    assert len({round(loss, 4) for loss in ours.losses}) == 6


def test_two_processes_train_as_one(monkeypatch):
    root = EXAMPLES.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "kernels")]))
    # The processes unpickle what they run by the name of its module.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    alone, together = importlib.import_module("ddp").main(steps=4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[-1][0] < alone[0][0]
