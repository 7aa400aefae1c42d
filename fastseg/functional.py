"""Functions of one array."""

from __future__ import annotations

from typing import Any

from fastseg.dispatch import backend_of
from fastseg.libraries import common_library
from fastseg.outputs import check_distinct, check_out_dtype, share_memory
from fastseg_kernels.constants import FLOAT_DTYPES


def sigmoid(x: Any, out: Any = None) -> Any:
    r"""Return the logistic function 1 / (1 + exp(-x)) of every element.

    Parameters
    ----------
    x
        Floating-point array of any shape and layout.
    out
        Array of the same shape to write to; it may be ``x`` but not overlap it otherwise. A new
        array by default.

    Returns
    -------
    Array of the dtype of ``x``, or ``out``. The error is at most 3 ulp in float32 and float64;
    sigma(-x) keeps its relative accuracy for large x.

    Raises
    ------
    TypeError, ValueError
        For an array that is not floating point, or an ``out`` that does not fit.

    Examples
    --------
    >>> import numpy as np, fastseg as fs
    >>> fs.sigmoid(np.array([0.0, 1.0])).round(4).tolist()
    [0.5, 0.7311]
    """
    library = common_library(x, "x", out=out)
    source = library.view(x, "x")
    if source.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be floating point, got {source.dtype}")
    result = library.empty_like(x) if out is None else out
    target = library.view(result, "out", writable=True)
    if target.shape != source.shape:
        raise ValueError(f"out must have the shape of x, {source.shape}, got {target.shape}")
    check_out_dtype(target.dtype, "x", source.dtype)
    if out is not None:
        check_distinct(target.layout)
        if share_memory(source.address, source.layout, target.address, target.layout):
            raise ValueError("out must not overlap x in memory (it may be x itself)")
    backend_of(library, x).sigmoid(source, target)
    library.used((source.owner,))
    if out is not None:
        library.written((out,))
    return result
