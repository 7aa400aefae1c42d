"""From the sums to the value and the coefficients of the gradient, on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import (
    COEFFICIENTS,
    DTYPE_CODES,
    PICKED,
    REDUCTIONS,
    more_coefficients,
)
from fastseg_kernels.cuda.modules import TABLE_NUMBERS
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import Evaluation
from fastseg_kernels.views import View

FILE = "evaluation.cu"
TABLE = np.dtype([("numbers", np.float64, (TABLE_NUMBERS,)), ("columns", np.int64, (len(PICKED),))])
NONE = REDUCTIONS.index("none")


class Table(NamedTuple):
    """A table of terms: an argument of the kernel, or numbers to be uploaded if it is too large."""

    record: NDArray[Any]
    more: NDArray[np.float64] | None
    terms: int
    reduction: int
    coefficients: int  # of a row


def prepare(
    device: Device,
    terms: NDArray[np.float64],
    class_weights: NDArray[np.float64],
    columns: NDArray[np.int64],
    reduction: int,
) -> Table:
    """Make a table of terms; as `fastseg_kernels.cpu.evaluation.prepare`."""
    record: Any = np.zeros(1, TABLE)
    record["columns"] = columns
    width = COEFFICIENTS + more_coefficients(terms)
    numbers = np.concatenate([terms.reshape(-1), class_weights.reshape(-1)])
    if numbers.size > TABLE_NUMBERS:
        return Table(record, numbers, len(terms), reduction, width)
    record["numbers"][0, : numbers.size] = numbers
    return Table(record, None, len(terms), reduction, width)


def _scale(
    device: Device, scale: float | NDArray[np.float64] | View
) -> tuple[tuple[float, ...], Any]:
    """Return a factor as the kernel takes it, and what keeps its memory alive."""
    if isinstance(scale, float):
        return (scale, 0, 0, 0, 0), None
    if isinstance(scale, View):
        address, layout = scale.address, scale.layout
        strides = layout.strides if len(layout.shape) == 2 else (0, 0)
        return (1.0, address, DTYPE_CODES[layout.dtype], *strides), scale.owner
    owner = device.upload(scale)
    return (1.0, device.memory.address(owner), DTYPE_CODES["float64"], *scale.strides), owner


def evaluate(
    device: Device,
    table: Table,
    sums: Any,
    scale: float | NDArray[np.float64] | View,
    dtype: str = "float64",
    by_term: bool = False,
) -> Evaluation:
    """Evaluate a table of terms; as `fastseg_kernels.cpu.evaluation.evaluate`, on the device.

    All is NaN where the sums have an invalid voxel. Sums of the host are uploaded; a scale may be
    a view of the device: of one number, or (N, C). The value has the given dtype.
    """
    if type(sums) is np.ndarray:
        sums = device.upload(sums)
    samples, classes, width = sums.shape
    rows = (samples, classes) if table.reduction == NONE else ()
    address, more = device.memory.address, None
    if table.more is not None:
        more = device.upload(table.more)
    value, terms = device.empty(rows, dtype), None
    coefficients = device.empty((samples, classes, table.coefficients))
    if by_term or table.reduction == NONE:
        terms = device.empty((table.terms, *rows))
    factor, owner = _scale(device, scale)
    device.launch(
        FILE, "evaluate", 1, table.record, 0 if more is None else address(more), address(sums),
        *factor, table.terms, samples, classes, width, table.reduction,
        dtype == "float32", address(value), 0 if terms is None else address(terms),
        address(coefficients), table.coefficients,
    )  # fmt: skip
    del owner, more  # until the launch is in its place on the stream
    return Evaluation(value, terms, coefficients)
