"""The code of the README and of the manual runs as printed; commands are where CI looks."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from test_terms import variants

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = [
    pytest.param(
        textwrap.dedent(code),
        marks=[pytest.mark.gpu] if "cuda" in code and "cupy" not in code else [],
        id=f"{page.stem}-{number}",
    )
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_there_is_code():
    pages = {str(param.id).partition("-")[0] for param in BLOCKS}
    assert {"README", "quickstart", "embedding", "trainers", "volumes", "losses"} <= pages


@pytest.mark.parametrize("code", BLOCKS)
def test_code_block_runs(code, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    if "import cupy" in code:
        request.getfixturevalue("cupy_stand_in")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["demo", "test"])
def test_commands_are_found(name):
    command = subprocess.run(
        [sys.executable, ".ci/readme_command.py", name], cwd=ROOT, capture_output=True, text=True
    )
    assert command.returncode == 0, command.stderr
    assert command.stdout.startswith("python3 -m venv .venv && ")


def test_the_toy_loss_of_contributing_is_complete(tmp_path):
    """The class printed under "Adding a loss" works as printed."""
    import numpy as np

    import fastseg as fs
    from fastseg import region_terms

    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(@dataclass.*?)```", text, re.DOTALL)
    assert code is not None
    scope = dict(vars(region_terms))
    exec(compile(code[1], "CONTRIBUTING.md", "exec"), scope)
    assert len(variants(scope["MissedShare"])) > 8  # what tests/test_terms.py will make of it
    loss = scope["MissedShare"]().replace(activation=None)
    probs, targets = np.array([[[0.25, 1.0, 0.5]]]), np.array([[[1, 1, 0]]])
    assert loss(probs, targets) == 0.375
    assert isinstance(loss, fs.Loss)
