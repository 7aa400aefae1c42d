"""Which sums there are among named columns, and what is said where one is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    CURVES,
    FAMILY_COLUMNS,
    FOCAL,
    HISTOGRAMS,
    PICKED,
    family_columns,
)


@cache
def family_of(name: str) -> str | None:
    """Return the family that a column belongs to, by its name."""
    base, _, gamma = name.rpartition("_")
    for family, members in FAMILY_COLUMNS.items():
        if family in FOCAL and base in members:
            return f"{family}_{gamma}"
        if family not in FOCAL and name in members:
            return family
    return next((family for family in HISTOGRAMS if name.startswith(f"{family}_")), None)


def check_gammas(families: Iterable[str]) -> None:
    """Refuse sums of two gammas, of which a loss would find one or the other."""
    gammas = sorted(f for f in families if f.rpartition("_")[0] in FOCAL)
    for family in gammas:
        gamma = family.rpartition("_")[2]
        try:
            if str(float(gamma)) == gamma:
                continue
        except ValueError:
            pass
        raise ValueError(
            f"names must have a number as gamma, as focal_bce_pos_sum_2.0, got {gamma!r}"
        )
    if len({family.rpartition("_")[0] for family in gammas}) < len(gammas):
        raise ValueError(f"statistics hold focal sums of one gamma, got {', '.join(gammas)}")


def is_focal(column: str) -> bool:
    """Tell whether a column is a sum of a focal loss, whose name has gamma in it."""
    return (family_of(column) or "").rpartition("_")[0] in FOCAL


def absent(name: str, names: Sequence[str]) -> Exception:
    """Return the error for a column that is not among ``names``."""
    family = family_of(name)
    if family is None:
        held = (n for n in names if family_of(n) not in HISTOGRAMS)
        return KeyError(f"no column {name!r}; these statistics hold {', '.join(held)}")
    if is_focal(name):
        return ValueError(f"these statistics do not hold {name}: they must be made with this gamma")
    asked = "curve" if family in CURVES else family
    return ValueError(
        f"these statistics do not hold {name}: ask for track=({asked!r},) when they are made"
    )


def require(names: Sequence[str], families: Iterable[str]) -> None:
    """Raise a ValueError that names the first column of ``families`` that is absent."""
    for family in families:
        if not (family == "bce" and "bce_pos_sum" in names):
            held = set(names)
            name = next((n for n in family_columns(family) if n not in held), None)
            if name is not None:
                raise absent(name, names)


@cache
def picks(names: tuple[str, ...]) -> NDArray[np.int64]:
    """Return where the sums that terms are made of are stored, int64 (len(PICKED),); or -1."""
    plain = [name.rpartition("_")[0] if is_focal(name) else name for name in names]
    found = [plain.index(name) if name in plain else -1 for name in PICKED]
    if "bce_pos_sum" in names:
        found[PICKED.index("bce_sum")] = -1  # the two parts add up to it
    return np.array(found, np.int64)
