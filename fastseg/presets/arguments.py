"""What the arguments of presets are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ONE_CLASS = (1.0,)
"""Class weights of a loss for one class, which make logits of several an error."""


def form_option(form: str) -> dict[str, Any]:
    """Return how a region term makes its sums; "product" is what it does anyway."""
    return {} if form == "product" else {"form": form}


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return a value that is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(each) for each in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    return value


def plain(values: Any) -> Any:
    """Return an array or a tensor, of any device, as Python's numbers and lists."""
    return values.tolist() if hasattr(values, "tolist") else values


def number(name: str, value: Any) -> float:
    """Return a finite number that is at least 0."""
    given = plain(value)
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (is_number and math.isfinite(given) and given >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(given)


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """Return one number for each class."""
    given = plain(values)
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{name} must be a sequence of one number per class, got {values!r}")
    return tuple(number(name, value) for value in given)


def only_number(name: str, value: Any) -> float:
    """Return a number, or the only one of an array."""
    array = np.asarray(plain(value))
    if array.size != 1:
        raise ValueError(f"{name} must be one number for a loss of one class, got {value!r}")
    return number(name, value if array.ndim == 0 else array.reshape(-1)[0])


def numbers_by_class(name: str, value: Any) -> float | tuple[float, ...]:
    """Return what broadcasts against (N, C, H, W) as one number, or one for each class."""
    array = np.asarray(plain(value))
    if array.size == 1:
        return only_number(name, value)
    shape = array.shape[1:] if array.ndim == 4 and array.shape[0] == 1 else array.shape
    if len(shape) != 3 or shape[1:] != (1, 1):
        raise ValueError(
            f"{name} must be one number, or have shape (C, 1, 1) or (1, C, 1, 1), got shape "
            f"{array.shape}; weights of voxels are weight_map= at the call"
        )
    return numbers(name, array.reshape(-1))
