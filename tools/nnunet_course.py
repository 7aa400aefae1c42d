"""Train nnU-Net itself with its own loss and with fastseg's, and print both courses.

    python -m pip install nnunetv2 -e ".[demo,torch]"
    python tools/nnunet_course.py --steps 20

The data are crops of the MNI152 template, with noise, and grey and white matter as labels.
nnU-Net plans, preprocesses and loads them, and takes its own training steps: deep supervision, its
own optimiser and augmentation. Both trainings start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

CASES, SIZE = 6, 48
NAME = "Dataset501_Template"


def write_dataset(raw: Path) -> None:
    """Write crops of the template as an nnU-Net dataset."""
    import nibabel
    from nilearn.datasets import (
        load_mni152_gm_template,
        load_mni152_template,
        load_mni152_wm_template,
    )

    t1, grey, white = (
        np.asarray(load(resolution=2).dataobj, np.float32)
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    labels = np.where(grey > 0.5, 1, np.where(white > 0.5, 2, 0)).astype(np.uint8)
    rng, folder = np.random.default_rng(0), raw / NAME
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(CASES):
        starts = [int(rng.integers(0, size - SIZE)) for size in t1.shape]
        crop = tuple(slice(start, start + SIZE) for start in starts)
        noisy = t1[crop] + rng.normal(0, 0.05, (SIZE,) * 3).astype(np.float32)
        for array, path in (
            (noisy, f"imagesTr/case{case}_0000.nii.gz"),
            (labels[crop], f"labelsTr/case{case}.nii.gz"),
        ):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / path)
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "grey": 1, "white": 2},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def trainer_of(name: str) -> Any:
    """Return one of nnU-Net's trainers, initialised from a fixed seed."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(NAME, "3d_fullres", 0, name, device=torch.device("cpu"))
    torch.manual_seed(0)
    trainer.initialize()
    return trainer


def course(name: str, batches: list[dict[str, Any]]) -> list[float]:
    """Return the loss of each of nnU-Net's training steps."""
    trainer = trainer_of(name)
    print(f"{name}: {type(trainer.loss).__module__}.{type(trainer.loss).__qualname__}")
    trainer.network.train()
    return [float(trainer.train_step(batch)["loss"]) for batch in batches]


def main() -> None:
    """Run both trainings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("raw", "preprocessed", "results"):
            (folder / kind).mkdir()
            os.environ[f"nnUNet_{kind}"] = str(folder / kind)
        from fastseg.torch.nnunet import TRAINERS

        os.environ |= {"nnUNet_extTrainer": str(TRAINERS), "nnUNet_compile": "f"}
        write_dataset(folder / "raw")
        plan = [Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess"), "-d", "501"]
        subprocess.run([*plan, "-c", "3d_fullres", "-np", "1"], check=True)
        os.environ |= {"nnUNet_n_proc_DA": "0"}  # batches are made here; planning takes no 0
        loader = trainer_of("nnUNetTrainer")
        loader.dataloader_train, _ = loader.get_dataloaders()
        np.random.seed(0)
        batches = [next(loader.dataloader_train) for _ in range(steps)]
        theirs = course("nnUNetTrainer", batches)
        ours = course("nnUNetTrainerFastseg", batches)
    for step, pair in enumerate(zip(theirs, ours, strict=True)):
        print(f"step {step:3}: nnU-Net {pair[0]:.6f}, fastseg {pair[1]:.6f}")
    print(f"largest difference {np.abs(np.subtract(ours, theirs)).max():.1e}")


if __name__ == "__main__":
    main()
