"""The tables that the comparing scripts print, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ADAM_BYTES = 28  # per parameter: 4 arrays are read and 3 written


def ratio(seconds: dict[str, float], name: str, baseline: str = "fastseg") -> str:
    """Show how many times as long as the baseline a contender takes."""
    if name not in seconds:
        return "-"
    times = seconds[name] / seconds[baseline]
    return f"{times:.0f}x" if times >= 10.0 else f"{times:.2g}x"


def shown(seconds: float) -> str:
    """Show a time in the unit that suits it."""
    factor, unit = (1.0, "s") if seconds >= 1.0 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * factor:.3g} {unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, its first column text and the others numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loss_table(rows: list[dict[str, Any]], peers: Iterable[str]) -> str:
    """Show the losses: peers over fastseg, fastseg over the limit, fastseg's time."""
    head = ["Value and gradient, BCE + soft Jaccard", *(f"{n} / fastseg" for n in peers)]
    return table(
        [*head, "fastseg / machine's limit", "fastseg"],
        [
            [
                row["volume"],
                *(ratio(row["seconds"], name) for name in peers),
                ratio(row["seconds"], "fastseg", "limit"),
                shown(row["seconds"]["fastseg"]),
            ]
            for row in rows
        ],
    )


def class_table(rows: list[dict[str, Any]], peers: Iterable[str]) -> str:
    """Show the losses over classes, and the memory that a call takes beside its arrays."""
    head = ["Value and gradient, cross-entropy + soft Jaccard"]
    head += [f"{name} / fastseg" for name in peers]
    head += ["fastseg / machine's limit", "fastseg"]
    head += [f"extra memory of {name}" for name in ("fastseg", *peers)]
    return table(
        head,
        [
            [
                row["volume"],
                *(ratio(row["seconds"], name) for name in peers),
                ratio(row["seconds"], "fastseg", "limit"),
                shown(row["seconds"]["fastseg"]),
                *(f"{row['memory'][n] / row['gradient']:.2f} gradients" for n in row["memory"]),
            ]
            for row in rows
        ],
    )


def lovasz_table(rows: list[dict[str, Any]]) -> str:
    """Show the Lovász losses: a peer that sorts over both ways, and their times."""
    head = ["Value and gradient, Lovász", "PyTorch / sorted", "PyTorch / bins=4096"]
    return table(
        [*head, "sorted", "bins=4096", "extra memory, sorted", "bins"],
        [
            [
                row["volume"],
                ratio(row["seconds"], "PyTorch"),
                ratio(row["seconds"], "PyTorch", "bins"),
                shown(row["seconds"]["fastseg"]),
                shown(row["seconds"]["bins"]),
                *(
                    f"{row['memory'][way] / row['gradient']:.2f} gradients"
                    if "memory" in row
                    else "-"
                    for way in ("sorted", "bins")
                ),
            ]
            for row in rows
        ],
    )


def adam_table(rows: list[dict[str, Any]]) -> str:
    """Show Adam in the same order, and the bytes that fastseg moves."""
    head = ["Adam step, float32", "torch fused / fastseg", "torch foreach / fastseg"]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        for name in ("fastseg", "new gradients"):
            if name in seconds:
                lines.append(
                    [
                        row["arrays"] + (", new gradient objects" if name != "fastseg" else ""),
                        *(ratio(seconds, kind, name) for kind in ("fused", "foreach")),
                        ratio(seconds, name, "limit"),
                        f"{ADAM_BYTES * row['elements'] / seconds[name] / 1e9:.1f}",
                        shown(seconds[name]),
                    ]
                )
    return table([*head, "fastseg / machine's limit", "GB/s", "fastseg"], lines)


def small_table(calls: list[dict[str, Any]], first: dict[str, float]) -> str:
    """Show what a call costs beyond its kernels, and what the first one costs."""
    lines = [
        [
            f"{row['call']}, beyond its kernels ({shown(row['kernels'])})",
            shown(max(0.0, row["seconds"] - row["kernels"])),
        ]
        for row in calls
    ]
    imported = f"{shown(first['imported'])} until fastseg is imported"
    lines.append(
        [f"first gradient of a process, cached kernels ({imported})", shown(first["warm"])]
    )
    lines.append(["first gradient of a process, empty cache (compiles)", shown(first["cold"])])
    return table(["Around the kernels", "time"], lines)
