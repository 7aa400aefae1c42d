"""What tests of arrays of a GPU share: arrays of the stand-in for CuPy, and a loss."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastseg as fs
from hostcuda import cupy

LOSS = fs.BCE() + 2.0 * fs.SoftJaccard()
SHAPE = (2, 3, 7, 11, 13)


def on_device(*arrays: np.ndarray) -> list[Any]:
    return [cupy.asarray(array) for array in arrays]


def host(array: Any) -> np.ndarray:
    return np.asarray(array.view(np.ndarray))


def close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(host(got), expected, rtol=rtol, atol=1e-9)


class Foreign:
    """An array of some other library, with a stream of its own."""

    def __init__(self, array: np.ndarray, stream: int | None = None, **more: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
            "stream": stream,
            **more,
        }


Foreign.__cuda_array_interface__ = None  # as a class that has it as a property
