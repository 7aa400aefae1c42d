"""What is done to the elements of a task of parameters: the rules, as kernels.

Every element is read and written once, whatever is asked of the step: the scale of the gradients,
weight decay and the zeroing of the gradients belong to the same pass. Arrays of 2 bytes an element
are widened tile by tile, in buffers that stay in the nearest cache, and the same rules read those.

A factor that acts on a state step after step is kept as two floats, high + low. 0.999 rounded to
float32 is off by 1.3e-8, which is little, but 1 - 0.999 is then off by 1.3e-5, and so is v_hat in
the long run (PyTorch's float32 moments have that error).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.halves import (
    NARROW,
    WIDEN,
    bfloat16_to_float,
)
from fastseg_kernels.cpu.intrinsics import (
    address_of,
    bits_of,
    carray,
    fma,
    is_same,
    pointer_to,
    scrambled,
    select,
    stack_array,
    wide_vectors,
)
from fastseg_kernels.updates import (
    COEFFICIENTS,
    MASTERED,
    STATE_COUNTS,
    STEP_STRIDE,
    TASK,
    TENSOR_FIELDS,
)

CHUNK = 4096
"""Elements of a task: its gradients are still in the cache (16 or 32 KB) when they are zeroed, and
finding its first array costs nothing beside them."""
TILE = 1024
"""Elements that are widened at once: four buffers of 4 KB."""
LANES = 64
"""Sums of squares that are added up side by side, each over `RUN` elements at once."""
RUN = 4

TENSOR = np.dtype([(name, np.int64) for name in TENSOR_FIELDS])
JOB = np.dtype(
    [
        ("tensors", np.int64),  # address of the records, one `TENSOR` each
        ("tasks", np.int64),  # address of the records, one `TASK` each
        ("sums", np.int64),  # address of a double for each task: what `squares_kernel` writes
        ("elements", np.int64),  # of all tensors
        ("zero_grads", np.int64),
        ("skip", np.int64),  # update nothing
        ("step", np.int64),  # 1 at the first
        ("coefficients", np.float64, (COEFFICIENTS,)),
    ]
)
"""What a kernel is told; every pointer of a tensor is valid for ``size`` elements."""
COEFFICIENTS_AT = JOB.fields["coefficients"][1]  # type: ignore[index]
TASK_BYTES, TENSOR_BYTES = TASK.itemsize, TENSOR.itemsize

F32 = np.float32


@inlined
def _decayed(state, high, low, added):  # type: ignore[no-untyped-def]
    """Return (high + low) state + added."""
    return fma(high, state, fma(low, state, added))


def _make_descent(T: Any) -> Any:
    @inlined
    def point(theta, g, scale, l2, lr):  # type: ignore[no-untyped-def]
        return fma(-lr, fma(l2, theta, scale * g), theta)

    @function
    def descent(param, grad, first, second, third, count, k):  # type: ignore[no-untyped-def]
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
    def momentum(param, grad, velocity, second, third, count, k):  # type: ignore[no-untyped-def]
        wide_vectors()
        scale, l2 = T(k[0]), T(k[1])
        keep, add, by_v, by_g = T(k[2]), T(k[3] + k[6]), T(k[4]), T(k[5])
        keep_low = T(k[2] - np.float64(keep))
        for i in range(count):
            param[i], velocity[i] = point(
                param[i], grad[i], velocity[i], scale, l2, keep, keep_low, add, by_v, by_g
            )

    return momentum


def _make_adam(T: Any, amsgrad: bool) -> Any:
    @function
    def adam(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, count, k):  # type: ignore[no-untyped-def]
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
            exp_avg[i], exp_avg_sq[i] = m, v
            if amsgrad:
                v = select(max_exp_avg_sq[i] >= v, max_exp_avg_sq[i], v)  # NaN stays
                max_exp_avg_sq[i] = v
            theta = fma(-decay, theta, theta)
            param[i] = fma(-rate, m / fma(root, np.sqrt(v), eps), theta)

    return adam


_RULES: dict[str, Callable[[Any], Any]] = {
    "descent": _make_descent,
    "momentum": _make_momentum,
    "adam": lambda T: _make_adam(T, False),
    "amsgrad": lambda T: _make_adam(T, True),
}


@inlined
def _round_by_chance(x, chance):  # type: ignore[no-untyped-def]
    """Return the bits of one of the two bfloat16 beside ``x``; chance: 16 bits."""
    bits = np.uint32(bits_of(x))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    rounded = np.uint32(np.uint32(bits + chance) >> np.uint32(16))
    quiet = np.uint32(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16(select(magnitude > np.uint32(0x7F800000), quiet, rounded))


def _make_store_states(states: int) -> Any:
    """Round states to bfloat16: the first by half of an element's chance, others by the rest."""

    @function
    def store_states(values, bits, values2, bits2, values3, bits3, count, place, step):  # type: ignore[no-untyped-def]
        wide_vectors()
        start = np.uint32(place + (step & 0x7FFFFFFF) * STEP_STRIDE)
        for i in range(count):
            noise = scrambled(start, i)  # the same for the same element and step
            high = np.uint32(noise >> np.uint32(16))
            if states > 0:
                bits[i] = _round_by_chance(values[i], np.uint32(noise & np.uint32(0xFFFF)))
            if states > 1:
                bits2[i] = _round_by_chance(values2[i], high)
            if states > 2:  # as the state that it is the largest of
                bits3[i] = _round_by_chance(values3[i], high)

    return store_states


