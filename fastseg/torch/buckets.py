"""Which parameters of torch.optim's groups share a step, and the memory of their states.

The truth is ``optimizer.state``, as for torch.optim's own classes: a bucket is a view of it, made
anew where an entry is no longer the tensor that the bucket put there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, NamedTuple

import torch

from fastseg.updater import MASTER, Updater


class Bucket:
    """Parameters that took the same steps."""

    def __init__(self, updater: Updater, steps: torch.Tensor, taken: int | None) -> None:
        self.updater, self.params = updater, updater.params
        self.steps = steps
        """How many: one int64 on the device of the parameters."""
        self.counter = steps.numpy() if steps.is_cpu else steps  # in one memory
        self.taken = taken
        """The same, where the host knows it."""
        self.shown: dict[str, list[torch.Tensor | None]] = {}
        """The tensors that are in the optimiser's state."""
        for name, flats in updater.states.items():
            pairs = zip(flats, self.params, strict=True)
            self.shown[name] = [None if flat is None else _in_shape(flat, p) for flat, p in pairs]
        if self.shown:
            self.shown["step"] = [steps[0]] * len(self.params)

    def is_current(self, state: Mapping[torch.Tensor, dict[str, Any]]) -> bool:
        """Tell whether the optimiser's state is what this bucket has put there."""
        if not self.shown:
            return True
        entries = [state.get(param, {}) for param in self.params]
        return all(
            all(map(is_, [entry.get(name) for entry in entries], tensors))
            for name, tensors in self.shown.items()
        )

    def count(self, taken: bool, may_be_dropped: bool) -> None:
        """Note that a step was taken, as far as the host knows."""
        if self.steps.is_cpu:
            self.taken = int(self.counter[0])
        elif may_be_dropped or self.taken is None:
            self.taken = None  # the device alone knows
        else:
            self.taken += taken


class _Active(NamedTuple):
    """The parameters of a group that had a gradient at its last step, and their buckets."""

    params: list[torch.Tensor]
    names: tuple[str, ...]
    buckets: list[Bucket]


class Buckets:
    """The buckets of an optimiser; ``steps_taken`` reads a parameter's entry of its state."""

    def __init__(self, steps_taken: Callable[[dict[str, Any]], int]) -> None:
        self._steps_taken = steps_taken
        self._active: dict[int, _Active] = {}
        self._places: dict[torch.Tensor, tuple[Bucket, int]] = {}

    def of_group(
        self,
        index: int,
        params: list[torch.Tensor],
        names: tuple[str, ...],
        state: Any,
        state_dtype: str | None,
    ) -> list[Bucket]:
        """Return the buckets of these parameters of a group; ``names`` are those of its states."""
        last = self._active.get(index)
        if (
            last is not None
            and last.names == names
            and len(last.params) == len(params)
            and all(map(is_, last.params, params))
            and all(bucket.is_current(state) for bucket in last.buckets)
        ):
            return last.buckets
        held = self._current(params, names, state)
        together: dict[Any, list[torch.Tensor]] = {}
        for param in params:
            if param in held:
                its = held[param][0]
                key: Any = its if its.taken is None else (param.device, its.taken)
            else:
                key = param.device, self._steps_taken(state.get(param, {}))
            together.setdefault(key, []).append(param)
        buckets = []
        for key, several in together.items():
            bucket = held[several[0]][0] if several[0] in held else None
            if bucket is None or list(map(id, bucket.params)) != list(map(id, several)):
                if isinstance(key, Bucket):
                    steps, taken = key.steps.clone(), None
                else:
                    device, taken = key
                    steps = torch.full((1,), taken, dtype=torch.int64, device=device)
                bucket = self._make(several, names, state, state_dtype, held, steps, taken)
            buckets.append(bucket)
        self._active[index] = _Active(params, names, buckets)
        return buckets

    def forget(self, bucket: Bucket) -> None:
        """Take a bucket's parameters out of it: they are laid out anew, from the state."""
        for param in bucket.params:
            self._places.pop(param, None)
        self._active.clear()

    def _current(
        self, params: list[torch.Tensor], names: tuple[str, ...], state: Any
    ) -> dict[torch.Tensor, tuple[Bucket, int]]:
        """Return the places of those parameters whose buckets are what the state has."""
        fine: dict[Bucket, bool] = {}
        held = {}
        for param in params:
            if param in self._places:
                bucket, _ = self._places[param]
                if bucket not in fine:
                    same = bucket.updater.state_names == names
                    fine[bucket] = same and bucket.is_current(state)
                if fine[bucket]:
                    held[param] = self._places[param]
        return held

    def _make(
        self,
        params: list[torch.Tensor],
        names: tuple[str, ...],
        state: Any,
        state_dtype: str | None,
        held: dict[torch.Tensor, tuple[Bucket, int]],
        steps: torch.Tensor,
        taken: int | None,
    ) -> Bucket:
        """Make a bucket; memory that another has is taken over, what the state has is copied."""
        flats: dict[str, list[Any]] = {name: [] for name in (*names, MASTER)}
        for param in params:
            bucket, i = held.get(param, (None, 0))
            for name, listed in flats.items():
                known = None if bucket is None else bucket.updater.states.get(name)
                listed.append(None if known is None else known[i])
        bucket = Bucket(Updater(params, names, state_dtype, flats), steps, taken)
        for name in bucket.updater.states:
            for i, param in enumerate(params):
                before, tensor = state.get(param, {}).get(name), bucket.shown[name][i]
                if tensor is None or before is None or flats[name][i] is not None:
                    continue
                if before.shape != param.shape:
                    raise ValueError(
                        f"state['{name}'] of a parameter must have its shape "
                        f"{tuple(param.shape)}, got {tuple(before.shape)}"
                    )
                tensor.copy_(before)
        for i, param in enumerate(params):
            self._places[param] = bucket, i
            for name, tensors in bucket.shown.items():
                if tensors[i] is not None:
                    state[param][name] = tensors[i]
            if MASTER not in bucket.shown and MASTER in state.get(param, {}):
                del state[param][MASTER]  # of a checkpoint whose parameters had 2 bytes
        return bucket


def _in_shape(flat: Any, param: torch.Tensor) -> torch.Tensor:
    """Return a state, in the memory order of a parameter, as a tensor of its shape."""
    tensor = flat if isinstance(flat, torch.Tensor) else torch.from_numpy(flat)
    if tensor.dtype == torch.int16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.as_strided(param.shape, param.stride())
