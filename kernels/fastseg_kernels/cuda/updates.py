"""Parameter updates of whole lists of arrays: gradient descent, momentum, Adam."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import DTYPE_CODES
from fastseg_kernels.cuda.modules import CHUNK, TYPES
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.updates import (
    BY_STEP,
    COEFFICIENTS,
    TENSOR_FIELDS,
    Cut,
    Guard,
    Rule,
    corrections,
    cut,
)
from fastseg_kernels.views import View

FILE = "updates.cu"
RULES = {"descent": "Descent", "momentum": "Momentum", "adam": "Adam", "amsgrad": "AMSGrad"}
NUMBERS = ("lr", "grad_scale", "norm", "found_inf")
"""What may be on the device."""
NUMBER = np.dtype([("value", np.float64), ("address", np.int64), ("code", np.int64)])
RECORD = np.dtype(
    [
        ("k", np.float64, (COEFFICIENTS,)),
        *((name, NUMBER) for name in NUMBERS),
        ("max_norm", np.float64),
        ("skip_non_finite", np.int64),
        ("by_lr", np.int64),
        *((name, np.int64) for name in ("by_step", "number", "counter")),
    ]
)
MOST_TASKS = 16384
"""Tasks at the most, in longer lists of more elements each: the device must be told of them."""
VECTOR = 4
"""Elements read at once: arrays start at multiples of it in the line that is cut into tasks."""


class _Part:
    """The arrays of one dtype, and copies on the device of what the kernel must know of them."""

    def __init__(self, part: Cut, chunk: int, states: Sequence[NDArray[np.int64]]) -> None:
        self.cut, self.chunk = part, chunk
        self.addresses = {name: np.zeros(len(part.indices), np.int64) for name in TENSOR_FIELDS}
        self.addresses["size"][:] = part.sizes
        self.copies: dict[str, Any] = {}
        for name, of_state in zip(("master", "first", "second", "third"), states, strict=False):
            self.point(name, of_state)

    def point(self, name: str, addresses: NDArray[np.int64]) -> None:
        """Set the addresses of a field; its copy is kept if they are the same."""
        row = addresses[self.cut.indices]
        if not np.array_equal(row, self.addresses[name]):
            self.addresses[name] = row
            self.copies.pop(name, None)

    def on_device(self, device: Device, *names: str) -> list[int]:
        """Return where the copies lie: of these fields' addresses (all, if none), of the tasks."""
        wanted = {**self.addresses, "tasks": self.cut.tasks.view(np.int64)}
        used = (*names, "size", "tasks") if names else tuple(wanted)
        for name in used:
            if name not in self.copies:
                self.copies[name] = device.upload(wanted[name])
        return [device.memory.address(self.copies[name]) for name in used]


