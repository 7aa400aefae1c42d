"""No way of using threads or processes loses the process, hangs it or changes a bit.

Every scenario runs in an interpreter of its own: what is tested is how processes start, fork and
end. The digests that they compare with come from one thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastseg as fs
from fastseg_kernels.cpu import threads as cpu_threads

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120
"""Seconds for a scenario of about two: reached by a hang, and not by a loaded machine."""
LAYERS = ["omp", "workqueue"]

# fastseg and Numba are imported by the functions that need them: when is part of the scenarios.
SCENARIO = '''
import hashlib, json, os, signal, sys, time

SIZES = (20_011, 50_000, 100_003, 131_072)  # all above the size from which work is shared

def digest(size):
    import numpy as np
    import fastseg as fs
    rng = np.random.default_rng(size)
    logits = rng.normal(0.0, 2.5, (1, 1, size)).astype(np.float32)
    targets = rng.random(logits.shape) < 0.4
    value, grad = (fs.BCE() + fs.SoftJaccard()).value_and_grad(logits, targets)
    return hashlib.sha256(value.tobytes() + grad.tobytes()).hexdigest()

def check(*sizes):
    expected = json.loads(os.environ["EXPECTED_DIGESTS"])
    for size in sizes or SIZES:
        assert digest(size) == expected[str(size)], size

def way():
    import fastseg_kernels.cpu as backend
    return backend.describe()["way"]

def in_fork(*steps):
    """Run the steps in a forked child; fail as it fails."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)  # a child that hangs outlives its parent otherwise
            for step in steps:
                step()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
