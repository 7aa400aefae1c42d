"""What a release says of itself, in one voice."""

from __future__ import annotations

import re
from pathlib import Path

import fastseg as fs

ROOT = Path(__file__).parent.parent


def test_one_version():
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest is not None
    assert newest[1] == fs.__version__
    assert f"version: {newest[1]}\n" in citation
    assert f'date-released: "{newest[2]}"\n' in citation


def test_types_are_shipped():
    assert (ROOT / "fastseg/py.typed").exists()
    assert (ROOT / "kernels/fastseg_kernels/py.typed").exists()
