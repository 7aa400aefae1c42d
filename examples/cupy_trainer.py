"""A trainer in CuPy: the GPU is never waited for until the training is over.

    python examples/cupy_trainer.py          # needs the extras demo and cuda12 or cuda13, and a GPU

Slabs of a volume that lies on the GPU are views: no copy is made of them. Value, sums and gradient
stay there, the optimiser clips the gradient's norm and drops a step that is not finite there, and
what is printed is fetched at the end.
"""

from __future__ import annotations

import cupy
import numpy as np

import fastseg as fs
from fastseg.demo_data import load_scan

DEPTH, POWERS = 16, 5


def main(steps: int = 60) -> list[tuple[float, float]]:
    """Train, print, and return the loss and the hard Jaccard index of each step."""
    scan = load_scan(quick=True)
    shape = (1, 1, *scan.image.shape)
    image = cupy.asarray(scan.image.reshape(shape).astype(np.float32) / 128 - 1)
    targets = cupy.asarray(scan.targets.reshape(shape))
    brain = cupy.asarray(scan.brain.reshape(shape))
    weights = cupy.asarray(np.zeros(POWERS, np.float32))
    grads = cupy.asarray(np.zeros(POWERS, np.float32))
    loss, optimiser = fs.BCE() + 2.0 * fs.SoftJaccard(), fs.Adam([weights], lr=0.1)
    rng, made = np.random.default_rng(0), []
    for _ in range(steps):
        middle = shape[-1] // 2
        start = int(rng.integers(middle - DEPTH, middle))
        slab = np.s_[..., start : start + DEPTH]
        x = [image[slab] ** k for k in range(POWERS)]  # what the model sees of each voxel
        logits = sum(weights[k] * x[k] for k in range(POWERS))
        value, grad, s = loss.evaluate(logits, targets[slab], mask=brain[slab], track=("hard",))
        for k in range(POWERS):
            grads[k] = (grad * x[k]).sum()
        optimiser.step([grads], max_norm=1.0, skip_non_finite=True)
        made.append((value, s))
    course = [(float(value.get()), float(s.jaccard_index())) for value, s in made]
    for step in range(0, steps, 10):
        print(
            f"step {step:3}: loss {course[step][0]:.4f}, hard Jaccard index {course[step][1]:.4f}"
        )
    return course


if __name__ == "__main__":
    main()
