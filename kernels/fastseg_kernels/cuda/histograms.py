"""What kernels are told of the histograms that they count."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import CURVES, HISTOGRAMS, OCTAVES, columns, gamma_of, histograms
from fastseg_kernels.cuda.runtime import Device

COUNTING = np.dtype(
    [
        ("gamma", np.float64),
        ("slopes", np.int64),
        ("counts", np.int64),
        ("columns", np.int64),
        ("first", np.int64),
        ("bins", np.int64),
        ("lowest", np.int64),
        ("octave_bits", np.int64),
    ]
)
"""``Counting`` of histograms.cuh, field by field."""


@cache
def counting(families: frozenset[str]) -> NDArray[Any]:
    """Return the record for families, without the address of the counts; it is shared."""
    record: Any = np.zeros(1, COUNTING)
    record["gamma"] = gamma_of(families)
    for family in histograms(families):
        histogram = HISTOGRAMS[family]
        if family not in CURVES:
            record["first"], record["bins"] = record["columns"], histogram.bins
            record["lowest"] = histogram.lowest
            record["octave_bits"] = (histogram.bins // OCTAVES).bit_length() - 1
        record["columns"] += histogram.width
    return record  # type: ignore[no-any-return]


def with_slopes(families: frozenset[str], address: int) -> NDArray[Any]:
    """Return the record of a gradient, which adds the slopes at an address if it is not 0."""
    record: Any = counting(families)
    if address != 0:
        record = record.copy()
        record["slopes"] = address
    return record  # type: ignore[no-any-return]


def add_up(
    device: Device,
    sums: Any,
    places: int,
    families: frozenset[str],
    counts: Any,
    shape: tuple[int, int],
) -> Any:
    """Return the sums of every row, from those of ``places`` parts of it, and its counts."""
    rows, width = shape[0] * shape[1], len(columns(families))
    total = device.empty((*shape, width))
    address = device.memory.address
    of_rows, scalars = address(total), np.int32(len(columns(families, counts=False)))
    device.launch("overlap.cu", "add_tasks", rows, address(sums), places, scalars, of_rows, width)
    if counts is not None:
        number = counts.shape[2]
        device.launch("overlap.cu", "widen_counts", rows, address(counts), number, of_rows, width)
    return total


def make_counts(
    device: Device, families: frozenset[str], shape: tuple[int, int]
) -> tuple[Any, NDArray[Any]]:
    """Return zeros for the counts, None where nothing is counted, and the record."""
    record: Any = counting(families)
    if not histograms(families):
        return None, record
    counts, record = device.zeros((*shape, int(record["columns"][0])), "int64"), record.copy()
    record["counts"] = device.memory.address(counts)
    return counts, record
