"""What the updates of every backend share: the rules as numbers, and lists of arrays as tasks.

The rules are those of ``reference/updates.py``, under the same names. Four kernels serve all of
them. With g <- grad_scale g + l2 theta, and coefficients that Python computes in float64:

    descent    theta <- theta - lr g
    momentum   v <- keep v + add g;  theta <- theta - (by_v v + by_g g)
    adam       m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
               theta <- (theta - decay theta) - rate m / (root sqrt(v) + eps)
    amsgrad    adam, with the largest v so far in the root

with rate = lr / (1 - beta1^t) and root = 1 / sqrt(1 - beta2^t), so that the fraction is Algorithm
1's. An element depends on nothing but itself: its bits are the same however the work is divided.

Parameters of 2 bytes have float32 masters, which are what is updated; the parameter is its master,
rounded. One that is not was written by others since the last step, and becomes the master's value.

States of 2 bytes (bfloat16) are rounded up or down by chance, in proportion to the distance, so
that the mean is kept: v changes by a thousandth at a step and, rounded to nearest, would stand
still, 2^-9 being half a unit. Chance is a hash of the step and the element's place (`STEP_STRIDE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COEFFICIENTS = 8
"""Numbers that a kernel takes, in the order of `COEFFICIENT_NAMES`; a rule may have fewer."""
COEFFICIENT_NAMES = {
    "descent": ("grad_scale", "l2", "lr"),
    "momentum": ("grad_scale", "l2", "keep", "add", "by_v", "by_g", "add_at_first"),
    "adam": ("grad_scale", "l2", "decay", "beta1", "beta2", "eps", "rate", "root"),
    "amsgrad": ("grad_scale", "l2", "decay", "beta1", "beta2", "eps", "rate", "root"),
}
"""What ``k[0]``, ``k[1]``, ... are in the kernels of a rule."""
STATE_COUNTS = {"descent": 0, "momentum": 1, "adam": 2, "amsgrad": 3}
"""How many states the kernels of a rule have."""
TENSOR_FIELDS = ("param", "grad", "master", "first", "second", "third", "size")
"""What a kernel knows of each array: addresses (``first`` to ``third`` are those of the states; 0
where there is none) and the number of elements."""
STEP_STRIDE = 0x9E3779B9
"""Chance is a hash of an element's place plus this much for each step: 2^32 / golden ratio, so that
steps in a row come nowhere near each other's places."""
MASTERED = ("float16", "bfloat16")
"""Parameters of these dtypes have masters."""
TASK = np.dtype([("tensor", np.int64), ("start", np.int64)])
"""Where a task begins: which array, and which of its elements."""


class Rule(NamedTuple):
    """A rule with its hyper-parameters; what changes from step to step is not in it."""

    kernel: str  # one of `STATE_COUNTS`
    coefficients: tuple[float, ...]  # for a step size, a scale and corrections by step of 1
    by_lr: tuple[int, ...]  # which coefficients the step size multiplies
    betas: tuple[float, float] | None = None  # decay of Adam's moments, corrected step by step

    @property
    def depends_on_step(self) -> bool:
        """Tell whether the number of the step changes a coefficient."""
        return len(self.coefficients) > BY_STEP[0]

    def at(self, step: int, lr: float, grad_scale: float) -> list[float]:
        """Return the `COEFFICIENTS` numbers of one step; ``step`` is 1 at the first."""
        numbers = [*self.coefficients, *[0.0] * (COEFFICIENTS - len(self.coefficients))]
        numbers[0] *= grad_scale
        for k in self.by_lr:
            numbers[k] *= lr
        if self.depends_on_step:
            for k, factor in zip(BY_STEP, corrections(self, step), strict=True):
                numbers[k] *= factor
        return numbers


BY_STEP = (6, 7)
"""The coefficients that the number of the step changes, and no others can be: Adam's rate and root,
and momentum's add_at_first."""


def corrections(rule: Rule, step: int) -> tuple[float, float]:
    """Return what the coefficients `BY_STEP` are multiplied by at a step."""
    if rule.betas is None:  # momentum's, or there is no such coefficient
        return float(step == 1), 0.0
    beta1, beta2 = rule.betas
    return 1.0 / (1.0 - beta1**step), 1.0 / sqrt(1.0 - beta2**step)


