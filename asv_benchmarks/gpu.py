"""On a machine with a GPU: the GPU tests, then fastseg beside PyTorch and the copy bandwidth.

    python asv_benchmarks/gpu.py [--quick] [--skip-tests] [--json FILE]

Times are the device's own (events), medians of rounds in each of which every contender has one
turn; "of copy" is the time in which the device copies as many bytes over the time taken. Contenders
go around several sets of arrays, together twice as large as the L2 cache, so that memory is what is
measured. Everything is PyTorch's: its arrays, its allocator, its streams.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastseg as fs
from fastseg.peers import bce_and_jaccard

Call = Callable[[], Any]
LOSS = fs.BCE() + fs.SoftJaccard()
SIZES, QUICK_SIZES = (64, 128, 256, 512), (64, 128)
ADAM = {"1 of 10M": (1, 10**7), "1 of 1B": (1, 10**9), "2000 of 1000": (2000, 1000)}
QUICK_ADAM = {"1 of 10M": (1, 10**7), "2000 of 1000": (2000, 1000)}
MOST_SETS = 16
ADAM_ARRAYS = 7  # of a parameter's size: four are read, three written


# The clock


def device_seconds(call: Call, turn: float = 0.01) -> float:
    """Return the device's time for a call, from as many as fill ``turn`` seconds."""

    def measure(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    call()
    once = measure(2)
    return measure(max(2, min(200, int(turn / once))))


def host_seconds(call: Call, count: int = 50) -> float:
    """Return how long the host is busy with a call while the device has nothing else to do."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return median(times)


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call over rounds."""
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            turns[name].append(device_seconds(call))
    return {name: median(times) for name, times in turns.items()}


def in_turns(calls: list[Call]) -> Call:
    """Return a call that makes the next of several calls."""
    cycle = itertools.cycle(calls)
    return lambda: next(cycle)()


# Contenders


def copy(nbytes: int, sets: int) -> Call:
    """Return a call that copies half as many bytes, from one of several arrays to another."""
    arrays = [
        torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda").fill_(1) for _ in range(2 * sets)
    ]
    return in_turns(
        [lambda a=a, b=b: b.copy_(a) for a, b in zip(arrays[::2], arrays[1::2], strict=True)]
    )


_LOSS = bce_and_jaccard()


def by_hand(logits: Any, targets: Any) -> Any:
    """Return BCE + the mean over the samples of one minus the soft Jaccard index."""
    return _LOSS(logits.float(), targets)


def backward(loss: Any, logits: Any, targets: Any) -> Call:
    """Return forward and backward of a PyTorch loss."""
    leaf, wide = logits.clone().requires_grad_(), targets.float()

    def call() -> None:
        leaf.grad = None
        loss(leaf, wide).backward()

    return call


def recorded(call: Call) -> Call:
    """Return the replay of a call that was recorded into a graph: no host in between."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def sets_of(size: int, dtype: Any) -> list[tuple[Any, Any, Any]]:
    """Return (logits, targets, out), as often as it takes to leave the L2 cache behind."""
    shape = (2, 1, size, size, size)
    item = torch.empty(0, dtype=dtype).element_size()
    nbytes = 2 * size**3 * (2 * item + 1)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(1, min(MOST_SETS, -(-2 * cache // nbytes)))
    made = []
    for _ in range(count):
        logits = torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
        targets = (torch.rand(shape, device="cuda") < 0.3).to(torch.uint8)
        made.append((logits, targets, torch.empty_like(logits)))
    return made


def compare_losses(size: int, dtype: Any, rounds: int, notes: list[str]) -> list[dict[str, Any]]:
    """Time the passes over volumes 2x1xsize³."""
    arrays = sets_of(size, dtype)
    logits = arrays[0][0]
    voxels, item = logits.numel(), logits.element_size()
    title = f"2x1x{size}³ {str(dtype).removeprefix('torch.')}"
    sums = [LOSS.statistics(x, t) for x, t, _ in arrays]
    statistics = [lambda x=x, t=t: LOSS.statistics(x, t) for x, t, _ in arrays]
    gradients = [
        lambda x=x, t=t, o=o, s=s: LOSS.gradient(x, t, s, out=o)
        for (x, t, o), s in zip(arrays, sums, strict=True)
    ]
    passes: dict[str, tuple[int, dict[str, Call]]] = {
        "statistics": (voxels * (item + 1), {"fastseg": in_turns(statistics)}),
        "gradient": (voxels * (2 * item + 1), {"fastseg": in_turns(gradients)}),
    }
    both = [lambda x=x, t=t, o=o: LOSS.value_and_grad(x, t, out=o) for x, t, o in arrays]
    contenders: dict[str, Call] = {
        "fastseg": in_turns(both),
        "graph": in_turns([recorded(c) for c in both]),
    }
    few = arrays[: 2 if size < 512 else 1]  # peers need much more memory
    contenders.update(peers_of(few, title, notes))
    passes["value_and_grad"] = (voxels * (3 * item + 2), contenders)
    rows = []
    for name, (nbytes, calls) in passes.items():
        calls["copy"] = copy(nbytes, max(1, min(MOST_SETS, len(arrays))))
        rows.append(
            {
                "pass": name,
                "volume": title,
                "bytes": nbytes,
                "seconds": interleaved(calls, rounds),
                "host": host_seconds(calls["fastseg"]),
            }
        )
        del calls["copy"]
    torch.cuda.empty_cache()
    return rows


def peers_of(arrays: list[Any], title: str, notes: list[str]) -> dict[str, Call]:
    """Return the peers that are installed and that this volume fits; others are noted."""
    contenders: dict[str, Call] = {}
    peers: dict[str, Any] = {
        "eager": by_hand,
        "torch.compile": torch.compile(by_hand, dynamic=False),
    }
    try:
        from monai.losses import DiceCELoss

        peers["MONAI"] = DiceCELoss(sigmoid=True, jaccard=True)
    except ImportError:
        notes.append("MONAI is not installed")
    for name, loss in peers.items():
        try:
            calls = [backward(loss, x, t) for x, t, _ in arrays]
            for call in calls:
                call()
            contenders[name] = in_turns(calls)
        except Exception as error:
            notes.append(
                f"{name}, {title}: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            )
    return contenders


def compare_adam(
    title: str, count: int, size: int, rounds: int, max_norm: float | None = None
) -> dict[str, Any]:
    """Time a step of Adam over ``count`` arrays, the norm clipped to ``max_norm`` if given."""
    params = [torch.randn(size, device="cuda") for _ in range(count)]
    grads = [torch.randn(size, device="cuda") for _ in range(count)]
    mine = fs.Adam([p.clone() for p in params], lr=1e-3)
    theirs = [p.requires_grad_() for p in params]
    for param, grad in zip(theirs, grads, strict=True):
        param.grad = grad
    fused = torch.optim.Adam(theirs, lr=1e-3, fused=True)
    nbytes = (ADAM_ARRAYS + (max_norm is not None)) * 4 * count * size

    def torch_step() -> None:
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        fused.step()

    calls: dict[str, Call] = {
        "fastseg": lambda: mine.step(grads, max_norm=max_norm),
        "torch fused": torch_step,
        "copy": copy(nbytes, 1),
    }
    row = {
        "pass": "Adam" if max_norm is None else "Adam, norm clipped",
        "volume": title,
        "bytes": nbytes,
        "seconds": interleaved(calls, rounds),
        "host": host_seconds(calls["fastseg"], 20),
    }
    torch.cuda.empty_cache()
    return row


# The table


def machine() -> str:
    """Name the GPU and the versions."""
    properties = torch.cuda.get_device_properties(0)
    versions = []
    for name in ("torch", "cupy-cuda12x", "cupy-cuda13x", "triton", "monai"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{properties.name} ({properties.multi_processor_count} multiprocessors, "
        f"{properties.L2_cache_size >> 20} MiB of L2); CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}, fastseg {fs.__version__}, {', '.join(versions)}; "
        f"{datetime.date.today().isoformat()}."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    peers = ("graph", "eager", "torch.compile", "MONAI", "torch fused")
    head = ["pass", "arrays", "fastseg", "of copy", "host", *(f"{p} / fastseg" for p in peers)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        seconds = row["seconds"]
        mine = seconds["fastseg"]
        ratios = [f"{seconds[p] / mine:.2f}x" if p in seconds else "-" for p in peers]
        share, host = seconds["copy"] / mine, row["host"]
        lines.append(
            [
                row["pass"],
                row["volume"],
                f"{mine * 1e6:.1f} µs",
                f"{share:.0%}",
                f"{host * 1e6:.0f} µs",
                *ratios,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Run the tests and the benchmarks, print the table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small volumes, few rounds")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks only")
    parser.add_argument("--json", type=Path, help="file to write all figures to, in seconds")
    options = parser.parse_args()
    failed = 0
    if not options.skip_tests:
        root = Path(__file__).parent.parent
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/test_gpu.py"]
        failed = subprocess.run(command, cwd=root).returncode
    rounds = 3 if options.quick else 9
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    for size in QUICK_SIZES if options.quick else SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            rows += compare_losses(size, dtype, rounds, notes)
    for title, (count, size) in (QUICK_ADAM if options.quick else ADAM).items():
        rows += [compare_adam(title, count, size, rounds, norm) for norm in (None, 1.0)]
    print(machine(), table(rows), sep="\n\n")
    print("\nTests failed." if failed else "", *(f"- {note}" for note in notes), sep="\n")
    if options.json:
        result = {"machine": machine(), "rows": rows, "notes": notes, "tests": failed}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
