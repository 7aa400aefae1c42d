"""Compilation: what is compiled when, and the cache on disk that makes it happen once.

Numba's own ``cache=True`` watches the one file that holds the function and would go on running the
machine code of yesterday's helper from another file. Here the name of a cache file is a digest of
everything that the machine code depends on (all sources of this backend, the versions of Numba,
llvmlite and Python, the CPU's name and features, the kernel's name and signature), so a stale file
can never be found. One file holds one kernel and is renamed into place whole, so any number of
processes may start at once on one directory, and a read-only directory only costs compilation.

Two kernels that were compiled in different processes must not share a symbol: the linker keeps the
first of two functions of one name, and Numba names a function by its qualified name and a counter
of the process. Closures of one factory (the loop over float32 and the one over float64) then swap
code without a word. So every function of this backend is made by `function` or `inlined`, which
put a digest of what it closes over into its name.

A cache file is machine code: whoever can write to the directory can run code as its readers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import binding
from numba import njit, types
from numba.core import caching, ccallback, compiler, runtime, serialize

# Parts of Numba that are not documented; each is as old as its cache.
_compiler: Any = compiler
_serialize: Any = serialize
_ccallback: Any = ccallback
_runtime: Any = runtime

LOG = logging.getLogger("fastseg.compile")
KERNEL_SIGNATURE = types.void(types.int64, types.int64, types.int64)
# Division must not test for zero (that alone keeps a loop from vectorising), and no flag of
# fast-math is set anywhere: NaN must survive and the order of every sum is fixed.
OPTIONS: dict[str, Any] = {"error_model": "numpy"}
VECTOR_FEATURES = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "neon")
_CHECKSUM_BYTES = 32
_COMPILING = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would wait forever for locks of Numba's that the
    # thread holds: the fork waits until it is done.
    os.register_at_fork(
        before=_COMPILING.acquire,
        after_in_parent=_COMPILING.release,
        after_in_child=_COMPILING.release,
    )


def cache_directory() -> Path | None:
    """Return where compiled kernels are kept: ``FASTSEG_CACHE_DIR`` or the user's cache directory.

    ``FASTSEG_CACHE_DIR=""`` (set, but empty) turns the cache off: None is returned, as it is for a
    user without a home.
    """
    chosen = os.environ.get("FASTSEG_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fastseg"
    except RuntimeError:  # a container's user without a home
        return None


def compile_target() -> dict[str, Any]:
    """Return the name of the CPU and its vector features, as LLVM compiles for them."""
    features = binding.get_host_cpu_features()
    return {
        "name": str(binding.get_host_cpu_name()),
        "features": {name: bool(features[name]) for name in VECTOR_FEATURES if name in features},
    }


def _digest_sources() -> bytes:
    """Digest every source of this backend, and what compiles it."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted([*package.glob("*.py"), *package.parent.glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    versions = (numba.__version__, llvmlite.__version__, sys.version)
    digest.update("\n".join(versions).encode())
    return digest.digest()


SOURCE_DIGEST = _digest_sources()
"""Taken on import: sources that are edited or upgraded under a running process are not those that
it compiles."""


