"""What importing costs, and who imports whom."""

from __future__ import annotations

import ast
import subprocess
import sys
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


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


RULES = [
    ("kernels/fastseg_kernels", ("fastseg.", "torch", "jax")),
    ("kernels/fastseg_kernels/reference", ("numba", "cupy", "fastseg_kernels.cpu")),
    ("kernels/fastseg_kernels/cpu", ("cupy", "fastseg_kernels.reference", "fastseg_kernels.cuda")),
    ("kernels/fastseg_kernels/cuda", ("numba", "fastseg_kernels.reference", "fastseg_kernels.cpu")),
    ("fastseg", ("numba", "llvmlite", "cupy", "fastseg_kernels.reference")),
]


@pytest.mark.parametrize(("folder", "forbidden"), RULES, ids=[folder for folder, _ in RULES])
def test_imports_point_in_one_direction(folder, forbidden):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            wrong = [f for f in forbidden if (name + ".").startswith(f.rstrip(".") + ".")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"
