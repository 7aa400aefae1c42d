"""The demo: a voxel-wise model learns to find grey matter, and is judged on slabs it never saw.

One fused evaluation per step gives the loss, its gradient and the hard Jaccard index; Adam updates
the weights. `fastseg.demo_data` makes the input, `fastseg.demo_figure` draws the picture.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastseg as fs
from fastseg.demo_data import (
    BIAS,
    GUARD,
    NOISE,
    SLAB,
    BoolArray,
    Features,
    FloatArray,
    Scan,
    compute_features,
    load_scan,
)
from fastseg.dispatch import cpu
from fastseg.optimizers import Adam
from fastseg.progress import Report
from fastseg.warmup import announced_compilation

LOSS = (fs.BCE() + fs.SoftJaccard()).replace(layout="")
LEARNING_RATE = 0.2
STEPS, QUICK_STEPS = 100, 40
LOOK_EVERY = 5
"""Steps between two looks at the held-out slabs, which are for the picture alone."""
REPEATS = 20
"""Calls that are timed; the fastest counts, since other programs can only slow a call down."""
PACKAGES = ("nibabel", "nilearn", "scipy", "matplotlib")
NOTICE = (
    "semi-synthetic input: the MNI152 template, which is a population average, with a bias field "
    f"of {BIAS:.0%} and Rician noise (sigma {NOISE:g} of 255) added"
)


class Fit(NamedTuple):
    """A trained model and how it came about; curves are hard Jaccard indices but for the loss."""

    weights: FloatArray  # (F,)
    bias: FloatArray  # (1,)
    losses: list[float]  # on the training slabs, before each step
    jaccards: list[float]  # likewise
    held_out: list[tuple[int, float]]  # (steps taken, on the held-out slabs)

    def logits(self, features: FloatArray) -> FloatArray:
        """Return the logits of voxels, (V,)."""
        return np.asarray(features @ self.weights + self.bias)

    def look(self, step: int, features: Features, targets: BoolArray) -> None:
        """Score the held-out slabs and write it down."""
        jaccard = score(self.logits(features.held_out), targets)["jaccard"]
        self.held_out.append((step, jaccard))


def run(
    out: Path, report: Report, *, quick: bool = False, steps: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Run the demo, write ``demo.png`` and ``demo.json`` to ``out``, and return the latter.

    Parameters
    ----------
    out
        A directory; made if it is absent.
    report
        Told what happens.
    quick
        Three slabs and fewer steps.
    steps
        Of training; `STEPS` or `QUICK_STEPS` by default.
    seed
        Of the bias field and the noise.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = steps or (QUICK_STEPS if quick else STEPS)
    laps = _Laps()
    report("reading the template", 0, None, "")
    scan = load_scan(seed, quick)
    train, held_out = (scan.targets[where] for where in scan.voxels())
    sizes = f"{len(train):,} voxels, {len(held_out):,} held out"
    report("reading the template", 1, 1, sizes)
    laps.end("reading")
    features = compute_features(scan, partial(report, "computing features"))
    laps.end("features")
    compiled = compile_kernels(report)
    laps.end("compiling")
    fitted = fit(features, train, held_out, steps, report)
    laps.end("training")
    document = {
        "settings": {"quick": quick, "steps": steps, "seed": seed, "learning_rate": LEARNING_RATE},
        "loss": repr(LOSS),
        "data": describe(scan, features),
        **_results(out, scan, features, fitted, report, laps),
        "seconds": laps.seconds,
        "compiled": compiled,
        "installation": fs.show_config(),
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(out / "demo.json", lambda path: path.write_text(text, encoding="utf-8"))
    return document


def _results(
    out: Path, scan: Scan, features: Features, fitted: Fit, report: Report, laps: _Laps
) -> dict[str, Any]:
    """Judge the model, draw the picture, and return what was found."""
    scores, logits = judge(scan, features, fitted)
    speed = time_per_voxel(logits["logistic"], scan.targets[scan.voxels()[1]])
    laps.end("scoring")
    report("drawing", 0, None, "")
    _draw(out / "demo.png", scan, logits, scores, fitted)
    report("drawing", 1, 1, "")
    laps.end("drawing")
    return {
        "scores": scores,
        "time_per_voxel": speed,
        "model": {"weights": fitted.weights.tolist(), "bias": fitted.bias.tolist()},
        "curves": {"loss": fitted.losses, "jaccard": fitted.jaccards, "held_out": fitted.held_out},
    }


class _Laps:
    """How long each part took, and all of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"total": 0.0}
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self.seconds["total"] += self.seconds[part]
        self._last = now


# Training


def compile_kernels(report: Report) -> tuple[str, ...]:
    """Compile what the demo runs, or find it in the cache; return the names of those compiled."""
    stage, names = "compiling kernels", list[str]()

    def say(name: str) -> None:
        names.append(name)
        report(stage, len(names), None, name)

    report(stage, 0, None, "")
    with announced_compilation(say):
        cpu().describe()  # starts the threads, whose driver is compiled too
        logits, targets = np.zeros(2, np.float32), np.ones(2, bool)
        LOSS.value_and_grad(logits, targets)
        LOSS.evaluate(logits, targets, track=("hard",))
        Adam(np.zeros(1, np.float32)).step(np.zeros(1, np.float32))
    report(stage, 1, 1, f"{len(names)} for the first time" if names else "found in the cache")
    return tuple(names)