@function
def _load_states(bits, count, values):  # type: ignore[no-untyped-def]
    wide_vectors()
    for i in range(count):
        values[i] = bfloat16_to_float(bits[i])


def _make_halves(dtype: str) -> tuple[Any, Any, Any]:
    """Return what is done to parameters of 2 bytes before and after, and to their gradients."""
    widen, narrow = WIDEN[dtype], NARROW[dtype]

    @function
    def take_over(bits, master, count):  # type: ignore[no-untyped-def]
        """Give a master the value of a parameter that is not the master rounded."""
        wide_vectors()
        for i in range(count):
            kept = is_same(narrow(master[i]), bits[i])
            master[i] = select(kept, master[i], widen(bits[i]))

    @function
    def round_off(master, bits, count):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            bits[i] = narrow(master[i])

    @function
    def widen_all(bits, count, values):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            values[i] = widen(bits[i])

    return take_over, round_off, widen_all


def _make_in_place(update: Any, T: Any) -> Any:
    """Return the update of a part of an array whose parameters and states are of one type."""
    item = np.dtype(T).itemsize

    @function
    def in_place(row, start, count, step, k):  # type: ignore[no-untyped-def]
        param = pointer_to(row.param + start * item, T)
        grad = pointer_to(row.grad + start * item, T)
        first = pointer_to(row.first + start * item, T)
        second = pointer_to(row.second + start * item, T)
        third = pointer_to(row.third + start * item, T)
        update(param, grad, first, second, third, count, k)

    return in_place


def _make_in_tiles(update: Any, states: int, dtype: str, small_states: bool) -> Any:
    """Return the update of a part whose parameters, states or both have 2 bytes an element."""
    halved, store = dtype in MASTERED, _make_store_states(states)
    take_over, round_off, widen_all = _make_halves(dtype if halved else "bfloat16")

    @function
    def tile(row, start, count, step, k):  # type: ignore[no-untyped-def]
        wide_vectors()
        grads = stack_array(TILE, F32)
        moments1, moments2 = stack_array(TILE, F32), stack_array(TILE, F32)
        moments3 = stack_array(TILE, F32)
        theta = pointer_to(row.param + start * 4, F32)
        grad = pointer_to(row.grad + start * 4, F32)
        bits = pointer_to(row.param + start * 2, np.uint16)
        if halved:
            theta = pointer_to(row.master + start * 4, F32)
            take_over(bits, theta, count)
            widen_all(pointer_to(row.grad + start * 2, np.uint16), count, grads)
            grad = pointer_to(address_of(grads), F32)
        first = pointer_to(row.first + start * 4, F32)
        second = pointer_to(row.second + start * 4, F32)
        third = pointer_to(row.third + start * 4, F32)
        small1 = pointer_to(row.first + start * 2, np.uint16)
        small2 = pointer_to(row.second + start * 2, np.uint16)
        small3 = pointer_to(row.third + start * 2, np.uint16)
        if small_states:
            first = pointer_to(address_of(moments1), F32)
            second = pointer_to(address_of(moments2), F32)
            third = pointer_to(address_of(moments3), F32)
            if states > 0:
                _load_states(small1, count, first)
            if states > 1:
                _load_states(small2, count, second)
            if states > 2:
                _load_states(small3, count, third)
        update(theta, grad, first, second, third, count, k)
        if halved:
            round_off(theta, bits, count)
        if small_states:
            store(first, small1, second, small2, third, small3, count, start, step)

    @function
    def in_tiles(row, start, count, step, k):  # type: ignore[no-untyped-def]
        for at in range(0, count, TILE):
            tile(row, start + at, min(TILE, count - at), step, k)

    return in_tiles


