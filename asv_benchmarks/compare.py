"""The README's table: fastseg, its peers and the machine's limit, in turns in one process.

    python asv_benchmarks/compare.py [--quick] [--threads N] [--json FILE]

Every figure is a median of rounds, in each of which every contender has one turn. Arrays are made
before, fastseg writes to ``out=``, and kernels are compiled in a call that does not count.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import peers
from benchmarks.calls import first_gradient
from benchmarks.common import (
    Call,
    Volume,
    classes,
    interleaved,
    update_limit,
    value_and_grad_limit,
    volume,
)
from benchmarks.losses import LOSS, SOFTMAX_LOSS
from benchmarks.updates import LISTS, LR, parameters
from tables import adam_table, class_table, loss_table, lovasz_table, small_table

import fastseg as fs
from fastseg_kernels.cpu import small_calls
from fastseg_kernels.cpu import threads as kernel_threads

SAME_VALUE = 1e-4  # MONAI smooths the quotient
PEERS = {
    "PyTorch eager": peers.eager,
    "torch.compile": peers.compiled,
    "MONAI DiceCELoss": peers.monai,
}
SOFTMAX_PEERS = {"PyTorch eager": peers.eager_softmax, "MONAI DiceCELoss": peers.monai_softmax}
MEMORY = """
import sys
from benchmarks import peers
from benchmarks.calls import first_gradient
from benchmarks.common import classes, volume
import fastseg as fs
name, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
losses = {
    "fastseg": fs.CrossEntropy() + fs.SoftJaccard(),
    "sorted": fs.LovaszHinge(scope="batch"),
    "bins": fs.LovaszHinge(scope="batch", bins=4096),
}
def run(arrays):
    if name in losses:
        losses[name].value_and_grad(arrays.logits, arrays.targets)
    else:
        make = {"PyTorch eager": peers.eager_softmax, "MONAI DiceCELoss": peers.monai_softmax}
        make[name](arrays)()
def make(size):
    return classes(count, size) if count > 1 else volume("float32", size, "uint8")
run(make(32))  # whatever is loaded or compiled is in both, threads too
arrays = make(size)
if sys.argv[4] == "compute":
    run(arrays)
