"""Threads for tasks that run at once: each has its share."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from fastseg.dispatch import cpu

_running = 0  # tasks in this process, now
_lock = threading.Lock()


@contextlib.contextmanager
def share_of_threads() -> Iterator[None]:
    """Leave to each of the tasks that run in this process its share of the threads."""
    global _running
    threads = _threads_of_process()
    with _lock:
        _running += 1
        share = max(1, threads // _running)
    try:
        with cpu().limit_threads(share):
            yield
    finally:
        with _lock:
            _running -= 1


def _threads_of_process() -> int:
    """Return how many threads the tasks of this process, or of this worker in it, may use."""
    count = cpu().get_num_threads()
    distributed = sys.modules.get("distributed")
    if distributed is None or cpu().are_threads_chosen():
        return count
    try:
        return min(count, int(distributed.get_worker().state.nthreads))
    except (AttributeError, ValueError):  # half imported yet; or this is no worker's task
        return count


def _after_fork() -> None:
    """Forget the tasks of the parent, and whoever held the lock."""
    global _running, _lock
    _running, _lock = 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
