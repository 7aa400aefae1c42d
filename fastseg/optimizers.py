"""Optimisers: gradient descent, momentum and Adam, in place on lists of arrays.

One step is one pass over memory and one parallel region for the whole list, however many arrays
it has; the gradients may be scaled and zeroed in that pass. What can go wrong is checked before
anything is written. Checking takes milliseconds where there are thousands of arrays, so the check
is remembered for as long as the same gradient objects come again (see `HELD_BYTES`).
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from math import inf, prod
from numbers import Integral, Real
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg.libraries import Library, library_of
from fastseg_kernels.constants import ITEM_SIZES
from fastseg_kernels.views import View

if TYPE_CHECKING:
    from fastseg_kernels.cpu.updates import Table

HELD_BYTES = 64 * 2**20
"""Gradients of the last step are held, so that they can be recognised, up to this size together.
Larger ones are checked anew at each step: keeping them alive could cost the caller as much memory
as the parameters, and beside a pass over them the check is short."""

CACHE_LINE, PAGE = 64, 4096  # bytes
FORMS = ("source", "pytorch")
_nbytes = attrgetter("nbytes")


class _Optimizer:
    """What the optimisers share: checks, the state, and one step over a list of arrays."""

    _hyperparameters: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    _state_names: ClassVar[tuple[str, ...]] = ()

    lr: float
    weight_decay: float

    def __init__(self, params: Any, **values: Any) -> None:
        values = self._checked(values)
        self.params = tuple(_as_list(params))
        """The arrays that are updated."""
        self.step_count = 0
        """How many steps were taken."""
        if not self.params:
            raise ValueError("params must have at least one array, got none")
        for name, value in values.items():
            setattr(self, name, value)
        self._views, self._memory = _check_params(self.params)
        self._libraries = [library_of(param, "params") for param in self.params]
        self._counting = [  # arrays whose library counts writes, as autograd does
            (i, library.written)
            for i, library in enumerate(self._libraries)
            if library.name != "numpy"
        ]
        self._watched = _watched(self.params)
        self._places = _places(self._watched)
        self._states = {
            name: [_zeros(view, k) for view in self._views]
            for k, name in enumerate(self._state_names)
        }
        self._table: Table | None = None
        self._last: _Gradients | None = None

    def step(
        self,
        grads: Any,
        *,
        lr: float | None = None,
        grad_scale: float = 1.0,
        zero_grads: bool = False,
    ) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : sequence of arrays, or one array
            One gradient per parameter, with its library, shape, dtype and strides.
        lr : float, optional
            Step size of this step alone, instead of the attribute ``lr``.
        grad_scale : float
            Multiplies the gradients on their way in, before everything else: 1 / scale undoes the
            scaling of a loss, a negative number maximises.
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
        After an error nothing has changed. Values are not looked at: a gradient that is not finite
        makes its parameter and state NaN or infinite, and other elements are not touched by it.
        """
        values = self._current()
        if lr is not None:
            values["lr"] = _number("lr", lr, at_least=0)
        options: dict[str, Any] = {
            "grad_scale": _number("grad_scale", grad_scale),
            "weight_decay": values["weight_decay"],
            "zero_grads": bool(zero_grads),
        }
        grads = _as_list(grads)
        table = self._point_table(grads, options["zero_grads"])
        self._update(table, self.step_count + 1, values, options)
        self.step_count += 1
        for arrays in (self.params, grads) if zero_grads else (self.params,):
            for i, written in self._counting:
                written(arrays[i])

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that the next step depends on, parameters excepted.

        Returns
        -------
        dict
            ``optimizer`` (the name of the class), ``step`` (int, steps taken), the
            hyper-parameters, and for each state (``velocity``, or ``exp_avg`` and ``exp_avg_sq``)
            a list of NumPy arrays, one per parameter, of its shape and dtype.

        Notes
        -----
        It pickles. For `numpy.savez`, give every array of a list a name of its own, as in
        ``{f"exp_avg_{i}": array for i, array in enumerate(state["exp_avg"])}``; what else it holds
        may be saved as it is, and comes back as arrays, which `load_state_dict` takes.
        """
        state: dict[str, Any] = {"optimizer": type(self).__name__, "step": self.step_count}
        state.update(self._current())
        for name, arrays in self._states.items():
            state[name] = [array.copy(order="K") for array in arrays]
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
            for i, (array, other) in enumerate(zip(arrays, map(np.asarray, loaded), strict=True)):
                if other.shape != array.shape:
                    raise ValueError(
                        f"state['{name}'][{i}] must have shape {array.shape} as params[{i}], "
                        f"got {other.shape}"
                    )
                if other.dtype != array.dtype:
                    raise TypeError(
                        f"state['{name}'][{i}] must have dtype {array.dtype} as params[{i}], "
                        f"got {other.dtype}"
                    )
        for name, arrays in self._states.items():
            for array, other in zip(arrays, state[name], strict=True):
                array[...] = other
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
            checked[name] = _number(name, values[name], at_least=0)
        return checked

    def _update(
        self, table: Table, step: int, values: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        """Run the kernel of the rule; ``options`` are those that all rules share."""
        raise NotImplementedError

    def _point_table(self, grads: list[Any], zero_grads: bool) -> Table:
        """Return the table, pointed at the parameters and at ``grads`` after checking both."""
        from fastseg_kernels.cpu import updates

        places = _places(self._watched)
        moved = places != self._places
        if self._table is not None and not moved and _is_same(self._last, grads, zero_grads):
            return self._table
        self._last = None
        views, memory = _check_params(self.params) if moved else (self._views, self._memory)
        for i, (view, old) in enumerate(zip(views, self._views, strict=True)):
            if moved and (_layout(view), view.dtype) != (_layout(old), old.dtype):
                raise ValueError(
                    f"params[{i}] had dtype {old.dtype}, shape {old.shape} and strides "
                    f"{old.strides} and has now {view.dtype}, {view.shape} and {view.strides}; "
                    "make a new optimiser"
                )
        grad_views = _check_grads(grads, views, memory, self._libraries, zero_grads)
        if self._table is None:
            states = [
                [library_of(array, name).view(array, name) for array in arrays]
                for name, arrays in self._states.items()
            ]
            self._table = updates.Table(views, states)
        self._views, self._memory, self._places = views, memory, places
        self._table.set_params(views)
        self._table.set_grads(grad_views)
        watched = _watched(grads)
        holds_graph = any(tensor.requires_grad for tensor in watched)  # and all that it saved
        if sum(map(_view_bytes, grad_views)) <= HELD_BYTES and not holds_graph:
            self._last = _Gradients(list(grads), watched, _places(watched), zero_grads)
        return self._table


class GradientDescent(_Optimizer):
    r"""Gradient descent.

    .. math:: \theta \leftarrow \theta - \eta g

    Parameters
    ----------
    params : sequence of arrays, or one array
        Parameters, written in place: NumPy arrays or torch tensors on the CPU, float32 or float64,
        any shapes, each one run of memory (C order, Fortran order, channels last, ...).
    lr : float
        Step size, at least 0. A plain attribute: schedules set it.
    weight_decay : float
        L2 penalty: g + weight_decay theta stands for g.

    Raises
    ------
    TypeError
        A parameter that is neither a NumPy array nor a tensor, or of another dtype; a
        hyper-parameter that is not a number.
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
    >>> import numpy as np
    >>> from fastseg.optimizers import GradientDescent
    >>> theta = np.array([1.0, 2.0])
    >>> opt = GradientDescent(theta, lr=0.5)
    >>> opt.step(np.array([1.0, -1.0]))
    >>> theta
    array([0.5, 2.5])
    >>> opt
    GradientDescent(<1 array, 2 elements>, lr=0.5, weight_decay=0.0)
    """

    def __init__(self, params: Any, lr: float, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def _update(
        self, table: Table, step: int, values: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        from fastseg_kernels.cpu import updates

        updates.gradient_descent(table, values["lr"], **options)


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
    >>> import numpy as np
    >>> from fastseg.optimizers import Momentum
    >>> theta = np.array([1.0, 2.0])
    >>> opt = Momentum(theta, lr=0.5, gamma=0.5)
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
        checked["gamma"] = _number("gamma", values["gamma"], at_least=0, below=1)
        checked["dampening"] = dampening = _number("dampening", values["dampening"])
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

    def _update(
        self, table: Table, step: int, values: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        from fastseg_kernels.cpu import updates

        lr, gamma, nesterov = values["lr"], values["gamma"], values["nesterov"]
        if values["form"] == "source":
            updates.momentum(table, lr, gamma, nesterov, **options)
        else:
            dampening = values["dampening"]
            updates.momentum_pytorch(table, step == 1, lr, gamma, dampening, nesterov, **options)


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
    >>> import numpy as np
    >>> from fastseg.optimizers import Adam
    >>> params = [np.ones((2, 3), np.float32), np.zeros(3, np.float32)]
    >>> opt = Adam(params, lr=0.5)
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
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        checked = super()._checked(values)
        checked["eps"] = _number("eps", values["eps"], at_least=0)
        checked["decoupled_weight_decay"] = bool(values["decoupled_weight_decay"])
        betas = values["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        checked["betas"] = tuple(
            _number(f"betas[{i}]", beta, at_least=0, below=1) for i, beta in enumerate(betas)
        )
        return checked

    def _update(
        self, table: Table, step: int, values: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        from fastseg_kernels.cpu import updates

        lr, (beta1, beta2), eps = values["lr"], values["betas"], values["eps"]
        decoupled = values["decoupled_weight_decay"]
        updates.adam(table, step, lr, beta1, beta2, eps, decoupled=decoupled, **options)


class _Gradients(NamedTuple):
    """Gradients that were checked, and how to tell that they still lie where they lay."""

    arrays: list[Any]
    watched: list[Any]
    places: list[int]
    writable: bool


def _is_same(last: _Gradients | None, grads: list[Any], zero_grads: bool) -> bool:
    """Tell whether ``grads`` are the very objects that were checked, in the same memory."""
    return (
        last is not None
        and (last.writable or not zero_grads)
        and len(grads) == len(last.arrays)
        and all(map(is_, grads, last.arrays))
        and _places(last.watched) == last.places
    )


def _watched(arrays: Any) -> list[Any]:
    """Return the tensors: ``tensor.data = other`` exchanges the memory under the same object.

    A NumPy array refuses to be resized while it is referenced, as it is here.
    """
    return [array for array in arrays if not isinstance(array, np.ndarray)]


def _places(watched: list[Any]) -> list[int]:
    """Return what tells whether tensors still have the memory they had."""
    if not watched:
        return []
    pointer = sys.modules["torch"].Tensor.data_ptr  # 60 ns each; methodcaller takes 130
    return [*map(pointer, watched), *map(_nbytes, watched)]


def _as_list(arrays: Any) -> list[Any]:
    """Return the arrays as a list; one array is a list of one."""
    if isinstance(arrays, list):
        return arrays
    return [arrays] if hasattr(arrays, "shape") else list(arrays)


def _number(name: str, value: Any, *, at_least: float = -inf, below: float = inf) -> float:
    """Return ``value`` as a float; it must be finite and in [at_least, below)."""
    if not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__qualname__}")
    number = float(value)
    if not (at_least <= number < below and number != -inf):
        if at_least == -inf:
            rule = "finite"
        elif below == inf:
            rule = f"finite and at least {at_least}"
        else:
            rule = f"in [{at_least}, {below})"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number


def _view(array: Any, name: str, *, writable: bool) -> View:
    """Describe one array of a list; it must be float32 or float64 and lie as the kernels need."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a numpy.ma.MaskedArray, whose mask would be ignored; pass {name}.data"
        )
    if array is None:
        raise TypeError(f"{name} is None; leave out params that have no gradient")
    library = library_of(array, name)
    if library.name == "torch" and array.requires_grad:
        array = array.detach()  # the same memory; torch.optim does not look at the graph either
    view = library.view(array, name, writable=writable)
    if view.dtype in ("float16", "bfloat16"):
        raise TypeError(
            f"{name} must be float32 or float64, got {view.dtype}: half-precision parameters need "
            "float32 master weights, which are not in this version; keep the params in float32"
        )
    if view.dtype not in ("float32", "float64"):
        raise TypeError(f"{name} must be float32 or float64, got {view.dtype}")
    if view.swapped:
        raise ValueError(
            f"{name} must be in native byte order, got {array.dtype}; pass "
            f"{name}.astype({view.dtype!r})"
        )
    if view.owner is not array or view.address % ITEM_SIZES[view.dtype]:
        raise ValueError(f"{name} must be a plain array aligned to its elements; pass a copy")
    return view


