"""Links: the functions that make a loss of a region score, and their derivatives, in float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

LINKS = ("one_minus", "negative", "log", "power")
"""How a loss is made of a score; see `link_value`."""


def link_value(score: ArrayLike, link: str, gamma: float = 1.0) -> NDArray[np.float64]:
    r"""Return the loss that a link makes of a score s.

    ========= ===================
    one_minus :math:`1 - s`
    negative  :math:`-s`
    log       :math:`-\log s`
    power     :math:`(1 - s)^\gamma`
    ========= ===================

    Parameters
    ----------
    score : array_like
        s, of any shape.
    link : {"one_minus", "negative", "log", "power"}
        The function.
    gamma : float
        The exponent of "power"; ignored by the others.

    Returns
    -------
    ndarray of float64
        With the shape of `score`.

    Raises
    ------
    ValueError
        For any other link.

    Examples
    --------
    >>> float(link_value(0.5, "power", gamma=2.0))
    0.25
    """
    s = np.asarray(score, dtype=np.float64)
    with np.errstate(divide="ignore"):  # -log 0 = inf
        if link == "one_minus":
            return 1 - s
        if link == "negative":
            return -s
        if link == "log":
            return -np.log(s)
        if link == "power":
            return (1 - s) ** gamma
    raise ValueError(f"link must be one of {LINKS}, got {link!r}")


def link_derivative(score: ArrayLike, link: str, gamma: float = 1.0) -> NDArray[np.float64]:
    r"""Return the derivative with respect to the score of the loss that a link makes of it.

    ========= ==============================
    one_minus :math:`-1`
    negative  :math:`-1`
    log       :math:`-1 / s`
    power     :math:`-\gamma (1 - s)^{\gamma - 1}`
    ========= ==============================

    Parameters, return value and errors as in `link_value`.

    Examples
    --------
    >>> float(link_derivative(0.5, "log"))
    -2.0
    """
    s = np.asarray(score, dtype=np.float64)
    with np.errstate(divide="ignore"):  # infinite slopes: log at s = 0, power with gamma < 1 at 1
        if link in ("one_minus", "negative"):
            return np.full_like(s, -1)
        if link == "log":
            return -1 / s
        if link == "power":
            return -gamma * (1 - s) ** (gamma - 1)
    raise ValueError(f"link must be one of {LINKS}, got {link!r}")
