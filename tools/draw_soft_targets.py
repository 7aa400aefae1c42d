"""Draw docs/soft_targets.png: what each form of the soft Jaccard loss does to a soft target.

    python tools/draw_soft_targets.py [FILE]

Every voxel has the target p = 0.3 or 0.7 and the prediction q; the loss is drawn over q.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib
import numpy as np

import fastseg as fs

matplotlib.use("Agg")
FORMS: tuple[Any, ...] = ("product", "l1", "squared")


def main(path: str) -> None:
    """Draw one panel for each target."""
    from matplotlib import pyplot

    q = np.linspace(0.005, 0.995, 199)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, target in zip(axes, (0.3, 0.7), strict=True):
        for form in FORMS:
            loss = fs.SoftJaccard(form=form).replace(activation=None)
            values = [float(loss(np.full((1, 1, 8), x), np.full((1, 1, 8), target))) for x in q]
            least = q[int(np.argmin(values))]
            axis.plot(q, values, label=f'form="{form}": least at q = {least:.2f}')
            axis.plot(least, min(values), "o", color=axis.lines[-1].get_color())
        axis.axvline(target, color="gray", linestyle=":", label=f"the target, p = {target}")
        axis.set(xlabel="prediction q of every voxel", title=f"target p = {target}")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("soft Jaccard loss")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/soft_targets.png")
