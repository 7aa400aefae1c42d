"""From the sums to the value and the coefficients of the gradient, on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import BASE_COLUMNS, COEFFICIENTS, DTYPE_CODES, PICKED, REDUCTIONS
from fastseg_kernels.cuda.modules import TABLE_NUMBERS
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import Evaluation
from fastseg_kernels.views import View

FILE = "evaluation.cu"
TABLE = np.dtype([("numbers", np.float64, (TABLE_NUMBERS,)), ("columns", np.int64, (len(PICKED),))])
SHAPE = np.dtype(
    [
        (name, np.int64)
        for name in ("terms", "samples", "classes", "columns", "invalid", "reduction", "single")
    ]
)
SCALE = np.dtype(
    [
        ("number", np.float64),
        *((name, np.int64) for name in ("address", "code", "stride_n", "stride_c")),
    ]
)
INVALID = BASE_COLUMNS.index("invalid")


def _scale(device: Device, scale: float | NDArray[np.float64] | View) -> tuple[Any, Any]:
    """Return the record of a factor, and what keeps its memory alive."""
    record = np.zeros(1, SCALE)
    record["number"] = 1.0
    if isinstance(scale, float):
        record["number"] = scale
        return record, None
    if isinstance(scale, View):
        address, layout = scale.address, scale.layout
        strides = layout.strides if len(layout.shape) == 2 else (0, 0)
        code, owner = DTYPE_CODES[layout.dtype], scale.owner
    else:
        owner = device.upload(scale)
        address, strides, code = device.memory.address(owner), scale.strides, DTYPE_CODES["float64"]
    record["address"], record["code"] = address, code
    record["stride_n"], record["stride_c"] = strides
    return record, owner


def evaluate(
    device: Device,
    terms: NDArray[np.float64],
    class_weights: NDArray[np.float64],
    sums: Any,
    columns: NDArray[np.int64],
    reduction: int,
    scale: float | NDArray[np.float64] | View,
    dtype: str = "float64",
) -> Evaluation:
    """Evaluate a table of terms; as `fastseg_kernels.cpu.evaluation.evaluate`, on the device.

    All is NaN where the sums have an invalid voxel. Sums of the host are uploaded; a scale may be
    a view of the device: of one number, or (N, C).
    """
    if type(sums) is np.ndarray:
        sums = device.upload(sums)
    samples, classes, width = sums.shape
    rows = (samples, classes) if reduction == REDUCTIONS.index("none") else ()
    result = Evaluation(
        device.empty(rows, dtype),
        device.empty((len(terms), *rows)),
        device.empty((samples, classes, COEFFICIENTS)),
    )
    table: Any = np.zeros(1, TABLE)
    table["columns"] = columns
    numbers, more = np.concatenate([terms.reshape(-1), class_weights.reshape(-1)]), None
    if numbers.size <= TABLE_NUMBERS:
        table["numbers"][0, : numbers.size] = numbers
    else:
        more = device.upload(numbers)
    shape = np.zeros(1, SHAPE)
    single = dtype == "float32"
    shape[0] = (len(terms), samples, classes, width, INVALID, reduction, single)
    factor, owner = _scale(device, scale)
    address = device.memory.address
    pointers = [address(array) for array in result]
    device.launch(
        FILE, "evaluate", 1, table, 0 if more is None else address(more), address(sums), factor,
        shape, *pointers,
    )  # fmt: skip
    del owner, more  # until the launch is in its place on the stream
    return result
