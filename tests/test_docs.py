"""The manual: it builds without a warning, has every public name, and its links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
MODULES = (
    "fastseg",
    "fastseg.presets",
    "fastseg.torch",
    "fastseg.torch.nnunet",
    "fastseg.jax",
    "fastseg.dask",
    "fastseg.stores",
    "fastseg.blocks",
)
PUBLIC = [
    f"{module}.{name}"
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if not isinstance(getattr(importlib.import_module(module), name), ModuleType)
]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def resolved(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", [name for name in PUBLIC if callable(resolved(name))])
def test_every_public_name_has_an_example(name):
    """That it runs is seen to by pytest's doctests."""
    text = inspect.getdoc(resolved(name)) or ""
    assert "Examples\n--------\n" in text, name


def test_the_manual_has_every_public_name(tmp_path):
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), "docs", str(tmp_path / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    inventory = InventoryFile.loads((tmp_path / "html" / "objects.inv").read_bytes(), uri="")
    listed = {name for kind, names in inventory.data.items() if kind[:3] == "py:" for name in names}
    assert not {*PUBLIC} - listed
    assert not [name for name in methods() if not name & listed]


def methods() -> Iterator[set[str]]:
    """Yield the names that each public method has: one for each class that has it."""
    classes = [(name, resolved(name)) for name in PUBLIC if inspect.isclass(resolved(name))]
    for _, cls in classes:
        for attribute, _ in inspect.getmembers(cls, callable):
            bases = [base for base in cls.__mro__ if attribute in vars(base)]
            own = all(base.__module__.startswith("fastseg") for base in bases)
            if attribute[0] != "_" and own:  # what other libraries promise is in their manuals
                yield {f"{n}.{attribute}" for n, c in classes if {*c.__mro__} & {*bases}}


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_between_pages_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
