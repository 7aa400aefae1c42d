"""Threads, and what this installation can do."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from fastseg.dispatch import cpu


def set_num_threads(count: int | None) -> None:
    """Set how many threads a call may use; None returns to the default.

    The default is ``FASTSEG_NUM_THREADS``, else the CPUs that the process may use (its affinity
    and its cgroup's quota), but no more than ``OMP_NUM_THREADS``. Results do not depend on it.

    Raises
    ------
    ValueError
        If ``count`` is not a positive integer.

    Examples
    --------
    >>> import fastseg as fs
    >>> fs.set_num_threads(1)
    >>> fs.get_num_threads()
    1
    >>> fs.set_num_threads(None)
    """
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"count must be a positive integer or None, got {count!r}")
        count = int(count)
    cpu().set_num_threads(count)


def get_num_threads() -> int:
    """Return how many threads a call may use.

    Examples
    --------
    >>> import fastseg as fs
    >>> fs.get_num_threads() >= 1
    True
    """
    return cpu().get_num_threads()


def show_config() -> dict[str, Any]:
    """Return (not print) what `fastseg info` shows: versions, CPU, threads, caches, GPU state.

    Examples
    --------
    >>> import fastseg as fs
    >>> sorted(fs.show_config())
    ['cache', 'conflicts', 'cpu', 'gpu', 'threads', 'versions']
    """
    from fastseg.info import collect

    return collect()
