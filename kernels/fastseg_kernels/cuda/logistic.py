"""The logistic function over a volume."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from fastseg_kernels.constants import ITEM_SIZES
from fastseg_kernels.cuda.job import JOB, fill_geometry
from fastseg_kernels.cuda.modules import THREADS, TYPES, kernel
from fastseg_kernels.cuda.runtime import blocks_for
from fastseg_kernels.problem import compute_type
from fastseg_kernels.views import View


def sigmoid(x: View, out: View) -> None:
    """Write the logistic function of ``x`` to ``out``, an array of the same shape (or ``x``)."""
    voxels = prod(x.shape)
    if voxels == 0:
        return
    job: Any = np.zeros(1, JOB)
    record = job[0]
    shape = (1, 1, *x.shape)
    rows = {
        name: view.layout._replace(shape=shape, strides=(0, 0, *view.strides))
        for name, view in (("logits", x), ("out", out))
    }
    geometry = fill_geometry(record, rows)
    real = TYPES[compute_type(x.dtype)]
    item = ITEM_SIZES[x.dtype]
    runs = len(geometry.sizes) == 1 and geometry.strides[0][0] == geometry.strides[1][0] == item
    grid = (blocks_for(-(-voxels // (4 * THREADS))),)
    if x.dtype == out.dtype and (runs or voxels == 1):
        name = f"sigmoid_in_place<{real}, {TYPES[x.dtype]}>"
        kernel("logistic.cu", name)(grid, (THREADS,), (x.address, voxels, out.address))
        return
    record["voxels"] = voxels
    record["logits"]["address"], record["out"]["address"] = x.address, out.address
    kernel("logistic.cu", f"sigmoid_anywhere<{real}>")(grid, (THREADS,), (job,))