@lru_cache(maxsize=1024)
def _layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], item_size: int
) -> tuple[Any, ...] | None:
    """Return what two arrays share whose elements lie in one order; None unless one run."""
    if 0 in shape:
        return shape, ()
    steps = tuple((step, size) for step, size in zip(strides, shape, strict=True) if size > 1)
    expected = item_size
    for step, size in sorted(steps):
        if step != expected:
            return None
        expected *= size
    return shape, steps


def _layout(view: View) -> tuple[Any, ...] | None:
    return _layout_of(view.shape, view.strides, ITEM_SIZES[view.dtype])


def _view_bytes(view: View) -> int:
    return prod(view.shape) * ITEM_SIZES[view.dtype]


def _zeros(view: View, k: int) -> NDArray[Any]:
    """Return zeros for state ``k``, whose elements lie in the order of ``view``'s.

    NumPy starts all large arrays 16 bytes into a page. Then every vector store touches two cache
    lines, and reads of one array seem to depend on writes to another that agree in their lowest
    twelve bits. States are aligned to cache lines, and large ones lie a quarter of a page apart
    from the parameter and each other: Adam of 16M float32 8.5 instead of 10.8 ms.
    """
    size = _view_bytes(view)
    if size == 0:
        return np.zeros(view.shape, view.dtype)
    period = PAGE if size >= 16 * PAGE else CACHE_LINE
    memory = np.zeros(size + period, np.uint8)
    wanted = view.address // CACHE_LINE * CACHE_LINE + (k + 1) * PAGE // 4
    offset = (wanted - memory.ctypes.data) % period
    return np.ndarray(view.shape, view.dtype, memory, offset, view.strides)


