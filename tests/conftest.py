"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastseg as fs


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back after a test that changes it."""
    yield
    fs.set_num_threads(None)


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
