"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastseg as fs
import fastseg_kernels
from fastseg import demo, demo_data, info, warmup
from fastseg.cli import main

SOURCES = os.pathsep.join(
    dict.fromkeys(str(Path(module.__file__ or "").parents[1]) for module in (fs, fastseg_kernels))
)
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its exit code, standard output and error."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code = stopped.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter in which every warning is an error."""
    environment = {**os.environ, "PYTHONPATH": SOURCES, **variables}
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


# info


def test_info_prints_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "info")
    assert (code, err) == (0, "")
    for word in ("versions", "cpu", "threads", "cache", "gpu", fs.__version__, np.__version__):
        assert word in out


def test_info_json_is_what_collect_returns(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "info", "--json")
    got = json.loads(out)
    assert (code, err) == (0, "")
    assert got["versions"] == info.collect()["versions"]
    assert got["versions"]["fastseg"] == fs.__version__
    assert got["threads"]["threads"] == fs.get_num_threads()
    assert got["cpu"]["name"]
    assert got["gpu"]["hint"].startswith(("computes on the CPU", "for the GPU", "arrays of CuPy"))


def test_info_counts_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEG_CACHE_DIR", str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"12345")
    (tmp_path / "b.bin").write_bytes(b"123")
    expected = {"directory": str(tmp_path), "writable": True, "files": 2, "bytes": 8}
    assert info.collect()["cache"] == expected


def test_info_knows_that_the_cache_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEG_CACHE_DIR", "")
    assert info.collect()["cache"]["directory"] is None


def test_info_of_a_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTSEG_CACHE_DIR", str(tmp_path / "file" / "cache"))
    got = info.collect()["cache"]
    assert (got["writable"], got["files"]) == (False, 0)