'''

# In a module of its own, so that Numba can cache it.
OTHER = """
import numba, numpy as np

@numba.njit(parallel=True, cache=True)
def total(a):
    s = 0.0
    for i in numba.prange(a.size):
        s += a[i]
    return s

def run():
    assert total(np.ones(100_000)) == 100_000.0
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads")
    (path / "scenario.py").write_text(SCENARIO)
    (path / "other.py").write_text(OTHER)
    return path


@pytest.fixture(scope="module")
def run(directory: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Return run(script, **environment): it must succeed; the layer is omp unless named."""
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, (directory, ROOT, ROOT / "kernels"))),
        "FASTSEG_CACHE_DIR": str(directory / "cache"),
        "NUMBA_CACHE_DIR": str(directory / "numba"),
        "FASTSEG_NUM_THREADS": "4",  # also on a machine with one CPU
        "NUMBA_THREADING_LAYER": "omp",
        "PYTHONFAULTHANDLER": "1",
    }

    def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr  # of a thread, which does not end the process
        return done

    serial = """
    import json, fastseg as fs
    from scenario import SIZES, digest
    fs.set_num_threads(1)
    print(json.dumps({size: digest(size) for size in SIZES}))
    """
    settings["EXPECTED_DIGESTS"] = run_script(serial).stdout
    yield run_script


# Many threads


@pytest.mark.parametrize("layer", LAYERS)
def test_python_threads_compute_at_once(run, layer):
    run(
        """
        import threading
        from scenario import SIZES, check
        failed, begin = [], threading.Barrier(8)

        def work(k):
            try:
                begin.wait()  # the first call of all of them starts the pool
                for i in range(25):
                    check(SIZES[(i + k) % len(SIZES)])
            except BaseException as error:
                failed.append(error)
                raise

        workers = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed
        """,
        NUMBA_THREADING_LAYER=layer,
    )


def test_each_layer_runs_as_documented(run):
    script = "from scenario import check, way; check(); print(way())"
    ways = {layer: run(script, NUMBA_THREADING_LAYER=layer).stdout.strip() for layer in LAYERS}
    assert ways == {"omp": "numba (omp)", "workqueue": "pool"}


def test_missing_threading_layer_leaves_the_pool(run):
    script = """
    import numba.np.ufunc.parallel as parallel
    def absent():
        raise ImportError("no TBB here")
    parallel._check_tbb_version_compatible = absent
    from scenario import check, way
    check()
    print(way())
    """
    assert run(script, NUMBA_THREADING_LAYER="tbb").stdout.strip() == "pool"


@pytest.mark.parametrize("way", [*LAYERS, "forced pool"])
def test_number_of_threads_does_not_change_a_bit(run, way):
    run(
        f"""
        import fastseg as fs
        from fastseg_kernels.cpu import threads
        from scenario import check
        if {way == "forced pool"}:
            threads._state.numba_allowed = False
        for count in (1, 2, 3, 5, 64):  # 64: more than tasks, and than Numba's threads
            fs.set_num_threads(count)
            check()
        """,
        NUMBA_THREADING_LAYER="workqueue" if way == "workqueue" else "omp",
        NUMBA_NUM_THREADS="2",
    )


# Forks


@pytest.mark.parametrize("layer", LAYERS)
def test_fork_after_use(run, layer):
    run(
        """
        from scenario import check, in_fork
        check()
        in_fork(check, lambda: in_fork(check))  # and a child of the child
        check()
        """,
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_fork_while_threads_compute(run, layer):
    run(
        """
        import threading
        from scenario import check, in_fork
        check()
        stop, failed = threading.Event(), []

        def work():
            try:
                while not stop.is_set():
                    check()
            except BaseException as error:
                failed.append(error)
                raise

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        try:
            for _ in range(5):
                in_fork(check)
        finally:
            stop.set()
        for worker in workers:
            worker.join()
        assert not failed
        """,
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_fork_pool_of_multiprocessing_after_use(run, layer):
    run(
        """
        import multiprocessing
        from scenario import SIZES, check
        check()
        with multiprocessing.get_context("fork").Pool(3) as pool:
            pool.map(check, SIZES * 3)
        check()
        """,
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_child_imports_first_after_other_parallel_code(run, layer):
    run(
        """
        import sys
        import other
        from scenario import check, in_fork
        other.run()
        assert "fastseg" not in sys.modules
        in_fork(check)
        """,
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("loaded", ["import fastseg", "import fastseg_kernels.cpu"])
def test_fork_after_import_and_other_parallel_code(run, layer, loaded):
    run(
        f"""
        {loaded}
        import other
        from scenario import check, in_fork
        other.run()
        in_fork(check)
        check()
        other.run()
        """,
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("loaded", ["pass", "import fastseg_kernels.cpu"])
def test_fork_after_another_library_used_the_same_openmp(run, loaded):
    """Without Numba in the parent nothing of Numba's tells the child; it would wait forever."""
    ctypes = pytest.importorskip("ctypes")
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("no libgomp here")
    run(
        f"""
        import ctypes
        {loaded}
        free = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel
        parallel(free, ctypes.c_void_p(), ctypes.c_uint(4), ctypes.c_uint(0))  # free(NULL), 4 times
        from scenario import check, in_fork
        in_fork(check)
        """
    )


def test_fork_while_another_thread_compiles(run, tmp_path):
    run(
        """
        import logging, threading
        import numpy as np
        import fastseg as fs
        from scenario import in_fork
        compiling = threading.Event()

        class Watch(logging.Handler):
            def emit(self, record):
                compiling.set()

        log = logging.getLogger("fastseg.compile")
        log.setLevel(logging.INFO)
        log.addHandler(Watch())

        def compute():
            assert fs.sigmoid(np.zeros(7, np.float32))[6] == 0.5

        worker = threading.Thread(target=compute)
        worker.start()
        assert compiling.wait(60)
        in_fork(compute)
        worker.join()
        """,
        FASTSEG_CACHE_DIR=str(tmp_path),
    )


# Pools in pools


@pytest.mark.parametrize("layer", LAYERS)
def test_inside_a_thread_pool(run, layer):
    run(
        """
        from concurrent.futures import ThreadPoolExecutor
        from scenario import SIZES, check

        def nested(size):
            with ThreadPoolExecutor(2) as inner:
                list(inner.map(check, SIZES))
            check(size)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(nested, SIZES * 2))
        """,
        NUMBA_THREADING_LAYER=layer,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_inside_a_process_pool_with_threads(run, directory, layer, method):
    """As joblib nests: processes, each of which has a pool of threads."""
    path = directory / f"nested_{layer}_{method}.py"
    path.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
            from scenario import SIZES, check

            def nested(size):
                with ThreadPoolExecutor(3) as inner:
                    list(inner.map(check, SIZES))
                return size

            def main():
                check()
                with ProcessPoolExecutor(2, multiprocessing.get_context("{method}")) as pool:
                    assert list(pool.map(nested, SIZES)) == list(SIZES)
                check()
            """
        )
    )
    run(f"import {path.stem}; {path.stem}.main()", NUMBA_THREADING_LAYER=layer)


def test_inside_nested_joblib(run):
    pytest.importorskip("joblib")
    run(
        """
        from joblib import Parallel, delayed
        from scenario import SIZES, check

        def outer():
            Parallel(2, prefer="threads")(delayed(check)(size) for size in SIZES)

        check()
        Parallel(2, backend="multiprocessing")(delayed(outer)() for _ in range(4))
        """
    )


# The end of a process


@pytest.mark.parametrize("layer", LAYERS)
def test_interpreter_ends_after_work(run, layer):
    run("from scenario import check; check()", NUMBA_THREADING_LAYER=layer)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("first", ["pass", "check()"])
def test_works_while_the_interpreter_ends(run, layer, first):
    """No thread can be started any more: what runs at exit is computed by the one that is left."""
    got = run(
        f"""
        import atexit
        from scenario import check

        def last():
            check()
            print("done")

        atexit.register(last)
        {first}
        """,
        NUMBA_THREADING_LAYER=layer,
    )
    assert got.stdout == "done\n"


@pytest.mark.parametrize("layer", LAYERS)
def test_daemon_thread_computes_while_the_main_thread_ends(run, layer):
    script = """
    import threading, time
    from scenario import check

    def work():
        while True:
            check()

    check()
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.1)
    """
    for _ in range(4):  # a race
        run(script, NUMBA_THREADING_LAYER=layer)


# The pool, by itself


class Recorder:
    """A kernel that notes which tasks were run."""

    def __init__(self, before: Callable[[int], None] = lambda first: None) -> None:
        self.before = before
        self.tasks: list[int] = []

    def call(self, job: int, first: int, last: int) -> None:
        self.before(first)
        self.tasks.extend(range(first, last))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, threads: None) -> Iterator[Any]:
    """Force the pool in this process and give it 4 threads."""
    state = cpu_threads._State(forked=True)
    monkeypatch.setattr(cpu_threads, "_state", state)
    fs.set_num_threads(4)
    yield state


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 100])
def test_pool_runs_each_task_once(pool, tasks):
    kernel = Recorder()
    cpu_threads.run(kernel, 0, tasks)
    assert sorted(kernel.tasks) == list(range(tasks))


def test_pool_does_without_threads_that_cannot_start(pool, monkeypatch):
    import _thread

    def refuse(*call: object) -> None:
        raise RuntimeError("can't start new thread")

    kernel = Recorder()
    with monkeypatch.context() as context:
        context.setattr(_thread, "start_new_thread", refuse)
        cpu_threads.run(kernel, 0, 8)
    assert sorted(kernel.tasks) == list(range(8))
    later = Recorder()
    cpu_threads.run(later, 0, 8)  # now with threads, which must not find anything of the first
    assert sorted(later.tasks) == sorted(kernel.tasks) == list(range(8))


def test_pool_makes_one_thread_less_than_there_are_parts(pool, monkeypatch):
    """The caller's own is the other; more callers at once do not need more."""
    import _thread

    started, start = [], _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *a: (started.append(a), start(*a)))
    for _ in range(200):
        cpu_threads.run(Recorder(), 0, 8)
    assert len(started) == 3


@pytest.mark.parametrize("interrupts", [1, 2])
def test_pool_leaves_nothing_running_after_an_interrupt(pool, interrupts):
    """Ctrl-C frees the arrays: a thread that still wrote to them would crash the process."""
    import _thread
    import threading

    main, begun, ended = threading.get_ident(), threading.Semaphore(0), threading.Event()

    def before(first: int) -> None:
        if threading.get_ident() == main:
            begun.acquire(timeout=TIMEOUT)
            raise KeyboardInterrupt
        begun.release()
        ended.wait(0.3)
        if interrupts == 2:
            _thread.interrupt_main()  # while the main thread waits for this one
            ended.wait(0.3)

    kernel = Recorder(before)
    with pytest.raises(KeyboardInterrupt):
        cpu_threads.run(kernel, 0, 4)
    at_return = list(kernel.tasks)
    ended.wait(1.0)
    assert at_return == kernel.tasks
    assert at_return


def test_pool_does_not_wait_for_a_part_that_an_interrupt_kept_from_beginning(pool):
    """The exception may come when this thread has claimed a part and not yet begun it."""
    import _thread

    ours, gate = object(), _thread.allocate_lock()
    gate.acquire()
    cpu_threads._wait_for_others({0: ours}, ours, [False], [gate])  # returns


def test_pool_survives_ctrl_c_at_any_time(run):
    """Twice, at random times, while threads wait for each other: it ends, and it says so."""
    script = """
    import faulthandler, random, signal, time
    from fastseg_kernels.cpu import threads

    faulthandler.dump_traceback_later(60, exit=True)
    state, left = threads._State(forked=True), [0]

    class Kernel:
        def call(self, job, first, last):
            time.sleep(0.0003 * first)

    def interrupt(*signal):
        if left[0] > 0:
            left[0] -= 1
            raise KeyboardInterrupt

    def trial():
        left[0] = 2
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + random.random() * 6e-4, 3e-5)
            while left[0] == 2:
                threads._run_in_pool(state, Kernel(), 0, [0, 1, 2], None)
        finally:
            left[0] = 0

    random.seed(0)
    signal.signal(signal.SIGALRM, interrupt)
    for _ in range(400):
        try:
            trial()
        except KeyboardInterrupt:  # both were raised, or trial() has taken the second back
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    print("survived")
    """
    run(script)


# Numbers of threads


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_set_num_threads_is_what_get_num_threads_returns(threads, count):
    fs.set_num_threads(count)
    assert fs.get_num_threads() == count
    fs.set_num_threads(None)
    assert fs.get_num_threads() == cpu_threads.default_num_threads()


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2"])
def test_set_num_threads_refuses_what_is_no_count(threads, count):
    before = fs.get_num_threads()
    with pytest.raises(ValueError, match=r"^count must be a positive integer or None, got "):
        fs.set_num_threads(count)
    assert fs.get_num_threads() == before


@pytest.mark.parametrize(
    ("own", "openmp", "expected"),
    [
        (None, None, 6),
        ("3", None, 3),
        ("12", None, 12),  # more than there are: as asked
        (None, "2", 2),
        (None, "12", 6),  # a limit
        (None, "2,4", 2),  # by level of nesting
        ("5", "2", 5),
        ("0", None, 6),
        ("-1", "3", 3),
        ("many", None, 6),
        ("", "", 6),
    ],
)
def test_default_number_of_threads(monkeypatch, own, openmp, expected):
    monkeypatch.setattr(cpu_threads, "available_threads", lambda: 6)
    for name, value in (("FASTSEG_NUM_THREADS", own), ("OMP_NUM_THREADS", openmp)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cpu_threads.default_num_threads() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "300000 50000 burst"}, 6),
        ({"cpu.max": "\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "150000\n"}, None),
        ({}, None),
    ],
)
def test_quota_of_a_control_group(monkeypatch, files, expected):
    def read_text(self: Path) -> str:
        try:
            return files[str(self.relative_to("/sys/fs/cgroup"))]
        except KeyError:
            raise FileNotFoundError(self) from None

    monkeypatch.setattr(Path, "read_text", read_text)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert cpu_threads._cgroup_quota() == expected
    assert cpu_threads.available_threads() == min(4, expected or 4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_limits_the_default(run):
    script = """
    import os, fastseg as fs, fastseg_kernels.cpu as backend
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from scenario import check
    check()
    print(backend.describe()["available"], fs.get_num_threads())
    """
    got = run(script, FASTSEG_NUM_THREADS="", OMP_NUM_THREADS="")
    assert got.stdout.split() == ["1", "1"]


def test_environment_sets_the_number_of_threads(run):
    script = "import fastseg as fs; print(fs.get_num_threads())"
    assert run(script, FASTSEG_NUM_THREADS="7", OMP_NUM_THREADS="1").stdout == "7\n"
    assert run(script, FASTSEG_NUM_THREADS="", OMP_NUM_THREADS="1").stdout == "1\n"


def test_small_work_stays_on_one_thread(pool):
    assert fs.sigmoid(np.zeros(100, np.float32))[99] == 0.5
    assert pool.pool._threads == 0
    assert fs.sigmoid(np.zeros(100_000, np.float32))[99_999] == 0.5
    assert pool.pool._threads == 3


@pytest.mark.parametrize("loss", [fs.LovaszSoftmax(bins=1024), fs.LovaszHinge()])
def test_memory_of_each_part_is_for_the_parts_that_run(loss, monkeypatch):
    """Another thread may change the number between the two: larger, it would overrun the memory."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 40_000)).astype(np.float32)
    targets = rng.integers(0, 2, (2, 40_000) if loss.activation == "softmax" else logits.shape)
    expected = loss(logits, targets)
    asked = []

    def falling() -> int:  # which overruns nothing, whoever asks twice
        asked.append(len(asked))
        return max(2, 9 - len(asked))

    monkeypatch.setattr(cpu_threads, "get_num_threads", falling)
    run, parts = cpu_threads.run, []

    def spied(kernel, job, tasks, share=True, memory=None, number=None):
        parts.append((number, len(asked)))
        before = len(asked)
        run(kernel, job, tasks, share, memory, number)
        assert number is None or len(asked) == before, "asked again"

    monkeypatch.setattr(cpu_threads, "run", spied)
    assert loss(logits, targets) == expected
    assert any(number is not None and number > 1 for number, _ in parts)