print("done", flush=True)
sys.stdin.read()
"""


# (a), (b): the loss


def compare_losses(sizes: tuple[int, ...], rounds: int, notes: list[str]) -> list[dict[str, Any]]:
    """Time the value and the gradient of BCE + soft Jaccard."""
    rows = []
    for size in sizes:
        calls = loss_calls(LOSS, PEERS, volume("float32", size, "uint8"), f"{size}³", notes)
        rows.append({"volume": f"2x1x{size}³", "seconds": interleaved(calls, rounds)})
        calls.clear()
        volume.cache_clear()  # a gigabyte where volumes are large
    return rows


def compare_classes(
    volumes: tuple[tuple[int, int], ...], rounds: int, notes: list[str]
) -> list[dict[str, Any]]:
    """Time the value and the gradient of cross-entropy + soft Jaccard over classes."""
    rows = []
    for count, size in volumes:
        name, arrays = f"1x{count}x{size}³", classes(count, size)
        calls = loss_calls(SOFTMAX_LOSS, SOFTMAX_PEERS, arrays, name, notes)
        seconds = interleaved(calls, rounds)
        memory = {peer: extra_memory(peer, count, size) for peer in ("fastseg", *SOFTMAX_PEERS)}
        rows.append(
            {"volume": name, "seconds": seconds, "memory": memory, "gradient": arrays.out.nbytes}
        )
        calls.clear()
        classes.cache_clear()
    return rows


def compare_lovasz(size: int, rounds: int, notes: list[str]) -> list[dict[str, Any]]:
    """Time the value and the gradient of the Lovász losses, sorted and counted in bins."""
    rows = []
    for name, of_bins, peer, make in (
        (f"hinge, 2x1x{size}³", fs.LovaszHinge, peers.lovasz_hinge, volume),
        (f"softmax, 1x4x{size}³", fs.LovaszSoftmax, peers.lovasz_softmax, classes),
    ):
        arrays = volume("float32", size, "uint8") if make is volume else classes(4, size)
        calls = loss_calls(of_bins(scope="batch"), {"PyTorch": peer}, arrays, name, notes)
        counted = loss_calls(of_bins(scope="batch", bins=4096), {}, arrays, name, notes)
        calls["bins"] = counted["fastseg"]
        difference = abs(float(calls["bins"]()) / float(calls["fastseg"]()) - 1.0)
        notes.append(f"Lovász {name}: bins=4096 differs from sorting by {difference:.1e}")
        row: dict[str, Any] = {"volume": name, "seconds": interleaved(calls, rounds)}
        if make is volume:
            memory = {way: extra_memory(way, 1, size) for way in ("sorted", "bins")}
            row |= {"memory": memory, "gradient": arrays.out.nbytes}
        rows.append(row)
        calls.clear()
        make.cache_clear()
    return rows


def extra_memory(name: str, count: int, size: int) -> int:
    """Return the bytes that a call adds to the peak of a process, as its parent sees it.

    That is the peak of one that makes its arrays and calls, less that of one that makes them only.
    The first compiles what is not in the cache, and does not count.
    ``count`` is of classes; 1: of two samples of one class.
    """
    peaks = []
    for step in ("make", "compute", "make"):
        command = [sys.executable, "-c", MEMORY, name, str(count), str(size), step]
        with subprocess.Popen(
            command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            if child.stdout.readline() != b"done\n":
                raise RuntimeError(f"measuring the memory of {name} failed")
            status = Path(f"/proc/{child.pid}/status").read_text()  # while it waits for its end
            peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            peaks.append(int(peak.split()[1]) * 1024)
            child.communicate()
    return peaks[1] - peaks[2]


def loss_calls(
    loss: fs.Loss, others: dict[str, Any], arrays: Volume, size: str, notes: list[str]
) -> dict[str, Call]:
    """Make the calls of all contenders; note which are left out, and values that differ."""
    logits, targets, out = arrays
    calls: dict[str, Call] = {
        "fastseg": lambda: loss.value_and_grad(logits, targets, out=out)[0],
        "limit": value_and_grad_limit(arrays),
    }
    value = float(calls["fastseg"]())
    for name, make in others.items():
        start = time.perf_counter()
        try:
            calls[name] = make(arrays)
        except Exception as error:  # no library, no C++ compiler: torch has many classes for it
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            notes.append(f"{name}, {size}: skipped, {type(error).__name__}: {reason[:120]}")
            continue
        if name == "torch.compile":
            taken = time.perf_counter() - start
            notes.append(f"{name}, {size}: first call, not counted, took {taken:.1f} s")
        difference = abs(float(calls[name]()) - value)
        if not difference < SAME_VALUE:
            notes.append(f"{name}, {size}: its value differs by {difference:.1e}")
    return calls


# (c): Adam


def compare_adam(lists: dict[str, tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Time steps of Adam; where there are many arrays, also with new gradient objects."""
    rows = []
    for name, (count, size) in lists.items():
        params, grads = parameters(count, size)
        optimizer = fs.Adam([param.copy() for param in params], lr=LR)
        calls: dict[str, Call] = {"fastseg": lambda o=optimizer, g=grads: o.step(g)}
        if count > 1:
            other = fs.Adam([param.copy() for param in params], lr=LR)
            turns = itertools.cycle([grads, [grad.copy() for grad in grads]])
            calls["new gradients"] = lambda o=other, turns=turns: o.step(next(turns))
        calls["limit"] = update_limit(4 * count * size, 4)
        for kind in ("fused", "foreach"):
            try:
                calls[kind] = peers.adam(params, grads, kind)
            except ImportError:
                continue
        for call in calls.values():
            call()
        rows.append(
            {"arrays": name, "elements": count * size, "seconds": interleaved(calls, rounds)}
        )
    return rows


# (d): what a call costs beyond its kernels


