"""The picture of the demo: held-out slices, what is made of them, and how it was learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastseg.demo_data import BIAS, NOISE, BoolArray, FloatArray, Scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PAPER, INK, FAINT, GRID = "#14171c", "#e8eaed", "#9aa3ad", "#2b3139"
# Colours that colour-blind people tell apart, and that differ in lightness too.
RIGHT, MISSED, WRONG, LEARNT = "#c9d3dc", "#3f8cff", "#ff8f2e", "#5fd3b4"
TITLES = {"threshold": "Best threshold", "logistic": "Logistic model"}
SHOWN = 3
LEAST_AREA = 0.6
"""Slices are shown that are at least this large, compared with the largest of those held out."""
DPI = 130


class Curves(NamedTuple):
    """What is plotted beside the slices; levels are the final hard Jaccard indices."""

    losses: list[float]
    jaccards: list[float]
    held_out: list[tuple[int, float]]
    levels: dict[str, float]


def draw(path: Path, scan: Scan, calls: dict[str, BoolArray], curves: Curves) -> None:
    """Draw the picture to a PNG file.

    Parameters
    ----------
    path
        Written to.
    scan
        From `fastseg.demo_data.load_scan`.
    calls
        For "threshold" and "logistic", the held-out voxels that are called grey, (D, H, W).
    curves
        Of the training.
    """
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.facecolor": PAPER,
        "axes.labelcolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "figure.facecolor": PAPER,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(16.0, 10.0))
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.42, 1.0), facecolor=PAPER)
        _draw_slices(parts[0], scan, calls)
        _draw_curves(parts[1], curves)
        _write_words(figure)
        figure.savefig(path, dpi=DPI)


def _write_words(figure: Figure) -> None:
    """Write the title, and what the pictures are of."""
    below = "Axial slabs that were held out. Errors are coloured, numbers are hard Jaccard indices."
    source = (
        "Semi-synthetic: the MNI152 template (a population average) with a bias field of "
        f"{BIAS:.0%} and Rician noise, sigma {NOISE:g} of 255. Truth: its grey-matter map, "
        "probability 0.5 or more."
    )
    lines = (
        (0.955, "Grey matter, voxel by voxel", 21.0, "bold", INK),
        (0.918, below, 12.0, "normal", FAINT),
        (0.022, source, 9.5, "normal", FAINT),
    )
    for height, words, size, weight, colour in lines:
        figure.text(0.026, height, words, size=size, weight=weight, color=colour, va="center")


def _draw_slices(part: SubFigure, scan: Scan, calls: dict[str, BoolArray]) -> None:
    """Draw a row per slice: the image, the truth, and each classifier's calls."""
    from matplotlib.patches import Patch

    shown, (rows, columns) = _choose(scan)
    axes = part.subplots(
        SHOWN, 2 + len(calls), squeeze=False,
        gridspec_kw={
            "left": 0.055, "right": 0.985, "top": 0.86, "bottom": 0.1, "wspace": 0.02,
            "hspace": 0.05,
        },
    )  # fmt: skip
    for row, z in zip(axes, shown, strict=True):
        image = scan.image[z, rows, columns]
        brain, truth = (volume[z, rows, columns] for volume in (scan.brain, scan.targets))
        _show(row[0], _grey(image, brain, 1.0))
        _show(row[1], _coloured(image, brain, truth, truth))
        height = f"z = {scan.heights[z]:+.0f} mm".replace("-", "\N{MINUS SIGN}")
        row[0].set_ylabel(height, color=FAINT, labelpad=8)
        for ax, volume in zip(row[2:], calls.values(), strict=True):
            called = volume[z, rows, columns]
            _show(ax, _coloured(image, brain, truth, called))
            jaccard = (called & truth & brain).sum() / ((called | truth) & brain).sum()
            ax.text(0.98, 0.02, f"{jaccard:.2f}", transform=ax.transAxes, ha="right", fontsize=12)
    names = ["Degraded image", "Truth", *(TITLES[name] for name in calls)]
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=12.5, pad=8)
    keys = {"grey matter": RIGHT, "missed": MISSED, "wrongly called grey": WRONG}
    part.legend(
        handles=[Patch(color=colour, label=label) for label, colour in keys.items()],
        loc="center", bbox_to_anchor=(0.52, 0.068), ncols=3, frameon=False, handlelength=1.1,
        handleheight=1.1, columnspacing=2.5,
    )  # fmt: skip


