"""A user's program, for type checkers: what public names take, give and refuse."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import fastseg as fs

loss: fs.Loss = fs.BCE() + 2.0 * fs.SoftJaccard(scope="batch", empty="one")
classes: fs.Loss = (fs.CrossEntropy() + fs.SoftDice()).replace(layout="N")


def train(logits: NDArray[np.float32], targets: NDArray[np.uint8]) -> list[float]:
    """Fit the logits themselves."""
    optimizer = fs.Adam([logits], lr=0.1)
    found: list[float] = []
    for _ in range(3):
        value, grad, s = loss.evaluate(logits, targets, track=("hard",))
        optimizer.step([grad], max_norm=1.0)
        found.append(float(value) + float(s.jaccard_index()))
    return found


def score(parts: list[fs.Statistics]) -> float:
    """Join what was summed up elsewhere."""
    total: fs.Statistics = fs.concatenate_statistics(parts)
    array: NDArray[np.float64] = total.array
    return float(loss.value(total)) + float(array.sum())


def mistakes() -> None:
    """Hold what a type checker is to find; an ignore that nothing needs is an error."""
    fs.SoftDice(scope="samples")  # type: ignore[arg-type]
    fs.BCE(normalize="mean")  # type: ignore[arg-type]
    fs.Adam([np.zeros(3)], rate=0.1)  # type: ignore[call-arg]
    loss.statistic  # type: ignore[attr-defined]  # noqa: B018


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    truth = (rng.random((1, 1, 8, 8)) < 0.3).astype(np.uint8)
    start = rng.normal(size=truth.shape).astype(np.float32)
    assert train(start, truth)[-1] > 0
    assert score([loss.statistics(start, truth, samples="first")]) > 0
    assert fs.jaccard_index(start, truth) <= 1
