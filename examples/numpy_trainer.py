"""A trainer in NumPy alone: a voxel-wise model learns the grey matter of a real volume.

    python examples/numpy_trainer.py         # needs the extra demo

A step is one read of the logits for the sums, one read and write for the gradient, and one pass
over the parameters; the hard Jaccard index of the step costs no pass of its own.
"""

from __future__ import annotations

import numpy as np

import fastseg as fs
from fastseg.demo_data import load_scan


def features(image: np.ndarray) -> np.ndarray:
    """Return (V, 5): what the model sees of each voxel: powers of its brightness."""
    x = image.reshape(-1) / 128 - 1
    return np.stack([x**k for k in range(5)], axis=1).astype(np.float32)


def main(steps: int = 60) -> list[tuple[float, float]]:
    """Train, print, and return the loss and the hard Jaccard index of each step."""
    scan = load_scan(quick=True)
    x, shape = features(scan.image), (1, 1, *scan.image.shape)
    targets, brain = scan.targets.reshape(shape), scan.brain.reshape(shape)
    weights = np.zeros(x.shape[1], np.float32)
    logits, grad = np.empty(shape, np.float32), np.empty(shape, np.float32)
    loss, optimiser = fs.BCE() + 2.0 * fs.SoftJaccard(), fs.Adam([weights], lr=0.1)
    course = []
    for step in range(steps):
        np.matmul(x, weights, out=logits.reshape(-1))
        value, _, s = loss.evaluate(logits, targets, mask=brain, track=("hard",), out=grad)
        optimiser.step([grad.reshape(-1) @ x])
        course.append((float(value), float(s.jaccard_index())))
        if step % 10 == 0:
            print(
                f"step {step:3}: loss {course[-1][0]:.4f}, hard Jaccard index {course[-1][1]:.4f}"
            )
    return course


if __name__ == "__main__":
    main()
