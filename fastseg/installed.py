"""Packages that an extra brings, and what is said where one is not there."""

from __future__ import annotations

from importlib.util import find_spec


def absent(*modules: str) -> list[str]:
    """Return which of these are not installed; none is imported."""

    def is_absent(name: str) -> bool:
        try:
            return find_spec(name) is None
        except (ImportError, ValueError):
            return True

    return [name for name in modules if is_absent(name)]


def check_installed(what: str, *modules: str) -> None:
    """Raise a ModuleNotFoundError that says what to install, where one of these is absent."""
    missing = absent(*modules)
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )
