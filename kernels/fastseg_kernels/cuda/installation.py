"""CuPy and what it needs, and one line that says what to do for each part that is missing."""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

CUDA_MAJORS = (12, 13)
"""CUDA versions that there is an extra for."""
CUPY_DISTRIBUTIONS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


class InstallationError(RuntimeError):
    """The CUDA backend cannot run: the message says what to install."""


def wanted_major() -> int | None:
    """Return the CUDA major version of PyTorch's build, if there is a CuPy for it here."""
    version = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
    major = int(version.partition(".")[0]) if version else None
    return major if major in CUDA_MAJORS else None


def installed_major() -> int | None:
    """Return the CUDA major version of the CuPy that is installed, if its name says so."""
    named = installed_cupy()
    major = named[0][-3:-1] if named and named[0].endswith("x") else ""
    return int(major) if major.isdigit() and int(major) in CUDA_MAJORS else None


def installed_cupy() -> tuple[str, str] | None:
    """Return distribution and version of the CuPy that is installed."""
    for name in CUPY_DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def driver_version() -> str | None:
    """Return the newest CUDA version that the driver supports, as "13.0"; None: no driver."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value > 0:
            return f"{version.value // 1000}.{version.value % 1000 // 10}"
    return None


def extra(major: int | None = None) -> str:
    """Return the command that installs CuPy with the CUDA libraries that it needs.

    ``major`` is the CUDA version that is wanted; by default the newest that the driver supports,
    and the oldest where that is not known.
    """
    if major is None:
        newest = float(driver_version() or 0.0)
        major = max((m for m in CUDA_MAJORS if m <= newest), default=CUDA_MAJORS[0])
    return f"pip install 'cupy-cuda{major}x[ctk]>=14.2'"


@cache
def cupy_module() -> Any:
    """Import CuPy; an InstallationError says what to do if that fails."""
    try:
        import cupy
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise InstallationError(
                f"CuPy, which launches the CUDA kernels, is not installed: {extra(wanted_major())}"
            ) from None
        line = str(error).strip().partition("\n")[0]
        raise InstallationError(
            f"CuPy cannot be imported ({line}): keep one of its distributions and reinstall it, "
            f"{extra(installed_major() or wanted_major())} --force-reinstall"
        ) from error
    return cupy


def advice(error: BaseException) -> str | None:
    """Return one line on what to do about an error of CuPy or PyTorch; None: it is no such one."""
    kind, message = type(error).__name__, str(error).partition("\n")[0]
    named = installed_cupy()
    name = named[0] if named else "CuPy"
    if kind == "OutOfMemoryError":
        return (
            f"the device has no memory left ({message}): pass out= (it may be the logits), or "
            "smaller parts of the volume to statistics and gradient"
        )
    if kind == "CUDARuntimeError" and "InsufficientDriver" in message:
        return (
            f"the NVIDIA driver is missing or older than the CUDA of {name} needs: update the "
            "driver, or install the CuPy of an older CUDA (`fastseg info` shows both versions)"
        )
    if kind == "CUDARuntimeError" and "NoDevice" in message:
        return "no NVIDIA GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if kind == "CUDADriverError" and "NO_BINARY_FOR_GPU" in message:
        return (
            f"{name} cannot compile for this GPU: install the CuPy of a newer CUDA in its place, "
            f"pip uninstall {name}, then {extra()}"
        )
    if "UNSUPPORTED_PTX_VERSION" in message or "INVALID_IMAGE" in message:
        return (
            "the driver is older than the NVRTC that CuPy found: update the driver, or pip "
            "uninstall the NVRTC that is newer (`fastseg info` shows both versions)"
        )
    if kind == "DynamicLibNotFoundError" or (
        isinstance(error, ImportError | OSError | RuntimeError) and "nvrtc" in message.lower()
    ):
        command = extra(installed_major())
        return f"NVRTC, which compiles the CUDA kernels, was not found: {command}"
    if kind == "CompileException" and "cannot open source file" in str(error):
        return f"the CUDA headers were not found: {extra(installed_major())}, or set CUDA_PATH"
    return None


def raise_explained(error: Exception) -> NoReturn:
    """Raise an error of an incomplete installation as one line, of which it is the cause.

    Errors of memory keep their class, which callers may catch, and get the line as a note.
    """
    line = advice(error)
    if line is None:
        raise error
    if type(error).__name__ == "OutOfMemoryError":
        error.add_note(f"fastseg: {line}")
        raise error
    raise InstallationError(line) from error


@contextmanager
def explained() -> Iterator[None]:
    """Pass what is raised through `raise_explained`."""
    try:
        yield
    except Exception as error:
        raise_explained(error)
