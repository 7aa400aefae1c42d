"""A backend for NumPy arrays that computes on a GPU: what it reads and writes is mirrored there.

It lets the contract's tests, which are written for NumPy arrays, run on a device as they are.
Memory goes over as it lies, byte for byte with gaps and overlaps, at the same alignment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.outputs import extent
from fastseg_kernels.cuda import Backend
from fastseg_kernels.problem import Evaluation, Problem
from fastseg_kernels.updates import Guard, Rule
from fastseg_kernels.views import Layout, View

ALIGNMENT = 256


class Mirror:
    """Host memory on the device, by ranges of addresses."""

    def __init__(self, cupy: Any, spans: Iterable[tuple[int, int]]) -> None:
        self.ranges: list[tuple[int, int, Any, int]] = []
        merged: list[list[int]] = []
        for low, high in sorted(span for span in spans if span[0] < span[1]):
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        for low, high in merged:
            shift = low % ALIGNMENT
            memory = cupy.empty(high - low + shift, np.uint8)
            memory[shift:].set(self._host(low, high))
            self.ranges.append((low, high, memory, int(memory.data.ptr) + shift))

    @staticmethod
    def _host(low: int, high: int) -> np.ndarray:
        return np.frombuffer((ctypes.c_char * (high - low)).from_address(low), np.uint8)

    def __getitem__(self, address: int) -> int:
        """Return where an address lies on the device; 0 stays 0, and what has no elements."""
        for low, high, _, base in self.ranges:
            if low <= address < high:
                return base + address - low
        return 0

    def fetch(self) -> None:
        """Copy everything back."""
        for low, high, memory, _ in self.ranges:
            content = np.ascontiguousarray(memory.get()[low % ALIGNMENT :])
            ctypes.memmove(low, content.ctypes.data, high - low)


def _span(address: int, layout: Layout | None) -> tuple[int, int]:
    low, high = (0, 0) if layout is None else extent(layout)
    return address + low, address + high


class MirrorTable:
    """The table of an optimiser whose arrays are on the host."""

    def __init__(
        self,
        backend: MirrorBackend,
        params: Sequence[View],
        states: Sequence[Sequence[Any]],
        masters: Sequence[Any],
        small_states: bool,
    ) -> None:
        self.backend, self.states, self.small_states = backend, [*states], small_states
        self.masters = [*masters]
        self.params = params

    def set_params(self, addresses: NDArray[np.int64]) -> None:
        self.params = self._moved_to(addresses)

    def set_grads(self, addresses: NDArray[np.int64]) -> None:
        self.grads = self._moved_to(addresses)  # gradients lie as their parameters do

    def _moved_to(self, addresses: NDArray[np.int64]) -> list[View]:
        pairs = zip(self.params, addresses.tolist(), strict=True)
        return [view._replace(address=address) for view, address in pairs]

    def norm(self) -> float:
        table, *_ = self._table()
        return float(table.norm().get()[0])

    def _table(self) -> Any:
        cupy, device = self.backend.cupy, self.backend.device
        views = [*self.params, *self.grads]
        mirror = Mirror(cupy, [_span(view.address, view.layout) for view in views])
        states = [
            [None if array is None else cupy.asarray(array) for array in arrays]
            for arrays in (self.masters, *self.states)
        ]
        params = [view._replace(address=mirror[view.address]) for view in self.params]
        table = device.update_table(params, states[1:], states[0], self.small_states)
        table.set_grads(np.array([mirror[view.address] for view in self.grads], np.int64))
        return table, mirror, states

    def update(
        self, rule: Rule, step: Any, lr: Any, grad_scale: Any, zero_grads: bool, guard: Guard
    ) -> bool:
        table, mirror, states = self._table()
        taken = step if isinstance(step, np.ndarray) else np.array([step - 1], np.int64)
        counter = self.backend.cupy.asarray(taken)
        table.update(rule, counter, lr, grad_scale, zero_grads, guard)
        mirror.fetch()
        for arrays, copies in zip((self.masters, *self.states), states, strict=True):
            for array, copy in zip(arrays, copies, strict=True):
                if array is not None:
                    array[...] = copy.get()
        before = int(taken[0])
        taken[...] = counter.get()
        return bool(taken[0] > before)


class MirrorBackend:
    """What `fastseg.dispatch.Backend` types, for NumPy arrays, on a device of CuPy's."""

    def __init__(self, device: Backend) -> None:
        import cupy

        self.cupy, self.device = cupy, device

    def _moved(self, problem: Problem, *more: View) -> tuple[Problem, Mirror]:
        layouts = problem.arrangement.layouts
        spans = [_span(a, layout) for a, layout in zip(problem.addresses, layouts, strict=True)]
        mirror = Mirror(self.cupy, [*spans, *(_span(v.address, v.layout) for v in more)])
        addresses = tuple(mirror[address] for address in problem.addresses)
        return problem._replace(addresses=addresses), mirror

    def keeps(self, problem: Problem, families: frozenset[str], out: View) -> bool:
        return False

    def statistics(
        self, problem: Problem, families: frozenset[str], keep: View | None = None
    ) -> Any:
        moved, _mirror = self._moved(problem)
        return self.device.to_host(self.device.statistics(moved, families))

    def gradient(
        self,
        problem: Problem,
        coefficients: Any,
        out: View,
        families: frozenset[str],
        slopes: Any = None,
        kept: bool = False,
    ) -> None:
        moved, mirror = self._moved(problem, out)
        there = out._replace(address=mirror[out.address])
        slopes = None if slopes is None else self.cupy.asarray(slopes)
        self.device.gradient(moved, self.cupy.asarray(coefficients), there, families, slopes)
        mirror.fetch()

    def sorted_slopes(
        self, problem: Problem, sums: Any, result: Evaluation, batch: bool, with_slopes: bool
    ) -> tuple[Evaluation, Any]:
        moved, _mirror = self._moved(problem)
        there = Evaluation(*(None if a is None else self.cupy.asarray(a) for a in result))
        sums = self.cupy.asarray(sums)
        made, slopes = self.device.sorted_slopes(moved, sums, there, batch, with_slopes)
        back = Evaluation(*(None if array is None else array.get() for array in made))
        return back, None if slopes is None else slopes.get()

    def small_call(self, *arguments: Any) -> None:
        return None

    def prepare(self, *arguments: Any) -> Any:
        return self.device.prepare(*arguments)

    def evaluate(self, *arguments: Any) -> Evaluation:
        result = self.device.evaluate(*arguments)
        return Evaluation(*(None if array is None else array.get() for array in result))

    def sigmoid(self, x: View, out: View) -> None:
        mirror = Mirror(self.cupy, [_span(view.address, view.layout) for view in (x, out)])
        self.device.sigmoid(*(v._replace(address=mirror[v.address]) for v in (x, out)))
        mirror.fetch()

    def count_labels(self, problem: Problem, num_classes: int) -> Any:
        moved, _mirror = self._moved(problem)  # which must outlive the call
        return self.device.count_labels(moved, num_classes)

    def update_table(
        self, params: Any, states: Any, masters: Any, small_states: bool
    ) -> MirrorTable:
        return MirrorTable(self, params, states, masters, small_states)

    def state_like(self, param: View, k: int, dtype: str) -> Any:
        return np.zeros(int(np.prod(param.shape)), "int16" if dtype == "bfloat16" else dtype)

    def counter(self, value: int) -> Any:
        return np.array([value], np.int64)

    def is_recording(self) -> bool:
        return False

    def to_host(self, array: Any) -> Any:
        return array

    def from_host(self, array: Any, values: Any) -> None:
        array[...] = values
