"""Optimiser steps over one large array and over many small ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import fastseg as fs

from . import device, peers
from .common import BACKENDS, PERIOD, Call, over, update_limit

LISTS = {"1 of 16M": (1, 16 * 2**20), "2000 of 1000": (2000, 1000)}
LR = 1e-3


@cache
def parameters(count: int, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Make ``count`` float32 arrays of ``size`` elements, and as many gradients."""
    rng = np.random.default_rng(0)
    lists = []
    for _ in range(2):
        values = rng.standard_normal(PERIOD, np.float32)
        lists.append([np.resize(np.roll(values, k), size) for k in range(count)])
    return lists[0], lists[1]


class _Update:
    """A step over lists of arrays; ``track_`` is its time over the machine's limit."""

    params = (BACKENDS, tuple(LISTS))
    param_names = ("backend", "arrays")
    timeout = 300
    unit = "time / limit"
    timer = staticmethod(device.clock)
    memory_arrays = 2  # that the limit goes through: parameters, gradients and states

    def setup(self, backend: str, arrays: str) -> None:
        params, grads = parameters(*LISTS[arrays])
        if backend == "cuda":
            params, grads = (list(map(device.to_device, each)) for each in (params, grads))
        step = self.make_optimizer(params).step
        self.call: Call = lambda: step(grads)
        self.call()  # compiles

    def make_optimizer(self, params: list[np.ndarray]) -> Any:
        raise NotImplementedError

    def time_step(self, backend: str, arrays: str) -> None:
        self.call()

    def track_over_limit(self, backend: str, arrays: str) -> float:
        count, size = LISTS[arrays]
        nbytes = 4 * count * size
        if backend == "cpu":
            limit = update_limit(nbytes, self.memory_arrays)
        else:  # all are read, and all but the gradients written
            limit = device.copy((2 * self.memory_arrays - 1) * nbytes)
        return over(self.call, limit, backend=backend)


class GradientDescent(_Update):
    def make_optimizer(self, params: list[np.ndarray]) -> Any:
        return fs.GradientDescent(params, lr=LR)


class Momentum(_Update):
    memory_arrays = 3

    def make_optimizer(self, params: list[np.ndarray]) -> Any:
        return fs.Momentum(params, lr=LR, gamma=0.9)


class Adam(_Update):
    memory_arrays = 4

    def make_optimizer(self, params: list[np.ndarray]) -> Any:
        return fs.Adam(params, lr=LR)


class TorchAdam:
    """torch.optim.Adam; ``track_`` is fastseg's time over the peer's."""

    params = (("fused",), tuple(LISTS))
    param_names = ("implementation", "arrays")
    timeout = 300
    unit = "time / peer's"

    def setup(self, implementation: str, arrays: str) -> None:
        self.arrays, self.grads = parameters(*LISTS[arrays])
        try:
            self.call = peers.adam(self.arrays, self.grads, implementation)
        except ImportError as error:
            raise NotImplementedError(str(error)) from error  # asv skips it

    def time_step(self, implementation: str, arrays: str) -> None:
        self.call()

    def track_fastseg_over_peer(self, implementation: str, arrays: str) -> float:
        step, grads = fs.Adam(self.arrays, lr=LR).step, self.grads
        return over(lambda: step(grads), self.call)
