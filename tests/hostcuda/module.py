"""RawModule and RawKernel as CuPy has them, over NumPy arrays and g++.

CuPy passes whatever bytes an argument has to the kernel: an int is 8 of them, a float is a double.
Here every argument must be of the very type that the kernel's parameter has.
"""

from __future__ import annotations

import ctypes
import os
import re
from math import prod
from typing import Any

import numpy as np

from hostcuda.build import HostCudaError, library

MOST_THREADS, MOST_BLOCKS, MOST_BLOCKS_ACROSS, MOST_THREADS_DEEP = 1024, 2**31 - 1, 65535, 64
MOST_SHARED_BYTES = 48 * 1024
KNOWN_OPTIONS = re.compile(r"(--std=|-D)")


class RawModule:
    """Kernels compiled from CUDA C++ text; as `cupy.RawModule`."""

    def __init__(
        self, *, code: str, options: tuple[str, ...] = (), name_expressions: tuple[str, ...] = ()
    ) -> None:
        self.code, self.options, self.names = code, tuple(options), tuple(name_expressions)
        self._library: ctypes.CDLL | None = None

    def compile(self) -> None:
        """Compile all named kernels."""
        if self._library is not None:
            return
        unknown = [option for option in self.options if not KNOWN_OPTIONS.match(option)]
        if unknown:
            raise HostCudaError(f"options that hostcuda does not know: {', '.join(unknown)}")
        defines = "".join(
            f"#define {option[2:].replace('=', ' ', 1)}\n"
            for option in self.options
            if option.startswith("-D")
        )
        entries = "".join(f"HOSTCUDA_ENTRY({k}, {name})\n" for k, name in enumerate(self.names))
        text = f'#include "hostcuda.hpp"\n{defines}{self.code}\n#line 1 "entries"\n{entries}'
        path = library(text, os.environ.get("HOSTCUDA_SANITIZE", ""))
        self._library = ctypes.CDLL(str(path))

    def get_function(self, name: str) -> RawKernel:
        """Return a kernel by the name expression that it was asked for with."""
        if name not in self.names:
            raise KeyError(f"{name!r} is not among the name_expressions {self.names}")
        self.compile()
        return RawKernel(self._library, self.names.index(name), name)


class RawKernel:
    """A kernel; ``kernel(grid, block, args)`` returns when it has run."""

    def __init__(self, library: Any, number: int, name: str) -> None:
        self.name = name
        signature = getattr(library, f"signature_{number}")
        signature.restype = ctypes.c_char_p
        self.parameters = signature().decode().split()
        self._launch = getattr(library, f"launch_{number}")
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [
            *(ctypes.c_void_p,) * 2, ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint,
        ]  # fmt: skip

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        """Run the kernel, in the order and with the workers that the environment names."""
        grid, block = ((*map(int, size), 1, 1)[:3] for size in (grid, block))
        if (
            min(*grid, *block) < 1
            or prod(block) > MOST_THREADS
            or block[2] > MOST_THREADS_DEEP
            or grid[0] > MOST_BLOCKS
            or max(grid[1:]) > MOST_BLOCKS_ACROSS
        ):
            raise HostCudaError(f"{self.name}: no device takes grid {grid} and block {block}")
        if shared_mem > MOST_SHARED_BYTES:
            raise HostCudaError(f"{self.name}: {shared_mem} bytes of shared memory are too many")
        if len(args) != len(self.parameters):
            raise HostCudaError(
                f"{self.name} has {len(self.parameters)} parameters, got {len(args)} arguments"
            )
        held = [self._bytes_of(k, argument) for k, argument in enumerate(args)]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*[a.ctypes.data for a in held])
        sizes = (ctypes.c_uint * 6)(*grid, *block)
        order = int(os.environ.get("HOSTCUDA_ORDER", "0"))
        workers = int(os.environ.get("HOSTCUDA_WORKERS", "1"))
        error = self._launch(pointers, sizes, shared_mem, order, workers)
        if error is not None:
            raise HostCudaError(f"{self.name}: {error.decode()}")

    def _bytes_of(self, k: int, argument: Any) -> np.ndarray:
        """Return an array whose first bytes are the argument; TypeError if its type is another."""
        wanted = self.parameters[k]
        if wanted.startswith("P"):
            if isinstance(argument, np.ndarray):
                if wanted not in ("PV0", f"P{_code(argument.dtype)}"):
                    raise TypeError(f"{self.name}: argument {k} is {argument.dtype}, not {wanted}")
                return np.array([argument.ctypes.data], np.uint64)
            if isinstance(argument, int | np.integer):  # an address, as tensor.data_ptr() is
                return np.array([argument], np.uint64)
            raise TypeError(f"{self.name}: argument {k} is {type(argument).__name__}, not {wanted}")
        if isinstance(argument, np.ndarray) and argument.size == 1 and wanted[0] == "V":
            if wanted != f"V{argument.itemsize}":
                raise TypeError(f"{self.name}: argument {k} is {argument.dtype}, not {wanted}")
            return argument.reshape(1)
        value = np.asarray(argument) if isinstance(argument, int | float | np.generic) else None
        if value is None or _code(value.dtype) != wanted:
            kind = type(argument).__name__ if value is None else str(value.dtype)
            raise TypeError(f"{self.name}: argument {k} is {kind}, not {wanted}")
        return value.reshape(1)


def _code(dtype: np.dtype) -> str:
    """Return what entry.hpp calls a type."""
    known = {"bfloat16": "E2", "bool": "b1"}
    return known.get(dtype.name, f"{dtype.kind}{dtype.itemsize}")
