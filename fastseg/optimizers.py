"""Optimisers: gradient descent, momentum and Adam, in place on lists of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastseg.optimizer import Optimizer
from fastseg.parameters import checked_number
from fastseg_kernels import updates
from fastseg_kernels.updates import Rule

FORMS = ("source", "pytorch")


class GradientDescent(Optimizer):
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


class Momentum(Optimizer):
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


class Adam(Optimizer):
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
