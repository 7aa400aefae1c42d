"""Optimisers: gradient descent, momentum and Adam, in place on lists of arrays.

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
from fastseg_kernels import updates
from fastseg_kernels.updates import Guard, Rule

FORMS = ("source", "pytorch")
NOTHING = 0.0
UNGUARDED = Guard()


class _Optimizer:
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
        states, views = self._updater.states, self._updater.views
        names = ("optimizer", "step", *self._hyperparameters, *states)
        if set(state) != set(names):
            raise ValueError(f"state must have the keys {', '.join(names)}, got {', '.join(state)}")
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
        for name, arrays in states.items():
            loaded = state[name]
            if len(loaded) != len(arrays):
                raise ValueError(
                    f"state['{name}'] must have one array per param ({len(arrays)}), "
                    f"got {len(loaded)}"
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
        for name in states:
            self._updater.from_host(name, state[name])
        for name, value in values.items():
            setattr(self, name, value)
        self.step_count = int(step)

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


class GradientDescent(_Optimizer):
    r"""Gradient descent.

    .. math:: \theta \leftarrow \theta - \eta g

    Parameters
    ----------
    params : sequence of arrays, or one array
        Parameters, written in place: NumPy or CuPy arrays or torch tensors, all on one device,
        float16, bfloat16, float32 or float64, any shapes, each one run of memory (C order, Fortran
        order, channels last, ...).
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

    A float16 or bfloat16 parameter has a float32 master, which is what is updated; the parameter is
    the master, rounded. Where it is not, it was written by somebody else since the last step (a
    checkpoint was loaded, a weight clamped), and the master takes its value over.

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
    def _rule(values: Mapping[str, Any]) -> Rule:
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
    state_dtype : "bfloat16", optional
        Keep the velocity in 2 bytes; see `Adam`.
    capturable : bool
        Count the steps on the GPU: dampened, the first step is another than the rest.

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
        state_dtype: str | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            state_dtype,
            capturable,
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
    def _rule(values: Mapping[str, Any]) -> Rule:
        gamma, nesterov, decay = values["gamma"], values["nesterov"], values["weight_decay"]
        if values["form"] == "source":
            return updates.momentum(gamma, nesterov, weight_decay=decay)
        dampening = values["dampening"]
        return updates.momentum_pytorch(gamma, dampening, nesterov, weight_decay=decay)


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
    decoupled_weight_decay : bool
        False: an L2 penalty, g + weight_decay theta stands for g. True (AdamW): the old parameter
        is decayed first, theta - eta weight_decay theta, and the moments do not see it.
    amsgrad : bool
        Put the largest v so far in the place of v.
    state_dtype : "bfloat16", optional
        Keep the moments in 2 bytes instead of 4, for parameters that are not float64. They are
        rounded up or down by chance, in proportion to the distance, so that they are right on
        average: rounded to nearest, v could not change by the thousandth that 1 - beta2 is. The
        same step of the same run has the same chance, whatever the threads.
    capturable : bool
        Count the steps on the GPU, so that a step may be recorded into a CUDA graph.

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
    S. J. Reddi, S. Kale and S. Kumar, "On the Convergence of Adam and Beyond", ICLR 2018 (AMSGrad,
    here with v corrected as in Algorithm 1 and torch.optim.Adam).

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

    _hyperparameters = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad")
    _state_names = ("exp_avg", "exp_avg_sq")

    betas: tuple[float, float]
    eps: float
    decoupled_weight_decay: bool
    amsgrad: bool

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        state_dtype: str | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            state_dtype,
            capturable,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            amsgrad=amsgrad,
        )

    def _names(self) -> tuple[str, ...]:
        return (*self._state_names, "max_exp_avg_sq") if self.amsgrad else self._state_names

    def _check_states(self, values: Mapping[str, Any]) -> None:
        has = "max_exp_avg_sq" in self._updater.states
        if values["amsgrad"] != has:
            raise ValueError(
                f"amsgrad must stay {has}, as the optimiser was made, got {values['amsgrad']}; "
                "make a new optimiser"
            )

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        checked = super()._checked(values)
        checked["eps"] = checked_number("eps", values["eps"], at_least=0)
        for name in ("decoupled_weight_decay", "amsgrad"):
            checked[name] = bool(values[name])
        betas = values["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        checked["betas"] = tuple(
            checked_number(f"betas[{i}]", beta, at_least=0, below=1) for i, beta in enumerate(betas)
        )
        return checked

    @staticmethod
    def _rule(values: Mapping[str, Any]) -> Rule:
        (beta1, beta2), eps = values["betas"], values["eps"]
        decay, decoupled = values["weight_decay"], values["decoupled_weight_decay"]
        return updates.adam(
            beta1,
            beta2,
            eps,
            weight_decay=decay,
            decoupled=decoupled,
            amsgrad=values["amsgrad"],
        )