class Table:
    """Where the arrays of a list lie; as `fastseg_kernels.cpu.updates.Table`, on the device."""

    def __init__(
        self,
        device: Device,
        params: Sequence[View],
        states: Sequence[Sequence[Any]],
        masters: Sequence[Any],
        small_states: bool,
    ) -> None:
        self._device, self._small_states = device, small_states
        self._held = [list(arrays) for arrays in (masters, *states)]
        sizes, dtypes = [prod(view.shape) for view in params], [view.dtype for view in params]
        addresses = [
            np.array(
                [0 if array is None else device.memory.address(array) for array in arrays], np.int64
            )
            for arrays in self._held
        ]
        chunk = CHUNK * max(1, -(-sum(sizes) // (CHUNK * MOST_TASKS)))
        self._parts = [_Part(part, chunk, addresses) for part in cut(sizes, dtypes, chunk, VECTOR)]
        self._stream = 0  # on which the copies were made
        self.set_params(np.array([view.address for view in params], np.int64))

    def set_params(self, addresses: NDArray[np.int64]) -> None:
        """Point the table at parameters of the same sizes and dtypes as before."""
        self._point("param", addresses)

    def set_grads(self, addresses: NDArray[np.int64]) -> None:
        """Point the table at the gradients, one per parameter, with its dtype and strides."""
        self._point("grad", addresses)

    def _point(self, name: str, addresses: NDArray[np.int64]) -> None:
        for part in self._parts:
            part.point(name, addresses)

    def _forget_copies(self) -> None:
        for part in self._parts:
            part.copies.clear()

    def _enter_stream(self) -> bool:
        """Forget copies that belong to another stream, or to a graph; tell whether one is made."""
        stream, captured = self._device.memory.stream(), self._device.memory.is_capturing()
        if stream != self._stream or captured:
            self._forget_copies()
            self._stream = stream
        return captured

    def norm(self) -> Any:
        """Return the norm of all gradients together, not finite where one of them is not: (1,)."""
        device, address = self._device, self._device.memory.address
        captured = self._enter_stream()
        grids = [device.grid(len(part.cut.tasks)) for part in self._parts]
        sums, norm = device.empty((max(1, sum(grids)),)), device.empty((1,))
        first = address(sums)
        try:
            for part, grid in zip(self._parts, grids, strict=True):
                pointers, count = part.on_device(device, "grad"), len(part.cut.tasks)
                name = f"squares<{TYPES[part.cut.dtype]}>"
                device.launch(
                    FILE, name, grid, *pointers, count, part.chunk, part.cut.length, first
                )
                first += 8 * grid
            device.launch(FILE, "norm_of", 1, address(sums), sum(grids), address(norm))
        finally:
            if captured:
                self._forget_copies()
        return norm

    def update(
        self,
        rule: Rule,
        step: int | Any,
        lr: float | View,
        grad_scale: float | View,
        zero_grads: bool,
        guard: Guard,
    ) -> bool:
        """Update parameters and states in place, by one launch per dtype.

        ``lr``, ``grad_scale`` and the numbers of ``guard`` may be views of one number of the
        device, and the norm what `norm` returned. ``step`` may be an array of the device, int64
        (1,), that holds the steps taken so far and is counted up, unless the step is dropped.
        Returns whether the step was taken as far as the host knows: what the device decides, that
        counter knows.
        """
        captured = self._device.memory.is_capturing()
        if captured and rule.depends_on_step and isinstance(step, int):
            raise RuntimeError(
                "a graph would repeat the step with the number that it was recorded with; make "
                "the optimiser with capturable=True"
            )
        self._enter_stream()
        try:
            self._launch_all(rule, step, lr, grad_scale, zero_grads, guard)
        finally:
            if captured:  # what was recorded was not copied yet
                self._forget_copies()
        return not isinstance(guard.found_inf, float) or guard.found_inf == 0

    def _record(self, rule: Rule, lr: Any, grad_scale: Any, guard: Guard) -> Any:
        """Return what the kernels are told beside arrays; not yet which step it is."""
        numbers = np.zeros(1, RECORD)
        record: Any = numbers[0]
        record["k"][: len(rule.coefficients)] = rule.coefficients
        record["by_lr"] = sum(1 << k for k in rule.by_lr)
        values = (lr, grad_scale, guard.norm, guard.found_inf)
        for name, value in zip(NUMBERS, values, strict=True):
            if isinstance(value, View):
                record[name] = (1.0, value.address, DTYPE_CODES[value.dtype])
            elif value is not None and not isinstance(value, int | float):  # made by `norm`
                address = self._device.memory.address(value)
                record[name] = (1.0, address, DTYPE_CODES["float64"])
            elif value is not None:
                record[name]["value"] = value
        record["max_norm"], record["skip_non_finite"] = guard.max_norm, guard.skip_non_finite
        return numbers

    def _launch_all(
        self,
        rule: Rule,
        step: int | Any,
        lr: float | View,
        grad_scale: float | View,
        zero_grads: bool,
        guard: Guard,
    ) -> None:
        device, address = self._device, self._device.memory.address
        pointers = [part.on_device(device) for part in self._parts]  # before anything is counted
        numbers = self._record(rule, lr, grad_scale, guard)
        record: Any = numbers[0]
        by_step = None
        if isinstance(step, int):
            record["number"] = step
            if rule.depends_on_step:
                record["k"][list(BY_STEP)] *= corrections(rule, step)
        else:
            by_step = device.empty((2,))
            betas = rule.betas or (-1.0, -1.0)
            counted = address(step), *betas, address(by_step)
            device.launch(FILE, "count_step", 1, *counted, numbers)
            record["counter"] = counted[0]
            record["by_step"] = counted[-1] if rule.depends_on_step else 0
        for part, at in zip(self._parts, pointers, strict=True):
            self._launch(part, at, rule, numbers, zero_grads)
        del by_step  # until the launches are in their place on the stream

    def _launch(
        self, part: _Part, pointers: list[int], rule: Rule, numbers: Any, zero_grads: bool
    ) -> None:
        device = self._device
        count, types = len(part.cut.tasks), TYPES[part.cut.dtype]
        if self._small_states:
            types += f", {TYPES['bfloat16']}"
        device.launch(
            FILE, f"update<{RULES[rule.kernel]}, {types}>", device.grid(count),
            *pointers, count, part.chunk, part.cut.length, numbers, np.bool_(zero_grads),
        )  # fmt: skip


def state_like(device: Device, param: View, k: int, dtype: str) -> Any:
    """Return zeros for state ``k``, one for each element of ``param``, in memory order.

    bfloat16 numbers, which CuPy does not know, are int16.
    """
    return device.zeros((prod(param.shape),), "int16" if dtype == "bfloat16" else dtype)
