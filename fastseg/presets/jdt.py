"""The loss of JDTLosses."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

from fastseg.losses import Loss
from fastseg.presets.arguments import choice, form_option, number, numbers
from fastseg.region_terms import Tversky
from fastseg.terms import Scope


def jdt_jml(
    mIoUD: float = 1.0,
    mIoUI: float = 0.0,
    mIoUC: float = 0.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    smooth: float = 1e-3,
    threshold: float = 0.01,
    norm: int = 1,
    log_loss: bool = False,
    ignore_index: int | None = None,
    class_weights: Any = None,
    active_classes_mode_hard: str = "PRESENT",
    active_classes_mode_soft: str = "ALL",
    *,
    soft_label: bool = False,
) -> Loss:
    r"""Return ``JDTLoss`` of JDTLosses: Jaccard metric, Dice semimetric and Tversky losses.

    .. math:: \left(1 - \frac{N + s}{N + \alpha (Q - N) + \beta (P - N) + s}\right)^\gamma,
              \qquad N = \tfrac12 \Bigl(P + Q - \sum_i |p_i - q_i|\Bigr)

    with softmax. ``mIoUD`` weighs the mean over classes of the whole batch, ``mIoUI`` the mean over
    images of their classes' mean, ``mIoUC`` the mean over classes of their images' mean.

    Parameters
    ----------
    mIoUD, mIoUI, mIoUC, alpha, beta, smooth, class_weights
        As there. ``gamma`` is 1 with ``log_loss``.
    gamma
        Exponent, at least 1; 1 with ``log_loss``.
    threshold
        With soft targets and "PRESENT" it must be 0: a class is active where any target is above 0.
        Else it has no effect.
    norm
        1, or 2 for sums of squares: N is the sum of p q then, and ``alpha`` must be ``beta``.
    log_loss
        -log(score) for 1 - score.
    ignore_index
        Label of voxels that do not count; None with soft targets. JDTLosses' ``keep_mask`` is
        ``mask=`` at the call.
    active_classes_mode_hard, active_classes_mode_soft
        "PRESENT": classes without foreground are left out of the means; "ALL": they are not.
    soft_label
        Whether targets are soft, ``(N, C, *spatial)``, and not class indices. JDTLosses tells by
        their dtype; which classes are active by default, and which sums are made, depends on it.

    Notes
    -----
    JDTLosses takes labels from C on for the last class; here they are errors.

    References
    ----------
    Wang, Ning and Blaschko, Jaccard metric losses, NeurIPS 2023; Wang, Popordanoska, Bertels,
    Lemmens and Blaschko, Dice semimetric losses, MICCAI 2023; zifuwanggg/JDTLosses,
    losses/jdt_loss.py.

    Examples
    --------
    >>> import numpy as np
    >>> from fastseg import presets
    >>> loss = presets.jdt_jml(smooth=0.0)
    >>> float(loss(np.zeros((1, 3, 4), np.float32), np.array([[1, 1, 1, 1]])))  # 1 - (4/3) / 4
    0.6666666865348816
    """
    mode = active_classes_mode_soft if soft_label else active_classes_mode_hard
    name = "active_classes_mode_soft" if soft_label else "active_classes_mode_hard"
    choice(name, mode, ("ALL", "PRESENT"))
    if soft_label and mode == "PRESENT" and threshold != 0:
        raise ValueError(
            f"threshold must be 0 with soft_label=True and {name}='PRESENT', got {threshold!r}"
        )
    if soft_label and ignore_index is not None:
        raise ValueError(
            f"ignore_index must be None with soft_label=True, got {ignore_index}; use mask="
        )
    if number("gamma", gamma) < 1 or (log_loss and gamma != 1):
        raise ValueError(f"gamma must be at least 1, and 1 with log_loss=True, got {gamma!r}")
    choice("norm", norm, (1, 2))
    if norm == 2 and alpha != beta:
        raise ValueError(f"alpha must be beta with norm=2, got {alpha!r} and {beta!r}")
    form = "squared" if norm == 2 else "l1" if soft_label else "product"
    options: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "link": "log" if log_loss else "one_minus" if gamma == 1 else "power",
        "smooth_num": number("smooth", smooth),
        "smooth_den": number("smooth", smooth),
        "empty": "skip" if mode == "PRESENT" else "formula",
        "class_weights": None if class_weights is None else numbers("class_weights", class_weights),
        **form_option(form),
    }
    scopes: dict[Scope, tuple[str, float]] = {
        "batch": ("mIoUD", mIoUD),
        "image": ("mIoUI", mIoUI),
        "class": ("mIoUC", mIoUC),
    }
    parts = [
        weight * Tversky(scope=scope, **options)
        for scope, (its_name, weight) in scopes.items()
        if number(its_name, weight) > 0
    ]
    if not parts:
        raise ValueError("one of mIoUD, mIoUI and mIoUC must be above 0, got 0 for all")
    loss: Loss = reduce(operator.add, parts)
    return loss.replace(activation="softmax", ignore_index=ignore_index)
