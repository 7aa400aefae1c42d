"""A C function whose work is done by Python, and that answers whatever becomes of Python.

What ctypes makes of a Python function returns whatever lies in memory when an exception leaves it,
as Ctrl-C may between any two of its steps. Where the caller frees what it gets, that ends the
process. Here C owns the answer: Python writes it to memory, and is asked again until it has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding
from numba import types

from fastseg_kernels.cpu.compiled import c_function
from fastseg_kernels.cpu.intrinsics import address_of, stack_array

_CALLED = types.void(types.int64, types.int64)
# Found by their names when machine code is loaded, so that it can come from the disk.
_work = types.ExternalFunction("fastseg_handler_work", _CALLED)
_fail = types.ExternalFunction("fastseg_handler_fail", _CALLED)


@cache
def c_handler(work: int, fail: int) -> Any:
    """Return a C function ``int64 handler(int64 frame)``; ``ctypes`` of it is what Python calls.

    ``work`` and ``fail`` are addresses of ``void f(int64 frame, int64 answer)``. Both write 1 to
    the first of two int64 at ``answer``, when the second is what the handler is to return; ``fail``
    is called until that is so. There is one handler in a process.
    """
    binding.add_symbol("fastseg_handler_work", work)
    binding.add_symbol("fastseg_handler_fail", fail)

    def handle(frame):  # type: ignore[no-untyped-def]
        answer = stack_array(2, np.int64)
        answer[0] = 0
        answer[1] = 0
        _work(frame, address_of(answer))
        while answer[0] == 0:
            _fail(frame, address_of(answer))
        return answer[1]

    return c_function(handle, "handler", types.int64(types.int64))
