"""Count the vector instructions of the loops of a loss: what arithmetic costs beside memory.

    python tools/count_instructions.py

Moves between registers and memory are left out: they take no place in the two ports that compute.
Numbers are per 16 voxels of float32 logits with labels of one byte, for the CPU of this machine.
"""

from __future__ import annotations

import os
import re

os.environ["FASTSEG_CACHE_DIR"] = ""  # a cached kernel has no assembly to read

from fastseg_kernels.cpu.overlap import gradient_kernel, statistics_kernel
from fastseg_kernels.cpu.points import Variant
from fastseg_kernels.cpu.tiles import TILE

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


def main() -> None:
    """Print the counts of the two passes."""
    statistics = loops(statistics_kernel(VARIANT)._keep_alive._library.get_asm_str())
    tile = max((body for body in statistics if divisions(body) > 8), key=arithmetic)
    gradient = loops(gradient_kernel(VARIANT)._keep_alive._library.get_asm_str())
    vector = min((body for body in gradient if divisions(body) == 1), key=len)
    width = 16 if any("zmm" in entry for entry in vector) else 8
    print(
        f"statistics {16 * arithmetic(tile) / TILE:.1f}, gradient {16 * arithmetic(vector) / width}"
    )


if __name__ == "__main__":
    main()
