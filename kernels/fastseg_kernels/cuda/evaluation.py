"""From the sums to the value and the coefficients of the gradient, on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import COEFFICIENTS, REDUCTIONS
from fastseg_kernels.cuda.modules import kernel
from fastseg_kernels.cuda.runtime import runtime
from fastseg_kernels.problem import Evaluation

SHAPE = np.dtype([(name, np.int64) for name in ("terms", "samples", "classes", "columns")])


def evaluate(
    terms: NDArray[np.float64],
    class_weights: NDArray[np.float64],
    sums: Any,
    columns: NDArray[np.int64],
    reduction: int,
    scale: Any,
) -> Evaluation:
    """Evaluate a table of terms; as `fastseg_kernels.cpu.evaluation.evaluate`, on the device."""
    device = runtime()
    samples, classes, width = sums.shape
    rows = (samples, classes) if reduction == REDUCTIONS.index("none") else (1, 1)
    result = Evaluation(
        device.empty(rows, "float64"),
        device.empty((len(terms), *rows), "float64"),
        device.empty((samples, classes, COEFFICIENTS), "float64"),
    )
    tables = [device.array(table) for table in (terms, class_weights, sums, columns, scale)]
    shape = np.array([(len(terms), samples, classes, width)], SHAPE)
    arguments = (*tables, shape, np.int32(reduction), *result)
    kernel("evaluation.cu", "evaluate")((1,), (1,), arguments)
    return result
