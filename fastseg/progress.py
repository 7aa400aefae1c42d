"""What a long command tells while it runs."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """A listener, as a progress bar; a stage is over when ``done`` equals ``total``."""

    def __call__(self, stage: str, done: int, total: int | None, note: str) -> None:
        """Tell that ``done`` of ``total`` (None: unknown) parts of a stage are done."""
