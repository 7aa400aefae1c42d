"""Optimisers: gradient descent, momentum and Adam, in place on lists of arrays.

One step is one pass over memory and one parallel region for the whole list, however many arrays
it has; the gradients may be scaled and zeroed in that pass. What can go wrong is checked before
anything is written. Checking takes milliseconds where there are thousands of arrays, so the check
is remembered for as long as the same gradient objects come again (see `HELD_BYTES`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, prod
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from fastseg.dispatch import UpdateTable, backend_of
from fastseg.libraries import device_number, library_of
from fastseg.parameters import (
    Gradients,
    _layout,
    _view_bytes,
    as_list,
    check_grads,
    check_params,
    checked_number,
    in_shape,
    is_same,
    may_move,
    places_of,
    watched_tensors,
)
from fastseg_kernels import updates
from fastseg_kernels.updates import Rule
from fastseg_kernels.views import View

HELD_BYTES = 64 * 2**20
"""Gradients of the last step are held, so that they can be recognised, up to this size together.
Larger ones are checked anew at each step: keeping them alive could cost the caller as much memory
as the parameters, and beside a pass over them the check is short."""

FORMS = ("source", "pytorch")


class _Optimizer:
    """What the optimisers share: checks, the state, and one step over a list of arrays."""

    _hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    _state_names: ClassVar[tuple[str, ...]] = ()

    lr: float
    weight_decay: float

    def __init__(self, params: Any, **values: Any) -> None:
        values = self._checked(values)
        self.params = tuple(as_list(params))
        """The arrays that are updated."""
        self._steps = 0
        self._counter: Any = None  # of the steps, in the backend's memory: Adam's, if capturable
        if not self.params:
            raise ValueError("params must have at least one array, got none")
        for name, value in values.items():
            setattr(self, name, value)
        self._views, self._memory = check_params(self.params)
        self._libraries = [library_of(param, "params") for param in self.params]
        self._counting = [  # arrays whose library counts writes, as autograd does
            (i, library.written)
            for i, library in enumerate(self._libraries)
            if library.name not in ("numpy", "cupy")
        ]
        self._may_move = may_move(self._libraries)
        self._watched = watched_tensors(self.params)
        self._places = places_of(self._watched)
        self._backend = backend_of(self._libraries[0], self.params[0])
        self._device = self._libraries[0].device(self.params[0])
        self._states = {  # of each array, its elements in the memory order of the parameter
            name: [self._backend.state_like(view, k) for view in self._views]
            for k, name in enumerate(self._state_names)
        }
        self._table: UpdateTable | None = None
        self._last: Gradients | None = None

    def step(
        self,
        grads: Any,
        *,
        lr: Any = None,
        grad_scale: Any = 1.0,
        zero_grads: bool = False,
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

        Raises
        ------
        TypeError
            A gradient of another library or dtype than its parameter, or an argument that is not a
            number.
        ValueError
            A wrong number of gradients, another shape or other strides, memory shared with a
            parameter, a number outside its range.

        Notes
        -----
        A gradient that was checked at the last step is not looked at again while it has the same
        memory: one whose strides were changed in place since (``grad.t_()``) goes unnoticed.

        After an error nothing has changed. Values are not looked at: a gradient that is not finite
        makes its parameter and state NaN or infinite, and other elements are not touched by it.
        """
        values = self._current()
        if lr is not None:
            values["lr"] = self._number("lr", lr, at_least=0)
        scale, zero_grads = self._number("grad_scale", grad_scale), bool(zero_grads)
        grads = as_list(grads)
        table = self._point_table(grads, zero_grads)
        recording = self._backend.is_recording()
        if values.get("form") == "pytorch" and self._steps == 0 and recording:
            raise RuntimeError(
                "a graph would repeat the first step, which has no momentum; take it before "
                "recording"
            )
        step = self._steps + 1 if self._counter is None else self._counter
        table.update(self._rule(values, self._steps + 1), step, values["lr"], scale, zero_grads)
        self._steps += not recording  # a step that is recorded is not taken yet
        for arrays in (self.params, grads) if zero_grads else (self.params,):
            for i, written in self._counting:
                written(arrays[i])
        for number in (values["lr"], scale):
            if type(number) is View:
                library_of(number.owner, "lr").used((number.owner,))
        if self._may_move and not zero_grads:
            for library, grad in zip(self._libraries, grads, strict=True):
                library.used((grad,))

    @property
    def step_count(self) -> int:
        """How many steps were taken; with ``capturable``, asking waits for the GPU.

        Those that a graph repeats are counted with ``capturable`` alone.
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
            hyper-parameters, and for each state (``velocity``, or ``exp_avg`` and ``exp_avg_sq``)
            a list of NumPy arrays, one per parameter, of its shape and dtype; those of a GPU are
            copied to the host.

        Notes
        -----
        It pickles. For `numpy.savez`, give every array of a list a name of its own, as in
        ``{f"exp_avg_{i}": array for i, array in enumerate(state["exp_avg"])}``; what else it holds
        may be saved as it is, and comes back as arrays, which `load_state_dict` takes.
        """
        state: dict[str, Any] = {"optimizer": type(self).__name__, "step": self.step_count}
        state.update(self._current())
        for name, arrays in self._states.items():
            on_host = map(self._backend.to_host, arrays)
            pairs = zip(on_host, self._views, strict=True)
            state[name] = [in_shape(flat, view).copy(order="K") for flat, view in pairs]
        return state

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
        names = ("optimizer", "step", *self._hyperparameters, *self._state_names)
        if set(state) != set(names):
            raise ValueError(f"state must have the keys {', '.join(names)}, got {', '.join(state)}")
        plain = {  # numpy.savez makes arrays of numbers
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in state.items()
            if name not in self._state_names
        }
        optimizer, step = plain.pop("optimizer"), plain.pop("step")
        if optimizer != type(self).__name__:
            raise ValueError(f"state must be of optimizer {type(self).__name__}, got {optimizer}")
        if not isinstance(step, Integral) or step < 0:
            raise ValueError(f"state['step'] must be an integer of at least 0, got {step!r}")
        values = self._checked(plain)
        for name, arrays in self._states.items():
            loaded = state[name]
            if len(loaded) != len(arrays):
                raise ValueError(
                    f"state['{name}'] must have one array per param ({len(arrays)}), "
                    f"got {len(loaded)}"
                )
            on_host = map(np.asarray, loaded)
            for i, (view, other) in enumerate(zip(self._views, on_host, strict=True)):
                if other.shape != view.shape:
                    raise ValueError(
                        f"state['{name}'][{i}] must have shape {view.shape} as params[{i}], "
                        f"got {other.shape}"
                    )
                if other.dtype != view.dtype:
                    raise TypeError(
                        f"state['{name}'][{i}] must have dtype {view.dtype} as params[{i}], "
                        f"got {other.dtype}"
                    )
        for name, arrays in self._states.items():
            for array, view, other in zip(arrays, self._views, state[name], strict=True):
                flat = np.empty(prod(view.shape), view.dtype)
                in_shape(flat, view)[...] = other
                self._backend.from_host(array, flat)
        for name, value in values.items():
            setattr(self, name, value)
        self.step_count = int(step)

    def __repr__(self) -> str:
        size = sum(prod(view.shape) for view in self._views)
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
        return self._checked({name: getattr(self, name) for name in self._hyperparameters})

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyper-parameters as plain Python values; raise if one is out of range."""
        checked = dict(values)
        for name in ("lr", "weight_decay"):
            checked[name] = checked_number(name, values[name], at_least=0)
        return checked

    @staticmethod
    def _rule(values: Mapping[str, Any], step: int) -> Rule:
        """Return the rule with these hyper-parameters; ``step`` is 1 at the first."""
        raise NotImplementedError

    def _number(self, name: str, value: Any, *, at_least: float = -inf) -> Any:
        """Return a number that was checked, or a view of one on the device of the parameters."""
        if isinstance(value, float | int):
            return checked_number(name, value, at_least=at_least)
        view = device_number(self._backend, value, name)
        if view is None:
            return checked_number(name, value, at_least=at_least)
        if prod(view.shape) != 1:
            raise ValueError(f"{name} must be one number, got an array of shape {view.shape}")
        return view

    def _point_table(self, grads: list[Any], zero_grads: bool) -> UpdateTable:
        """Return the table, pointed at the parameters and at ``grads`` after checking both."""
        places = places_of(self._watched)
        moved = places != self._places or self._may_move
        if self._table is not None and not moved and is_same(self._last, grads, zero_grads):
            return self._table
        self._last = None
        views, memory = check_params(self.params) if moved else (self._views, self._memory)
        now = self._libraries[0].device(self.params[0])
        if now != self._device:
            raise ValueError(
                f"params were on {self._device} and are on {now} now, where the states are not; "
                "make a new optimiser"
            )
        for i, (view, old) in enumerate(zip(views, self._views, strict=True)):
            if moved and (_layout(view), view.dtype) != (_layout(old), old.dtype):
                raise ValueError(
                    f"params[{i}] had dtype {old.dtype}, shape {old.shape} and strides "
                    f"{old.strides} and has now {view.dtype}, {view.shape} and {view.strides}; "
                    "make a new optimiser"
                )
        grad_views = check_grads(grads, views, memory, self._libraries, self._device, zero_grads)
        if self._table is None:
            self._table = self._backend.update_table(views, list(self._states.values()))
        self._views, self._memory, self._places = views, memory, places
        self._table.set_params(views)
        self._table.set_grads(grad_views)
        watched = watched_tensors(grads)
        holds_graph = any(tensor.requires_grad for tensor in watched)  # and all that it saved
        if sum(map(_view_bytes, grad_views)) <= HELD_BYTES and not holds_graph:
            self._last = Gradients(list(grads), watched, places_of(watched), zero_grads)
        return self._table


class GradientDescent(_Optimizer):
    r"""Gradient descent.

    .. math:: \theta \leftarrow \theta - \eta g

    Parameters
    ----------
    params : sequence of arrays, or one array
        Parameters, written in place: NumPy or CuPy arrays or torch tensors, all on one device,
        float32 or float64, any shapes, each one run of memory (C order, Fortran order, channels
        last, ...).
    lr : float
        Step size, at least 0. A plain attribute: schedules set it.
    weight_decay : float
        L2 penalty: g + weight_decay theta stands for g.

    Raises
    ------
    TypeError
        A parameter that is no such array, or of another dtype; a hyper-parameter that is not a
        number.
    ValueError
        A parameter that is read-only, not one run of memory, or shares memory with another; a
        number outside its range.

    Notes
    -----
    Every element is computed in the dtype of its parameter, within a few units in the last place
    of the added terms, and has the same bits whatever the number of threads. torch.optim.SGD with
    momentum=0 is the same rule.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> theta = np.array([1.0, 2.0])
    >>> opt = fs.GradientDescent(theta, lr=0.5)
    >>> opt.step(np.array([1.0, -1.0]))
    >>> theta
    array([0.5, 2.5])
    >>> opt
    GradientDescent(<1 array, 2 elements>, lr=0.5, weight_decay=0.0)
    """

    def __init__(self, params: Any, lr: float, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @staticmethod
    def _rule(values: Mapping[str, Any], step: int) -> Rule:
        return updates.gradient_descent(weight_decay=values["weight_decay"])


class Momentum(_Optimizer):
    r"""Gradient descent with momentum, in one of two forms; the velocity is 0 at first.

    .. math:: v \leftarrow \gamma v + \eta g, \qquad
              \theta \leftarrow \theta - v
              \qquad \text{("source")}

    .. math:: v \leftarrow \gamma v + (1 - \mathrm{dampening}) g, \qquad
              \theta \leftarrow \theta - \eta v
              \qquad \text{("pytorch", first step: } v = g \text{)}

    Parameters
    ----------
    params : sequence of arrays, or one array
        As for `GradientDescent`.
    lr : float
        Step size eta, at least 0. A plain attribute: schedules set it.
    gamma : float
        Share of the velocity that is kept, in [0, 1).
    form : {"source", "pytorch"}
        Whether the velocity contains the step size.
    dampening : float
        Of the new gradient, for the PyTorch form without Nesterov alone.
    nesterov : bool
        Look ahead along the new velocity: theta - (gamma v + eta g), or in the PyTorch form
        theta - eta (g + gamma v).
    weight_decay : float
        L2 penalty: g + weight_decay theta stands for g.

    Raises
    ------
    TypeError, ValueError
        As for `GradientDescent`.

    Notes
    -----
    At a constant step size both forms take the same steps. Under a schedule they differ: in the
    source's form a new step size acts on new gradients alone, in PyTorch's (torch.optim.SGD) on
    the whole velocity. A gradient that is not finite makes its parameter NaN.

    References
    ----------
    B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML
    2013 (Nesterov's form).

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> theta = np.array([1.0, 2.0])
    >>> opt = fs.Momentum(theta, lr=0.5, gamma=0.5)
    >>> opt.step(np.array([1.0, -1.0]))
    >>> opt.step(np.array([0.0, 0.0]), lr=0.25)  # the velocity runs on
    >>> theta
    array([0.25, 2.75])
    """

    _hyperparameters = ("lr", "gamma", "form", "dampening", "nesterov", "weight_decay")
    _state_names = ("velocity",)

    gamma: float
    form: str
    dampening: float
    nesterov: bool

    def __init__(
        self,
        params: Any,
        lr: float,
        gamma: float = 0.9,
        *,
        form: str = "source",
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            gamma=gamma,
            form=form,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        checked = super()._checked(values)
        checked["gamma"] = checked_number("gamma", values["gamma"], at_least=0, below=1)
        checked["dampening"] = dampening = checked_number("dampening", values["dampening"])
        checked["nesterov"] = nesterov = bool(values["nesterov"])
        form = values["form"]
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if dampening != 0 and (form == "source" or nesterov):
            raise ValueError(
                "dampening must be 0 unless form='pytorch' and nesterov=False, "
                f"got dampening={dampening} with form={form!r} and nesterov={nesterov}"
            )
        return checked

    @staticmethod
    def _rule(values: Mapping[str, Any], step: int) -> Rule:
        gamma, nesterov, decay = values["gamma"], values["nesterov"], values["weight_decay"]
        if values["form"] == "source":
            return updates.momentum(gamma, nesterov, weight_decay=decay)
        dampening = values["dampening"]
        return updates.momentum_pytorch(step == 1, gamma, dampening, nesterov, weight_decay=decay)


class Adam(_Optimizer):
    r"""Adam, Algorithm 1 of Kingma and Ba; t counts the steps from 1 and both moments start at 0.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
              v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              \theta \leftarrow \theta - \eta \frac{m / (1 - \beta_1^t)}
              {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Parameters
    ----------
    params : sequence of arrays, or one array
        As for `GradientDescent`.
    lr : float
        Step size eta, at least 0. A plain attribute: schedules set it.
    betas : (float, float)
        Decay of the moments, each in [0, 1).
    eps : float
        At least 0; outside the square root, beside the corrected v (Keras' epsilon is not).
    weight_decay : float
        Decay of the parameters, 0 in the paper.
    capturable : bool
        Count the steps on the GPU, so that a step may be recorded into a CUDA graph.
    decoupled_weight_decay : bool
        False: an L2 penalty, g + weight_decay theta stands for g. True (AdamW): the old parameter
        is decayed first, theta - eta weight_decay theta, and the moments do not see it.

    Raises
    ------
    TypeError, ValueError
        As for `GradientDescent`.

    Notes
    -----
    The same rule as torch.optim.Adam and AdamW (whose default weight_decay is 0.01, here 0).
    float32 moments decay by the betas that were asked for, not by their nearest float32: 1 - 0.999
    is off by 1.3e-5 in float32, and so in the long run is PyTorch's v (here 1e-7 on average). With
    eps=0 an element whose gradients were all 0 becomes NaN (0 / 0). A float32 v overflows where
    (1 - beta2) g^2 does; the parameter becomes NaN at the step after, instead of standing still.

    References
    ----------
    D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.
    I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> params = [np.ones((2, 3), np.float32), np.zeros(3, np.float32)]
    >>> opt = fs.Adam(params, lr=0.5)
    >>> opt.step([np.full((2, 3), 4.0, np.float32), np.ones(3, np.float32)])
    >>> params[1].round(3)
    array([-0.5, -0.5, -0.5], dtype=float32)
    >>> opt.lr = 0.1  # as a schedule would
    >>> opt.state_dict()["step"]
    1
    """

    _hyperparameters = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")
    _state_names = ("exp_avg", "exp_avg_sq")

    betas: tuple[float, float]
    eps: float
    decoupled_weight_decay: bool

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        if capturable:
            if self._libraries[0].device(self.params[0]) == "cpu":
                raise ValueError("capturable=True is for params on a GPU, got params on the CPU")
            self._counter = self._backend.counter(0)

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        checked = super()._checked(values)
        checked["eps"] = checked_number("eps", values["eps"], at_least=0)
        checked["decoupled_weight_decay"] = bool(values["decoupled_weight_decay"])
        betas = values["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        checked["betas"] = tuple(
            checked_number(f"betas[{i}]", beta, at_least=0, below=1) for i, beta in enumerate(betas)
        )
        return checked

    @staticmethod
    def _rule(values: Mapping[str, Any], step: int) -> Rule:
        (beta1, beta2), eps = values["betas"], values["eps"]
        decay, decoupled = values["weight_decay"], values["decoupled_weight_decay"]
        return updates.adam(beta1, beta2, eps, weight_decay=decay, decoupled=decoupled)
