"""From the sums to the value and the coefficients of the gradient: one table of terms.

A loss is data here: a row per term (`constants.TERM_FIELDS`), weights and choice of classes. It
costs the same few microseconds whatever the size of the volume.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof, c_char
from functools import cache, lru_cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastseg_kernels.constants import COEFFICIENTS, KINDS, more_coefficients
from fastseg_kernels.cpu.compiled import Kernel
from fastseg_kernels.cpu.entropy_terms import bce_kernel, cross_entropy_kernel
from fastseg_kernels.cpu.intrinsics import call_kernel, carray, pointer_to
from fastseg_kernels.cpu.lovasz_terms import lovasz_kernel
from fastseg_kernels.cpu.memory import own_address
from fastseg_kernels.cpu.region_terms import region_kernel
from fastseg_kernels.cpu.term_rows import EVALUATION, FIELDS, KIND, NONE, WEIGHT
from fastseg_kernels.problem import Evaluation

_PACK = Struct(f"{len(EVALUATION.names or ())}q")
TERM_KERNELS: dict[str, Callable[[], Kernel]] = {
    "bce": bce_kernel,
    "focal_bce": bce_kernel,
    "cross_entropy": cross_entropy_kernel,
    "focal_cross_entropy": cross_entropy_kernel,
    "region": region_kernel,
    "lovasz": lovasz_kernel,
}
"""What evaluates a term of each of `constants.KINDS`."""


def _term_kernel(kind: int) -> Kernel:
    name = KINDS[kind] if kind < len(KINDS) else str(kind)
    if name not in TERM_KERNELS:
        raise NotImplementedError(f"no kernel evaluates terms of the kind {name!r}")
    return TERM_KERNELS[name]()


@cache
def evaluation_kernel() -> Kernel:
    """Compile ``evaluate(record, unused, unused)`` of an `EVALUATION`."""

    def evaluate_record(address, first, last):  # type: ignore[no-untyped-def]
        own = carray(pointer_to(address, EVALUATION), 1)[0]
        rows = own.samples * own.classes
        lines = rows if own.reduction == NONE else 1
        kernels, terms = pointer_to(own.kernels, np.int64), pointer_to(own.terms, np.float64)
        value = pointer_to(own.results, np.float64)
        for k in range(lines * (1 + own.number) + rows * own.width):
            value[k] = 0.0
        for k in range(own.number):
            call_kernel(kernels[k], address, k, 0)
            for line in range(lines):
                value[line] += terms[FIELDS * k + WEIGHT] * value[lines * (1 + k) + line]

    return Kernel(evaluate_record, "evaluate")


class Table(NamedTuple):
    """A table of terms, as the kernel takes it."""

    # The first fields of an `EVALUATION`, in their order
    terms: int
    kernels: int
    number: int
    class_weights: int
    picked: int
    reduction: int
    width: int
    owners: tuple[NDArray[Any], ...]  # keep the memory alive

    @property
    def per_row(self) -> bool:
        """Tell whether there is a value for every row."""
        return self.reduction == NONE

    def record(self, shape: tuple[int, ...], *addresses: int) -> bytes:
        """Return the `EVALUATION` of sums (N, C, K); ``addresses``: from the sums' on."""
        return _PACK.pack(*self[:-1], *shape, *addresses)


def prepare(
    terms: NDArray[np.float64],
    class_weights: NDArray[np.float64],
    columns: NDArray[np.int64],
    reduction: int,
) -> Table:
    """Make a table of terms.

    Parameters
    ----------
    terms
        float64 (T, len(TERM_FIELDS)).
    class_weights
        float64 (T, C); NaN says that the term leaves the class out.
    columns
        int64 (len(PICKED),): in which column of the sums each of `constants.PICKED` is; -1: absent.
    reduction
        Index into `constants.REDUCTIONS`.
    """
    kernels = np.array([_term_kernel(int(kind)).address for kind in terms[:, KIND]], np.int64)
    owners = tuple(map(np.ascontiguousarray, (terms, kernels, class_weights, columns)))
    of_terms, of_kernels, of_weights, of_columns = (own_address(array) for array in owners)
    width = COEFFICIENTS + more_coefficients(terms)
    return Table(of_terms, of_kernels, len(terms), of_weights, of_columns, reduction, width, owners)


def evaluate(
    table: Table,
    sums: NDArray[np.float64],
    scale: float | NDArray[np.float64],
    dtype: str = "float64",
    by_term: bool = False,
) -> Evaluation:
    """Evaluate a table of terms.

    Parameters
    ----------
    table
        What `prepare` made.
    sums
        float64 (N, C, K).
    scale
        A number, or float64 (N, C), multiplied into the coefficients.
    dtype, by_term
        Not used here: the value is float64, and its caller rounds it; the terms are always there.
    """
    rows = sums.shape[:2]
    shape = rows if table.per_row else (1, 1)
    values = shape[0] * shape[1]
    of_coefficients = values * (1 + table.number)
    results = np.empty(of_coefficients + rows[0] * rows[1] * table.width)
    # Both are held until the kernel has read them: another call may drop what is remembered.
    factors, of_scale = (
        _constant(rows, scale) if isinstance(scale, float) else (scale, own_address(scale))
    )
    sums = np.ascontiguousarray(sums)
    record = table.record(sums.shape, own_address(sums), of_scale, own_address(results))
    memory = c_char.from_buffer(bytearray(record))
    evaluation_kernel().call(addressof(memory), 0, 0)
    del factors
    return Evaluation(
        np.ndarray(shape, np.float64, results),
        np.ndarray((table.number, *shape), np.float64, results, 8 * values),
        np.ndarray((*rows, table.width), np.float64, results, 8 * of_coefficients),
    )


@lru_cache(maxsize=64)
def _constant(rows: tuple[int, ...], value: float) -> tuple[NDArray[np.float64], int]:
    """Return the factor of every row, and its address; shared by all calls, and never written."""
    factors = np.full(rows, value)
    return factors, own_address(factors)
