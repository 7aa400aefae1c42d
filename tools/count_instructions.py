"""Count the vector instructions of loops, and how many of these the CPU does at most.

    python tools/count_instructions.py

Moves between registers and memory are left out: they take no place in the two ports that compute. A
division or a root of 512 bits counts as three, as it does there on Intel's CPUs (uops.info).
Numbers are per 16 voxels of float32 logits with labels of one byte, and per 16 parameters of Adam
with moments of bfloat16, for the CPU of this machine. From the first, and from the rate of
multiplications that wait for nothing, follows the time that a voxel takes at least, however it is
stored.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

os.environ["FASTSEG_CACHE_DIR"] = ""  # a cached kernel has no assembly to read

from fastseg_kernels.cpu.intrinsics import wide_vectors
from fastseg_kernels.cpu.overlap import slopes_kernel
from fastseg_kernels.cpu.tiles import LANES, TILE, sums_kernel
from fastseg_kernels.cpu.update_kernels import update_kernel
from fastseg_kernels.cpu.variants import HAS_MASKS, Variant

VARIANT = Variant("float32", "binary", "sigmoid", frozenset({"bce", "overlap"}))
# A move between registers computes where it is under a mask.
NO_ARITHMETIC = re.compile(r"vmov[^{]*$|vmov.*\(|vbroadcast|vzeroupper")
WIDTH = 16 if HAS_MASKS else 8  # float32 in a vector
CHAINS = 12  # that do not wait for each other: more than a multiplication takes cycles, twice


def loops(assembly: str) -> list[list[str]]:
    """Return the instructions of every loop: from a label to a jump back to it."""
    lines = assembly.splitlines()
    labels = {
        found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.?L\w+):", line))
    }
    found = []
    for i, line in enumerate(lines):
        jump = re.match(r"\s+j\w+\s+(\.?L\w+)", line)
        if jump and labels.get(jump[1], len(lines)) < i:
            body = lines[labels[jump[1]] : i + 1]
            found.append([entry.strip() for entry in body if re.match(r"\s+[a-z]", entry)])
    return found


def arithmetic(body: list[str]) -> int:
    """Count the vector and mask instructions that compute."""
    counted = sum(entry[0] in "vk" and not NO_ARITHMETIC.match(entry) for entry in body)
    return counted + 2 * sum(bool(re.match(r"v(div|sqrt)p.*%zmm", entry)) for entry in body)


def divisions(body: list[str]) -> int:
    """Count the vector divisions: one for each vector of voxels, and one for each logarithm."""
    return sum(entry.startswith("vdivps") for entry in body)


def stores(body: list[str]) -> int:
    """Count the vectors of float32 that are written."""
    return sum(bool(re.match(r"vmovups\s+%[yz]mm\d+, .*\(", entry)) for entry in body)


def lanes(body: list[str]) -> int:
    """Return how many float32 a vector of the loop has."""
    return next(n for n, kind in ((16, "zmm"), (8, "ymm"), (4, "xmm")) if kind in "".join(body))


def in_a_tile(bodies: list[list[str]]) -> float:
    """Count what the statistics of a tile compute."""
    widens = [body for body in bodies if any("vcvtps2pd" in entry for entry in body)]
    tile = min((body for body in widens if divisions(body) > 2), key=len)
    if divisions(tile) > 8:  # all of it in one loop
        return arithmetic(tile)
    inner = [body for body in bodies if body not in widens and divisions(body) > 0]
    masses, tree = min(inner, key=len), max(inner, key=len)
    once = arithmetic(tile) - arithmetic(masses) - arithmetic(tree)
    return (
        once
        + arithmetic(masses) * TILE / (lanes(masses) * divisions(masses))
        + arithmetic(tree) * LANES / lanes(tree)
    )


@intrinsic
def multiply(typing_context: Any, rounds: Any, by: Any) -> tuple[Any, Callable[..., Any]]:
    """Multiply `CHAINS` vectors, so many times; return a number, for something must be."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), WIDTH)
        factors = ir.Constant(vector, ir.Undefined)
        for k in range(vector.count):
            factors = builder.insert_element(factors, args[1], ir.IntType(32)(k))
        before, loop = builder.block, builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        count, values = builder.phi(args[0].type), [builder.phi(vector) for _ in range(CHAINS)]
        left = builder.sub(count, count.type(1))
        count.add_incoming(args[0], before)
        count.add_incoming(left, loop)
        made = [builder.fmul(value, factors) for value in values]
        for k, (value, next_value) in enumerate(zip(values, made, strict=True)):
            value.add_incoming(ir.Constant(vector, [float(k)] * vector.count), before)
            value.add_incoming(next_value, loop)
        builder.cbranch(builder.icmp_signed(">", left, count.type(0)), loop, after)
        builder.position_at_end(after)
        total = made[0]
        for value in made[1:]:
            total = builder.fadd(total, value)
        return builder.extract_element(total, ir.IntType(32)(0))

    return types.float32(types.int64, types.float32), codegen


def vectors_per_ns() -> float:
    """Return how many vectors one core multiplies in a nanosecond, the best of many."""
    rounds = 1_000_000
    run = njit([types.float32(types.int64, types.float32)])(_spin)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        run(rounds, 1.0)
        times.append(time.perf_counter() - start)
    return 1e-9 * CHAINS * rounds / min(times)


def _spin(rounds: int, by: float) -> Any:
    wide_vectors()
    return multiply(rounds, by)


def main() -> None:
    """Print the counts of the two passes, and of that which starts from what the first kept."""
    statistics = loops(sums_kernel(VARIANT)._keep_alive._library.get_asm_str())
    gradient = loops(slopes_kernel(VARIANT)._keep_alive._library.get_asm_str())
    vector = min((body for body in gradient if divisions(body) == 1), key=len)
    of_kept = VARIANT.sloping(VARIANT.families)._replace(kept=True)
    kept = loops(slopes_kernel(of_kept)._keep_alive._library.get_asm_str())
    # No other loop of that kernel multiplies and adds.
    own = min((body for body in kept if "vfn" in "".join(body) and stores(body)), key=len)
    adds, slopes = 16 * in_a_tile(statistics) / TILE, 16 * arithmetic(vector) / lanes(vector)
    print(
        f"statistics {adds:.1f}, gradient {slopes:.1f}, of what was kept "
        f"{16 * arithmetic(own) / (lanes(own) * stores(own)):.1f}"
    )
    rate = vectors_per_ns()
    print(
        f"{rate:.2f} vectors per ns: at least {adds / 16 / rate:.2f} and {slopes / 16 / rate:.2f} "
        f"ns per voxel on one core"
    )
    adam = loops(update_kernel("adam", "float32", True)._keep_alive._library.get_asm_str())
    update, rounding = (
        max((body for body in adam if mnemonic in " ".join(body)), key=lanes)
        for mnemonic in ("vsqrtps", "vpmulld")
    )
    print(
        f"Adam {16 * arithmetic(update) / lanes(update)}, "
        f"rounding both moments {16 * arithmetic(rounding) / lanes(rounding)}"
    )


if __name__ == "__main__":
    main()