class DiskCache(caching._Cache):
    """What Numba asks of a cache, with one self-describing file per kernel."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.enabled = True

    @property
    def cache_path(self) -> str:
        """Return the directory."""
        return str(cache_directory())

    def enable(self) -> None:
        """Use the cache."""
        self.enabled = True

    def disable(self) -> None:
        """Do not use the cache."""
        self.enabled = False

    def flush(self) -> None:
        """Refuse: kernels of other processes lie in the same directory."""
        raise NotImplementedError("remove the cache directory instead: see fastseg.show_config()")

    def _path(self, signature: Any, target_context: Any) -> Path | None:
        directory = cache_directory()
        if directory is None or not self.enabled:
            return None
        key = hashlib.sha256(SOURCE_DIGEST)
        key.update(repr((self.name, signature, target_context.codegen().magic_tuple())).encode())
        return directory / f"{self.name}-{key.hexdigest()[:32]}.bin"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None: not there, damaged, or not readable."""
        path = self._path(signature, target_context)
        try:
            content = path.read_bytes() if path else b""
        except OSError:
            content = b""
        if not content:
            LOG.info("compiling %s", self.name)
            return None
        checksum, payload = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if hashlib.sha256(payload).digest() != checksum:  # a disk that was full, a copy cut short
            LOG.warning("ignoring the damaged cache file %s", path)
            return None
        # Numba's own cache would refresh the context, which imports all that may be compiled and
        # takes 0.4 s; what is compiled already needs these few functions alone.
        _runtime.rtsys.initialize(target_context)
        return _compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, signature: Any, data: Any) -> None:
        """Write the compiled kernel, or let it be where that cannot be done."""
        path = self._path(signature, data.target_context)
        if path is None:
            return
        payload = _serialize.dumps(data._reduce())
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(payload).digest() + payload)
                Path(temporary).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()
                raise
        except OSError as error:
            LOG.info("not cached (%s): %s", error, path)


def _content(value: Any) -> str:
    """Describe a closed-over value so that equal descriptions mean equal machine code."""
    if hasattr(value, "py_func"):
        return str(value.py_func.__qualname__)
    if isinstance(value, type | np.dtype | bool | int | float | str | np.generic):
        return f"{type(value).__name__}({value!r})"
    if isinstance(value, tuple):
        return f"({', '.join(_content(item) for item in value)})"
    raise TypeError(f"a compiled function closes over {value!r}, which has no digest")


def _name_by_content(function: Callable[..., Any]) -> None:
    """Make the symbol of a closure unique among all processes that share a cache."""
    cells = function.__closure__ or ()
    closed = zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True)
    content = "; ".join(f"{name}={_content(value)}" for name, value in closed)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    function.__qualname__ = f"{function.__qualname__}.{digest}"


def function(body: Callable[..., Any]) -> Any:
    """Decorate a function that kernels call."""
    _name_by_content(body)
    return njit(**OPTIONS)(body)


def inlined(body: Callable[..., Any]) -> Any:
    """Decorate a function that is always inlined: point functions, single steps."""
    _name_by_content(body)
    return njit(**OPTIONS, forceinline=True)(body)


def pasted(body: Callable[..., Any]) -> Any:
    """Decorate a function with loops that is pasted into its callers before anything is compiled.

    What is only `inlined` is optimised by itself first: its loops by what is known of its arguments
    alone (which may overlap), with vectors of the length that LLVM prefers.
    """
    _name_by_content(body)
    return njit(**OPTIONS, inline="always")(body)


def c_function(body: Callable[..., Any], name: str, signature: Any) -> Any:
    """Compile a function that C can call, through the cache; ``address`` is where it is."""
    body.__qualname__ = f"{name}."
    _name_by_content(body)
    types = (signature.args, signature.return_type)
    compiled: Any = _ccallback.CFunc(body, types, {}, OPTIONS)
    compiled._cache = DiskCache(name)
    with _COMPILING:
        compiled.compile()
    return compiled


class Kernel:
    """A compiled kernel ``kernel(job, first, last)``: process the tasks [first, last) of a job.

    ``job`` is the address of a record (each kernel's module defines its own). ``call`` runs on this
    thread and lets other Python threads run meanwhile; ``address`` is what the parallel driver of
    ``threads.py`` calls. All kernels having one signature, that driver is compiled once.
    """

    def __init__(self, body: Callable[..., Any], name: str) -> None:
        self.name = name
        compiled = c_function(body, name, KERNEL_SIGNATURE)
        self.address: int = compiled.address
        self.call: Callable[[int, int, int], None] = compiled.ctypes
        self._keep_alive = compiled

    def __repr__(self) -> str:
        return f"Kernel({self.name!r})"


def jit(name: str, signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for one signature, through the cache; it never compiles for another."""

    def compile_now(body: Callable[..., Any]) -> Any:
        _name_by_content(body)
        dispatcher = njit(**OPTIONS, **options)(body)
        dispatcher._cache = DiskCache(name)
        with _COMPILING:
            dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compile_now
