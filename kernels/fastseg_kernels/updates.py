"""What the updates of every backend share: the rules as numbers, and lists of arrays as tasks.

The rules are those of ``reference/updates.py``, under the same names. Three kernels serve all of
them. With g <- grad_scale g + l2 theta, and coefficients that Python computes in float64:

    descent    theta <- theta - lr g
    momentum   v <- keep v + add g;  theta <- theta - (by_v v + by_g g)
    adam       m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
               theta <- (theta - decay theta) - rate m / (root sqrt(v) + eps)

with rate = lr / (1 - beta1^t) and root = 1 / sqrt(1 - beta2^t), so that the fraction is Algorithm
1's. An element depends on nothing but itself: its bits are the same however the work is divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COEFFICIENTS = 8
"""Numbers that a kernel takes: grad_scale, l2, and those of the rule in the order given above."""
TENSOR_FIELDS = ("param", "grad", "first", "second", "size")
"""What a kernel knows of each array: addresses (``first`` and ``second`` are those of the states, 0
where there is none) and the number of elements."""
TASK = np.dtype([("tensor", np.int64), ("start", np.int64)])
"""Where a task begins: which array, and which of its elements."""


class Rule(NamedTuple):
    """A rule with its hyper-parameters; what changes from step to step is not in it."""

    kernel: str  # "descent", "momentum" or "adam"
    coefficients: tuple[float, ...]  # for a step size, a scale and corrections by step of 1
    by_lr: tuple[int, ...]  # which coefficients the step size multiplies
    betas: tuple[float, float] | None = None  # decay of Adam's moments, corrected step by step

    def at(self, step: int, lr: float, grad_scale: float) -> list[float]:
        """Return the coefficients of one step; ``step`` is 1 at the first."""
        numbers = list(self.coefficients)
        numbers[0] *= grad_scale
        for k in self.by_lr:
            numbers[k] *= lr
        if self.betas is not None:
            for k, factor in zip(BY_STEP, corrections(self.betas, step), strict=True):
                numbers[k] *= factor
        return numbers


BY_STEP = (6, 7)
"""Adam's coefficients that the number of the step changes: rate and root."""


def corrections(betas: tuple[float, float], step: int) -> tuple[float, float]:
    """Return what Adam's rate and root are multiplied by at a step."""
    beta1, beta2 = betas
    return 1.0 / (1.0 - beta1**step), 1.0 / sqrt(1.0 - beta2**step)


def gradient_descent(*, weight_decay: float = 0.0) -> Rule:
    """Return the rule theta <- theta - lr g."""
    return Rule("descent", (1.0, weight_decay, 1.0), (2,))


def momentum(gamma: float, nesterov: bool = False, *, weight_decay: float = 0.0) -> Rule:
    """Return the source's rule v <- gamma v + lr g; theta <- theta - v."""
    by_v, by_g = (gamma, 1.0) if nesterov else (1.0, 0.0)
    return Rule("momentum", (1.0, weight_decay, gamma, 1.0, by_v, by_g), (3, 5))


def momentum_pytorch(
    first: bool,
    gamma: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    *,
    weight_decay: float = 0.0,
) -> Rule:
    """Return the rule of torch.optim.SGD.

    At the first step, said by ``first``, the buffers become the gradients, undamped.
    """
    keep, add = (0.0, 1.0) if first else (gamma, 1.0 - dampening)
    by_v, by_g = (gamma, 1.0) if nesterov else (1.0, 0.0)
    return Rule("momentum", (1.0, weight_decay, keep, add, by_v, by_g), (4, 5))


def adam(
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Rule:
    """Return Adam's rule."""
    l2, decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    numbers = (1.0, l2, decay, beta1, beta2, eps, 1.0, 1.0)
    return Rule("adam", numbers, (2, 6), (beta1, beta2))


class Cut(NamedTuple):
    """The arrays of one dtype, laid end to end and cut into tasks."""

    real: str  # the dtype
    indices: list[int]  # which arrays of the list; those without elements are left out
    sizes: NDArray[np.int64]  # elements of each of them
    tasks: NDArray[np.void]  # `TASK`
    length: int  # of the line


def cut(sizes: Sequence[int], dtypes: Sequence[str], chunk: int, multiple: int = 1) -> list[Cut]:
    """Cut arrays into tasks of ``chunk`` elements, those of each dtype by themselves.

    A task may hold many small arrays or a part of a large one. Each array takes a multiple of
    ``multiple`` places in the line, so that tasks start at multiples of it in every array.
    """
    parts = []
    for real in sorted(set(dtypes)):
        indices = [i for i, size in enumerate(sizes) if size > 0 and dtypes[i] == real]
        counts = np.array([sizes[i] for i in indices], np.int64)
        places = -(-counts // multiple) * multiple
        ends = np.cumsum(places)
        length = int(places.sum())
        position = np.arange(0, length, chunk)
        tasks = np.zeros(len(position), TASK)
        tasks["tensor"] = np.searchsorted(ends, position, side="right")
        tasks["start"] = position - (ends - places)[tasks["tensor"]]
        if length > 0:
            parts.append(Cut(real, indices, counts, tasks, length))
    return parts
