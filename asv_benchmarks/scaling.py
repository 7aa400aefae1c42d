"""How value and gradient scale: from 16³ to 2³¹ + 17 voxels, with one thread and with two.

    python asv_benchmarks/scaling.py [--largest VOXELS] [--json FILE] [--plot FILE]

One row of float16 logits with uint8 targets, ``out=`` given: 11 GB of arrays for the largest. Each
time is held against the larger of two bounds. The bytes': plain kernels that move what the call
moves, in the same two passes over the same memory. The arithmetic's: the time per voxel where all
is in the caches, the best of the sizes that are. Every result is checked: counts are exact, and the
gradient of the last voxels is what it is for these alone, with the sums of all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import interleaved, limit_of
from compare import machine
from tables import shown, table

import fastseg as fs

LOSS = (fs.BCE() + fs.SoftJaccard()).replace(layout="")
SIZES = tuple(16 * 2**k for k in range(7))
LARGEST = 2**31 + 17
IN_CACHE = 128**3  # voxels, 7 bytes each
TAIL = 1000  # voxels whose gradient is looked at
PERIOD = 2**20 + 7


def arrays_of(voxels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make logits, targets and a place for the gradient, without more memory than these."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(PERIOD, np.float32).astype(np.float16)
    labels = (rng.random(PERIOD) < 0.3).astype(np.uint8)
    logits, targets = np.empty(voxels, np.float16), np.empty(voxels, np.uint8)
    for start in range(0, voxels, PERIOD):
        end = min(voxels, start + PERIOD)
        logits[start:end], targets[start:end] = values[: end - start], labels[: end - start]
    return logits, targets, np.zeros(voxels, np.float16)


def peak_beside(call: Any) -> int:
    """Return by how many bytes the process's memory grew during a call, at the most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def verify(logits: np.ndarray, targets: np.ndarray, out: np.ndarray) -> None:
    """Raise an AssertionError if counts, or the gradient of the last voxels, are wrong."""
    _, _, s = LOSS.evaluate(logits, targets, track=("hard",), out=out)
    pieces = [slice(k, k + 2**26) for k in range(0, logits.size, 2**26)]
    hits = sum(np.count_nonzero((logits[k] >= 0) & (targets[k] != 0)) for k in pieces)
    foreground = sum(np.count_nonzero(targets[k]) for k in pieces)
    if (s["hard_true_positives"].item(), s["targets_sum"].item()) != (hits, foreground):
        raise AssertionError(f"{hits} hits of {foreground} foreground voxels, got {s!r}")
    alone = LOSS.gradient(logits[-TAIL:], targets[-TAIL:], s)
    if not np.array_equal(alone, out[-TAIL:]):
        raise AssertionError("the last voxels have another gradient alone than in the volume")


def measure(voxels: int, threads: int, arrays: Any) -> dict[str, Any]:
    """Time a size, its bytes, and its memory."""
    fs.set_num_threads(threads)
    logits, targets, out = arrays

    def call() -> Any:
        return LOSS.value_and_grad(logits, targets, out=out)

    call()
    beside = peak_beside(call)
    rounds = 3 if voxels > 2**28 else 9
    seconds = interleaved({"fastseg": call, "bytes": limit_of(*arrays)}, rounds)
    return {"voxels": voxels, "threads": threads, "beside": beside, **seconds}


def with_bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the arithmetic's own time, and the time over the larger of both bounds."""
    made = []
    for row in rows:
        alike = (r for r in rows if r["threads"] == row["threads"] and r["voxels"] <= IN_CACHE)
        per_voxel = min(r["fastseg"] / r["voxels"] for r in alike)
        arithmetic = per_voxel * row["voxels"]
        over = row["fastseg"] / max(arithmetic, row["bytes"])
        made.append(row | {"arithmetic": arithmetic, "over": over})
    return made


def named(voxels: int) -> str:
    """Name a size."""
    side = round(voxels ** (1 / 3))
    return f"{side}³" if side**3 == voxels else f"{voxels:,}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time per voxel over the size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for threads, marker in ((1, "o"), (2, "s")):
        mine = [row for row in rows if row["threads"] == threads]
        sizes = [row["voxels"] for row in mine]
        color = f"C{threads - 1}"
        for key, style, label in (
            ("fastseg", "-", "value and gradient"),
            ("bytes", ":", "its bytes alone"),
        ):
            times = [1e9 * row[key] / row["voxels"] for row in mine]
            name = f"{label}, {threads} thread{'s' if threads > 1 else ''}"
            axes.loglog(sizes, times, style, marker=marker, ms=4, color=color, label=name)
    axes.set(
        xlabel="voxels",
        ylabel="ns per voxel",
        title="BCE + soft Jaccard, float16 logits, uint8 targets",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scaling_table(rows: list[dict[str, Any]]) -> str:
    """Show each size: what a call takes, what its bytes take, and memory beside the arrays."""
    lines = [
        [
            named(row["voxels"]),
            str(row["threads"]),
            shown(row["fastseg"]),
            f"{1e9 * row['fastseg'] / row['voxels']:.2f}",
            f"{1e9 * row['bytes'] / row['voxels']:.2f}",
            f"{row['over']:.2f}",
            f"{row['beside'] / 2**20:.1f}",
        ]
        for row in rows
    ]
    head = [
        "voxels",
        "threads",
        "value and gradient",
        "ns per voxel",
        "its bytes, ns",
        "over the larger bound",
        "MB beside",
    ]
    return table(head, lines)


def main() -> None:
    """Measure, print the table, draw and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--largest", type=int, default=LARGEST, help="voxels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    name = machine()  # before the load is ours
    rows = []
    for voxels in sorted(
        {*(side**3 for side in SIZES if side**3 < options.largest), options.largest}
    ):
        arrays = arrays_of(voxels)
        rows += [measure(voxels, threads, arrays) for threads in (1, 2)]
        verify(*arrays)
        del arrays
        print(f"{named(voxels)} done", flush=True)
    rows = with_bounds(rows)
    print(name, scaling_table(rows), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": name, "rows": rows}, indent=2) + "\n")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
