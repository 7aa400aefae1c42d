"""What this installation consists of and can do: ``fastseg info`` and `fastseg.show_config`.

Everything is looked up so that its absence is an answer and not an error.
"""

from __future__ import annotations

import importlib.metadata as metadata
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastseg_kernels.cuda import installation

DISTRIBUTION = "fastseg-kernels"


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


def installed_version(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _versions() -> dict[str, str | None]:
    from fastseg import __version__

    found = {name: installed_version(name) for name in ("numpy", "numba", "llvmlite", "torch")}
    return {
        "fastseg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **found,
        "cupy": installed_version(*installation.CUPY_DISTRIBUTIONS),
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
    """Say what of a GPU's software is there, and what to do about what is not.

    CuPy is imported only where both it and a driver are there.
    """
    driver, cupy = installation.driver_version(), installation.installed_cupy()
    found: dict[str, Any] = {
        "driver_cuda": driver,
        "cupy": None if cupy is None else " ".join(cupy),
        "devices": [],
        "hint": "computes on the CPU: no NVIDIA driver was found, and there is nothing to install",
    }
    if driver is None:
        return found
    if float(driver) < min(installation.CUDA_MAJORS):
        found["hint"] = (
            f"the NVIDIA driver supports CUDA {driver} only: update it to one for CUDA "
            f"{min(installation.CUDA_MAJORS)} or newer"
        )
        return found
    if cupy is None:
        found["hint"] = f"for the GPU: {installation.extra()}"
        return found
    try:
        with installation.explained():
            module = installation.cupy_module()
            runtime = module.cuda.runtime
            for index in range(runtime.getDeviceCount()):
                properties = runtime.getDeviceProperties(index)
                name = properties["name"].decode()
                capability = f"{properties['major']}.{properties['minor']}"
                found["devices"].append(f"{name}, compute capability {capability}")
            nvrtc = module.cuda.nvrtc.getVersion()
    except Exception as error:
        found["hint"] = str(error).partition("\n")[0]
        return found
    found["nvrtc"] = ".".join(map(str, nvrtc))
    if nvrtc[0] > float(driver):
        found["hint"] = (
            f"CuPy compiles by NVRTC {found['nvrtc']}, and the driver supports CUDA {driver}: pip "
            "uninstall nvidia-cuda-nvrtc, or update the driver"
        )
        return found
    found["hint"] = "arrays of CuPy and CUDA tensors are computed on their GPU"
    return found


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
