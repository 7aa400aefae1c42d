"""Which threads run a kernel, and why no process dies of it.

A kernel is a list of independent tasks; every task is computed by one thread and its result does
not depend on which, so all four ways below give the same bits.

serial
    1 us a call. One thread, one task, or too little work to share.
numba
    2 us (OpenMP). Where Numba's pool is thread safe and was started by us, after the last fork.
pool
    10 us, threads of Python's own. Otherwise: Numba's "workqueue" layer aborts the process when two
    Python threads use it; its OpenMP layer terminates a forked child, or lets it wait forever if
    anyone used that OpenMP before the fork.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from numba import prange, types
from numba.np.ufunc import parallel

from fastseg_kernels.cpu.compiled import Kernel, jit
from fastseg_kernels.cpu.intrinsics import call_kernel

numba_parallel: Any = parallel  # private parts of it are used, none without a fallback
SHARED_FROM = 16384
"""Voxels from which a second thread pays for itself: 5 us of work, against 2 us to wake it."""
THREAD_SAFE_LAYERS = ("omp", "tbb")
LONGEST_WAIT = 0.05
"""Seconds until a waiting thread looks anew whether it must: a wake-up may be lost to Ctrl-C."""


class _Pool:
    """Threads that run what they are given, and wait for more.

    It is made of C's primitives alone. Ctrl-C can come between any two steps of Python code, and
    `concurrent.futures` is such code: left half way through a submission, its locks stay locked.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._threads = 0

    def submit(self, call: Callable[[], None], threads: int) -> None:
        """Have one of up to ``threads`` threads run ``call``; RuntimeError if none can be had."""
        if self._threads < threads:
            _thread.start_new_thread(self._run, ())
            self._threads += 1
        self._work.put(call)

    def _run(self) -> None:
        while True:
            self._work.get()()


class _State:
    """What this process knows of its threads; made anew in a forked child."""

    def __init__(self, forked: bool) -> None:
        self.lock = threading.Lock()
        self.pool = _Pool()
        # If Numba's pool runs already, someone else started it, maybe in a parent of this process,
        # which Numba answers with SIGTERM: it is not used then. Nor is it in any forked child: if
        # another library used the same libgomp in the parent, the first parallel loop here would
        # wait for threads that only the parent has.
        self.numba_allowed = not forked and not getattr(numba_parallel, "_is_initialized", True)
        self.numba_ready = False


_FORKED_WITHOUT_EXEC = 0x40
"""PF_FORKNOEXEC of Linux's process flags, field 9 of /proc/self/stat (field 2 may hold spaces)."""


def _is_forked() -> bool:
    """Tell whether this process is a fork that has not run exec; False where nobody knows."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return bool(int(fields[6]) & _FORKED_WITHOUT_EXEC)
    except (OSError, ValueError, IndexError):
        return False


_state = _State(_is_forked())
_num_threads: int | None = None
_is_chosen = False
_limits = threading.local()


def _after_fork() -> None:
    global _state
    _state = _State(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available_threads() -> int:
    """Count the CPUs that this process may use: its affinity and its cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(count, quota) if quota else count)


def _cgroup_quota() -> int | None:
    """Return the CPUs' worth of time that a Linux cgroup grants, rounded up; None without limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit():  # "max", or -1
        return None
    return -(-int(quota) // int(period))


def _chosen_threads() -> int | None:
    chosen = os.environ.get("FASTSEG_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else None


def default_num_threads() -> int:
    """Return ``FASTSEG_NUM_THREADS``, else the available CPUs but no more than OMP_NUM_THREADS."""
    chosen = _chosen_threads()
    if chosen is not None:
        return chosen
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    count = available_threads()
    return min(count, int(limit)) if limit.isdigit() and int(limit) > 0 else count


def get_num_threads() -> int:
    """Return how many threads a kernel may use."""
    global _num_threads
    if _num_threads is None:
        _num_threads = default_num_threads()
    limit: int | None = getattr(_limits, "count", None)
    return _num_threads if limit is None else min(limit, _num_threads)


@contextlib.contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Let calls of this Python thread use no more threads than ``count``."""
    before = getattr(_limits, "count", None)
    _limits.count = count
    try:
        yield
    finally:
        _limits.count = before


def set_num_threads(count: int | None) -> None:
    """Set how many threads a kernel may use; None returns to the default."""
    global _num_threads, _is_chosen
    _num_threads, _is_chosen = count, count is not None


def are_threads_chosen() -> bool:
    """Tell whether a number of threads was set, or is in ``FASTSEG_NUM_THREADS``."""
    return _is_chosen or _chosen_threads() is not None


