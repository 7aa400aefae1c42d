"""A fair clock: contenders take turns, so that a drift of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

Call = Callable[[], Any]
LEAD_IN = 0.01
"""Seconds of untimed calls at the start of a turn: they bring the contender's arrays into the
caches, and the idle threads of the contender before it, another OpenMP pool, stop spinning."""


def wall_seconds(call: Call) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    turn: float = 0.03,
    stopwatch: Callable[[Call], float] = wall_seconds,
    budget: float = float("inf"),
) -> dict[str, float]:
    """Return the median seconds of each call.

    A turn is a lead-in, then timed calls for ``turn`` seconds, at least three. After ``budget``
    seconds no round begins, but for the first.
    """
    start = time.perf_counter()
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds):
        if k and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            turns[name].append(_take_turn(call, turn, stopwatch))
    return {name: median(times) for name, times in turns.items()}


def _take_turn(call: Call, turn: float, stopwatch: Callable[[Call], float]) -> float:
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < LEAD_IN:
        call()
    times: list[float] = []
    total = 0.0
    while len(times) < 3 or total < turn:
        times.append(stopwatch(call))
        total += times[-1]
    return median(times)
