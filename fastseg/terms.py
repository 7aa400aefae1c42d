"""Terms of a loss: what all of them share, and the table of numbers that a loss becomes.

The terms themselves are in ``region_terms.py``, ``entropy_terms.py`` and ``lovasz.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fastseg.losses import Loss

Empty = Literal["formula", "one", "zero", "skip"]
Scope = Literal["sample", "batch", "image", "class"]


def choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError if a value is not one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def not_negative(term: object, *names: str) -> None:
    """Check the numbers of a term and store them as Python's floats."""
    for name in names:
        value = getattr(term, name)
        number = float(value) if isinstance(value, Real) else math.nan
        if isinstance(value, bool) or not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        object.__setattr__(term, name, number)


def at_most(term: object, name: str, most: float) -> None:
    """Check the upper end of a number that `not_negative` has checked."""
    value = getattr(term, name)
    if value > most:
        raise ValueError(f"{name} must be in [0, {most:g}], got {value}")


def _tuple_of(term: object, name: str, kind: type, what: str) -> None:
    """Check a sequence of numbers, or None, and store it as a tuple."""
    value = getattr(term, name)
    if value is None:
        return
    array = np.asarray(value)
    entries = tuple(array.tolist()) if array.ndim == 1 else ()
    if not entries or any(isinstance(e, bool) or not isinstance(e, kind) for e in entries):
        raise ValueError(f"{name} must be a sequence of {what}, or None, got {value!r}")
    object.__setattr__(term, name, entries)


@dataclass(frozen=True)
class Term(Loss):
    """One term. It is a loss by itself; terms add up and are multiplied by numbers.

    Parameters
    ----------
    classes
        Indices of the classes that count; None for all. Negative indices count from the end.
    include_background
        False: all classes count but the first.
    class_weights
        One factor per class of the logits, or None. The mean still divides by the number of
        classes (or voxels), not by the sum of the factors.

    Raises
    ------
    ValueError, TypeError
        For an option that is out of its range or of another kind; the message names it.

    Examples
    --------
    >>> import fastseg as fs
    >>> loss = 0.5 * fs.BCE() + fs.SoftDice(include_background=False)
    >>> [(weight, type(term).__name__) for weight, term in loss.parts]
    [(0.5, 'BCE'), (1.0, 'SoftDice')]
    """

    classes: tuple[int, ...] | None = None
    class_weights: tuple[float, ...] | None = None
    include_background: bool = True

    ACTIVATION: ClassVar[str] = ""
    """The activation that the term needs: "sigmoid", "softmax", or "": it takes either."""

    def __post_init__(self) -> None:
        """Check the options and make sequences hashable."""
        if not isinstance(self.classes, str):  # a rule of the subclass
            _tuple_of(self, "classes", Integral, "indices")
        _tuple_of(self, "class_weights", Real, "numbers")
        if self.class_weights is not None and not all(
            math.isfinite(weight) and weight >= 0 for weight in self.class_weights
        ):
            raise ValueError(f"class_weights must be finite and >= 0, got {self.class_weights}")
        object.__setattr__(self, "include_background", bool(self.include_background))
        if isinstance(self.classes, tuple) and not self.include_background:
            raise ValueError(
                f"include_background=False says which classes count, and so does "
                f"classes={self.classes}; choose one"
            )

    @property
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """Return the term itself, once."""
        return ((1.0, self),)

    @property
    def needs_logits(self) -> bool:
        """Whether a term of "sigmoid" does not take probabilities."""
        return False

    def needs(self) -> frozenset[str]:
        """Return the families of sums that the term is made of."""
        raise NotImplementedError  # every class below says so

    def row(self) -> dict[str, float]:
        """Return the term's entries in the table (see `constants.TERM_FIELDS`)."""
        raise NotImplementedError  # every class below says so

    def weights_of_classes(self, count: int) -> NDArray[np.float64]:
        """Return the factor of each of ``count`` classes, NaN for those that do not count."""
        weights = np.ones(count)
        if self.class_weights is not None:
            if len(self.class_weights) != count:
                raise ValueError(
                    f"class_weights must have one entry per class, got "
                    f"{len(self.class_weights)} for {count} classes"
                )
            weights[:] = self.class_weights
        if not self.include_background:
            if count == 1:
                raise ValueError("include_background=False leaves none of 1 class")
            weights[0] = np.nan
        if isinstance(self.classes, tuple):
            if not all(-count <= c < count for c in self.classes):
                raise ValueError(f"classes must be in [0, {count}), got {self.classes}")
            chosen = np.full(count, np.nan)
            for c in self.classes:
                chosen[c] = weights[c]
            weights = chosen
        return weights

    def __repr__(self) -> str:
        given = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(given)})"
