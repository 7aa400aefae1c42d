"""Parameter updates of whole lists of arrays: gradient descent, momentum, Adam."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cuda.modules import CHUNK, THREADS, TYPES, kernel
from fastseg_kernels.cuda.runtime import blocks_for, runtime
from fastseg_kernels.views import View

TENSOR = np.dtype([(name, np.int64) for name in ("param", "grad", "first", "second", "size")])
TASK = np.dtype([("tensor", np.int64), ("start", np.int64)])
COEFFICIENTS = np.dtype([("k", np.float64, (8,))])


class _Part(NamedTuple):
    """The arrays of one dtype."""

    real: str
    indices: list[int]  # which arrays of the list; those without elements are left out
    tensors: NDArray[Any]  # one `TENSOR` per index, on the host
    tasks: Any  # one `TASK` each, on the device
    number: int  # of tasks
    elements: int


class Table:
    """Where the arrays of a list lie; as `fastseg_kernels.cpu.updates.Table`, on the device."""

    def __init__(self, params: Sequence[View], states: Sequence[Sequence[View]]) -> None:
        self._parts: list[_Part] = []
        self._on_device: list[Any] = []
        for real in sorted({view.dtype for view in params}):
            sizes = [prod(view.shape) if view.dtype == real else 0 for view in params]
            indices = [i for i, size in enumerate(sizes) if size > 0]
            tensors = np.zeros(len(indices), TENSOR)
            tensors["size"] = [sizes[i] for i in indices]
            for name, views in zip(("first", "second"), states, strict=False):
                tensors[name] = [views[i].address for i in indices]
            ends = np.cumsum(tensors["size"])
            elements = sum(sizes)
            position = np.arange(0, elements, CHUNK)
            tasks = np.zeros(len(position), TASK)
            tasks["tensor"] = np.searchsorted(ends, position, side="right")
            tasks["start"] = position - (ends - tensors["size"])[tasks["tensor"]]
            on_device = runtime().array(tasks.view(np.int64))
            self._parts.append(_Part(real, indices, tensors, on_device, len(tasks), elements))
        self.set_params(params)

    def set_params(self, params: Sequence[View]) -> None:
        """Point the table at parameters of the same sizes and dtypes as before."""
        self._point("param", params)

    def set_grads(self, grads: Sequence[View]) -> None:
        """Point the table at the gradients, one per parameter, with its dtype and strides."""
        self._point("grad", grads)

    def _point(self, name: str, views: Sequence[View]) -> None:
        for part in self._parts:
            part.tensors[name] = [views[i].address for i in part.indices]
        self._on_device = []  # copied anew before the next step

    def run(self, rule: str, zero_grads: bool, *coefficients: float) -> None:
        """Run a rule's kernel over all arrays, one launch per dtype."""
        if not self._on_device:
            device = runtime()
            self._on_device = [device.array(p.tensors.view(np.int64)) for p in self._parts]
        numbers = np.zeros(1, COEFFICIENTS)
        numbers["k"][0, : len(coefficients)] = coefficients
        for part, tensors in zip(self._parts, self._on_device, strict=True):
            if part.number == 0:
                continue
            launch = kernel("updates.cu", f"update<{rule}, {TYPES[part.real]}>")
            address = runtime().address
            arguments = (
                *(address(tensors), address(part.tasks), part.number, part.elements),
                *(numbers, np.bool_(zero_grads)),
            )
            launch((blocks_for(part.number),), (THREADS,), arguments)


def gradient_descent(
    table: Table,
    lr: float,
    *,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    zero_grads: bool = False,
) -> None:
    """Update the parameters of ``table`` in place: theta <- theta - lr g."""
    table.run("Descent", zero_grads, grad_scale, weight_decay, lr)


def momentum(
    table: Table,
    lr: float,
    gamma: float,
    nesterov: bool = False,
    *,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    zero_grads: bool = False,
) -> None:
    """Update parameters and velocities in place: v <- gamma v + lr g; theta <- theta - v."""
    by_v, by_g = (gamma, lr) if nesterov else (1.0, 0.0)
    table.run("Momentum", zero_grads, grad_scale, weight_decay, gamma, lr, by_v, by_g)


def momentum_pytorch(
    table: Table,
    first: bool,
    lr: float,
    gamma: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    *,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    zero_grads: bool = False,
) -> None:
    """Update parameters and buffers in place as torch.optim.SGD does.

    At the first step, said by ``first``, the buffers become the gradients, undamped.
    """
    keep, add = (0.0, 1.0) if first else (gamma, 1.0 - dampening)
    by_v, by_g = (lr * gamma, lr) if nesterov else (lr, 0.0)
    table.run("Momentum", zero_grads, grad_scale, weight_decay, keep, add, by_v, by_g)


def adam(
    table: Table,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    grad_scale: float = 1.0,
    zero_grads: bool = False,
) -> None:
    """Update parameters and both moments in place; ``step`` is 1 at the first."""
    l2, decay = (0.0, lr * weight_decay) if decoupled else (weight_decay, 0.0)
    rate, root = lr / (1.0 - beta1**step), 1.0 / sqrt(1.0 - beta2**step)
    table.run("Adam", zero_grads, grad_scale, l2, decay, beta1, beta2, eps, rate, root)
