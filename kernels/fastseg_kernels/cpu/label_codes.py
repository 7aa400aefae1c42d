"""From labels of any dtype to one byte per voxel: 0, 1, `INVALID` or `EXCLUDED`.

Labels are compared in their own type, 32 bytes or 4 of int64 to a vector: what they mean is put in
three numbers of that type first, so that one loop serves every rule.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastseg_kernels.constants import TARGETS_AS_STORED, TARGETS_NONZERO
from fastseg_kernels.cpu.compiled import Kernel, function, inlined
from fastseg_kernels.cpu.conversions import EXCLUDED, INVALID, make_convert, stored_type
from fastseg_kernels.cpu.intrinsics import carray, is_same, pointer_to, select, wide_vectors
from fastseg_kernels.cpu.jobs import JOB, LOAD_REQUEST


def _make_classify(dtype: Any) -> Any:
    """Return ``classify(address, count, job, codes)`` for contiguous labels of ``dtype``."""
    is_float = np.issubdtype(dtype, np.floating)
    background, foreground = np.uint8(0), np.uint8(1)
    invalid, excluded = np.uint8(INVALID), np.uint8(EXCLUDED)
    limits = np.iinfo(np.int64 if is_float else dtype)
    least, largest = int(limits.min), int(limits.max)

    @inlined
    def convert(label, real):  # type: ignore[no-untyped-def]
        """Return a label as one of ``dtype``, and whether that is the same number."""
        if is_float:
            return dtype(real), np.float64(dtype(real)) == real
        return dtype(label), least <= label <= largest

    @inlined
    def equal(a, b):  # type: ignore[no-untyped-def]
        return a == b if is_float else is_same(a, b)

    @function
    def classify(address, count, job, codes):  # type: ignore[no-untyped-def]
        wide_vectors()
        labels = pointer_to(address, dtype)
        # A label is `first`, `second` or something else; what is ignored is compared before.
        first, first_code = dtype(0), background
        second, second_code, other = dtype(1), foreground, invalid
        if job.target_mode == TARGETS_NONZERO:
            second, second_code, other = first, first_code, foreground
        elif job.target_mode != TARGETS_AS_STORED:
            first, there = convert(job.positive_label, job.positive_real)
            second, other = first, background
            first_code = second_code = foreground if there else background
        ignored, ignored_code = first, first_code
        if job.has_ignore != 0:
            value, there = convert(job.ignore_label, job.ignore_real)
            if there:
                ignored, ignored_code = value, excluded
        for i in range(count):
            label = labels[i]
            which = select(equal(label, second), second_code, other)
            which = select(equal(label, first), first_code, which)
            if is_float:
                which = select(label == label, which, invalid)
            codes[i] = select(equal(label, ignored), ignored_code, which)

    return classify


def _make_narrow(dtype: Any) -> Any:
    """Return ``narrow(address, count, out)``: whether all labels fit a byte, which ``out`` gets."""
    nothing = dtype(0)

    @function
    def narrow(address, count, out):  # type: ignore[no-untyped-def]
        wide_vectors()
        labels, seen = pointer_to(address, dtype), nothing
        for i in range(count):
            seen = dtype(seen | labels[i])
            out[i] = np.uint8(labels[i])
        return 0 <= seen <= 255

    return narrow


@cache
def codes_kernel(dtype: str) -> Kernel:
    """Compile ``codes(job, request, unused)``: ``count`` labels of a dtype to codes of one byte.

    NaN is `INVALID`. uint64 is read as int64, as `problems.as_stored` writes labels.
    """
    Stored = stored_type(dtype)
    small = dtype in ("float16", "bfloat16")
    wide = dtype in ("uint32", "int32", "uint64", "int64")
    read_as = np.float32 if small else (np.int64 if dtype == "uint64" else Stored)
    of_bytes, of_labels = _make_classify(np.uint8), _make_classify(read_as)
    narrow, widen = _make_narrow(read_as if wide else np.int32), make_convert(dtype, "float32")

    @function
    def classify_narrow(ask, job, out):  # type: ignore[no-untyped-def]
        """Mostly labels are small, and bytes are compared four or eight times as fast."""
        if narrow(ask.labels, ask.count, pointer_to(ask.brief, np.uint8)):
            of_bytes(ask.brief, ask.count, job, out)
        else:
            of_labels(ask.labels, ask.count, job, out)

    @function
    def classify_widened(ask, job, out):  # type: ignore[no-untyped-def]
        widen(ask.labels, ask.count, ask.brief)
        of_labels(ask.brief, ask.count, job, out)

    @function
    def classify_as_stored(ask, job, out):  # type: ignore[no-untyped-def]
        of_labels(ask.labels, ask.count, job, out)

    classify = classify_as_stored
    if small or wide:
        classify = classify_widened if small else classify_narrow

    def codes(job_address, request_address, unused):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        ask = carray(pointer_to(request_address, LOAD_REQUEST), 1)[0]
        classify(ask, job, pointer_to(ask.codes, np.uint8))

    return Kernel(codes, f"codes-{dtype}")
