"""The cache on disk saves compilation and can do nothing else: no stale, broken or mixed results.

Every run is an interpreter of its own, as users meet the cache. Most compile two small kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastseg_kernels.cpu import compiled

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120
PACKAGES = {"fastseg": ROOT / "fastseg", "fastseg_kernels": ROOT / "kernels" / "fastseg_kernels"}
BACKEND_SOURCES = sorted(
    str(path.relative_to(PACKAGES["fastseg_kernels"]))
    for pattern in ("*.py", "cpu/*.py")
    for path in PACKAGES["fastseg_kernels"].glob(pattern)
)

PREPARE = """
import json, logging, sys, warnings
warnings.simplefilter("error")
messages = []

class Keep(logging.Handler):
    def emit(self, record):
        messages.append(f"{record.levelname}: {record.getMessage()}")

log = logging.getLogger("fastseg.compile")
log.setLevel(logging.INFO)
log.addHandler(Keep())
log.propagate = False
import numpy as np
import fastseg as fs
"""
X, Y = "np.linspace(-3, 3, 50, dtype=np.float32)[None, None]", "np.arange(50)[None, None] < 20"
BCE = f"result = fs.BCE().statistics({X}, {Y}).array[0, 0].tolist()"
BCE64 = BCE.replace("float32", "float64")
OVERLAP = BCE.replace("BCE", "SoftJaccard")
LOSS = f"value, grad = fs.BCE().value_and_grad({X}, {Y}); result = [float(value), grad.tolist()]"
KERNEL = "sums-float32-binary-sigmoid-bce"
KERNELS = [KERNEL, "statistics-float32-binary"]


class Run(NamedTuple):
    """What a process computed, and what the logger said meanwhile."""

    result: Any
    messages: list[str]

    @property
    def compiled(self) -> list[str]:
        return [text.split()[-1] for text in self.messages if text.startswith("INFO: compiling ")]


def run(script: str, cache: Path | str, source: Path | None = None, **environment: str) -> Run:
    """Run ``script``, which sets ``result``, with a cache directory and a copy of the sources."""
    roots = (ROOT, ROOT / "kernels") if source is None else (source,)
    ending = "print(json.dumps([result, messages, fs.__file__]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join((PREPARE, textwrap.dedent(script), ending))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            "FASTSEG_CACHE_DIR": str(cache),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result, messages, file = json.loads(done.stdout)
    assert Path(file).is_relative_to(roots[0])
    return Run(result, messages)


def check(got: Run) -> None:
    x, y = np.linspace(-3, 3, 50), np.arange(50) < 20
    voxels, counted, invalid, foreground, bce = got.result
    assert (voxels, counted, invalid, foreground) == (50, 50, 0, 20)
    np.testing.assert_allclose(bce, np.logaddexp(0, np.where(y, -x, x)).sum(), rtol=1e-6)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Fill a directory with the kernels that BCE runs; return it and the run that did."""
    cache = tmp_path_factory.mktemp("cache") / "made" / "by the first run"
    return cache, run(BCE, cache)


