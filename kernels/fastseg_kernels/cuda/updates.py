"""Parameter updates of whole lists of arrays: gradient descent, momentum, Adam."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from fastseg_kernels.constants import DTYPE_CODES
from fastseg_kernels.cuda.modules import CHUNK, TYPES
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.updates import (
    BY_STEP,
    COEFFICIENTS,
    TENSOR_FIELDS,
    Cut,
    Rule,
    corrections,
    cut,
)
from fastseg_kernels.views import View

FILE = "updates.cu"
RULES = {"descent": "Descent", "momentum": "Momentum", "adam": "Adam"}
RECORD = np.dtype(
    [
        ("k", np.float64, (COEFFICIENTS,)),
        *((name, np.int64) for name in ("lr", "grad_scale", "lr_code", "grad_scale_code")),
        ("by_lr", np.int64),
        ("by_step", np.int64),
    ]
)
MOST_TASKS = 16384
"""Tasks at the most, in longer lists of more elements each: the device must be told of them."""
VECTOR = 4
"""Elements read at once: arrays start at multiples of it in the line that is cut into tasks."""


class _Part:
    """The arrays of one dtype, and copies on the device of what the kernel must know of them."""

    def __init__(self, part: Cut, chunk: int, states: Sequence[Sequence[int]]) -> None:
        self.cut, self.chunk = part, chunk
        self.addresses = {name: np.zeros(len(part.indices), np.int64) for name in TENSOR_FIELDS}
        self.addresses["size"][:] = part.sizes
        self.copies: dict[str, Any] = {}
        for name, of_state in zip(("first", "second"), states, strict=False):
            self.point(name, of_state)

    def point(self, name: str, addresses: Sequence[int]) -> None:
        """Set the addresses of a field; its copy is kept if they are the same."""
        row = np.array([addresses[i] for i in self.cut.indices], np.int64)
        if not np.array_equal(row, self.addresses[name]):
            self.addresses[name] = row
            self.copies.pop(name, None)

    def on_device(self, device: Device) -> list[int]:
        """Return where the copies lie: of the addresses, field by field, and of the tasks."""
        wanted = {**self.addresses, "tasks": self.cut.tasks.view(np.int64)}
        for name, values in wanted.items():
            if name not in self.copies:
                self.copies[name] = device.upload(values)
        return [device.memory.address(self.copies[name]) for name in wanted]


class Table:
    """Where the arrays of a list lie; as `fastseg_kernels.cpu.updates.Table`, on the device."""

    def __init__(
        self, device: Device, params: Sequence[View], states: Sequence[Sequence[Any]]
    ) -> None:
        self._device, address = device, device.memory.address
        self._states = [list(arrays) for arrays in states]
        sizes, dtypes = [prod(view.shape) for view in params], [view.dtype for view in params]
        addresses = [[address(array) for array in arrays] for arrays in states]
        chunk = CHUNK * max(1, -(-sum(sizes) // (CHUNK * MOST_TASKS)))
        self._parts = [_Part(part, chunk, addresses) for part in cut(sizes, dtypes, chunk, VECTOR)]
        self._stream = 0  # on which the copies were made
        self.set_params(params)

    def set_params(self, params: Sequence[View]) -> None:
        """Point the table at parameters of the same sizes and dtypes as before."""
        self._point("param", params)

    def set_grads(self, grads: Sequence[View]) -> None:
        """Point the table at the gradients, one per parameter, with its dtype and strides."""
        self._point("grad", grads)

    def _point(self, name: str, views: Sequence[View]) -> None:
        addresses = [view.address for view in views]
        for part in self._parts:
            part.point(name, addresses)

    def _forget_copies(self) -> None:
        for part in self._parts:
            part.copies.clear()

    def update(
        self,
        rule: Rule,
        step: int | Any,
        lr: float | View,
        grad_scale: float | View,
        zero_grads: bool,
    ) -> None:
        """Update parameters and states in place, by one launch per dtype.

        ``lr`` and ``grad_scale`` may be views of one number of the device, and ``step`` an array of
        the device, int64 (1,), that holds the steps taken so far and is counted up.
        """
        device = self._device
        stream, captured = device.memory.stream(), device.memory.is_capturing()
        if captured and rule.betas is not None and isinstance(step, int):
            raise RuntimeError(
                "a graph would repeat the step with the number that it was recorded with; make "
                "the optimiser with capturable=True"
            )
        if stream != self._stream or captured:  # copies belong to one stream, or to one graph
            self._forget_copies()
            self._stream = stream
        try:
            self._launch_all(rule, step, lr, grad_scale, zero_grads)
        finally:
            if captured:  # what was recorded was not copied yet
                self._forget_copies()

    def _launch_all(
        self,
        rule: Rule,
        step: int | Any,
        lr: float | View,
        grad_scale: float | View,
        zero_grads: bool,
    ) -> None:
        device = self._device
        pointers = [part.on_device(device) for part in self._parts]  # before anything is counted
        numbers = np.zeros(1, RECORD)
        record: Any = numbers[0]
        record["k"][: len(rule.coefficients)] = rule.coefficients
        owners = []
        for name, value in (("lr", lr), ("grad_scale", grad_scale)):
            if isinstance(value, View):
                record[name], record[f"{name}_code"] = value.address, DTYPE_CODES[value.dtype]
                owners.append(value.owner)
        if isinstance(lr, View):
            record["by_lr"] = sum(1 << k for k in rule.by_lr)
        else:
            for k in rule.by_lr:
                record["k"][k] *= lr
        if not isinstance(grad_scale, View):
            record["k"][0] *= grad_scale
        if rule.betas is not None:
            if isinstance(step, int):
                record["k"][list(BY_STEP)] *= corrections(rule.betas, step)
            else:
                by_step = device.empty((2,))
                owners.append(by_step)
                record["by_step"] = device.memory.address(by_step)
                counted = device.memory.address(step), *rule.betas, record["by_step"].item()
                device.launch(FILE, "count_step", 1, *counted)
        for part, at in zip(self._parts, pointers, strict=True):
            self._launch(part, at, rule, numbers, zero_grads)
        del owners  # until the launches are in their place on the stream

    def _launch(
        self, part: _Part, pointers: list[int], rule: Rule, numbers: Any, zero_grads: bool
    ) -> None:
        device = self._device
        count = len(part.cut.tasks)
        device.launch(
            FILE, f"update<{RULES[rule.kernel]}, {TYPES[part.cut.real]}>", device.grid(count),
            *pointers, count, part.chunk, part.cut.length, numbers, np.bool_(zero_grads),
        )  # fmt: skip


def state_like(device: Device, param: View, k: int) -> Any:
    """Return zeros for state ``k``, one for each element of ``param``, in memory order."""
    return device.zeros((prod(param.shape),), param.dtype)
