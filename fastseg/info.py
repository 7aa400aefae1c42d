"""What this installation consists of and can do: ``fastseg info`` and `fastseg.show_config`.

Everything is looked up so that its absence is an answer and not an error.
"""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

DISTRIBUTION = "fastseg-kernels"
CUPY_DISTRIBUTIONS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def collect() -> dict[str, Any]:
    """Return versions, CPU, threads, cache, GPU and conflicts, as JSON can hold them.

    Returns
    -------
    dict
        ``versions``, ``cpu``, ``threads``, ``cache``, ``gpu``: dictionaries; ``conflicts``: a list
        of sentences, empty if all is well. What could not be found out is None, or an ``error``.

    Examples
    --------
    >>> from fastseg.info import collect
    >>> sorted(collect())
    ['cache', 'conflicts', 'cpu', 'gpu', 'threads', 'versions']
    """
    return {
        "versions": _versions(),
        "cpu": _guarded(_cpu),
        "threads": _guarded(_threads),
        "cache": _guarded(_cache),
        "gpu": _guarded(_gpu),
        "conflicts": _conflicts(),
    }


def _guarded(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return an answer, or what kept it from being given: Numba may be absent or broken."""
    try:
        return ask()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _version(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _versions() -> dict[str, str | None]:
    from fastseg import __version__

    found = {name: _version(name) for name in ("numpy", "numba", "llvmlite", "torch")}
    return {
        "fastseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **found,
        "cupy": _version(*CUPY_DISTRIBUTIONS),
    }


def _cpu() -> dict[str, Any]:
    """Name the CPU as a person and as the compiler know it."""
    from fastseg_kernels.cpu import compile_target

    return {"model": _cpu_model(), **compile_target()}


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _threads() -> dict[str, Any]:
    from fastseg.dispatch import cpu

    return cpu().describe()


def _cache() -> dict[str, Any]:
    """Describe the directory of compiled kernels; no directory: the cache was turned off."""
    from fastseg_kernels.cpu import cache_directory

    directory = cache_directory()
    if directory is None:
        return {"directory": None, "writable": False, "files": 0, "bytes": 0}
    sizes = []
    if directory.is_dir():
        for path in directory.glob("*.bin"):
            try:
                sizes.append(path.stat().st_size)
            except OSError:  # another process replaced it
                continue
    return {
        "directory": str(directory),
        "writable": is_writable(directory),
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def is_writable(directory: Path) -> bool:
    """Tell whether files can be made in a directory, or the directory itself where it is absent.

    It is tried, with a file that has no name: what `os.access` tells root is not always true.
    """
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def _gpu() -> dict[str, Any]:
    """Say what of a GPU's software is there; neither CuPy nor a driver is started."""
    cupy, driver = _version(*CUPY_DISTRIBUTIONS), _driver_version()
    if driver is None:
        hint = "no NVIDIA driver was found"
    elif cupy is None:
        hint = "an NVIDIA driver was found, CuPy was not"
    else:
        hint = "an NVIDIA driver and CuPy were found"
    return {
        "cupy": cupy,
        "driver": driver,
        "hint": f"{hint}; this version computes on the CPU only, there is nothing to install",
    }


def _driver_version() -> str | None:
    """Return the newest CUDA version that the driver supports, as "13.0"."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value > 0:
            return f"{version.value // 1000}.{version.value % 1000 // 10}"
    return None


def _conflicts() -> list[str]:
    """Name other distributions that install a package called ``fastseg`` over this one."""
    try:
        owners = metadata.packages_distributions().get("fastseg", [])
    except Exception:  # a damaged record of some other distribution
        return []
    plain = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    return [
        f"the distribution {other} also installs a package named fastseg, and the two overwrite "
        f"each other's files: run pip uninstall {other}, then pip install --force-reinstall "
        f"--no-deps {DISTRIBUTION}"
        for other in sorted(plain - {DISTRIBUTION})
    ]
