"""Contiguous elements of one type to another: a kernel for each pair that a call needs.

Apart from the kernels that load and store, which know nothing of types, so that a call compiles the
few loops that its own dtypes need; and what is stored as it is wanted needs none.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.elementary import REALS
from fastseg_kernels.cpu.halves import (
    bfloat16_to_float,
    float_to_bfloat16,
    float_to_half,
    half_to_float,
)
from fastseg_kernels.cpu.intrinsics import pointer_to, wide_vectors

# Codes of a staged binary target beside 0 and 1.
INVALID, EXCLUDED = 2, 3
NO_LABEL = -(2**63)
"""Stands for 0.5, NaN and the like: no class, and nothing that one would ignore."""
_EXACT_INTEGERS = 2.0**53
_STORED = {"bool": np.uint8, "float16": np.uint16, "bfloat16": np.uint16}


def stored_type(dtype: str) -> Any:
    """Return the type of NumPy's that elements of ``dtype`` are read as."""
    return _STORED.get(dtype, getattr(np, dtype, None))


def make_widen(dtype: str, target: Any) -> Any:
    """Return ``widen(source, count, destination)``, between two addresses."""
    Source = stored_type(dtype)
    half, brain = dtype == "float16", dtype == "bfloat16"

    @function
    def widen(source, count, destination):  # type: ignore[no-untyped-def]
        wide_vectors()
        data, out = pointer_to(source, Source), pointer_to(destination, target)
        for i in range(count):
            if half:
                out[i] = target(half_to_float(data[i]))
            elif brain:
                out[i] = target(bfloat16_to_float(data[i]))
            else:
                out[i] = target(data[i])

    return widen


@cache
def widen_kernel(dtype: str, real: str) -> Kernel:
    """Compile ``widen(source, count, destination)``: any dtype to float32 or float64."""
    widen_run = make_widen(dtype, REALS[real].scalar)

    def widen(source, count, destination):  # type: ignore[no-untyped-def]
        widen_run(source, count, destination)

    return Kernel(widen, f"widen-{dtype}-{real}")


@cache
def round_kernel(real: str, dtype: str) -> Kernel:
    """Compile ``rounded(source, count, destination)``: round once to a floating-point dtype."""
    T, Target = REALS[real].scalar, stored_type(dtype)
    half, brain = dtype == "float16", dtype == "bfloat16"

    @function
    def round_run(source, count, destination):  # type: ignore[no-untyped-def]
        wide_vectors()
        values, out = pointer_to(source, T), pointer_to(destination, Target)
        for i in range(count):
            if half:
                out[i] = float_to_half(np.float32(values[i]))
            elif brain:
                out[i] = float_to_bfloat16(np.float32(values[i]))
            else:
                out[i] = Target(values[i])

    def rounded(source, count, destination):  # type: ignore[no-untyped-def]
        round_run(source, count, destination)

    return Kernel(rounded, f"round-{real}-{dtype}")


def widening(dtype: str, real: str) -> int:
    """Return `operands.OPERAND`'s ``convert`` of what is read as reals."""
    return 0 if dtype == real else widen_kernel(dtype, real).address


def rounding(real: str, dtype: str) -> int:
    """Return `operands.OPERAND`'s ``convert`` of what reals are written to."""
    return 0 if dtype == real else round_kernel(real, dtype).address


@cache
def label_kernel(dtype: str) -> Kernel:
    """Compile ``labels(source, count, destination)``: labels of any dtype to int64.

    uint64 is read as int64: labels past 2^63 come out negative. What is no integer becomes
    `NO_LABEL`.
    """
    is_float = "float" in dtype
    widen = make_widen(dtype, np.float64 if is_float else np.int64)

    @function
    def whole_numbers(address, count):  # type: ignore[no-untyped-def]
        values, out = pointer_to(address, np.float64), pointer_to(address, np.int64)
        for i in range(count):
            value = values[i]
            small = abs(value) < _EXACT_INTEGERS
            label = np.int64(value) if small else np.int64(NO_LABEL)
            out[i] = label if small and np.float64(label) == value else np.int64(NO_LABEL)

    def labels(source, count, destination):  # type: ignore[no-untyped-def]
        widen(source, count, destination)
        if is_float:
            whole_numbers(destination, count)

    return Kernel(labels, f"labels-{dtype}")


def to_labels(dtype: str) -> int:
    """Return `operands.OPERAND`'s ``convert`` of labels that are wanted as int64."""
    return label_kernel(dtype).address
