"""What the launchers need of CuPy: compiled modules, memory, the number of multiprocessors.

CuPy is imported when the first kernel is asked for. Tests put a stand-in in its place that runs the
same CUDA text on the CPU (`use`).
"""

from __future__ import annotations

from typing import Any, Protocol


class Runtime(Protocol):
    """A device, as far as a launcher knows it."""

    def module(self, code: str, options: tuple[str, ...], names: tuple[str, ...]) -> Any:
        """Return a module of kernels, as `cupy.RawModule`."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a new array of the device."""

    def array(self, values: Any) -> Any:
        """Return a C-contiguous array of the device with the same values; as it is if it is one."""

    def address(self, array: Any) -> int:
        """Return where an array of the device lies."""

    def multiprocessors(self) -> int:
        """Return how many thread blocks run at least at once."""


class CuPy:
    """The current device of CuPy."""

    def __init__(self) -> None:
        import cupy

        self._cupy: Any = cupy

    def module(self, code: str, options: tuple[str, ...], names: tuple[str, ...]) -> Any:
        """Compile by NVRTC when a kernel is first got."""
        return self._cupy.RawModule(code=code, options=options, name_expressions=names)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Take memory from CuPy's pool."""
        return self._cupy.empty(shape, dtype)

    def array(self, values: Any) -> Any:
        """Copy to the device, on the current stream."""
        return self._cupy.ascontiguousarray(self._cupy.asarray(values))

    def address(self, array: Any) -> int:
        """Return the device pointer."""
        return int(array.data.ptr)

    def multiprocessors(self) -> int:
        """Ask CuPy, which remembers."""
        return int(self._cupy.cuda.Device().attributes["MultiProcessorCount"])


_runtime: Runtime | None = None


def runtime() -> Runtime:
    """Return the runtime in use: CuPy unless `use` said otherwise."""
    global _runtime
    if _runtime is None:
        _runtime = CuPy()
    return _runtime


def use(other: Runtime | None) -> None:
    """Put ``other`` in CuPy's place; None: CuPy again."""
    global _runtime
    _runtime = other


def blocks_for(tasks: int, per_multiprocessor: int = 8) -> int:
    """Return the grid for a number of tasks that thread blocks take in turns."""
    return max(1, min(tasks, per_multiprocessor * runtime().multiprocessors()))
