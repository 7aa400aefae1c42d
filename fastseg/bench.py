"""``fastseg bench``: fastseg, its peers and plain NumPy on this machine, in under a minute.

A shorter relative of the project's asv suite: value and gradient of BCE + soft Jaccard and of
cross-entropy + soft Jaccard (softmax), hard scores of label volumes, a step of Adam. Contenders
take turns, medians count, and a contender whose value is not fastseg's is not timed. Peers that are
not installed are named and left out.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastseg as fs
from fastseg import peers
from fastseg.clock import Call, interleaved
from fastseg.files import replacing, write_json
from fastseg.info import collect, installed_version
from fastseg.progress import Report

SECONDS = 40.0
"""After which no further round begins: what is left of a minute is for imports and compilation."""
ROUNDS = 7
SAME = 1e-3
"""Relative difference of values up to which a contender computes the same (MONAI smooths)."""
OURS = "fastseg"
BUSY = 0.25
"""Load of a CPU, before anything is timed, from which on it is said to be busy."""
COPIED = 2**28
"""Bytes that are copied to measure the machine: more than caches hold."""


class Task(NamedTuple):
    """Something to be computed, and who does it."""

    name: str
    items: int  # voxels, or parameters
    unit: str
    moved: int  # bytes that must be read and written at least
    contenders: dict[str, Callable[[], Call]]


class Result(NamedTuple):
    """The medians of a task, in seconds by contender, and why others are not there."""

    task: Task
    seconds: dict[str, float]
    notes: list[str]


def tasks(quick: bool = False) -> list[Task]:
    """Return what is timed, with its arrays."""
    rng = np.random.default_rng(0)
    return [
        *(_binary(rng, size) for size in ((32, 64) if quick else (32, 64, 128))),
        _softmax(rng, 4, 32 if quick else 96),
        _labels(rng, 64 if quick else 192),
        _adam(rng, 2**18 if quick else 2**22),
    ]


def _binary(rng: np.random.Generator, size: int) -> Task:
    shape = (2, 1, size, size, size)
    logits = rng.standard_normal(shape, np.float32)
    targets = (rng.random(shape, np.float32) < 0.3).astype(np.uint8)
    loss, out = fs.BCE() + fs.SoftJaccard(), np.empty_like(logits)
    contenders: dict[str, Callable[[], Call]] = {
        OURS: lambda: lambda: loss.value_and_grad(logits, targets, out=out)[0],
        "NumPy": lambda: peers.numpy_loss(logits, targets),
        "PyTorch": lambda: peers.eager(logits, targets),
        "MONAI": lambda: peers.monai(logits, targets),
    }
    for name, make in _on_gpu().items():
        contenders[name] = lambda make=make: make(loss, peers.eager, logits, targets)  # type: ignore[misc]
    moved = logits.size * (4 + 1 + 4 + 1 + 4)
    name = f"BCE + soft Jaccard, 2x1x{size}³"
    return Task(name, logits.size, "voxel", moved, contenders)


def _softmax(rng: np.random.Generator, classes: int, size: int) -> Task:
    shape = (1, classes, size, size, size)
    logits = rng.standard_normal(shape, np.float32)
    targets = rng.integers(0, classes, (1, *shape[2:])).astype(np.uint8)
    loss, out = fs.CrossEntropy() + fs.SoftJaccard(), np.empty_like(logits)
    contenders: dict[str, Callable[[], Call]] = {
        OURS: lambda: lambda: loss.value_and_grad(logits, targets, out=out)[0],
        "PyTorch": lambda: peers.eager_softmax(logits, targets),
        "MONAI": lambda: peers.monai_softmax(logits, targets),
    }
    for name, make in _on_gpu().items():
        contenders[name] = lambda make=make: make(loss, peers.eager_softmax, logits, targets)  # type: ignore[misc]
    moved = logits.size * 12 + targets.size * 2
    name = f"softmax, 1x{classes}x{size}³"
    return Task(name, targets.size, "voxel", moved, contenders)


def _labels(rng: np.random.Generator, size: int) -> Task:
    shape, classes = (1, size, size, size), 3
    pred, targets = (rng.integers(0, classes, shape).astype(np.uint8) for _ in range(2))
    contenders: dict[str, Callable[[], Call]] = {
        OURS: lambda: lambda: fs.jaccard_index(pred, targets, num_classes=classes),
        "NumPy": lambda: peers.numpy_labels(pred, targets, classes),
    }
    name = f"Jaccard index of labels, {size}³"
    return Task(name, pred.size, "voxel", 2 * pred.size, contenders)


def _adam(rng: np.random.Generator, size: int) -> Task:
    params, grads = (rng.standard_normal(size, np.float32) for _ in range(2))

    def ours() -> Call:
        optimizer = fs.Adam(params.copy(), lr=1e-3)
        return lambda: optimizer.step(grads)

    contenders: dict[str, Callable[[], Call]] = {
        OURS: ours,
        "PyTorch": lambda: peers.adam([params], [grads], "fused"),
    }
    return Task(f"Adam step, {size / 2**20:g}M", size, "parameter", 28 * size, contenders)


@cache
def _on_gpu() -> dict[str, Callable[..., Call]]:
    """Return who computes on a GPU, where there is one; each call waits for it to be done."""
    found: dict[str, Callable[..., Call]] = {}
    if collect()["gpu"]["devices"]:

        def ours(loss: fs.Loss, peer: Any, logits: Any, targets: Any) -> Call:
            cupy: Any = import_module("cupy")
            x, y = cupy.asarray(logits), cupy.asarray(targets)
            out = cupy.empty_like(x)

            def call() -> Any:
                value = loss.value_and_grad(x, y, out=out)[0]
                cupy.cuda.Device().synchronize()
                return value

            return call

        found["fastseg, GPU"] = ours
    try:
        torch = peers.torch_module()
    except ImportError:
        return found
    if torch.cuda.is_available():

        def theirs(loss: fs.Loss, peer: Any, logits: Any, targets: Any) -> Call:
            run = peer(logits, targets, device="cuda")

            def call() -> Any:
                value = run()
                torch.cuda.synchronize()
                return value

            return call

        found["PyTorch, GPU"] = theirs
    return found


def run(out: Path, report: Report, *, quick: bool = False) -> dict[str, Any]:
    """Time everything, write ``bench.json`` to ``out`` and return it.

    Parameters
    ----------
    out
        A directory; made if it is absent.
    report
        Told the stage, how much of it is done, of how much, and a note.
    quick
        Small arrays, for a look whether it works.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    every = tasks(quick)
    rate = copy_rate()
    results = []
    for k, task in enumerate(every):
        report("timing", k, len(every), task.name)
        left = SECONDS - (time.perf_counter() - start)
        results.append(time_task(task, left / (len(every) - k)))
    report("timing", len(every), len(every), "")
    document = describe(results, rate)
    document["machine"]["load"] = load
    document["seconds"] = time.perf_counter() - start
    write_json(document, out / "bench.json")
    return document