def seconds_per_call(call: Call, count: int = 300, batches: int = 15) -> float:
    """Return the median, over batches, of the mean time of a call."""
    means = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(count):
            call()
        means.append((time.perf_counter() - start) / count)
    return median(means)


def seconds_in_kernels(call: Call) -> float:
    """Return the time that one call spends in its kernels, each run again and again for it."""
    seconds = []
    run, whole = kernel_threads.run, small_calls.whole_kernel()
    at_once = whole.call

    def measured(*job: Any) -> None:
        seconds.append(seconds_per_call(lambda: run(*job)))

    def measured_at_once(*job: int) -> None:
        seconds.append(seconds_per_call(lambda: at_once(*job)))

    kernel_threads.run, whole.call = measured, measured_at_once
    try:
        call()
    finally:
        kernel_threads.run, whole.call = run, at_once
    return sum(seconds)


def call_overheads() -> list[dict[str, Any]]:
    """Time public calls on arrays so small that little but the call is left."""
    logits, targets, out = volume("float32", 8, "uint8")
    params, grads = parameters(10, 100)
    step = fs.Adam(params, lr=LR).step
    calls: dict[str, Call] = {
        "value_and_grad of 2x1x8³": lambda: LOSS.value_and_grad(logits, targets, out=out),
        "Adam step of 10 arrays of 100": lambda: step(grads),
    }
    rows = []
    for name, call in calls.items():
        call()
        total, kernels = seconds_per_call(call), seconds_in_kernels(call)
        rows.append({"call": name, "seconds": total, "kernels": kernels})
    return rows


# (e): the first gradient of a process


def starts(count: int) -> dict[str, float]:
    """Time first gradients with a warm cache (median) and once with an empty one."""
    first_gradient()  # fills the cache, and the file system's
    warm = [first_gradient() for _ in range(count)]
    with tempfile.TemporaryDirectory() as empty:
        cold = first_gradient(empty)
    return {
        "imported": median(w[0] for w in warm),
        "warm": median(w[1] for w in warm),
        "cold": cold[1],
    }


# The table


def machine() -> str:
    """Name the machine, the threads and the versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    versions = []
    for name in ("numpy", "numba", "torch", "monai"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    count = fs.get_num_threads()
    return (
        f"{cpu} ({os.cpu_count()} CPUs, {load} before the start), {count} thread"
        f"{'s' * (count != 1)}; fastseg {fs.__version__}, Python {platform.python_version()}, "
        f"{', '.join(versions)}; {datetime.date.today().isoformat()}."
    )


def main() -> None:
    """Measure, print the table, and write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 256³ volume")
    parser.add_argument("--threads", type=int, default=2, help="of fastseg and of every peer")
    parser.add_argument("--json", type=Path, help="file to write all figures to, in seconds")
    options = parser.parse_args()
    fs.set_num_threads(options.threads)
    sizes = (64, 128) if options.quick else (64, 128, 256)
    rounds = 3 if options.quick else 15
    lists = {"1 of 1M": (1, 2**20), "2000 of 1000": (2000, 1000)} if options.quick else LISTS
    notes: list[str] = []
    result: dict[str, Any] = {"machine": machine()}  # before the load is ours
    result["losses"] = compare_losses(sizes, rounds, notes)
    several = ((4, 64),) if options.quick else ((4, 128), (16, 128), (4, 256))
    result["classes"] = compare_classes(several, rounds, notes)
    result["lovasz"] = compare_lovasz(64 if options.quick else 128, min(rounds, 7), notes)
    result["adam"] = compare_adam(lists, rounds)
    result["calls"] = call_overheads()
    result["first"] = starts(1 if options.quick else 5)
    print(result["machine"], end="\n\n")
    tables = (
        loss_table(result["losses"], PEERS),
        class_table(result["classes"], SOFTMAX_PEERS),
        lovasz_table(result["lovasz"]),
        adam_table(result["adam"]),
        small_table(result["calls"], result["first"]),
    )
    print(*tables, sep="\n\n")
    if notes:
        print("", *(f"- {note}" for note in notes), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({**result, "notes": notes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