def test_info_survives_absent_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> dict[str, Any]:
        raise ImportError("no Numba here")

    monkeypatch.setattr(info, "_threads", absent)
    assert info.collect()["threads"] == {"error": "ImportError: no Numba here"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_info_works_in_a_forked_child() -> None:
    program = (
        "import os, json, warnings, fastseg as fs\n"
        "fs.show_config()\n"  # the parent's threads run
        "warnings.simplefilter('ignore', DeprecationWarning)\n"  # Python 3.12's, about os.fork
        "child = os.fork()\n"
        "if child == 0:\n"
        "    json.dumps(fs.show_config())\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert python(program).stdout.strip() == "7"


@pytest.mark.parametrize(
    ("owners", "expected"),
    [([], []), (["fastseg_kernels"], []), (["fastseg-kernels", "FastSeg"], ["uninstall fastseg,"])],
)
def test_info_names_another_fastseg(
    monkeypatch: pytest.MonkeyPatch, owners: list[str], expected: list[str]
) -> None:
    found = {"fastseg": owners, "numpy": ["numpy"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: found)
    got = info.collect()["conflicts"]
    assert len(got) == len(expected)
    assert all(word in sentence for word, sentence in zip(expected, got, strict=True))


# warmup


def test_compile_ahead_leaves_nothing_to_compile() -> None:
    told: list[tuple[str, int, int]] = []
    compiled: list[str] = []
    warmup.compile_ahead(lambda *what: told.append(what))
    with warmup.announced_compilation(compiled.append):
        warmup.compile_ahead()
    assert compiled == []
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert told[-1][1] == told[-1][2]


@pytest.mark.slow
def test_warmup_fills_a_fresh_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    program = "from fastseg.cli import main; main(['warmup'])"
    first = python(program, FASTSEG_CACHE_DIR=str(cache))
    assert (first.returncode, first.stderr) == (0, "")
    files = {path.name for path in cache.iterdir()}
    assert f"{len(files)} kernels compiled" in first.stdout
    assert str(cache) in first.stdout.replace("\n", "")
    kinds = (
        "driver",
        "evaluate",
        "gradient",
        "statistics",
        "sums",
        "slopes",
        "load",
        "store",
        "codes",
        "widen",
        "sigmoid",
        "adam",
    )
    assert all(any(name.startswith(kind) for name in files) for kind in kinds)
    second = python(program, FASTSEG_CACHE_DIR=str(cache))
    assert "0 kernels compiled" in second.stdout
    assert {path.name for path in cache.iterdir()} == files


# demo


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the quick demo once, without a network; return its directory and its numbers."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the demo asked for the network")

    out = tmp_path_factory.mktemp("demo") / "made" / "by it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        with pytest.raises(SystemExit) as stopped:
            main(["demo", "--quick", "--seed", "3", "--out", str(out)])
    assert stopped.value.code == 0
    return out, json.loads((out / "demo.json").read_text())


def test_demo_writes_a_picture_and_its_numbers(quick: Any) -> None:
    out, found = quick
    assert {path.name for path in out.iterdir()} == {"demo.png", "demo.json"}
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["settings"]["quick"] and found["settings"]["seed"] == 3
    assert len(found["curves"]["loss"]) == found["settings"]["steps"] == demo.QUICK_STEPS
    assert found["curves"]["loss"][-1] < found["curves"]["loss"][0]
    assert found["time_per_voxel"]["relative_error"] < 1e-6
    assert "semi-synthetic" in found["data"]["notice"]


def test_demo_scores_agree_with_their_counts(quick: Any) -> None:
    _, found = quick
    for score in found["scores"].values():
        jaccard = score["tp"] / (score["tp"] + score["fp"] + score["fn"])
        assert score["jaccard"] == pytest.approx(jaccard, rel=1e-12)
        assert score["dice"] == pytest.approx(2 * jaccard / (1 + jaccard), rel=1e-12)
        count = score["tp"] + score["fp"] + score["fn"] + score["tn"]
        assert count == found["data"]["held_out"]["voxels"]
        assert score["tp"] + score["fn"] == found["data"]["held_out"]["grey"]
    logistic, threshold = (found["scores"][k]["jaccard"] for k in ("logistic", "threshold"))
    assert logistic > threshold + 0.05
    assert found["curves"]["held_out"][-1] == [demo.QUICK_STEPS, logistic]


def test_demo_scores_agree_with_numpy(quick: Any) -> None:
    _, found = quick
    scan = demo_data.load_scan(seed=3, quick=True)
    features = demo_data.compute_features(scan, lambda *what: None)
    _, held_out = scan.voxels()
    truth = scan.targets[held_out]
    weights = np.array(found["model"]["weights"], np.float32)
    logits = features.held_out @ weights + np.float32(found["model"]["bias"][0])
    called = {
        "threshold": scan.image[held_out] <= np.float32(found["scores"]["threshold"]["level"]),
        "logistic": logits >= 0,
    }
    for name, grey in called.items():
        expected = (grey & truth).sum() / (grey | truth).sum()
        # A logit at 0 may round to either side where the matrix product adds in another order.
        tolerance = 0.0 if name == "threshold" else 1e-4
        assert found["scores"][name]["jaccard"] == pytest.approx(expected, abs=tolerance or 1e-12)


def test_demo_starts_from_the_loss_of_zero_logits(quick: Any) -> None:
    _, found = quick
    part = found["data"]["train"]
    jaccard = part["grey"] / (part["grey"] + part["voxels"])  # (P / 2) / (P + V / 2 - P / 2)
    assert found["curves"]["loss"][0] == pytest.approx(np.log(2) + 1 - jaccard, rel=1e-6)


def test_demo_slabs_are_axial_and_apart() -> None:
    scan = demo_data.load_scan(quick=True)
    train, held_out = np.flatnonzero(scan.train), np.flatnonzero(scan.held_out)
    assert np.abs(train[:, None] - held_out[None, :]).min() > 2 * demo_data.GUARD
    assert np.array_equal(np.diff(scan.heights), np.ones(len(scan.heights) - 1))
    assert not scan.image[~scan.brain].any()


def test_plain_gradient_is_the_fused_one() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 1000).astype(np.float32)
    targets = rng.random(1000) < 0.3
    got = demo.LOSS.value_and_grad(logits, targets)
    expected = demo.plain_value_and_grad(logits.astype(np.float64), targets)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("image", "targets", "expected"),
    [([1, 2, 3, 4], [1, 1, 0, 0], 2), ([5, 1, 9, 7], [1, 1, 0, 1], 7), ([3, 1], [1, 1], 3)],
)
def test_best_threshold_by_hand(image: list[float], targets: list[int], expected: float) -> None:
    assert demo.best_threshold(np.array(image, np.float32), np.array(targets, bool)) == expected


def test_write_whole_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half of it")
        raise OSError("the disk is full")

    path = tmp_path / "demo.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk is full"):
        demo.write_whole(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# The rest, and failures


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"fastseg {fs.__version__}\n", "")
    for arguments in ((), ("--help",)):
        code, out, err = call(capsys, *arguments)
        assert (code, err) == (0, "")
        assert all(command in out for command in ("info", "demo", "warmup"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nonsense",), "nonsense"),
        (("info", "--no-such-option"), "--no-such-option"),
        (("demo", "--steps", "0"), "--steps"),
        (("demo", "--seed", "-1"), "--seed"),
        (("demo", "--steps", "many"), "--steps"),
        (("demo", "--out"), "--out"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fastseg: ") and err.count("\n") == 1 and expected in err


def test_directory_that_cannot_be_made_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, out, err = call(capsys, "demo", "--quick", "--out", str(tmp_path / "file" / "demo"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "file" in err


@pytest.mark.parametrize(("place", "expected"), [("", "cache is off"), ("file/c", "not writable")])
def test_warmup_without_a_cache_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    expected: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTSEG_CACHE_DIR", str(tmp_path / place) if place else "")
    code, out, err = call(capsys, "warmup")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_missing_cli_extra_is_one_line(absent: str) -> None:
    program = BLOCK.format(names={absent}) + "from fastseg.cli import main; main(['info'])"
    got = python(program)
    expected = "fastseg's command line needs typer and rich: pip install typer rich\n"
    assert (got.returncode, got.stdout, got.stderr) == (2, "", expected)


def test_missing_demo_extra_is_one_line() -> None:
    program = BLOCK.format(names={"nilearn", "scipy"})
    got = python(program + "from fastseg.cli import main; main(['demo'])")
    expected = "fastseg demo needs nilearn, scipy: pip install nilearn scipy\n"
    assert (got.returncode, got.stdout, got.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    ("option", "value", "package"),
    [
        ("--table", "t.zarr", "zarr"),
        ("--error-map", "e.png", "matplotlib"),
        ("--dask", "tcp://127.0.0.1:1", "distributed"),
    ],
)
def test_what_an_option_of_score_needs_is_asked_before_anything_is_read(
    option: str, value: str, package: str, tmp_path: Path
) -> None:
    program = BLOCK.format(names={package}) + "from fastseg.cli import main; "
    files = [str(tmp_path / name) for name in ("p.npy", "t.npy")]
    for file in files:
        np.save(file, np.zeros((2, 2), np.uint8))
    got = python(program + f"main({['score', *files, option, value]})")
    expected = f"fastseg: {option} needs {package}: pip install {package}\n"
    assert (got.returncode, got.stdout, got.stderr) == (2, "", expected)


def test_importing_the_command_line_imports_no_extra() -> None:
    program = "import sys, fastseg.cli; print({'typer', 'rich', 'numba'} & set(sys.modules))"
    assert python(program).stdout.strip() == "set()"


# bench


# What MONAI cannot import for a warning, it does without as long as the process lives.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_bench_times_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = call(capsys, "bench", "--quick", "--out", str(tmp_path))
    assert (code, err) == (0, "")
    assert "BCE + soft Jaccard, 2x1x64³" in out and "GB/s" in out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["tasks"]) == 5
    for task in found["tasks"]:
        assert task["over_fastseg"]["fastseg"] == 1.0 and not task["notes"]
        assert set(task["seconds"]) >= {"fastseg"} and min(task["seconds"].values()) > 0
    assert set(found["tasks"][0]["seconds"]) == {"fastseg", "NumPy", "PyTorch", "MONAI"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_bench_does_not_time_what_computes_something_else() -> None:
    from fastseg import bench

    def absent() -> Any:
        raise ModuleNotFoundError("No module named 'other'", name="other")

    contenders: Any = {
        "fastseg": lambda: lambda: 1.0,
        "wrong": lambda: lambda: 1.1,
        "other": absent,
        "right": lambda: lambda: 1.0001,
    }
    found = bench.time_task(bench.Task("toy", 1, "voxel", 1, contenders), budget=0.0)
    assert set(found.seconds) == {"fastseg", "right"}
    assert found.notes == [
        "wrong: computes 1.1, fastseg 1",
        "other: other is not installed",
    ]
