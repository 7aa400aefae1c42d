r"""Parameter updates: gradient descent, momentum in two forms, and Adam, in float64.

Pure functions: they return new arrays and leave their arguments as they were. theta, the state and
the gradient have one shape, any; lr is written eta. Except where decoupled, weight decay is an L2
penalty, applied first of all: g <- g + weight_decay theta.

References
----------
Adam: D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.
AMSGrad: S. J. Reddi, S. Kale and S. Kumar, "On the Convergence of Adam and Beyond", ICLR 2018.
Decoupled weight decay: I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR
2019, in the form of torch.optim.AdamW. The PyTorch form of momentum: torch.optim.SGD.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _with_l2(
    grad: ArrayLike, theta: NDArray[np.float64], weight_decay: float
) -> NDArray[np.float64]:
    """Return g + weight_decay theta."""
    return np.asarray(grad, dtype=np.float64) + weight_decay * theta


def gradient_descent(
    theta: ArrayLike, grad: ArrayLike, lr: float, *, weight_decay: float = 0.0
) -> NDArray[np.float64]:
    r"""Return the parameters after one step of gradient descent.

    .. math:: \theta \leftarrow \theta - \eta g

    Examples
    --------
    >>> gradient_descent([1.0, 2.0], [1.0, -1.0], lr=0.5).tolist()
    [0.5, 2.5]
    """
    theta = np.asarray(theta, dtype=np.float64)
    g = _with_l2(grad, theta, weight_decay)
    return theta - lr * g


def momentum(
    theta: ArrayLike,
    velocity: ArrayLike,
    grad: ArrayLike,
    lr: float,
    gamma: float,
    nesterov: bool = False,
    *,
    weight_decay: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the parameters and the velocity after one step; the velocity contains the step size.

    .. math:: v \leftarrow \gamma v + \eta g, \qquad \theta \leftarrow \theta - v

    and with `nesterov`, of the new velocity,

    .. math:: \theta \leftarrow \theta - (\gamma v + \eta g)

    Parameters
    ----------
    theta, velocity, grad : array_like
        The velocity is 0 before the first step.
    lr, gamma : float
        Step size and share of the velocity that is kept.
    nesterov : bool
        Look ahead along the new velocity.
    weight_decay : float
        L2 penalty.

    Returns
    -------
    theta, velocity : ndarray of float64

    Examples
    --------
    >>> theta, velocity = momentum(1.0, 0.5, 1.0, lr=0.25, gamma=0.5)
    >>> float(theta), float(velocity)
    (0.5, 0.5)
    """
    theta = np.asarray(theta, dtype=np.float64)
    g = _with_l2(grad, theta, weight_decay)
    v = gamma * np.asarray(velocity, dtype=np.float64) + lr * g
    if nesterov:
        return theta - (gamma * v + lr * g), v
    return theta - v, v


