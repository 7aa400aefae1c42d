"""Shared fixtures."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator

import pytest

import fastseg as fs
from stand_in import forget_libraries


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back after a test that changes it."""
    yield
    fs.set_num_threads(None)


@pytest.fixture
def cupy_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put hostcuda's stand-in in CuPy's place; without g++ there is none."""
    if shutil.which("g++") is None and os.environ.get("CI") is None:
        pytest.skip("the CUDA kernels are run on the CPU by g++, which is not installed")
    from hostcuda import cupy

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    current = cupy.Stream(0)
    monkeypatch.setattr(cupy, "current", current)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda index=0: cupy.current)
    forget_libraries()
    cupy.events.clear()
    yield
    monkeypatch.undo()
    forget_libraries()


NOT_ON_A_DEVICE = ("swapped", "unaligned")
"""Layouts that arrays in a device's memory cannot have."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of the contract on the CUDA backend what its arrays cannot be."""

    def is_impossible(item: pytest.Item) -> bool:
        of_a_device = item.path.name in ("test_cuda_contract.py", "test_gpu.py")
        return of_a_device and any(name in item.name for name in NOT_ON_A_DEVICE)

    impossible = [item for item in items if is_impossible(item)]
    if impossible:
        config.hook.pytest_deselected(items=impossible)
        items[:] = [item for item in items if not is_impossible(item)]
