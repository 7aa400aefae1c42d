"""What importing costs, and who imports whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "numba",
    "llvmlite",
    "cupy",
    "torch",
    "jax",
    "dask",
    "scipy",
    "matplotlib",
    "typer",
    "rich",
)


def run(code: str) -> str:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_numpy_and_nothing_else():
    out = run(f"import fastseg; print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip() == "[]"


def test_import_is_quick():
    """Measured against NumPy's own import in the same process; it takes a quarter of that."""
    code = (
        "import time; a = time.perf_counter(); import numpy; b = time.perf_counter(); "
        "import fastseg; c = time.perf_counter(); print((c - b) / (b - a), c - b)"
    )
    results = sorted(tuple(map(float, run(code).split())) for _ in range(5))
    ratio, seconds = results[len(results) // 2]
    assert ratio < 1.0, (ratio, seconds)


def test_imports_point_in_one_direction():
    """What imports what is in pyproject.toml."""
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


LONGEST_FILE, LONGEST_FUNCTION = 400, 40


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield functions and their lines, without signature, docstring and functions inside.

    In ``cpu`` those that Numba compiles are left out: inside of another, or marked.
    """
    tree = ast.parse(path.read_text())
    for node in tree.body if "cpu" in path.parts else ast.walk(tree):
        marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
        if isinstance(node, ast.FunctionDef) and not {"function", "inlined"} & {*marks}:
            own = node.body[1:] if ast.get_docstring(node) else node.body
            inside = [part for part in own if not isinstance(part, ast.FunctionDef)]
            yield node.name, sum((part.end_lineno or 0) - part.lineno + 1 for part in inside)


@pytest.mark.parametrize("folder", ["fastseg", "kernels", "asv_benchmarks", "tools", "examples"])
def test_files_and_functions_are_short(folder):
    """The body of a kernel may be longer: a part of it is compiled apart, with all that it uses.

    So may the functions that translate another library's arguments, one by one.
    """
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    long = [path for path in paths if len(path.read_text().splitlines()) > LONGEST_FILE]
    for path in paths:
        if "presets" not in path.parts:
            long += [(path, name) for name, lines in functions(path) if lines > LONGEST_FUNCTION]
    assert not long
