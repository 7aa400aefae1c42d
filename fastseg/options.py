"""The options that belong to a whole loss."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal

from fastseg_kernels.constants import REDUCTIONS
from fastseg_kernels.problem import compute_type

LAYOUTS = ("NC", "N", "C", "")


@dataclass(frozen=True)
class Options:
    """What `Loss.replace` sets.

    Parameters
    ----------
    activation
        "sigmoid" and "softmax": the predictions are logits, of classes each for itself or of one
        distribution over the classes of a voxel; None: they are probabilities. "auto": what the
        terms imply, and "sigmoid" where they imply nothing.
    ignore_index
        Label of voxels that do not count; compared before ``positive``.
    positive
        None: targets are 0 and 1 (or soft, in [0, 1]); "nonzero": every label but 0 is foreground;
        an integer: that label is.
    reduction
        "mean" or "sum" over samples and classes, or "none": one value for each, (N, C).
    layout
        The axes before the spatial ones: "NC", "N", "C" or "" (a plain volume).
    compute_dtype
        "auto": float16, bfloat16 and float32 logits are computed in float32, where sixteen voxels
        are added up before they are widened; "float64": everything is computed and summed in
        float64, and so is the value. Chunks of any size then add up to the whole within 1e-12. It
        takes about three times as long.
    backend
        "auto": the backend of the device that holds the arrays; "cpu" or "cuda": arrays elsewhere
        are errors. No volume is ever moved between devices.

    Raises
    ------
    ValueError
        For a value that is none of these.

    Examples
    --------
    >>> import fastseg as fs
    >>> fs.BCE().replace(layout="", ignore_index=255).options.given()
    {'ignore_index': 255, 'layout': ''}
    """

    activation: Literal["auto", "sigmoid", "softmax"] | None = "auto"
    ignore_index: int | None = None
    positive: Literal["nonzero"] | int | None = None
    reduction: Literal["none", "mean", "sum"] = "mean"
    layout: Literal["NC", "N", "C", ""] = "NC"
    compute_dtype: Literal["auto", "float64"] = "auto"
    backend: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.activation not in ("auto", "sigmoid", "softmax", None):
            raise ValueError(
                f"activation must be 'auto', 'sigmoid', 'softmax' or None, got {self.activation!r}"
            )
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be 'NC', 'N', 'C' or '', got {self.layout!r}")
        if self.compute_dtype not in ("auto", "float64"):
            raise ValueError(
                f"compute_dtype must be 'auto' or 'float64', got {self.compute_dtype!r}"
            )
        if self.backend not in ("auto", "cpu", "cuda"):
            raise ValueError(f"backend must be 'auto', 'cpu' or 'cuda', got {self.backend!r}")
        for name in ("ignore_index", "positive"):
            value = getattr(self, name)
            if value is None or (name == "positive" and value == "nonzero"):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                extra = ", 'nonzero'" if name == "positive" else ""
                raise ValueError(f"{name} must be an integer{extra} or None, got {value!r}")
            label = int(value)
            if not -(2**63) <= label < 2**64:
                raise ValueError(f"{name} must fit 64 bits, got {label}")
            object.__setattr__(self, name, label)

    def rows_of(self, shape: Any) -> tuple[Any, Any]:
        """Return how many samples and classes logits of a shape have."""
        layout = self.layout
        samples, classes = (shape[layout.index(a)] if a in layout else 1 for a in "NC")
        return samples, classes

    def beside_voxels(self, rows: Any, ndim: int) -> Any:
        """Return an array of any library, (N, C) or 0-d, so that it broadcasts beside logits."""
        if rows.ndim == 0:
            return rows
        lead = [rows.shape["NC".index(axis)] for axis in self.layout]
        return rows.reshape(*lead, *(1,) * (ndim - len(self.layout)))

    def real_of(self, dtype: str) -> str:
        """Return the dtype in which a loss of such logits is computed."""
        return "float64" if self.compute_dtype == "float64" else compute_type(dtype)

    def given(self) -> dict[str, Any]:
        """Return the options that differ from the defaults."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value != getattr(DEFAULTS, name)}


DEFAULTS = Options()