class Guard(NamedTuple):
    """What may shorten a step or drop it. Its numbers may be views of the backend's memory."""

    norm: Any = None  # of all gradients together, before they are scaled
    max_norm: float = inf  # of the scaled gradients; longer ones are shortened to it
    skip_non_finite: bool = False  # drop the step where the norm is not finite
    found_inf: Any = 0.0  # drop the step unless this is 0


def guarded_scale(grad_scale: float, guard: Guard) -> float | None:
    """Return the scale of the gradients once they are clipped; None: the step is dropped."""
    if guard.found_inf != 0:
        return None
    if guard.norm is None:
        return grad_scale
    norm = abs(grad_scale) * guard.norm
    if guard.skip_non_finite and not isfinite(norm):
        return None
    return grad_scale * (guard.max_norm / norm) if norm > guard.max_norm else grad_scale


def gradient_descent(*, weight_decay: float = 0.0) -> Rule:
    """Return the rule theta <- theta - lr g."""
    return Rule("descent", (1.0, weight_decay, 1.0), (2,))


def momentum(gamma: float, nesterov: bool = False, *, weight_decay: float = 0.0) -> Rule:
    """Return the source's rule v <- gamma v + lr g; theta <- theta - v."""
    by_v, by_g = (gamma, 1.0) if nesterov else (1.0, 0.0)
    return Rule("momentum", (1.0, weight_decay, gamma, 1.0, by_v, by_g), (3, 5))


def momentum_pytorch(
    gamma: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    *,
    weight_decay: float = 0.0,
) -> Rule:
    """Return the rule of torch.optim.SGD; at the first step the gradients are not dampened."""
    by_v, by_g = (gamma, 1.0) if nesterov else (1.0, 0.0)
    at_first = () if dampening == 0 else (dampening,)
    numbers = (1.0, weight_decay, gamma, 1.0 - dampening, by_v, by_g, *at_first)
    return Rule("momentum", numbers, (4, 5))


def adam(
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
) -> Rule:
    """Return Adam's rule."""
    l2, decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    numbers = (1.0, l2, decay, beta1, beta2, eps, 1.0, 1.0)
    return Rule("amsgrad" if amsgrad else "adam", numbers, (2, 6), (beta1, beta2))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.int16]:
    """Return the bits of the nearest bfloat16, ties to even; states are given by hosts so."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    quiet = bits >> 16 | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(np.int16)


def from_bfloat16(bits: NDArray[np.int16]) -> NDArray[np.float32]:
    """Return the values of bfloat16 numbers that are given by their bits."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class Cut(NamedTuple):
    """The arrays of one dtype, laid end to end and cut into tasks."""

    dtype: str  # of the parameters and gradients
    indices: NDArray[np.intp]  # which arrays of the list; those without elements are left out
    sizes: NDArray[np.int64]  # elements of each of them
    tasks: NDArray[np.void]  # `TASK`
    length: int  # of the line


def cut(sizes: Sequence[int], dtypes: Sequence[str], chunk: int, multiple: int = 1) -> list[Cut]:
    """Cut arrays into tasks of ``chunk`` elements, those of each dtype by themselves.

    A task may hold many small arrays or a part of a large one. Each array takes a multiple of
    ``multiple`` places in the line, so that tasks start at multiples of it in every array.
    """
    parts = []
    for dtype in sorted(set(dtypes)):
        chosen = [i for i, size in enumerate(sizes) if size > 0 and dtypes[i] == dtype]
        indices = np.array(chosen, np.intp)
        counts = np.array([sizes[i] for i in indices], np.int64)
        places = -(-counts // multiple) * multiple
        ends = np.cumsum(places)
        length = int(places.sum())
        position = np.arange(0, length, chunk)
        tasks = np.zeros(len(position), TASK)
        tasks["tensor"] = np.searchsorted(ends, position, side="right")
        tasks["start"] = position - (ends - places)[tasks["tensor"]]
        if length > 0:
            parts.append(Cut(dtype, indices, counts, tasks, length))
    return parts
