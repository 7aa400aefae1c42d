"""What XLA calls on the CPU: Python that reads and writes XLA's own buffers, where they lie.

`jax.pure_callback` makes JAX arrays of what it hands to Python, and waits for them on the threads
that wait for the callback: with one CPU a process stops there for ever. Here XLA's foreign-function
interface (``xla/ffi/api/c_api.h``, whose structs these are) calls a function of C's that has Python
make NumPy views of the buffers: nothing is copied, and nothing waited for.
"""

from __future__ import annotations

import _thread
import ctypes
import hashlib
import pickle
import time
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache, lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax import dtypes

Verb = Callable[..., None]
"""Called with what it reads, and ``out=``, the arrays that it writes."""
TARGET = "fastseg"
METADATA = 1
"""The extension by which XLA asks a handler for the version of its interface."""
EXECUTE = 3
"""The stage in which a handler computes."""
DTYPES = {
    1: "bool",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "uint8",
    7: "uint16",
    8: "uint32",
    9: "uint64",
    10: "float16",
    11: "float32",
    12: "float64",
    16: "bfloat16",
}
"""NumPy's names of XLA_FFI_DataType."""
INTERNAL = 13
"""XLA_FFI_Error_Code of what went wrong here."""


def call(verb: Verb, constant: Any, shapes: tuple[Any, ...], *arrays: Any) -> list[jax.Array]:
    """Return what ``verb(constant, *arrays, out=...)`` writes, as JAX arrays of ``shapes``.

    ``verb`` is a function of a module and ``constant`` can be pickled: their bytes are its name in
    the compiled program, which JAX may keep on disk. Arrays may be None. Where JAX has a GPU,
    `jax.pure_callback` brings arrays to the host.
    """
    given, tree = jax.tree.flatten(arrays)
    if jax.default_backend() != "cpu":
        made: list[jax.Array] = jax.pure_callback(
            _in_new_arrays(verb, constant, tree, shapes), shapes, *given, vmap_method="sequential"
        )
        return list(made)
    _register()
    run = jax.ffi.ffi_call(TARGET, shapes, vmap_method="sequential")
    return list(run(*given, key=_key_of(verb, constant, tree)))


@lru_cache(maxsize=1024)
def _key_of(verb: Verb, constant: Any, tree: Any) -> np.uint64:
    """Return the name of a call in compiled programs, by which `_work` finds it."""
    words = pickle.dumps((verb.__module__, verb.__qualname__, constant, str(tree)))
    key = int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1  # JAX takes an int64
    _verbs[key] = partial(_unflattened, verb, constant, tree)
    return np.uint64(key)


_verbs: dict[int, Callable[[list[Any], list[Any]], None]] = {}
"""By the key in the compiled programs, of which nobody says when they are gone."""


def _unflattened(verb: Verb, constant: Any, tree: Any, given: list[Any], out: list[Any]) -> None:
    verb(constant, *jax.tree.unflatten(tree, given), out=out)


@lru_cache(maxsize=1024)
def _in_new_arrays(verb: Verb, constant: Any, tree: Any, shapes: tuple[Any, ...]) -> Any:
    """Return a verb as `jax.pure_callback` wants it; the same one for the same arguments."""

    def callback(*given: Any) -> tuple[Any, ...]:
        out = [np.empty(each.shape, each.dtype) for each in shapes]
        _unflattened(verb, constant, tree, [np.asarray(array) for array in given], out)
        return tuple(out)

    return callback


# The interface, in C's terms. Each struct begins with its size and a list of extensions.


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


_HEAD = (("struct_size", c_size_t), ("extension_start", POINTER(_Extension)))


class _Version(ctypes.Structure):
    _fields_ = (*_HEAD, ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("api_version", _Version), ("traits", c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _ErrorArguments(ctypes.Structure):
    _fields_ = (*_HEAD, ("message", c_char_p), ("code", c_int))


_CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))


class _Api(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("api_version", _Version),
        ("internal_api", c_void_p),
        ("create_error", _CreateError),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(ctypes.Structure):
    """Of arguments and of results."""

    _fields_ = (
        *_HEAD,
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    )


class _Scalar(ctypes.Structure):
    _fields_ = (("dtype", c_int), ("value", POINTER(ctypes.c_uint64)))


class _Attributes(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("attributes", POINTER(POINTER(_Scalar))),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_failed: dict[int, BaseException] = {}
"""What went wrong, by the address of the call's frame, until XLA is told."""
_Called = ctypes.CFUNCTYPE(None, c_int64, c_int64)


def _work(address: int, answer: int) -> None:
    """Do what XLA asks for; an exception is kept for `_fail`, or leaves no answer either."""
    try:
        frame = _CallFrame.from_address(address)
        if frame.extension_start and frame.extension_start.contents.type == METADATA:
            extension = ctypes.cast(frame.extension_start, POINTER(_MetadataExtension))
            version = extension.contents.metadata.contents.api_version
            # What is used of the structs has been the same in all versions.
            version.major = frame.api.contents.api_version.major
            version.minor = frame.api.contents.api_version.minor
        elif frame.stage == EXECUTE:
            key = frame.attributes.attributes[0].contents.value[0]
            _verbs[key](_views(frame.arguments), _views(frame.results))
    except BaseException as error:
        _failed[address] = error
    else:
        c_int64.from_address(answer).value = 1


def _fail(address: int, answer: int) -> None:
    """Answer with an error of XLA's; the interface has no exceptions."""
    error = _failed.pop(address, None) or KeyboardInterrupt("between two steps of a handler")
    message = f"{type(error).__name__}: {error}".encode(errors="replace")
    arguments = _ErrorArguments(message=message, code=INTERNAL)
    arguments.struct_size = ctypes.sizeof(arguments)
    create_error = _CallFrame.from_address(address).api.contents.create_error
    made = create_error(ctypes.byref(arguments))
    if isinstance(error, KeyboardInterrupt):  # and once more for Python, when XLA has returned
        _thread.start_new_thread(_interrupt_again, ())
    c_int64.from_address(answer + 8).value = made
    c_int64.from_address(answer).value = 1


def _interrupt_again() -> None:
    time.sleep(0.05)
    _thread.interrupt_main()


def _views(buffers: Any) -> list[np.ndarray[Any, Any]]:
    return [_view(buffers.buffers[k].contents) for k in range(buffers.size)]


def _view(buffer: Any) -> np.ndarray[Any, Any]:
    """Return a buffer of XLA's as a NumPy array, in its memory."""
    if buffer.dtype not in DTYPES:
        raise TypeError(f"arrays must be boolean, integer or floating, got XLA's {buffer.dtype}")
    name = DTYPES[buffer.dtype]
    dtype = np.dtype(dtypes.bfloat16 if name == "bfloat16" else name)
    shape = tuple(buffer.dims[k] for k in range(buffer.rank))
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if size == 0:
        return np.empty(shape, dtype)
    memory: Any = (ctypes.c_char * size).from_address(buffer.data)
    return np.ndarray(shape, dtype, memory)


_python = _Called(_work), _Called(_fail)  # they live as long as the target


@cache
def _register() -> None:
    from fastseg_kernels.cpu.handler import c_handler

    work, fail = (ctypes.cast(each, c_void_p).value or 0 for each in _python)
    ffi: Any = jax.ffi
    ffi.register_ffi_target(TARGET, ffi.pycapsule(c_handler(work, fail).ctypes), platform="cpu")
