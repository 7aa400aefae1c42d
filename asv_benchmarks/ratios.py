"""A regression check: ratios of times taken in one run, held against stored ones.

    python asv_benchmarks/ratios.py              # exits 1 and names what became slower
    python asv_benchmarks/ratios.py --update     # measures, and stores what was found
    python asv_benchmarks/ratios.py --times 128  # the times of the losses' calls, 2x1x128³

Each ratio is of two things that this machine does in turns, so that neither its speed nor its load
matters much; where it is loaded a ratio still wanders, and a slow one is measured again before it
counts. Baselines are kept by kind of CPU, which ratios do depend on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import Call, Volume, classes, interleaved, update_limit, volume
from benchmarks.losses import LOSS, SOFTMAX_LOSS
from benchmarks.updates import LR, parameters

import fastseg as fs
from fastseg_kernels.cpu import compile_target

BASELINE = Path(__file__).with_name("ratios.json")
SLOWER = 1.75
"""A ratio may be so many times the stored one: on a machine that others load they moved by 1.4, and
a check that cries wolf is ignored."""
ATTEMPTS, ROUNDS = 3, 7


def exponentials(arrays: Volume) -> Call:
    """Return NumPy's exp of as many numbers: arithmetic in vectors, as a loss is."""
    out = np.empty_like(arrays.logits)
    return lambda: np.exp(arrays.logits, out=out)


def losses(size: int = 96) -> dict[str, tuple[Call, Call]]:
    """Return what is timed of the losses, over what."""
    middle = volume("float32", size, "uint8")
    half, words = volume("bfloat16", size, "uint8"), volume("float32", size, "int64")
    mask = np.ones(middle.logits.shape, bool)
    s = LOSS.statistics(middle.logits, middle.targets)
    several = classes(4, 64)

    def of(loss: Any, arrays: Volume, **more: Any) -> Call:
        return lambda: loss.value_and_grad(arrays.logits, arrays.targets, out=arrays.out, **more)

    plain = of(LOSS, middle)
    read = lambda: LOSS.statistics(middle.logits, middle.targets)  # noqa: E731
    return {
        "value_and_grad / numpy.exp": (plain, exponentials(middle)),
        "statistics / value_and_grad": (read, plain),
        "gradient / value_and_grad": (
            lambda: LOSS.gradient(middle.logits, middle.targets, s, out=middle.out),
            plain,
        ),
        "hard counts / statistics": (
            lambda: LOSS.statistics(middle.logits, middle.targets, track=("hard",)),
            read,
        ),
        "bfloat16 / float32": (of(LOSS, half), plain),
        "int64 targets / uint8": (of(LOSS, words), plain),
        "ignore_index / none": (of(LOSS.replace(ignore_index=255), middle), plain),
        "mask / none": (of(LOSS, middle, mask=mask), plain),
        "softmax of 4 / numpy.exp": (of(SOFTMAX_LOSS, several), exponentials(several)),
        "Lovasz, 4096 bins / BCE + Jaccard": (of(fs.LovaszHinge(bins=4096), middle), plain),
        "label scores / statistics": (
            lambda: fs.jaccard_index(middle.targets, middle.targets, num_classes=2, layout="N"),
            read,
        ),
    }


def updates() -> dict[str, tuple[Call, Call]]:
    """Return what is timed of the updates, over what."""
    large, many = parameters(1, 2**24), parameters(500, 1000)

    def step(arrays: Any) -> Call:
        opt = fs.Adam(arrays[0], lr=LR)
        return lambda: opt.step(arrays[1])

    return {
        "Adam of 16M / its bytes": (step(large), update_limit(4 * 2**24, 4)),
        "Adam, 500 of 1000 / one of 16M": (step(many), step(large)),
    }


def measure(pairs: Mapping[str, tuple[Call, Call]]) -> dict[str, float]:
    """Return the ratios, each of two calls that take turns."""
    found = {}
    for name, (call, baseline) in pairs.items():
        times = interleaved({"call": call, "baseline": baseline}, ROUNDS, turn=0.02)
        found[name] = times["call"] / times["baseline"]
    return found


def slower(found: Mapping[str, float], stored: Mapping[str, float]) -> dict[str, float]:
    """Return by how much those ratios grew that grew too much; KeyError for an unknown one."""
    grown = {name: ratio / stored[name] for name, ratio in found.items()}
    return {name: factor for name, factor in grown.items() if factor > SLOWER}


def check(
    take: Callable[[Mapping[str, Any]], dict[str, float]],
    pairs: Mapping[str, Any],
    stored: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure; what is slow, again, and keep its best. Return ratios, and the slow ones' growth."""
    found = take(pairs)
    for _ in range(ATTEMPTS - 1):
        again = take({name: pairs[name] for name in slower(found, stored)})
        found |= {name: min(found[name], ratio) for name, ratio in again.items()}
    return found, slower(found, stored)


def main(arguments: list[str] | None = None) -> int:
    """Check or store; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="store what is found")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="file of stored ratios")
    parser.add_argument("--times", type=int, metavar="SIZE", help="show times, and compare nothing")
    options = parser.parse_args(arguments)
    fs.set_num_threads(2)
    if options.times:
        for name, (call, _) in losses(options.times).items():
            print(
                f"{1e3 * interleaved({name: call}, ROUNDS)[name]:8.3f} ms  {name.split(' / ')[0]}"
            )
        return 0
    kind = str(compile_target()["name"])
    known = json.loads(options.baseline.read_text()) if options.baseline.exists() else {}
    pairs = losses() | updates()
    if options.update or kind not in known:
        found = measure(pairs)
        if options.update:
            for _ in range(ATTEMPTS - 1):  # the largest: what a machine does on a bad day
                again = measure(pairs)
                found = {name: max(ratio, again[name]) for name, ratio in found.items()}
            known[kind] = {name: float(f"{ratio:.3g}") for name, ratio in found.items()}
            options.baseline.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        else:
            print(f"no baseline for a CPU of kind {kind}: nothing was compared")
        grown = {}
    else:
        found, grown = check(measure, pairs, known[kind])
    stored = known.get(kind, {})
    for name, ratio in found.items():
        said = f"{ratio:8.2f}  {name}"
        said += f" (stored {stored[name]:.2f})" if name in stored else ""
        print(said + (f": {grown[name]:.2f} times as slow" if name in grown else ""))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
