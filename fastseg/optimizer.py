"""What optimisers share: checks, states, and one step over a list of arrays, in place.

One step is one pass over memory and one parallel region for the whole list, however many arrays
it has; the gradients may be scaled and zeroed in that pass, and be read once before it to clip
their norm. What can go wrong is checked before anything is written (see `fastseg.updater`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, prod
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from fastseg.dispatch import cpu
from fastseg.parameters import as_list, check_state_dtype, checked_max_norm, checked_number
from fastseg.updater import Updater, widest
from fastseg_kernels.updates import Guard, Rule

NOTHING = 0.0
UNGUARDED = Guard()


class Optimizer:
    """What the optimisers share: checks, the state, and one step over a list of arrays."""

    _hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    _state_names: ClassVar[tuple[str, ...]] = ()

    lr: float
    weight_decay: float

    def __init__(
        self,
        params: Any,
        state_dtype: str | None = None,
        capturable: bool = False,
        **values: Any,
    ) -> None:
        values = self._checked(values)
        check_state_dtype(state_dtype)
        self.params = tuple(as_list(params))
        """The arrays that are updated."""
        if not self.params:
            raise ValueError("params must have at least one array, got none")
        for name, value in values.items():
            setattr(self, name, value)
        self._steps = 0
        self._updater = Updater(self.params, self._names(), state_dtype)
        self._backend = self._updater.backend
        self._counter: Any = None  # of the steps, in the memory of the GPU
        if capturable:
            if self._updater.device == "cpu":
                raise ValueError("capturable=True is for params on a GPU, got params on the CPU")
            self._counter = self._backend.counter(0)

    def step(
        self,
        grads: Any,
        *,
        lr: Any = None,
        grad_scale: Any = 1.0,
        zero_grads: bool = False,
        max_norm: float | None = None,
        skip_non_finite: bool = False,
        grad_norm: Any = None,
        found_inf: Any = NOTHING,
    ) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : sequence of arrays, or one array
            One gradient per parameter, with its library, shape, dtype and strides.
        lr : float, or an array of one number on the GPU, optional
            Step size of this step alone, instead of the attribute ``lr``.
        grad_scale : float, or an array of one number on the GPU
            Multiplies the gradients on their way in, before everything else: 1 / scale undoes the
            scaling of a loss, a negative number maximises. A number that is on the GPU, as ``lr``
            may be, is read there by the step itself: nobody waits for it, and its range is not
            checked.
        zero_grads : bool
            Write zeros to the gradients in the same pass, once they are read.
        max_norm : float, optional
            Clip: where the norm of all scaled gradients together is larger, they are shortened to
            it (infinite: never). Costs one more reading of the gradients.
        skip_non_finite : bool
            Drop the step, which then does not count, where that norm is not finite, as it is not
            where a gradient is not. Costs the same reading, once for both.
        grad_norm : float, or an array of one number on the GPU, optional
            The norm of the gradients before they are scaled, if it is known, as `grad_norm` returns
            it. Combine it over optimisers, or over processes: the root of the sum of squares.
        found_inf : float, or an array of one number on the GPU
            Drop the step unless this is 0, as gradient scalers ask for.

        Raises
        ------
        TypeError
            A gradient of another library or dtype than its parameter, or an argument that is not a
            number.
        ValueError
            A wrong number of gradients, another shape or other strides, memory shared with a
            parameter, a number outside its range.
        RuntimeError
            While a CUDA graph is recorded: a step whose number matters, or that may be dropped,
            and the steps are not counted on the GPU yet (``capturable=True``).

        Notes
        -----
        A gradient that was checked at the last step is not looked at again while it has the same
        memory: a NumPy or CuPy array whose shape or strides were set since goes unnoticed.

        After an error nothing has changed. Unless ``skip_non_finite`` is set, a gradient that is
        not finite makes its parameter and state NaN or infinite, and other elements are not touched
        by it. A step that is dropped still zeroes the gradients if it is asked to. On a GPU nobody
        waits to learn whether it was dropped; the steps are counted there from then on.

        The norm is added up in float64: of float64 gradients beyond 1e154 it is infinite.
        """
        values, number = self._current(), self._updater.number
        if lr is not None:
            values["lr"] = number("lr", lr, at_least=0)
        scale, zero_grads = number("grad_scale", grad_scale), bool(zero_grads)
        grads = as_list(grads)
        guard = UNGUARDED
        if not (max_norm is grad_norm is None and found_inf is NOTHING and not skip_non_finite):
            guard = Guard(
                None
                if grad_norm is None
                else number("grad_norm", grad_norm, at_least=0, finite=False),
                inf if max_norm is None else checked_max_norm(max_norm),
                bool(skip_non_finite),
                number("found_inf", found_inf, finite=False),
            )
        table = self._updater.point_table(grads, zero_grads)
        recording = self._backend.is_recording()
        if guard is not UNGUARDED:
            self._count_where_steps_are_dropped(guard, recording)
            if grad_norm is None and (max_norm is not None or guard.skip_non_finite):
                guard = guard._replace(norm=table.norm())
        step = self._steps + 1 if self._counter is None else self._counter
        rule, lr = self._rule(values), values["lr"]
        taken = self._updater.step(table, grads, rule, step, lr, scale, zero_grads, guard)
        self._steps += taken and not recording  # a step that is recorded is not taken yet

    def _count_where_steps_are_dropped(self, guard: Guard, recording: bool) -> None:
        """Count the steps on the GPU from now on, if this one may be dropped there."""
        may_drop = guard.skip_non_finite or not isinstance(guard.found_inf, float)
        if not may_drop or self._counter is not None or self._backend is cpu():
            return  # the CPU says so
        if recording:
            raise RuntimeError(
                "a step that may be dropped is counted on the GPU; take one before recording, or "
                "make the optimiser with capturable=True"
            )
        self._counter = self._backend.counter(self._steps)

    def grad_norm(self, grads: Any) -> Any:
        """Return the norm of all gradients together, as `step` clips it if ``grad_scale`` is 1.

        Parameters
        ----------
        grads : sequence of arrays, or one array
            As for `step`.

        Returns
        -------
        float, or on a GPU a 0-d array, float64
            Nobody waits for the latter.

        Raises
        ------
        TypeError, ValueError
            As `step`.

        Examples
        --------
        >>> import numpy as np, fastseg as fs
        >>> grads = [np.array([3.0]), np.array([[4.0]])]
        >>> opt = fs.GradientDescent([np.zeros(1), np.zeros((1, 1))], lr=1.0)
        >>> norm = opt.grad_norm(grads)
        >>> norm
        5.0
        >>> opt.step(grads, max_norm=1.0, grad_norm=norm)
        >>> opt.params[1]
        array([[-0.8]])
        """
        norm = self._updater.point_table(as_list(grads), False).norm()
        return norm if isinstance(norm, float) else norm.reshape(())

    @property
    def step_count(self) -> int:
        """How many steps were taken. Where they are counted on the GPU, asking waits for it.

        They are with ``capturable``, and from the first step on that may be dropped; only there are
        those counted that a graph repeats.
        """
        return (
            self._steps if self._counter is None else int(self._backend.to_host(self._counter)[0])
        )

    @step_count.setter
    def step_count(self, count: int) -> None:
        self._steps = count
        if self._counter is not None:
            self._backend.from_host(self._counter, np.array([count], np.int64))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that the next step depends on, parameters excepted.

        Returns
        -------
        dict
            ``optimizer`` (the name of the class), ``step`` (int, steps taken), the
            hyper-parameters, and for each state (``velocity``, or ``exp_avg``, ``exp_avg_sq``, and
            ``max_exp_avg_sq``) a list of NumPy arrays, one per parameter, of its shape; those of a
            GPU are copied to the host, and load there or here. They have the dtype of the
            parameter, float32 for one of 2 bytes, for which ``master_param`` has the master (None
            for others; 0 before the first step: a master that, rounded, is not its parameter does
            not count).

        Notes
        -----
        It pickles. For `numpy.savez`, give every array of a list a name of its own, as in
        ``{f"exp_avg_{i}": array for i, array in enumerate(state["exp_avg"])}``, leaving out what is
        None; what else it holds may be saved as it is, and comes back as arrays, which
        `load_state_dict` takes.
        """
        state: dict[str, Any] = {"optimizer": type(self).__name__, "step": self.step_count}
        state.update(self._current())
        return state | {name: self._updater.to_host(name) for name in self._updater.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned, hyper-parameters included.

        Parameters
        ----------
        state : dict
            Of an optimiser of the same class, over parameters of the same shapes and dtypes.

        Raises
        ------
        TypeError, ValueError
            Something in ``state`` does not fit; nothing has changed then.
        """
        states = self._updater.states
        names = ("optimizer", "step", *self._hyperparameters, *states)
        if set(state) != set(names):
            missing, strange = [n for n in names if n not in state], [*state.keys() - {*names}]
            said = [f"lacks {', '.join(missing)}"] * bool(missing)
            said += [f"has {', '.join(map(str, strange))}"] * bool(strange)
            raise ValueError(f"state must have the keys {', '.join(names)}; it {', '.join(said)}")
        plain = {  # numpy.savez makes arrays of numbers
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in state.items()
            if name not in states
        }
        optimizer, step = plain.pop("optimizer"), plain.pop("step")
        if optimizer != type(self).__name__:
            raise ValueError(f"state must be of optimizer {type(self).__name__}, got {optimizer}")
        if not isinstance(step, Integral) or step < 0:
            raise ValueError(f"state['step'] must be an integer of at least 0, got {step!r}")
        values = self._checked(plain)
        self._check_states(values)
        for name in states:
            self._check_loaded(name, state[name])
        for name in states:
            self._updater.from_host(name, state[name])
        for name, value in values.items():
            setattr(self, name, value)
        self.step_count = int(step)

    def _check_loaded(self, name: str, loaded: Any) -> None:
        """Raise unless each array of a state fits its parameter."""
        views, arrays = self._updater.views, self._updater.states[name]
        if len(loaded) != len(arrays):
            raise ValueError(
                f"state['{name}'] must have one array per param ({len(arrays)}), got {len(loaded)}"
            )
        for i, (view, flat) in enumerate(zip(views, arrays, strict=True)):
            if flat is None:
                continue
            other = np.asarray(loaded[i])
            if other.shape != view.shape:
                raise ValueError(
                    f"state['{name}'][{i}] must have shape {view.shape} as params[{i}], "
                    f"got {other.shape}"
                )
            if other.dtype != (dtype := widest(view.dtype)):
                raise TypeError(
                    f"state['{name}'][{i}] must have dtype {dtype} for params[{i}], which has "
                    f"{view.dtype}, got {other.dtype}"
                )

    def __repr__(self) -> str:
        size = sum(prod(view.shape) for view in self._updater.views)
        count = len(self.params)
        values = [f"{name}={getattr(self, name)!r}" for name in self._hyperparameters]
        arrays = f"<{count} array{'s' * (count != 1)}, {size:,} elements>"
        return f"{type(self).__name__}({', '.join([arrays, *values])})"

    def __reduce__(self) -> Any:
        # A copy would go on writing to the memory of the original.
        raise TypeError(
            f"{type(self).__name__} is bound to the memory of its params and can neither be copied "
            "nor pickled; pickle its state_dict()"
        )

    def _current(self) -> dict[str, Any]:
        """Return the hyper-parameters; attributes may have been set to anything."""
        values = self._checked({name: getattr(self, name) for name in self._hyperparameters})
        self._check_states(values)
        return values

    def _check_states(self, values: Mapping[str, Any]) -> None:
        """Raise if these hyper-parameters need other states than there are."""

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyper-parameters as plain Python values; raise if one is out of range."""
        checked = dict(values)
        for name in ("lr", "weight_decay"):
            checked[name] = checked_number(name, values[name], at_least=0)
        return checked

    def _names(self) -> tuple[str, ...]:
        """Return the names of the states."""
        return self._state_names

    @staticmethod
    def _rule(values: Mapping[str, Any]) -> Rule:
        """Return the rule with these hyper-parameters."""
        raise NotImplementedError
