"""Contiguous elements of one type to another: a kernel for each pair that a call needs.

Apart from the kernels that load and store, which know nothing of types, so that a call compiles the
few loops that its own dtypes need; and what is stored as it is wanted needs none.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.halves import NARROW, WIDEN
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


def make_convert(source: str, target: str) -> Any:
    """Return ``convert(address, count, destination)``: what is not exact is rounded once."""
    Source, Target = stored_type(source), stored_type(target)
    Number = np.float32 if target in NARROW else Target  # what is written, or made bits of

    @inlined
    def unchanged(x):  # type: ignore[no-untyped-def]
        return x

    read, write = WIDEN.get(source, unchanged), NARROW.get(target, unchanged)

    @function
    def convert(address, count, destination):  # type: ignore[no-untyped-def]
        wide_vectors()
        data, out = pointer_to(address, Source), pointer_to(destination, Target)
        for i in range(count):
            out[i] = write(Number(read(data[i])))

    return convert


@cache
def convert_kernel(source: str, target: str) -> Kernel:
    """Compile ``convert(address, count, destination)`` from one dtype to another."""
    run = make_convert(source, target)

    def convert(address, count, destination):  # type: ignore[no-untyped-def]
        run(address, count, destination)

    return Kernel(convert, f"convert-{source}-{target}")


def conversion(source: str, target: str) -> int:
    """Return an `operands.OPERAND`'s ``convert``, from what is stored to what is wanted."""
    return 0 if source == target else convert_kernel(source, target).address


@cache
def label_kernel(dtype: str) -> Kernel:
    """Compile ``labels(source, count, destination)``: labels of any dtype to int64.

    uint64 is read as int64: labels past 2^63 come out negative. What is no integer becomes
    `NO_LABEL`.
    """
    is_float = "float" in dtype
    widen = make_convert(dtype, "float64" if is_float else "int64")

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