def _choose(scan: Scan) -> tuple[list[int], tuple[slice, slice]]:
    """Return held-out slices from top to bottom, and the part of a slice that holds their brain."""
    area = scan.brain.sum(axis=(1, 2)) * scan.held_out
    large = np.flatnonzero(area >= LEAST_AREA * area.max())
    shown = large[np.linspace(len(large) - 1, 0, SHOWN).round().astype(int)].tolist()
    brain = scan.brain[shown].any(axis=0)
    spans = (np.flatnonzero(brain.any(axis=axis)) for axis in (1, 0))
    rows, columns = (slice(max(0, int(span[0]) - 4), int(span[-1]) + 5) for span in spans)
    return shown, (rows, columns)


def _show(ax: Axes, picture: FloatArray) -> None:
    ax.imshow(picture, origin="lower", interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _rgb(colour: str) -> FloatArray:
    from matplotlib.colors import to_rgb

    return np.array(to_rgb(colour), np.float32)


def _grey(image: FloatArray, brain: BoolArray, strength: float) -> FloatArray:
    """Return the image as shades on the paper's colour, (H, W, 3)."""
    bright = np.clip(image / np.float32(275.0), 0.0, 1.0) * np.float32(strength)
    picture = np.repeat(bright[..., None], 3, axis=2)
    return np.where(brain[..., None], picture, _rgb(PAPER))


def _coloured(
    image: FloatArray, brain: BoolArray, truth: BoolArray, called: BoolArray
) -> FloatArray:
    """Return the faint image with right calls, misses and wrong calls painted over it."""
    picture = _grey(image, brain, 0.3)
    marks = ((truth & called, RIGHT), (truth & ~called, MISSED), (called & ~truth, WRONG))
    for where, colour in marks:
        picture[where & brain] = _rgb(colour)
    return picture


def _draw_curves(part: SubFigure, curves: Curves) -> None:
    """Draw the loss and, below it, the hard Jaccard index at each step."""
    top, bottom = part.subplots(
        2, 1, sharex=True,
        gridspec_kw={"left": 0.12, "right": 0.945, "top": 0.86, "bottom": 0.125, "hspace": 0.2},
    )  # fmt: skip
    steps = np.arange(len(curves.losses))
    last = len(steps)
    for ax, title in ((top, "Loss: BCE + soft Jaccard"), (bottom, "Hard Jaccard index")):
        ax.set_title(title, fontsize=12.5, loc="left", pad=8)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xlim(0, last)
    top.plot(steps, curves.losses, color=LEARNT, linewidth=2)
    top.set_ylim(bottom=0)
    bottom.plot(steps, curves.jaccards, color=LEARNT, linewidth=2, label="training slabs")
    at, held_out = zip(*curves.held_out, strict=True)
    bottom.plot(at, held_out, "o", color=INK, markersize=3.5, clip_on=False, label="held-out slabs")
    level = curves.levels["threshold"]
    bottom.axhline(level, color=WRONG, linewidth=1.6, linestyle=(0, (5, 3)))
    reached = curves.levels["logistic"]
    above = reached > curves.jaccards[-1]  # so that the words do not cross the other curve
    for height, name, colour, up in (
        (level, "threshold, held out", WRONG, level < reached),
        (reached, "logistic, held out", INK, above),
    ):
        bottom.annotate(
            f"{name}: {height:.3f}", (last, height), (-4, 7 if up else -7), ha="right",
            va="bottom" if up else "top", textcoords="offset points", color=colour, fontsize=11,
        )  # fmt: skip
    bottom.set_ylim(np.floor(10 * min(*curves.jaccards, *held_out, level) - 0.1) / 10, 1.0)
    bottom.set_xlabel("steps of Adam")
    bottom.legend(loc="lower right", frameon=False, fontsize=10)