def momentum_pytorch(
    theta: ArrayLike,
    buf: ArrayLike | None,
    grad: ArrayLike,
    lr: float,
    gamma: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    *,
    weight_decay: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the parameters and the buffer after one step, as torch.optim.SGD has them.

    .. math:: b \leftarrow \gamma b + (1 - \mathrm{dampening}) g, \qquad
              \theta \leftarrow \theta - \eta b

    At the first step (`buf` is None) b = g, undamped. With `nesterov`, of the new buffer,
    :math:`\theta \leftarrow \theta - \eta (g + \gamma b)`. Returns theta and buf, float64.

    Notes
    -----
    Without dampening v = eta b at a constant eta, and the trajectory is that of `momentum`. When
    eta changes, it acts here on the whole buffer, there on the new gradient alone.

    Examples
    --------
    >>> theta, buf = momentum_pytorch(1.0, None, 1.0, lr=0.25, gamma=0.5)
    >>> float(theta), float(buf)
    (0.75, 1.0)
    """
    theta = np.asarray(theta, dtype=np.float64)
    g = _with_l2(grad, theta, weight_decay)
    b = g.copy()  # the first step
    if buf is not None:
        b = gamma * np.asarray(buf, dtype=np.float64) + (1 - dampening) * g
    if nesterov:
        return theta - lr * (g + gamma * b), b
    return theta - lr * b, b


def _moments(
    theta: ArrayLike,
    exp_avg: ArrayLike,
    exp_avg_sq: ArrayLike,
    grad: ArrayLike,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the parameters, decayed where that is decoupled, and both new moments."""
    theta = np.asarray(theta, dtype=np.float64)
    if decoupled:
        g = np.asarray(grad, dtype=np.float64)
        theta = theta - lr * weight_decay * theta
    else:
        g = _with_l2(grad, theta, weight_decay)
    m = beta1 * np.asarray(exp_avg, dtype=np.float64) + (1 - beta1) * g
    v = beta2 * np.asarray(exp_avg_sq, dtype=np.float64) + (1 - beta2) * g**2
    return theta, m, v


def adam(
    theta: ArrayLike,
    exp_avg: ArrayLike,
    exp_avg_sq: ArrayLike,
    grad: ArrayLike,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the parameters and both moments after one step of Adam (Kingma and Ba, algorithm 1).

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
              v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              \hat m = \frac{m}{1 - \beta_1^t}, \quad \hat v = \frac{v}{1 - \beta_2^t}, \quad
              \theta \leftarrow \theta - \eta \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    Parameters
    ----------
    theta, exp_avg, exp_avg_sq, grad : array_like
        theta, m, v and g; both moments are 0 before the first step.
    step : int
        t, the number of this step: 1 at the first.
    lr, beta1, beta2, eps : float
        The defaults are the paper's.
    weight_decay : float
        Decay of the parameters, 0 in the paper.
    decoupled : bool
        False: an L2 penalty in the gradient. True (AdamW): the old parameter is decayed first,
        theta <- theta - lr weight_decay theta, and the moments do not see it.

    Returns
    -------
    theta, exp_avg, exp_avg_sq : ndarray of float64

    Examples
    --------
    >>> theta, m, v = adam(1.0, 0.0, 0.0, 4.0, step=1, lr=0.5, beta1=0.5, beta2=0.5, eps=0.0)
    >>> float(theta), float(m), float(v)
    (0.5, 2.0, 8.0)
    """
    theta, m, v = _moments(
        theta, exp_avg, exp_avg_sq, grad, lr, beta1, beta2, weight_decay, decoupled
    )
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return theta - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def amsgrad(
    theta: ArrayLike,
    exp_avg: ArrayLike,
    exp_avg_sq: ArrayLike,
    max_exp_avg_sq: ArrayLike,
    grad: ArrayLike,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the parameters, both moments and the largest v after one step of AMSGrad.

    As `adam`, with the largest v so far in the place of v, corrected as v is (torch.optim.Adam;
    the paper corrects neither).

    Examples
    --------
    >>> state = amsgrad(1.0, 0.0, 0.0, 2.0, 4.0, step=1, lr=0.5, beta1=0.5, beta2=0.75, eps=0.0)
    >>> tuple(map(float, state))
    (0.5, 2.0, 4.0, 4.0)
    >>> state = amsgrad(1.0, 0.0, 0.0, 16.0, 4.0, step=1, lr=0.5, beta1=0.5, beta2=0.75, eps=0.0)
    >>> tuple(map(float, state))
    (0.75, 2.0, 4.0, 16.0)
    """
    theta, m, v = _moments(
        theta, exp_avg, exp_avg_sq, grad, lr, beta1, beta2, weight_decay, decoupled
    )
    v_max = np.maximum(v, max_exp_avg_sq)
    m_hat = m / (1 - beta1**step)
    v_hat = v_max / (1 - beta2**step)
    return theta - lr * m_hat / (np.sqrt(v_hat) + eps), m, v, v_max
