"""Parameter updates of whole lists of arrays: gradient descent, momentum, Adam.

`fastseg_kernels.updates` has the rules and cuts the lists into tasks, so that 2000 arrays of 1000
elements are one parallel region; `fastseg_kernels.cpu.update_kernels` has what is done to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cpu import threads
from fastseg_kernels.cpu.update_kernels import CHUNK, JOB, TENSOR, squares_kernel, update_kernel
from fastseg_kernels.updates import Guard, Rule, cut, guarded_scale
from fastseg_kernels.views import View

SHARED_FROM = 32768
"""Elements from which a second thread pays for itself: Adam of so many takes 13 us on one thread
and 11 on two; of half as many, 7 and 8."""


class _Part(NamedTuple):
    """The arrays of one dtype: a job whose addresses are those of the other fields."""

    dtype: str
    indices: NDArray[np.intp]  # which arrays of the list; those without elements are left out
    tensors: NDArray[Any]  # one `TENSOR` per index
    tasks: NDArray[Any]
    sums: NDArray[np.float64]  # one per task
    job: NDArray[Any]
    zero_grads: NDArray[np.int64]  # views of the job's fields: setting them so is 5 times as fast
    skip: NDArray[np.int64]
    step: NDArray[np.int64]
    coefficients: NDArray[np.float64]
    address: int  # of the job
    elements: int


class Table:
    """Where the arrays of a list lie and how they are cut into tasks; made once per optimiser.

    Parameters
    ----------
    params
        The parameters, float16, bfloat16, float32 or float64, each one run of memory (in any order
        of axes).
    states
        For each state of the rule (none, velocity, exp_avg and exp_avg_sq, ...) as many arrays that
        `fastseg_kernels.cpu.memory.state_like` made, of float32 for parameters of 2 bytes.
    masters
        For each parameter of 2 bytes such an array of float32, None for others.
    small_states
        The states are bfloat16.

    Notes
    -----
    The table holds addresses, not arrays: the caller keeps all of them alive, and points the table
    elsewhere with `set_params` and `set_grads` before memory moves. The gradients are set before
    the first step.
    """

    def __init__(
        self,
        params: Sequence[View],
        states: Sequence[Sequence[NDArray[Any]]],
        masters: Sequence[NDArray[np.float32] | None],
        small_states: bool,
    ) -> None:
        self._parts: list[_Part] = []
        self._small_states = small_states
        sizes, dtypes = [prod(view.shape) for view in params], [view.dtype for view in params]
        for part in cut(sizes, dtypes, CHUNK):
            tensors = np.zeros(len(part.indices), TENSOR)
            tensors["size"] = part.sizes
            lists = zip(("master", "first", "second", "third"), (masters, *states), strict=False)
            for name, arrays in lists:
                addresses = (0 if array is None else array.ctypes.data for array in arrays)
                tensors[name] = np.fromiter(addresses, np.int64)[part.indices]
            job, sums = np.zeros(1, JOB), np.zeros(len(part.tasks))
            job["tensors"], job["tasks"] = tensors.ctypes.data, part.tasks.ctypes.data
            job["sums"], job["elements"] = sums.ctypes.data, part.length
            views = (job["zero_grads"], job["skip"], job["step"], job["coefficients"][0])
            fields = (sums, job, *views, job.ctypes.data, part.length)
            self._parts.append(_Part(part.dtype, part.indices, tensors, part.tasks, *fields))
        self.set_params(np.array([view.address for view in params], np.int64))

    def set_params(self, addresses: NDArray[np.int64]) -> None:
        """Point the table at parameters of the same sizes and dtypes as before."""
        for part in self._parts:
            part.tensors["param"] = addresses[part.indices]

    def set_grads(self, addresses: NDArray[np.int64]) -> None:
        """Point the table at the gradients, one per parameter, with its dtype and strides."""
        for part in self._parts:
            part.tensors["grad"] = addresses[part.indices]

    def norm(self) -> float:
        """Return the norm of all gradients together, not finite where one of them is not."""
        total = 0.0
        for part in self._parts:
            self._run(squares_kernel(part.dtype), part)
            with np.errstate(over="ignore"):
                total += float(part.sums.sum())
        return sqrt(total)

    def update(
        self,
        rule: Rule,
        step: int | NDArray[np.int64],
        lr: float,
        grad_scale: float,
        zero_grads: bool,
        guard: Guard,
    ) -> bool:
        """Update parameters and states in place, by one parallel region per dtype.

        ``step`` is 1 at the first, or a counter of the steps before, which is counted up unless
        the step is dropped; returns whether it was taken.
        """
        scale = guarded_scale(grad_scale, guard)
        number = int(step[0]) + 1 if isinstance(step, np.ndarray) else step
        numbers = rule.at(number, lr, 0.0 if scale is None else scale)
        for part in self._parts:
            part.zero_grads[0], part.skip[0] = zero_grads, scale is None
            part.step[0], part.coefficients[:] = number, numbers
            if zero_grads or scale is not None:
                self._run(update_kernel(rule.kernel, part.dtype, self._small_states), part)
        if isinstance(step, np.ndarray) and scale is not None:
            step[0] = number
        return scale is not None

    @staticmethod
    def _run(kernel: Any, part: _Part) -> None:
        threads.run(kernel, part.address, len(part.tasks), part.elements >= SHARED_FROM, part)
