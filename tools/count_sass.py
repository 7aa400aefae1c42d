"""Count the machine instructions of the CUDA kernels' loops, and the bandwidth that they allow.

    python tools/count_sass.py

An element is a voxel or a parameter. Counted is the shortest way from a 16-byte load around its
loop: what every element costs where arrays are runs of memory. A multiprocessor issues four
instructions per clock, each for 32 elements, so an instruction per element takes 1/128 of a clock.
Bytes are those that must be moved. NVRTC and the disassembler come with the extra [test].
"""

from __future__ import annotations

import re
from collections import deque
from typing import NamedTuple

from fastseg_kernels.cuda.modules import GROUP, text
from tools.nvrtc import compile_text, disassemble

ARCHITECTURE = 90
ISSUE = 128
"""Instructions per clock and multiprocessor, counted per element: 4 schedulers times 32 lanes."""
SPECIAL, DOUBLE = 16, 64
"""Results per clock and multiprocessor of the special function unit (MUFU) and, on data-centre
GPUs, of double precision; CUDA C++ Programming Guide, throughput of native arithmetic."""
H200_BYTES = 16.5
"""Bytes per clock and multiprocessor: 4.3 TB/s over 132 multiprocessors at 1.98 GHz."""


class Kernel(NamedTuple):
    """A kernel; elements and vector loads of one round of its loop; bytes that an element takes."""

    title: str
    file: str
    name: str
    elements: int
    loads: int
    bytes: float
    instructions: float  # at most, per element


def _overlap(verb: str, element: str, families: str, target: str = "unsigned char") -> str:
    kind = "SOFT" if target == "float" else "BINARY"
    return f"{verb}_in_place<Variant<float, {kind}, SIGMOID, {families}>, {element}, {target}>"


SUMS, HALF = "BCE | OVERLAP", "__nv_bfloat16"
KERNELS = [
    Kernel(
        "statistics, float32", "overlap.cu", _overlap("statistics", "float", SUMS), GROUP, 4, 5, 36
    ),
    Kernel(
        "statistics, bfloat16", "overlap.cu", _overlap("statistics", HALF, SUMS), GROUP, 4, 3, 29
    ),
    Kernel(
        "statistics with hard counts, float32",
        "overlap.cu",
        _overlap("statistics", "float", SUMS + " | HARD"),
        GROUP,
        4,
        5,
        44,
    ),
    Kernel(
        "statistics, float32, targets float32",
        "overlap.cu",
        _overlap("statistics", "float", SUMS, "float"),
        GROUP,
        8,
        8,
        60,
    ),
    Kernel(
        "statistics, float32, targets int64",
        "overlap.cu",
        _overlap("statistics", "float", SUMS, "long long"),
        GROUP,
        12,
        12,
        60,
    ),
    Kernel("gradient, float32", "overlap.cu", _overlap("gradient", "float", "0"), 4, 1, 9, 38),
    Kernel("gradient, bfloat16", "overlap.cu", _overlap("gradient", HALF, "0"), 4, 1, 5, 30),
    Kernel(
        "gradient, float32, targets float32",
        "overlap.cu",
        _overlap("gradient", "float", "0", "float"),
        4,
        2,
        12,
        60,
    ),
    Kernel("sigmoid, float32", "logistic.cu", "sigmoid_in_place<float, float>", 4, 1, 8, 36),
    Kernel("gradient descent, float32", "updates.cu", "update<Descent, float>", 4, 2, 12, 16),
    Kernel("momentum, float32", "updates.cu", "update<Momentum, float>", 4, 3, 20, 22),
    Kernel("Adam, float32", "updates.cu", "update<Adam, float>", 4, 4, 28, 48),
]
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*);")
LABEL = re.compile(r"^(\.L_x_\d+):")


def loop(code: str, load: str, number: int) -> list[str]:
    """Return the instructions of the shortest way around that passes ``number`` loads ("E.128")."""
    instructions: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append((found[2] or "", found[3], found[4]))

    def following(i: int) -> list[int]:
        predicate, name, operands = instructions[i]
        stops = name.split(".")[0] in ("BRA", "EXIT", "RET") and not predicate
        after = [] if stops and "P" not in operands.partition("`")[0] else [i + 1]
        target = re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith("BRA") else None
        return [*after, *([labels[target[1]]] if target else [])]

    def loads_of(way: list[int]) -> int:
        return sum(instructions[i][1].removesuffix(".CONSTANT") in names for i in way)

    best: list[int] = []
    names = (f"LDG.{load}", f"LD.{load}")
    loads = [i for i in range(len(instructions)) if loads_of([i])]
    for start in loads:
        came_from: dict[int, int] = {}
        queue = deque([start])
        while queue and start not in came_from:
            i = queue.popleft()
            for j in following(i):
                if j < len(instructions) and j not in came_from:
                    came_from[j] = i
                    queue.append(j)
        if start not in came_from:
            continue
        way = [came_from[start]]
        while way[-1] != start:
            way.append(came_from[way[-1]])
        if loads_of(way) == number and (not best or len(way) < len(best)):
            best = way
    return [instructions[i][1] for i in sorted(best)]


def count(kernel: Kernel) -> dict[str, float]:
    """Return instructions per element: all, of the special function unit, of double precision."""
    compiled = compile_text(text(kernel.file), (kernel.name,), ARCHITECTURE, major=13)
    listing = disassemble(compiled.code)
    section = f".text.{compiled.names[kernel.name]}"
    code = listing[listing.index(section + ",") :]
    load = "E.64" if HALF in kernel.name else "E.128"
    names = loop(code.split("//----", 1)[0], load, kernel.loads)
    double = ("DADD", "DMUL", "DFMA", "F2F.F64", "I2F.F64", "DSETP")
    return {
        "all": len(names) / kernel.elements,
        "special": sum(name.startswith("MUFU") for name in names) / kernel.elements,
        "double": sum(name.startswith(double) for name in names) / kernel.elements,
    }


def bound(kernel: Kernel, counted: dict[str, float]) -> float:
    """Return the bytes per clock and multiprocessor that the instructions allow."""
    if counted["all"] == 0:
        raise ValueError(f"no loop was found in {kernel.name}")
    clocks = max(counted["all"] / ISSUE, counted["special"] / SPECIAL, counted["double"] / DOUBLE)
    return kernel.bytes / clocks


def main() -> None:
    """Print the table."""
    print("| kernel | bytes | instructions | special | double | bytes per clock | of an H200's |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for kernel in KERNELS:
        counted = count(kernel)
        allowed = bound(kernel, counted)
        print(
            f"| {kernel.title} | {kernel.bytes} | {counted['all']:.1f} | "
            f"{counted['special']:.2f} | {counted['double']:.2f} | {allowed:.1f} | "
            f"{allowed / H200_BYTES:.1f}x |"
        )


if __name__ == "__main__":
    main()
