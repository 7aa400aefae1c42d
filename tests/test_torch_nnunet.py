"""nnU-Net's trainer with fastseg's loss, on stand-ins for what nnU-Net gives it.

What nnU-Net computes is restated from nnunetv2 2.8.1, training/loss/compound_losses.py and
deep_supervision.py; its Dice score stands in test_presets.py.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional

from fastseg.torch import nnunet
from test_presets import nnunet_dice

OUTPUTS = [(8, 8, 8), (4, 4, 4), (2, 2, 2)]


def trainer(**changes):
    labels = {
        "has_regions": False,
        "ignore_label": None,
        "foreground_regions": [(1, 2), (2,), (3,)],
    }
    labels.update({k: v for k, v in changes.items() if k in labels})
    return SimpleNamespace(
        label_manager=SimpleNamespace(**labels),
        configuration_manager=SimpleNamespace(batch_dice=changes.get("batch_dice", False)),
        is_ddp=False,
        enable_deep_supervision=changes.get("deep", True),
        _get_deep_supervision_scales=lambda: [[1.0], [0.5], [0.25]],
        _do_i_compile=lambda: False,
    )


def of_classes(x, y, batch_dice, ignore):
    keep = torch.ones_like(y, dtype=torch.bool) if ignore is None else y != ignore
    p = functional.one_hot(torch.where(keep, y, 0)[:, 0], 4).movedim(-1, 1)
    missing = -100 if ignore is None else ignore
    ce = functional.cross_entropy(x, y[:, 0], ignore_index=missing)
    return ce + nnunet_dice(x.softmax(1), p, keep, batch_dice, do_bg=False, smooth=1e-5)


def of_regions(x, y, batch_dice, ignore):
    bce = functional.binary_cross_entropy_with_logits
    if ignore is None:
        return bce(x, y.double()) + nnunet_dice(x.sigmoid(), y, 1, batch_dice, True, 1e-5)
    keep, p = 1 - y[:, -1:], y[:, :-1]
    ce = (bce(x, p.double(), reduction="none") * keep).sum() / keep.sum()
    return ce + nnunet_dice(x.sigmoid(), p, keep, batch_dice, True, 1e-5)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("ignore", [None, 4])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("regions", [True, False])
def test_loss_is_nnunets(regions, batch_dice, ignore, deep):
    made = torch.Generator().manual_seed(0)
    criterion = nnunet.build_loss(
        trainer(has_regions=regions, ignore_label=ignore, batch_dice=batch_dice, deep=deep)
    )
    channels = 3 if regions else 4
    logits = [torch.randn(2, channels, *s, generator=made, dtype=torch.float64) for s in OUTPUTS]
    if regions:
        last = channels + (ignore is not None)
        targets = [torch.randint(0, 2, (2, last, *s), generator=made) for s in OUTPUTS]
    else:
        end = 4 if ignore is None else 5
        targets = [torch.randint(0, end, (2, 1, *s), generator=made) for s in OUTPUTS]
    for x in logits:
        x.requires_grad_()
    peer = of_regions if regions else of_classes
    parts = [peer(x, y, batch_dice, ignore) for x, y in zip(logits, targets, strict=True)]
    expected = (parts[0] + parts[1] / 2) / 1.5 if deep else parts[0]
    got = criterion(logits, targets) if deep else criterion(logits[0], targets[0])
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    used = logits[: 2 if deep else 1]
    for mine, theirs in zip(
        torch.autograd.grad(got, used), torch.autograd.grad(expected, used), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)


def load() -> ModuleType:
    """Load the trainer as nnU-Net does: the file, by its place."""
    path = nnunet.TRAINERS / "nnUNetTrainerFastseg.py"
    spec = importlib.util.spec_from_file_location("nnUNetTrainerFastseg", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_is_found_by_name_and_builds_the_loss(monkeypatch):
    names = ["nnunetv2", "training", "nnUNetTrainer", "nnUNetTrainer"]
    for k in range(len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[: k + 1]), ModuleType(names[k]))
    sys.modules[".".join(names)].nnUNetTrainer = type("nnUNetTrainer", (), {})
    made = load().nnUNetTrainerFastseg()
    made.__dict__.update(vars(trainer(deep=False)))
    assert "CrossEntropy" in repr(made._build_loss())


def test_without_nnunet_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    with pytest.raises(ImportError, match="pip install nnunetv2"):
        load()