@cache
def _driver() -> Any:
    @jit("driver", types.void(*[types.int64] * 4), parallel=True, nogil=True)
    def drive(address, job, tasks, parts):  # type: ignore[no-untyped-def]
        for part in prange(parts):
            call_kernel(address, job, part * tasks // parts, (part + 1) * tasks // parts)

    return drive


def _start_numba(state: _State) -> None:
    """Start Numba's pool once, and keep it only if Python threads may share it."""
    with state.lock:
        if state.numba_ready or not state.numba_allowed:
            return
        try:
            numba_parallel._launch_threads()
        except ValueError:  # NUMBA_THREADING_LAYER names one that is not installed
            state.numba_allowed = False
            return
        if numba_parallel.threading_layer() in THREAD_SAFE_LAYERS:
            _driver()
            state.numba_ready = True
        else:
            state.numba_allowed = False


def _run_in_pool(
    state: _State, kernel: Kernel, job: int, bounds: list[int], memory: object
) -> None:
    """Run the parts between ``bounds``, each on the thread that comes first, this one or another.

    On return no other thread touches the job's memory, even if Ctrl-C ends the wait for the kernel.
    """
    parts = len(bounds) - 1
    owners: dict[int, object] = {}
    done = [False] * parts
    # Raw locks, not events: those are made of Python code, which Ctrl-C can leave half way, locked.
    gates = [_thread.allocate_lock() for _ in range(parts)]
    for gate in gates:
        gate.acquire()
    ours = object()  # not the thread's identity: a new thread may get that of one that ended

    def work(part: int, claim: object, memory: object = memory) -> None:
        # `memory` lives as long as this does, also if Ctrl-C ends the caller's wait.
        if owners.setdefault(part, claim) is claim:  # one atomic step: nobody else begins it
            try:
                kernel.call(job, bounds[part], bounds[part + 1])
            finally:
                done[part] = True
                gates[part].release()

    try:
        # No more threads to be had, or the interpreter is ending: this one does the rest.
        with contextlib.suppress(RuntimeError):
            for part in range(1, 0 if sys.is_finalizing() else parts):
                state.pool.submit(partial(work, part, object()), parts - 1)
        for part in range(parts):
            work(part, ours)
    finally:
        _wait_for_others(owners, ours, done, gates)


def _wait_for_others(
    owners: dict[int, object], ours: object, done: list[bool], gates: list[Any]
) -> None:
    """Wait for the parts that other threads began, and claim the rest so that nobody begins them.

    A second Ctrl-C does not end the wait, it is raised after it. Only this thread gets Ctrl-C, so
    what the others began they finish. (One that comes in the instant before the wait still ends it:
    the others hold the job's memory then.)
    """
    interrupt: BaseException | None = None
    part, parts = 0, len(done)
    while True:
        try:
            while part < parts:
                if owners.setdefault(part, ours) is not ours:
                    while not done[part]:
                        gates[part].acquire(timeout=LONGEST_WAIT)
                part += 1
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def describe() -> dict[str, Any]:
    """Return the number of threads and the way in which kernels run now."""
    state = _state
    if state.numba_allowed and not state.numba_ready:
        _start_numba(state)
    way = f"numba ({numba_parallel.threading_layer()})" if state.numba_ready else "pool"
    return {"threads": get_num_threads(), "available": available_threads(), "way": way}


def parts_of(tasks: int, share: bool) -> int:
    """Return how many calls of a kernel `run` makes, each for a part of the tasks.

    Who gives each call memory of its own passes the number on: another thread may change it.
    """
    return max(1, min(get_num_threads(), tasks)) if share else 1


def run(
    kernel: Kernel,
    job: int,
    tasks: int,
    share: bool = True,
    memory: object = None,
    parts: int | None = None,
) -> None:
    """Run ``kernel`` on ``tasks`` tasks of the job at address ``job``; return when all are done.

    ``share=False`` keeps work that is too small to be worth a second thread on this one.
    ``memory`` is what owns the job and all that it points to; other threads hold it meanwhile.
    ``parts``: what `parts_of` said, if that matters.
    """
    parts = parts_of(tasks, share) if parts is None else parts
    if parts == 1:
        kernel.call(job, 0, tasks)
        return
    state = _state
    if state.numba_allowed and not state.numba_ready:
        _start_numba(state)
    if state.numba_ready:
        _driver()(kernel.address, job, tasks, parts)
        return
    bounds = [part * tasks // parts for part in range(parts + 1)]
    _run_in_pool(state, kernel, job, bounds, memory)
