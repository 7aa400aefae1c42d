"""The record by which a kernel is told of its arrays; ``Job`` of operands.cuh, field by field."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastseg_kernels.constants import DTYPE_CODES, MAX_DIMS
from fastseg_kernels.views import Geometry, Layout, merge_layouts

OPERAND = np.dtype(
    [
        ("address", np.int64),
        ("code", np.int64),
        ("stride_n", np.int64),
        ("stride_c", np.int64),
        ("strides", np.int64, (MAX_DIMS,)),
    ]
)
OPERANDS = ("logits", "targets", "mask", "weights", "out")
JOB = np.dtype(
    [
        *((name, OPERAND) for name in OPERANDS),
        ("ndim", np.int64),
        ("sizes", np.int64, (MAX_DIMS,)),
        ("samples", np.int64),
        ("classes", np.int64),
        ("voxels", np.int64),
        ("block", np.int64),
        ("blocks", np.int64),
        ("tasks", np.int64),
        ("labelled", np.int64),
        ("target_mode", np.int64),
        ("has_ignore", np.int64),
        ("ignore_label", np.int64),
        ("positive_label", np.int64),
        ("ignore_real", np.float64),
        ("positive_real", np.float64),
        ("threshold", np.float64),
    ]
)


MOST_TASKS = 2**31 - 1
"""Kernels count tasks in 32 bits."""


def fill_geometry(record: Any, layouts: dict[str, Layout]) -> Geometry:
    """Write ``layouts`` (N, C, *spatial), by their names in the job, with merged spatial axes."""
    first, geometry = next(iter(layouts.values())), merge_layouts(layouts.values())
    record["samples"], record["classes"] = first.shape[:2]
    record["ndim"] = len(geometry.sizes)
    record["sizes"][: len(geometry.sizes)] = geometry.sizes
    for (name, layout), strides in zip(layouts.items(), geometry.strides, strict=True):
        operand = record[name]
        operand["code"] = DTYPE_CODES[layout.dtype]
        operand["stride_n"], operand["stride_c"] = layout.strides[:2]
        operand["strides"][: len(strides)] = strides
    return geometry