def _check_params(params: tuple[Any, ...]) -> tuple[list[View], _Memory]:
    """Return a view of every parameter and where all lie; raise where one cannot be updated."""
    views = []
    for i, param in enumerate(params):
        name = f"params[{i}]"
        if any(base.__module__.split(".")[0] in ("jax", "jaxlib") for base in type(param).__mro__):
            raise TypeError(
                f"{name} is a JAX array, which is immutable and cannot be updated in place; keep "
                "the params in NumPy arrays"
            )
        view = _view(param, name, writable=True)
        if _layout(view) is None:
            raise ValueError(
                f"{name} must be one run of memory, in any order of its axes, got shape "
                f"{view.shape} with strides {view.strides}; pass a contiguous copy"
            )
        views.append(view)
    memory = _memory_of(views)
    _check_apart(memory, "params", "would be updated twice; pass every array once")
    return views, memory


def _check_grads(
    grads: list[Any],
    params: list[View],
    memory: _Memory,
    libraries: list[Library],
    zero_grads: bool,
) -> list[View]:
    """Return a view of every gradient; raise where one does not fit its parameter."""
    if len(grads) != len(params):
        raise ValueError(f"grads must have one array per param ({len(params)}), got {len(grads)}")
    views = [_view(grad, f"grads[{i}]", writable=zero_grads) for i, grad in enumerate(grads)]
    if [library_of(grad, "grads") for grad in grads] != libraries or (
        [view[1:4] for view in views] != [view[1:4] for view in params]  # shape, strides, dtype
    ):
        for i, (view, param) in enumerate(zip(views, params, strict=True)):
            _check_fits(i, view, param, library_of(grads[i], "grads"), libraries[i])
    if zero_grads:
        consequence = "would be zeroed before it is read twice; pass copies"
        _check_apart(_memory_of(views), "grads", consequence)
    for i, view in enumerate(views):
        # The last parameter that starts before the gradient's end alone can reach into it.
        nearest = bisect_left(memory.starts, view.address + _view_bytes(view)) - 1
        if nearest >= 0 and memory.ends[nearest] > view.address and 0 not in view.shape:
            its = f"params[{memory.owners[nearest]}]"
            raise ValueError(f"grads[{i}] shares memory with {its}; pass a copy")
    return views


def _check_fits(i: int, view: View, param: View, library: Library, its_library: Library) -> None:
    """Raise if a gradient does not fit its parameter, other strides of one layout excepted."""
    name, its = f"grads[{i}]", f"params[{i}]"
    if library is not its_library:
        raise TypeError(
            f"{name} and {its} must come from one library, got {library.name} and "
            f"{its_library.name}"
        )
    if view.shape != param.shape:
        raise ValueError(f"{name} must have shape {param.shape} as {its}, got {view.shape}")
    if view.dtype != param.dtype:
        raise TypeError(f"{name} must have dtype {param.dtype} as {its}, got {view.dtype}")
    if _layout(view) != _layout(param):
        raise ValueError(
            f"{name} must have strides {param.strides} as {its}, got {view.strides}; copy it to "
            f"memory laid out as {its}"
        )


class _Memory(NamedTuple):
    """First byte, byte after the last, and index of all arrays with elements, in address order."""

    starts: list[int]
    ends: list[int]
    owners: list[int]


def _memory_of(views: list[View]) -> _Memory:
    spans = [
        (view.address, view.address + _view_bytes(view), i)
        for i, view in enumerate(views)
        if 0 not in view.shape
    ]
    columns = zip(*sorted(spans), strict=True)
    return _Memory(*map(list, columns)) if spans else _Memory([], [], [])


def _check_apart(memory: _Memory, what: str, consequence: str) -> None:
    """Raise if two arrays share memory."""
    for k, (start, end) in enumerate(zip(memory.starts[1:], memory.ends, strict=False)):
        if start < end:
            first, second = sorted(memory.owners[k : k + 2])
            raise ValueError(
                f"{what}[{second}] shares memory with {what}[{first}] and {consequence}"
            )