def _walk(visit: Any, after: Any) -> Any:
    """Return a kernel that visits every array's part of the tasks, in their order."""

    def kernel(job_address, first_task, last_task):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        k = pointer_to(job_address + COEFFICIENTS_AT, np.float64)
        for index in range(first_task, last_task):
            task = carray(pointer_to(job.tasks + index * TASK_BYTES, TASK), 1)[0]
            tensor, start = task.tensor, task.start
            left = min(CHUNK, job.elements - index * CHUNK)
            total = 0.0
            while left > 0:
                row = carray(pointer_to(job.tensors + tensor * TENSOR_BYTES, TENSOR), 1)[0]
                count = min(left, row.size - start)
                total += visit(job, row, start, count, k)
                left -= count
                tensor, start = tensor + 1, 0
            after(job, index, total)

    return kernel


@cache
def update_kernel(rule: str, dtype: str, small_states: bool = False) -> Kernel:
    """Compile the kernel of a rule for parameters of a dtype, once; small states are bfloat16."""
    real = "float64" if dtype == "float64" else "float32"
    T = REALS[real].scalar
    item = 2 if dtype in MASTERED else np.dtype(T).itemsize
    update = _RULES[rule](T)
    U = np.uint16 if item == 2 else T
    if small_states or dtype in MASTERED:
        one = _make_in_tiles(update, STATE_COUNTS[rule], dtype, small_states)
    else:
        one = _make_in_place(update, T)

    @function
    def visit(job, row, start, count, k):  # type: ignore[no-untyped-def]
        if job.skip == 0:
            one(row, start, count, job.step, k)
        if job.zero_grads != 0:
            grad = pointer_to(row.grad + start * item, U)
            for i in range(count):
                grad[i] = U(0)
        return 0.0

    @function
    def after(job, index, total):  # type: ignore[no-untyped-def]
        pass

    return Kernel(_walk(visit, after), f"{rule}-{dtype}{'-small_states' * small_states}")


@cache
def squares_kernel(dtype: str) -> Kernel:
    """Compile the kernel that adds up the squares of the gradients of each task, in float64."""
    halved = dtype in MASTERED
    T = np.uint16 if halved else REALS[dtype].scalar
    item = np.dtype(T).itemsize
    widen = WIDEN[dtype if halved else "bfloat16"]

    @inlined
    def square(element, total):  # type: ignore[no-untyped-def]
        g = np.float64(widen(element) if halved else element)
        return fma(g, g, total)

    @function
    def visit(job, row, start, count, k):  # type: ignore[no-untyped-def]
        wide_vectors()
        grad = pointer_to(row.grad + start * item, T)
        sums = stack_array(LANES, np.float64)
        for lane in range(LANES):
            sums[lane] = 0.0
        whole = count // (LANES * RUN) * (LANES * RUN)
        for i in range(0, whole, LANES * RUN):
            for lane in range(LANES):  # vectorised: one lane each
                total = sums[lane]
                total = square(grad[i + lane], total)
                total = square(grad[i + lane + LANES], total)
                total = square(grad[i + lane + 2 * LANES], total)
                sums[lane] = square(grad[i + lane + 3 * LANES], total)
        for i in range(whole, count):
            sums[i % LANES] = square(grad[i], sums[i % LANES])
        result = 0.0
        for lane in range(LANES):
            result += sums[lane]
        return result

    @function
    def after(job, index, total):  # type: ignore[no-untyped-def]
        pointer_to(job.sums, np.float64)[index] = total

    return Kernel(_walk(visit, after), f"squares-{dtype}")
