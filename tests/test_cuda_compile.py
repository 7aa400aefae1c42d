"""The CUDA text through NVIDIA's own compiler, for real architectures; no GPU or driver is needed.

What the assembler says of registers and of spills to memory is held to the bounds below.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nvidia
import pytest
from cuda.bindings import nvrtc

from fastseg_kernels.cuda.modules import OPTIONS, TYPES, text

ARCHITECTURES = (70, 75, 80, 90, 100, 120)
FOLDERS = ("cuda_runtime/include", "cuda_cccl/include")
INCLUDES = [
    str(Path(base, folder)) for base in nvidia.__path__ for folder in FOLDERS
    if Path(base, folder).is_dir()
]  # fmt: skip
FAMILIES = ("BCE | OVERLAP", "BCE | HARD | OVERLAP", "BCE_SPLIT | HARD | OVERLAP", "HARD")
KINDS = [(k, a) for k in ("BINARY", "SOFT", "WEIGHTED") for a in ("SIGMOID", "PROBS")]


def in_place(verb: str, real: str, *families: str) -> list[str]:
    return [
        f"{verb}_in_place<Variant<{real}, BINARY, SIGMOID, {names}>, {element}>"
        for names in families
        for element in TYPES.values()
        if real == "double" or element != "double"
    ]


def anywhere(verb: str, *families: str) -> list[str]:
    return [
        f"{verb}_anywhere<Variant<{real}, {kind}, {activation}, {names}>, {counter}>"
        for names in families
        for real in ("float", "double")
        for kind, activation in KINDS
        for counter in ("unsigned", "unsigned long long")
    ]


class Group(NamedTuple):
    """Kernels of one file, with the most registers that each may have; none may spill any."""

    file: str
    names: list[str]
    registers: int


def updates() -> list[str]:
    rules = ("Descent", "Momentum", "Adam")
    return [f"update<{rule}, {real}>" for rule in rules for real in ("float", "double")]


def sigmoids() -> list[str]:
    pairs = ((element, "double" if element == "double" else "float") for element in TYPES.values())
    return [f"sigmoid_in_place<{real}, {element}>" for element, real in pairs]


# A multiprocessor has 65536 registers: 80 for each thread of a block are three blocks at a time, 40
# are six. The second pass and the logistic function live from the number of their threads.
GROUPS = {
    "statistics in place": Group(
        "overlap.cu", in_place("statistics", "float", *FAMILIES[:2], FAMILIES[3]), 80
    ),
    "statistics in place, all sums": Group(
        "overlap.cu", in_place("statistics", "float", FAMILIES[2]), 120
    ),
    "statistics in place, double": Group(
        "overlap.cu", in_place("statistics", "double", *FAMILIES[1:]), 160
    ),
    "statistics anywhere": Group("overlap.cu", anywhere("statistics", *FAMILIES[2:]), 128),
    "sum of tasks": Group("overlap.cu", ["add_tasks"], 64),
    "evaluation": Group("evaluation.cu", ["evaluate"], 128),
    "gradient in place": Group("overlap.cu", in_place("gradient", "float", "0"), 40),
    "gradient in place, double": Group("overlap.cu", in_place("gradient", "double", "0"), 64),
    "gradient anywhere": Group("overlap.cu", anywhere("gradient", "0"), 80),
    "sigmoid in place": Group("logistic.cu", sigmoids(), 40),
    "sigmoid anywhere": Group(
        "logistic.cu",
        [f"sigmoid_anywhere<{real}, unsigned>" for real in ("float", "double")],
        64,
    ),
    "labels": Group("labels.cu", ["count_labels<unsigned>"], 80),
    "updates": Group("updates.cu", updates(), 120),
    "steps": Group("updates.cu", ["count_step"], 64),
    "memory": Group("memory.cu", ["upload", "clear"], 40),
}


def check(answer: tuple[object, ...]) -> object:
    error, *rest = answer
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    return rest[0] if rest else None


@cache
def compiled(name: str, architecture: int, ptx: bool = False) -> tuple[str, str]:
    """Return the log of the compilation of a group of kernels, and its PTX if asked for."""
    group = GROUPS[name]
    program = check(nvrtc.nvrtcCreateProgram(text(group.file).encode(), b"k.cu", 0, [], []))
    for expression in group.names:
        check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
    target = "compute" if ptx else "sm"
    options = [
        *OPTIONS, "-ftz=true", f"-arch={target}_{architecture}", "--ptxas-options=-v",
        *(f"-I{folder}" for folder in INCLUDES),
    ]  # fmt: skip
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assembly = b""
    if ptx:
        assembly = b" " * check(nvrtc.nvrtcGetPTXSize(program))
        check(nvrtc.nvrtcGetPTX(program, assembly))
    check(nvrtc.nvrtcDestroyProgram(program))
    return log.decode(), assembly.decode()


USAGE = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", GROUPS)
def test_kernels_compile_within_their_bounds(name, architecture):
    group = GROUPS[name]
    log = compiled(name, architecture)[0]
    # Kernels that are no templates are compiled with every group of their file.
    stems = {re.match(r"\w+", expression)[0] for expression in group.names}  # type: ignore[index]
    found = [u for u in USAGE.finditer(log) if any(stem in u["name"] for stem in stems)]
    assert len(found) == len(group.names)
    for usage in found:
        assert int(usage["registers"]) <= group.registers, usage[0]
        assert (usage["stores"], usage["loads"]) == ("0", "0"), usage[0]


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("statistics in place", r"ld\.global\.\S*v4\.f32"),
        ("gradient in place", r"ld\.global\.\S*v4\.f32"),
        ("gradient in place", r"st\.global\.v4\.f32"),
        ("sigmoid in place", r"st\.global\.v4\.f32"),
        ("updates", r"ld\.(global\.)?v4\.f32"),
    ],
)
def test_float_is_read_and_written_16_bytes_at_a_time(name, instruction):
    assembly = compiled(name, 90, ptx=True)[1]
    assert re.search(instruction, assembly), sorted(
        set(re.findall(r"[ls][dt]\.global\S*", assembly))
    )


def test_a_spill_would_be_seen(monkeypatch):
    """The check above reads the log rightly: a kernel that must spill is found to."""
    crowded = text("overlap.cu").replace("V::resident", "8")
    monkeypatch.setitem(globals(), "text", lambda file: crowded)
    log, _ = compiled.__wrapped__("statistics in place", 70)
    assert any(int(usage["stores"]) > 0 for usage in USAGE.finditer(log))
