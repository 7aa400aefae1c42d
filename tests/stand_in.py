"""What tests do that put something in the place of an array library."""

from __future__ import annotations

from fastseg import dispatch, libraries
from fastseg_kernels.cuda import installation


def forget_libraries() -> None:
    """Forget which libraries and backends were found."""
    for cached in (
        dispatch._on_device,
        libraries._library_of_class,
        installation.cupy_module,
    ):
        cached.cache_clear()
    dispatch._made.clear()
    libraries._made.clear()
