"""Plan a scoring run over more voxels than one machine sees: how long, what limits it, what fails.

    python tools/plan_run.py [--voxels 1e15] [--cores 4096] [--rate 2.3e8] ...

The arithmetic is `plan`; `simulate` plays the same run event by event (workers that take units in
turn, share a store, die and come back), so that the arithmetic can be held against it. The rate is
measured: `python tools/score_large.py`.
"""

import argparse
import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Run:
    """A run: its volume, the machines, and how often they fail."""

    voxels: float = 1e15
    bytes_per_voxel: float = 2.0
    """Read for each voxel, as stored: a uint8 probability and a uint8 label, uncompressed."""
    block: float = 512.0**3
    """Voxels of a block."""
    files: int = 4096
    """Files of the table; a unit of work is the blocks of one file."""
    cores: int = 4096
    rate: float = 2.6e8
    """Voxels per second and core, reading and decompressing included."""
    bandwidth: float = 2e11
    """Bytes per second that the store gives to all readers together."""
    days_between_failures: float = 30.0
    """Of one core's worker."""
    restart: float = 120.0
    """Seconds until a worker that died has a successor."""


class Plan(NamedTuple):
    """What the arithmetic says; times in seconds."""

    blocks: float
    units: float
    unit_seconds: float  # of one core
    computing: float  # of the run, if only cores limited it
    reading: float  # if only the store did
    failures: float
    lost: float  # core seconds that failures cost
    tail: float  # while the last units run and other cores wait
    total: float
    table_bytes: float


def plan(run: Run, sums: int = 8) -> Plan:
    """Return the expectations; ``sums`` is how many float64 a row of the table has."""
    blocks = math.ceil(run.voxels / run.block)
    per_unit = math.ceil(blocks / run.files)
    units = math.ceil(blocks / per_unit)
    computing = run.voxels / (run.rate * run.cores)
    reading = run.voxels * run.bytes_per_voxel / run.bandwidth
    # Where the store is the limit, a unit takes as long as its share of the store.
    unit_seconds = per_unit * run.block / run.rate * max(1.0, reading / computing)
    mean = run.days_between_failures * 86400.0
    busy = units * unit_seconds
    failures = busy / mean
    # A failure loses half a unit on average, and the time until there is a successor.
    lost = failures * (unit_seconds / 2 + run.restart)
    waves = (busy + lost) / unit_seconds / run.cores
    tail = (math.ceil(waves) - waves) * unit_seconds
    total = (busy + lost) / run.cores + tail
    return Plan(
        blocks,
        units,
        unit_seconds,
        computing,
        reading,
        failures,
        lost,
        tail,
        total,
        8.0 * sums * blocks,
    )


def simulate(run: Run, seed: int = 0) -> tuple[float, int, float]:
    """Return the seconds of a run, its failures, and the core seconds that these cost."""
    rng = np.random.default_rng(seed)
    expected = plan(run)
    mean = run.days_between_failures * 86400.0
    waiting = int(expected.units)
    ready = [(0.0, core) for core in range(run.cores)]  # when each is free
    dies = rng.exponential(mean, run.cores)  # seconds of work until a core's worker dies
    end, failures, lost = 0.0, 0, 0.0
    while waiting:
        start, core = heapq.heappop(ready)
        if dies[core] < expected.unit_seconds:  # the unit is done by another, from its start
            failures += 1
            lost += dies[core] + run.restart
            heapq.heappush(ready, (start + dies[core] + run.restart, core))
            dies[core] = rng.exponential(mean)
            continue
        dies[core] -= expected.unit_seconds
        waiting -= 1
        end = max(end, start + expected.unit_seconds)
        heapq.heappush(ready, (start + expected.unit_seconds, core))
    return end, failures, lost


def main() -> None:
    """Print the plan, and what the simulation makes of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = Run()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    run = Run(**vars(parser.parse_args()))
    found = plan(run)
    limit = "the store" if found.reading > found.computing else "cores"
    played = [simulate(run, seed) for seed in range(5)]
    rows = {
        "blocks": f"{found.blocks:,.0f}",
        "units (files of the table)": f"{found.units:,.0f}",
        "a unit, one core": f"{found.unit_seconds / 60:.1f} min",
        "table": f"{found.table_bytes / 1e9:.2f} GB",
        "if cores alone limited": f"{found.computing / 3600:.2f} h",
        "if the store alone limited": f"{found.reading / 3600:.2f} h",
        "limited by": limit,
        "failures": f"{found.failures:.1f} (simulated {np.mean([p[1] for p in played]):.1f})",
        "core hours lost to them": f"{found.lost / 3600:.1f} "
        f"(simulated {np.mean([p[2] for p in played]) / 3600:.1f})",
        "in all": f"{found.total / 3600:.2f} h "
        f"(simulated {np.mean([p[0] for p in played]) / 3600:.2f} h)",
        "core hours": f"{found.total * run.cores / 3600:,.0f}",
    }
    print(*(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")


if __name__ == "__main__":
    main()
