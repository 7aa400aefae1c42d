"""Parameter updates of whole lists of arrays: gradient descent, momentum, Adam.

`fastseg_kernels.updates` has the rules and cuts the lists into tasks, of `CHUNK` elements, so that
2000 arrays of 1000 elements are one parallel region. Every element is read and written once,
whatever is asked of the step: the scale of the gradients, weight decay and the zeroing of the
gradients belong to the same pass.

A factor that acts on a state step after step is kept as two floats, high + low. 0.999 rounded to
float32 is off by 1.3e-8, which is little, but 1 - 0.999 is then off by 1.3e-5, and so is v_hat in
the long run (PyTorch's float32 moments have that error).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.cpu import threads
from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.intrinsics import carray, fma, pointer_to, wide_vectors
from fastseg_kernels.updates import COEFFICIENTS, TASK, TENSOR_FIELDS, Rule, cut
from fastseg_kernels.views import View

CHUNK = 4096
"""Elements of a task: its gradients are still in the cache (16 or 32 KB) when they are zeroed, and
finding its first array costs nothing beside them."""
SHARED_FROM = 32768
"""Elements from which a second thread pays for itself: Adam of so many takes 13 us on one thread
and 11 on two; of half as many, 7 and 8."""

TENSOR = np.dtype([(name, np.int64) for name in TENSOR_FIELDS])
JOB = np.dtype(
    [
        ("tensors", np.int64),  # address of the records, one `TENSOR` each
        ("tasks", np.int64),  # address of the records, one `TASK` each
        ("elements", np.int64),  # of all tensors
        ("zero_grads", np.int64),
        ("coefficients", np.float64, (COEFFICIENTS,)),
    ]
)
"""What a kernel is told; every pointer of a tensor is valid for ``size`` elements."""
COEFFICIENTS_AT = JOB.fields["coefficients"][1]  # type: ignore[index]
TASK_BYTES, TENSOR_BYTES = TASK.itemsize, TENSOR.itemsize


@inlined
def _decayed(state, high, low, added):  # type: ignore[no-untyped-def]
    """Return (high + low) state + added."""
    return fma(high, state, fma(low, state, added))


def _make_descent(T: Any) -> Any:
    @inlined
    def point(theta, g, scale, l2, lr):  # type: ignore[no-untyped-def]
        return fma(-lr, fma(l2, theta, scale * g), theta)

    @function
    def descent(param, grad, first, second, count, k):  # type: ignore[no-untyped-def]
        wide_vectors()
        scale, l2, lr = T(k[0]), T(k[1]), T(k[2])
        for i in range(count):
            param[i] = point(param[i], grad[i], scale, l2, lr)

    return descent


def _make_momentum(T: Any) -> Any:
    @inlined
    def point(theta, g, v, scale, l2, keep, keep_low, add, by_v, by_g):  # type: ignore[no-untyped-def]
        g = fma(l2, theta, scale * g)
        v = _decayed(v, keep, keep_low, add * g)
        return theta - fma(by_v, v, by_g * g), v

    @function
    def momentum(param, grad, velocity, second, count, k):  # type: ignore[no-untyped-def]
        wide_vectors()
        scale, l2 = T(k[0]), T(k[1])
        keep, add, by_v, by_g = T(k[2]), T(k[3]), T(k[4]), T(k[5])
        keep_low = T(k[2] - np.float64(keep))
        for i in range(count):
            param[i], velocity[i] = point(
                param[i], grad[i], velocity[i], scale, l2, keep, keep_low, add, by_v, by_g
            )

    return momentum


def _make_adam(T: Any) -> Any:
    @function
    def adam(param, grad, exp_avg, exp_avg_sq, count, k):  # type: ignore[no-untyped-def]
        wide_vectors()
        scale, l2, decay, eps = T(k[0]), T(k[1]), T(k[2]), T(k[5])
        beta1, beta2, rate, root = T(k[3]), T(k[4]), T(k[6]), T(k[7])
        low1, low2 = T(k[3] - np.float64(beta1)), T(k[4] - np.float64(beta2))
        new1, new2 = T(1.0 - k[3]), T(1.0 - k[4])
        for i in range(count):
            theta = param[i]
            g = fma(l2, theta, scale * grad[i])
            m = _decayed(exp_avg[i], beta1, low1, new1 * g)
            v = _decayed(exp_avg_sq[i], beta2, low2, new2 * g * g)
            theta = fma(-decay, theta, theta)
            param[i] = fma(-rate, m / fma(root, np.sqrt(v), eps), theta)
            exp_avg[i], exp_avg_sq[i] = m, v

    return adam


_RULES: dict[str, Callable[[Any], Any]] = {
    "descent": _make_descent,
    "momentum": _make_momentum,
    "adam": _make_adam,
}


@cache
def update_kernel(rule: str, real: str) -> Kernel:
    """Compile the kernel of a rule ("descent", "momentum", "adam") for a dtype, once."""
    T = REALS[real].scalar
    item = np.dtype(T).itemsize
    update = _RULES[rule](T)

    def updates(job_address, first_task, last_task):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        k = pointer_to(job_address + COEFFICIENTS_AT, np.float64)
        for index in range(first_task, last_task):
            task = carray(pointer_to(job.tasks + index * TASK_BYTES, TASK), 1)[0]
            tensor, start = task.tensor, task.start
            left = min(CHUNK, job.elements - index * CHUNK)
            while left > 0:
                row = carray(pointer_to(job.tensors + tensor * TENSOR_BYTES, TENSOR), 1)[0]
                count = min(left, row.size - start)
                param = pointer_to(row.param + start * item, T)
                grad = pointer_to(row.grad + start * item, T)
                first = pointer_to(row.first + start * item, T)
                second = pointer_to(row.second + start * item, T)
                update(param, grad, first, second, count, k)
                if job.zero_grads != 0:
                    for i in range(count):
                        grad[i] = T(0)
                left -= count
                tensor, start = tensor + 1, 0

    return Kernel(updates, f"{rule}-{real}")


class _Part(NamedTuple):
    """The arrays of one dtype: a job whose addresses are those of the other fields."""

    real: str
    indices: list[int]  # which arrays of the list; those without elements are left out
    tensors: NDArray[Any]  # one `TENSOR` per index
    tasks: NDArray[Any]
    job: NDArray[Any]
    zero_grads: NDArray[np.int64]  # views of the job's fields: setting them so is 5 times as fast
    coefficients: NDArray[np.float64]
    address: int  # of the job
    elements: int


class Table:
    """Where the arrays of a list lie and how they are cut into tasks; made once per optimiser.

    Parameters
    ----------
    params
        The parameters, float32 or float64, each one run of memory (in any order of axes).
    states
        For each state of the rule (none, velocity, or exp_avg and exp_avg_sq) as many arrays that
        `fastseg_kernels.cpu.memory.state_like` made.

    Notes
    -----
    The table holds addresses, not arrays: the caller keeps all of them alive, and points the table
    elsewhere with `set_params` and `set_grads` before memory moves. The gradients are set before
    the first step.
    """

    def __init__(self, params: Sequence[View], states: Sequence[Sequence[NDArray[Any]]]) -> None:
        self._parts: list[_Part] = []
        sizes, dtypes = [prod(view.shape) for view in params], [view.dtype for view in params]
        for part in cut(sizes, dtypes, CHUNK):
            tensors = np.zeros(len(part.indices), TENSOR)
            tensors["size"] = part.sizes
            for name, arrays in zip(("first", "second"), states, strict=False):
                tensors[name] = [arrays[i].ctypes.data for i in part.indices]
            job = np.zeros(1, JOB)
            job["tensors"], job["tasks"] = tensors.ctypes.data, part.tasks.ctypes.data
            job["elements"] = part.length
            fields = (job["zero_grads"], job["coefficients"][0], job.ctypes.data, part.length)
            self._parts.append(_Part(part.real, part.indices, tensors, part.tasks, job, *fields))
        self.set_params(params)

    def set_params(self, params: Sequence[View]) -> None:
        """Point the table at parameters of the same sizes and dtypes as before."""
        for part in self._parts:
            part.tensors["param"] = [params[i].address for i in part.indices]

    def set_grads(self, grads: Sequence[View]) -> None:
        """Point the table at the gradients, one per parameter, with its dtype and strides."""
        for part in self._parts:
            part.tensors["grad"] = [grads[i].address for i in part.indices]

    def update(
        self,
        rule: Rule,
        step: int | NDArray[np.int64],
        lr: float,
        grad_scale: float,
        zero_grads: bool,
    ) -> None:
        """Update parameters and states in place, by one parallel region per dtype.

        ``step`` is 1 at the first, or a counter of the steps before, which is counted up.
        """
        if isinstance(step, np.ndarray):
            step += 1
            step = int(step[0])
        numbers = rule.at(step, lr, grad_scale)
        for part in self._parts:
            part.zero_grads[0] = zero_grads
            part.coefficients[: len(numbers)] = numbers
            share = part.elements >= SHARED_FROM
            kernel = update_kernel(rule.kernel, part.real)
            threads.run(kernel, part.address, len(part.tasks), share, part)