def time_task(task: Task, budget: float) -> Result:
    """Return the medians of a task's contenders, in turns; after ``budget`` seconds none begins."""
    start, notes = time.perf_counter(), []
    calls: dict[str, Call] = {}
    expected: float | None = None
    for name, make in task.contenders.items():
        try:
            call = make()
        except ImportError as error:
            notes.append(f"{name}: {error.name or error} is not installed")
            continue
        value = call()
        if expected is None:
            expected = None if value is None else float(value)
        elif expected is not None and value is not None:
            difference = abs(float(value) - expected) / abs(expected)
            if not difference <= SAME:
                notes.append(f"{name}: computes {float(value):.6g}, fastseg {expected:.6g}")
                continue
        calls[name] = call
    left = budget - (time.perf_counter() - start)
    return Result(task, interleaved(calls, ROUNDS, budget=left), notes)


def copy_rate() -> float:
    """Return the bytes per second, read and written, of NumPy's copies on fastseg's threads."""
    count = fs.get_num_threads()
    source, target = (np.ones(COPIED, np.uint8) for _ in range(2))
    bounds = [COPIED * k // count for k in range(count + 1)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    with ThreadPoolExecutor(count) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

        return 2 * COPIED / interleaved({"copy": copy}, 3)["copy"]


def describe(results: list[Result], rate: float) -> dict[str, Any]:
    """Return the document: the machine, and for each task times and ratios."""
    found = collect()
    return {
        "machine": {
            "cpu": found["cpu"]["model"],
            "gpu": found["gpu"],
            "threads": fs.get_num_threads(),
            "copy_bytes_per_second": rate,
            "system": platform.platform(),
        },
        "versions": {**found["versions"], "monai": installed_version("monai")},
        "date": datetime.date.today().isoformat(),
        "tasks": [
            {
                "name": result.task.name,
                "items": result.task.items,
                "unit": result.task.unit,
                "seconds": result.seconds,
                "over_fastseg": {
                    name: seconds / result.seconds[OURS] for name, seconds in result.seconds.items()
                },
                "fastseg_over_copy": result.seconds[OURS] * rate / result.task.moved,
                "notes": result.notes,
            }
            for result in results
        ],
    }


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw how many times as long as fastseg each contender takes, as a PNG; needs matplotlib."""
    figures: Any = import_module("matplotlib.figure")
    rows = document["tasks"]
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    figure = figures.Figure(figsize=(9, 1.2 + 0.9 * len(rows)), layout="constrained", dpi=130)
    axes = figure.subplots()
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        places = [i for i, row in enumerate(rows) if name in row["seconds"]]
        ratios = [rows[i]["over_fastseg"][name] for i in places]
        bars = axes.barh([i + (k - len(names) / 2 + 0.5) * height for i in places], ratios, height)
        bars.set_label(name)
        labels = [
            f"{ratio:.1f}x" if name != OURS else _shown(rows[i]["seconds"][name])
            for i, ratio in zip(places, ratios, strict=True)
        ]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("time over fastseg's on the CPU (its own time is written at its bar)")
    axes.set_title(
        f"{document['machine']['cpu']}, {document['machine']['threads']} threads, "
        f"{document['date']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _shown(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
