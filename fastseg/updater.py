"""One step over a list of parameters, whatever optimiser takes it.

What can go wrong is checked before anything is written. Checking takes milliseconds where there are
thousands of arrays, so the check is remembered for as long as the same gradient objects come again
(see `HELD_BYTES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, prod
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.dispatch import UpdateTable, backend_of
from fastseg.libraries import device_number, library_of
from fastseg.parameters import (
    Gradients,
    addresses_of,
    check_grads,
    check_params,
    checked_number,
    dense_layout,
    is_same,
    may_move,
    places_of,
    watched_tensors,
)
from fastseg_kernels.constants import ITEM_SIZES
from fastseg_kernels.updates import MASTERED, Guard, Rule, from_bfloat16, to_bfloat16
from fastseg_kernels.views import View

HELD_BYTES = 64 * 2**20
"""Gradients of the last step are held, so that they can be recognised, up to this size together.
Larger ones are checked anew at each step: keeping them alive could cost the caller as much memory
as the parameters, and beside a pass over them the check is short."""
MASTER = "master_param"
"""What the masters are called among the states."""


class MovedError(ValueError):
    """Parameters lie otherwise than when their states were made."""


def widest(dtype: str) -> str:
    """Return the dtype that parameters of ``dtype`` are computed in, as are their states."""
    return "float32" if dtype in MASTERED else dtype


class Updater:
    """Parameters, their states, and what is remembered of them from step to step.

    Parameters
    ----------
    params
        The parameters.
    state_names
        Names of the states of the rule, in its order.
    state_dtype
        "bfloat16", or None for the dtype that is computed in.
    states
        States to go on with, as `Updater.states` has them; new ones where there is None.
    """

    def __init__(
        self,
        params: Sequence[Any],
        state_names: Sequence[str],
        state_dtype: str | None = None,
        states: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self.params = tuple(params)
        self.views, self._memory = check_params(self.params)
        self.libraries = [library_of(param, "params") for param in self.params]
        self._counting: dict[Any, list[int]] = {}  # which arrays are of a library that counts
        for i, library in enumerate(self.libraries):
            if library.counts_writes:
                self._counting.setdefault(library, []).append(i)
        self._may_move = may_move(self.libraries)
        self._watched = watched_tensors(self.params)
        self._places = places_of(self._watched)
        self.backend = backend_of(self.libraries[0], self.params[0])
        self.device = self.libraries[0].device(self.params[0])
        self.state_names, self.small_states = tuple(state_names), state_dtype == "bfloat16"
        if self.small_states:
            for i, view in enumerate(self.views):
                if view.dtype == "float64":
                    raise TypeError(
                        f"params[{i}] must not be float64 with state_dtype='bfloat16': its states "
                        "would have a seventh of its digits"
                    )
        self.states: dict[str, list[Any]] = {}
        """Of each array, its elements in the memory order of the parameter; the masters (None for
        parameters that need none) are among them."""
        for k, name in enumerate(self.state_names):
            dtypes = [state_dtype or widest(view.dtype) for view in self.views]
            self.states[name] = self._memory_of(k, dtypes, (states or {}).get(name))
        if any(view.dtype in MASTERED for view in self.views):
            dtypes = ["float32" if view.dtype in MASTERED else "" for view in self.views]
            known = (states or {}).get(MASTER)
            self.states[MASTER] = self._memory_of(len(self.state_names), dtypes, known)
        self._table: UpdateTable | None = None
        self._last: Gradients | None = None

    def _memory_of(self, k: int, dtypes: list[str], known: list[Any] | None) -> list[Any]:
        """Return the memory of state ``k``; "" stands for none, None in ``known`` for new."""
        rows = zip(self.views, dtypes, known or [None] * len(dtypes), strict=True)
        return [
            None if not dtype else self.backend.state_like(view, k, dtype) if flat is None else flat
            for view, dtype, flat in rows
        ]

    def number(self, name: str, value: Any, *, at_least: float = -inf, finite: bool = True) -> Any:
        """Return a number that was checked, or a view of one on the device of the parameters."""
        if not isinstance(value, float | int):
            view = device_number(self.backend, value, name)
            if view is not None:
                if prod(view.shape) != 1:
                    raise ValueError(
                        f"{name} must be one number, got an array of shape {view.shape}"
                    )
                return view
        if isinstance(value, np.bool_):
            value = bool(value)
        if not finite and isinstance(value, Real) and not value < at_least:
            return float(value)
        return checked_number(name, value, at_least=at_least)

    def step(
        self,
        table: UpdateTable,
        grads: list[Any],
        rule: Rule,
        step: Any,
        lr: Any,
        grad_scale: Any,
        zero_grads: bool,
        guard: Guard,
    ) -> bool:
        """Take a step with the table that `point_table` returned for these gradients.

        Other arguments are those of `UpdateTable.update`, numbers as `number` returned them.
        Returns False if the step is known to be dropped.
        """
        taken = table.update(rule, step, lr, grad_scale, zero_grads, guard)
        for library, places in self._counting.items():
            library.written([self.params[i] for i in places])
            if zero_grads:
                library.written([grads[i] for i in places])
        for number in (lr, grad_scale, guard.norm, guard.found_inf):
            if type(number) is View:
                library_of(number.owner, "lr").used((number.owner,))
        if self._may_move and not zero_grads:
            for library, grad in zip(self.libraries, grads, strict=True):
                library.used((grad,))
        return taken

    def point_table(
        self, grads: list[Any], zero_grads: bool, prepare: Callable[[], None] | None = None
    ) -> UpdateTable:
        """Return the table, pointed at the parameters and at ``grads`` after checking both.

        ``prepare`` is called before gradients are checked that are not those of the last step; it
        may put others into the list.
        """
        places = places_of(self._watched)
        moved = places != self._places or self._may_move
        if self._table is not None and not moved and is_same(self._last, grads, zero_grads):
            return self._table
        if prepare is not None:
            prepare()
        self._last = None
        views, memory = check_params(self.params) if moved else (self.views, self._memory)
        now = self.libraries[0].device(self.params[0])
        if now != self.device:
            raise MovedError(
                f"params were on {self.device} and are on {now} now, where the states are not; "
                "make a new optimiser"
            )
        if moved:
            self._check_same_layouts(views)
        grad_addresses = check_grads(grads, views, memory, self.libraries, self.device, zero_grads)
        if self._table is None:
            states = [self.states[name] for name in self.state_names]
            masters = self.states.get(MASTER) or [None] * len(views)
            self._table = self.backend.update_table(views, states, masters, self.small_states)
        if moved:
            self._table.set_params(addresses_of(views))
        self.views, self._memory, self._places = views, memory, places
        self._table.set_grads(grad_addresses)
        watched = watched_tensors(grads)
        holds_graph = any(tensor.requires_grad for tensor in watched)  # and all that it saved
        if memory.sizes.sum() <= HELD_BYTES and not holds_graph:  # gradients are as large
            self._last = Gradients(list(grads), watched, places_of(watched), zero_grads)
        return self._table

    def _check_same_layouts(self, views: list[View]) -> None:
        """Raise where a parameter does not lie as it did when its states were made."""
        for i, (view, old) in enumerate(zip(views, self.views, strict=True)):
            if (dense_layout(view), view.dtype) != (dense_layout(old), old.dtype):
                raise MovedError(
                    f"params[{i}] had dtype {old.dtype}, shape {old.shape} and strides "
                    f"{old.strides} and has now {view.dtype}, {view.shape} and {view.strides}; "
                    "make a new optimiser"
                )

    def to_host(self, name: str) -> list[NDArray[Any] | None]:
        """Return copies of a state of every array, in its shape; bfloat16 becomes float32."""
        copies: list[NDArray[Any] | None] = []
        for flat, view in zip(self.states[name], self.views, strict=True):
            if flat is None:
                copies.append(None)
                continue
            numbers = self.backend.to_host(flat)
            if self._is_small(name):
                numbers = from_bfloat16(numbers)
            copies.append(_in_shape(numbers, view).copy(order="K"))
        return copies

    def from_host(self, name: str, arrays: Sequence[Any]) -> None:
        """Take over what `to_host` returned; float32 becomes the nearest bfloat16, if need be."""
        for flat, view, array in zip(self.states[name], self.views, arrays, strict=True):
            if flat is None:
                continue
            numbers = np.empty(prod(view.shape), widest(view.dtype))
            _in_shape(numbers, view)[...] = array
            self.backend.from_host(flat, to_bfloat16(numbers) if self._is_small(name) else numbers)

    def _is_small(self, name: str) -> bool:
        return self.small_states and name != MASTER


def _in_shape(flat: NDArray[Any], view: View) -> NDArray[Any]:
    """Return ``flat``, elements in the memory order of a parameter, as an array of its shape."""
    if flat.size == 0:
        return flat.reshape(view.shape)
    strides = tuple(step // ITEM_SIZES[view.dtype] * flat.itemsize for step in view.strides)
    return np.ndarray(view.shape, flat.dtype, flat, 0, strides)