def fit(
    features: Features, train: BoolArray, held_out: BoolArray, steps: int, report: Report
) -> Fit:
    """Train logits = features @ weights + bias, on all training voxels at each step."""
    x = features.train
    weights, bias = np.zeros(x.shape[1], np.float32), np.zeros(1, np.float32)
    optimizer = Adam([weights, bias], LEARNING_RATE)
    logits, grad = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    result = Fit(weights, bias, [], [], [])
    for step in range(steps):
        if step % LOOK_EVERY == 0:
            result.look(step, features, held_out)
        np.matmul(x, weights, out=logits)
        logits += bias
        value, _, s = LOSS.evaluate(logits, train, track=("hard",), out=grad)
        rate = LEARNING_RATE * (1.0 + math.cos(math.pi * step / steps)) / 2.0
        optimizer.step([grad @ x, grad.sum(keepdims=True)], lr=rate)
        result.losses.append(float(value))
        result.jaccards.append(float(s.jaccard_index()))
        note = f"loss {result.losses[-1]:.4f}, hard Jaccard {result.jaccards[-1]:.4f}"
        report("training", step + 1, steps, note)
    result.look(steps, features, held_out)
    return result


# Judging


def score(logits: FloatArray, targets: BoolArray) -> dict[str, Any]:
    """Return the hard scores and counts of logits."""
    s = LOSS.statistics(logits, targets, track=("hard",))
    counts = {name: int(count[0, 0]) for name, count in s.counts().items()}
    return {"jaccard": float(s.jaccard_index()), "dice": float(s.dice_score()), **counts}


def best_threshold(image: FloatArray, targets: BoolArray) -> float:
    """Return the intensity up to which voxels are best called grey, by the hard Jaccard index.

    Grey matter is darker than white matter in a T1-weighted image.
    """
    order = np.argsort(image)
    hits = np.cumsum(targets[order])
    called = np.arange(1, len(image) + 1)
    best = np.argmax(hits / (called + hits[-1] - hits))
    return float(image[order[best]])


def judge(
    scan: Scan, features: Features, fitted: Fit
) -> tuple[dict[str, dict[str, Any]], dict[str, FloatArray]]:
    """Return scores on the held-out slabs, and the logits that they are of, by classifier."""
    train, held_out = scan.voxels()
    level = best_threshold(scan.image[train], scan.targets[train])
    logits = {
        "threshold": np.float32(level) - scan.image[held_out],  # at least 0 up to the level
        "logistic": fitted.logits(features.held_out),
    }
    scores = {name: score(value, scan.targets[held_out]) for name, value in logits.items()}
    scores["threshold"]["level"] = level
    return scores, logits


def plain_value_and_grad(logits: FloatArray, targets: BoolArray) -> tuple[Any, Any]:
    """Return what `LOSS` does, written in NumPy as one would."""
    p = targets.astype(logits.dtype)
    q = 0.5 + 0.5 * np.tanh(0.5 * logits)
    bce = np.mean(np.logaddexp(0.0, logits) - p * logits)
    inter = np.sum(p * q)
    union = np.sum(p) + np.sum(q) - inter
    slope = (inter - p * (union + inter)) / union**2
    return bce + 1.0 - inter / union, (q - p) / len(p) + q * (1.0 - q) * slope


def time_per_voxel(logits: FloatArray, targets: BoolArray) -> dict[str, float]:
    """Time value and gradient, fused and in NumPy, in nanoseconds, and compare the values."""
    grad = np.empty_like(logits)
    threads = fs.get_num_threads()

    def fused() -> None:
        LOSS.value_and_grad(logits, targets, out=grad)

    result: dict[str, float] = {"threads": threads}
    result["fused_ns"] = _least_seconds(fused, REPEATS)
    fs.set_num_threads(1)
    try:
        result["fused_one_thread_ns"] = _least_seconds(fused, REPEATS)
    finally:
        fs.set_num_threads(threads)
    result["numpy_ns"] = _least_seconds(lambda: plain_value_and_grad(logits, targets), 3)
    for name in result.keys() - {"threads"}:
        result[name] *= 1e9 / len(logits)
    exact = plain_value_and_grad(logits.astype(np.float64), targets)[0]
    result["relative_error"] = float(abs(LOSS(logits, targets) / exact - 1.0))
    return result


def _least_seconds(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def describe(scan: Scan, features: Features) -> dict[str, Any]:
    """Return what the demo ran on."""
    parts = {}
    for name, where in zip(("train", "held_out"), scan.voxels(), strict=True):
        parts[name] = {"voxels": int(where.sum()), "grey": int(scan.targets[where].sum())}
    slabs = {"slab_mm": SLAB, "guard_mm": GUARD}
    return {
        "notice": NOTICE,
        "shape": scan.image.shape,
        **slabs,
        **parts,
        "features": features.names,
    }


# Writing


def _draw(
    path: Path,
    scan: Scan,
    logits: dict[str, FloatArray],
    scores: dict[str, dict[str, Any]],
    fitted: Fit,
) -> None:
    from fastseg.demo_figure import Curves, draw

    _, held_out = scan.voxels()
    calls = {}
    for name, values in logits.items():
        calls[name] = np.zeros(scan.brain.shape, bool)
        calls[name][held_out] = values >= 0
    levels = {name: found["jaccard"] for name, found in scores.items()}
    curves = Curves(fitted.losses, fitted.jaccards, fitted.held_out, levels)
    write_whole(path, lambda temporary: draw(temporary, scan, calls, curves))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it into place."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
