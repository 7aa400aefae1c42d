"""Count the vector instructions of loops: what arithmetic costs beside memory.

    python tools/count_instructions.py

Moves between registers and memory are left out: they take no place in the two ports that compute.
Numbers are per 16 voxels of float32 logits with labels of one byte, and per 16 parameters of Adam
with moments of bfloat16, for the CPU of this machine.
"""

from __future__ import annotations

import os
import re

os.environ["FASTSEG_CACHE_DIR"] = ""  # a cached kernel has no assembly to read

from fastseg_kernels.cpu.overlap import slopes_kernel
from fastseg_kernels.cpu.points import Variant
from fastseg_kernels.cpu.tiles import LANES, TILE, sums_kernel
from fastseg_kernels.cpu.update_kernels import update_kernel

VARIANT = Variant("float32", "binary", "sigmoid", frozenset({"bce", "overlap"}))
NO_ARITHMETIC = re.compile(r"vmov|vbroadcast|vzeroupper")


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
    return sum(entry[0] in "vk" and not NO_ARITHMETIC.match(entry) for entry in body)


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


def main() -> None:
    """Print the counts of the two passes, and of that which starts from what the first kept."""
    statistics = loops(sums_kernel(VARIANT)._keep_alive._library.get_asm_str())
    gradient = loops(slopes_kernel(VARIANT)._keep_alive._library.get_asm_str())
    vector = min((body for body in gradient if divisions(body) == 1), key=len)
    of_kept = VARIANT.sloping(VARIANT.families)._replace(kept=True)
    kept = loops(slopes_kernel(of_kept)._keep_alive._library.get_asm_str())
    # No other loop of that kernel multiplies and adds.
    own = min((body for body in kept if "vfn" in "".join(body) and stores(body)), key=len)
    print(
        f"statistics {16 * in_a_tile(statistics) / TILE:.1f}, "
        f"gradient {16 * arithmetic(vector) / lanes(vector)}, of what was kept "
        f"{16 * arithmetic(own) / (lanes(own) * stores(own)):.1f}"
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
