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