@pytest.fixture
def copied(warm: tuple[Path, Run], tmp_path: Path) -> Path:
    """Return a copy of the warm directory, for tests that spoil it."""
    return Path(shutil.copytree(warm[0], tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with copies of both packages."""
    for name, package in PACKAGES.items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, tmp_path / "source" / name, ignore=ignored)
    return tmp_path / "source"


# Nothing is compiled twice


def test_second_process_compiles_nothing(warm):
    cache, first = warm
    check(first)
    assert first.compiled == KERNELS
    second = run(BCE, cache)
    assert second == Run(first.result, [])


def test_second_process_compiles_nothing_of_a_loss(tmp_path):
    first = run(LOSS, tmp_path)
    assert len(first.compiled) == 7  # two of either pass, a term, the evaluation, what calls all
    assert run(LOSS, tmp_path) == Run(first.result, [])


def test_second_process_imports_little_of_numba(warm):
    """What compilation needs of it takes longer to import than all the rest of a first call."""
    asked = "; result = [name in sys.modules for name in ('numba', 'numba.np.linalg')]"
    assert run(BCE + asked, warm[0]).result == [True, False]


def test_cache_is_private_to_its_user(warm):
    cache, _ = warm
    assert cache.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in cache.iterdir())


# Nothing stale or mixed is run


@pytest.mark.parametrize(
    ("file", "old", "new", "script"),
    [
        ("cpu/elementary.py", "T(1 / math.log(2))", "T(1.1 / math.log(2))", BCE),
        ("cpu/points.py", "missed = wrong if", "missed = T(3) * wrong if", OVERLAP),
    ],
)
def test_edited_source_is_recompiled(source, tmp_path, file, old, new, script):
    cache = tmp_path / "cache"
    before = run(script, cache, source)
    edited = source / "fastseg_kernels" / file
    text = edited.read_text()
    assert text.count(old) == 1
    edited.write_text(text.replace(old, new))
    after = run(script, cache, source)
    assert after.compiled
    assert after.result != before.result
    edited.write_text(text)
    assert run(script, cache, source) == Run(before.result, [])  # and the old files still serve


def test_source_edited_under_a_running_process_is_not_taken_for_its_own(source, tmp_path):
    """The process compiles what it imported, and must not file it under what is there now."""
    cache, edited = tmp_path / "cache", source / "fastseg_kernels/cpu/points.py"
    text = edited.read_text()
    assert text.count("missed = wrong if") == 1
    meanwhile = f"""
import fastseg_kernels.cpu
from pathlib import Path
path = Path({str(edited)!r})
path.write_text(path.read_text().replace("missed = wrong if", "missed = T(3) * wrong if"))
"""
    before = run(meanwhile + OVERLAP, cache, source)
    after = run(OVERLAP, cache, source)
    assert after.compiled
    assert after.result != before.result


@pytest.mark.parametrize("file", BACKEND_SOURCES)
def test_every_source_of_the_backend_is_in_the_key(source, monkeypatch, file):
    digest = compiled._digest_sources
    monkeypatch.setattr(compiled, "__file__", str(source / "fastseg_kernels/cpu/compiled.py"))
    before = digest()
    path = source / "fastseg_kernels" / file
    path.write_text(path.read_text() + "\n")
    assert digest() != before


@pytest.mark.parametrize(
    ("first", "second"), [(BCE, BCE64), (BCE, OVERLAP)], ids=["dtype", "families"]
)
def test_kernels_of_different_processes_do_not_mix(tmp_path, first, second):
    """Closures of one factory have one name: linked together, one would run the other's code."""
    expected = [run(script, tmp_path).result for script in (first, second)]
    both = f"{first}\nresults = [result]\n{second}\nresult = [*results, result]"
    assert run(both, tmp_path) == Run(expected, [])


@pytest.mark.parametrize("other", [np.float64(2), np.float32(3), 2, (np.float32(2),), float])
def test_closures_are_named_by_what_they_close_over(other):
    def name(constant: Any) -> str:
        def body(x: Any) -> Any:
            return x, constant

        return str(compiled.function(body).py_func.__qualname__)

    assert name(np.float32(2)) == name(np.float32(2))
    assert name(np.float32(2)) != name(other)


def test_closures_over_what_has_no_digest_are_refused():
    values = [1, 2]

    def body() -> Any:
        return values

    with pytest.raises(TypeError, match="which has no digest"):
        compiled.function(body)


# Nothing depends on the directory


@pytest.mark.parametrize("below", ["/dev/null/cache", "file"])
def test_directory_that_cannot_be_made_only_costs_compilation(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    got = run(BCE, tmp_path / below)
    check(got)
    assert got.compiled == KERNELS
    assert all(text.startswith("INFO: ") for text in got.messages)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() == 0, reason="permissions do not bind this user"
)
def test_read_only_directory_only_costs_compilation(copied):
    for path in copied.iterdir():
        path.unlink()
    copied.chmod(0o500)
    got = run(BCE, copied)
    copied.chmod(0o700)
    check(got)
    assert got.compiled == KERNELS
    assert all(text.startswith("INFO: ") for text in got.messages)


def test_empty_name_turns_the_cache_off(tmp_path):
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    got = run(BCE, "", **home)
    check(got)
    assert got.messages == [f"INFO: compiling {kernel}" for kernel in KERNELS]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTSEG_CACHE_DIR": "/chosen", "XDG_CACHE_HOME": "/xdg"}, Path("/chosen")),
        ({"FASTSEG_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg"}, None),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/fastseg")),
        ({"XDG_CACHE_HOME": ""}, Path("/home/someone/.cache/fastseg")),
        ({}, Path("/home/someone/.cache/fastseg")),
    ],
)
def test_cache_directory_follows_the_environment(monkeypatch, environment, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("FASTSEG_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compiled.cache_directory() == expected


def test_user_without_a_home_has_no_cache(monkeypatch):
    def absent() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTSEG_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", absent)
    assert compiled.cache_directory() is None


# Damage is noticed and repaired


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_file_is_replaced(warm, copied, damage):
    names = {item.name for item in copied.iterdir()}
    (path,) = copied.glob(f"{KERNEL}-*.bin")
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "flipped": bytes(changed),
            "empty": b"",
        }[damage]
    )
    got = run(BCE, copied)
    assert got.result == warm[1].result
    ignored = [text for text in got.messages if text.startswith("WARNING: ignoring the damaged")]
    assert len(ignored) == (damage != "empty")
    assert len(got.messages) == 1
    assert run(BCE, copied) == Run(warm[1].result, [])
    assert {item.name for item in copied.iterdir()} == names


def test_folder_in_the_place_of_a_file_only_costs_compilation(warm, copied):
    (path,) = copied.glob(f"{KERNEL}-*.bin")
    path.unlink()
    path.mkdir()
    got = run(BCE, copied)
    assert got.result == warm[1].result
    assert list(copied.glob("*.tmp")) == []


# Many processes


def test_processes_started_at_once_share_one_directory(tmp_path):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(6) as pool:
        runs = list(pool.map(lambda _: run(BCE, cache), range(6)))
    for got in runs:
        check(got)
        assert got.result == runs[0].result
        assert {*got.messages} <= {f"INFO: compiling {kernel}" for kernel in KERNELS}
    files = sorted(path.name for path in cache.iterdir())  # no temporary file is left
    for kernel, name in zip(sorted(KERNELS), files, strict=True):
        assert re.fullmatch(kernel + r"-[0-9a-f]{32}\.bin", name)
    assert run(BCE, cache) == Run(runs[0].result, [])


# A read-only installation


def test_read_only_installation(source, tmp_path):
    folders = [path for path in source.rglob("*") if path.is_dir()]
    for folder in folders:
        (folder / "__pycache__").write_text("")  # cannot be made a folder, not even by root
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    for folder in [source, *folders]:
        folder.chmod(0o500)
    environment = {"PYTHONDONTWRITEBYTECODE": "", "HOME": "/dev/null"}
    without = run(BCE, "/dev/null/cache", source, **environment)
    first, second = (run(BCE, tmp_path / "cache", source, **environment) for _ in range(2))
    for folder in [source, *folders]:
        folder.chmod(0o700)
    check(without)
    assert without.compiled == first.compiled == KERNELS
    assert second == Run(without.result, [])
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
