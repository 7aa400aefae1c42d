"""The CUDA text through NVIDIA's own compilers, for real architectures; no GPU or driver is needed.

What the assembler says of registers and of spills to memory, and the number of instructions of the
loops, are held to the bounds below.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import pytest

from fastseg_kernels.cuda.modules import TYPES, text
from fastseg_kernels.cuda.updates import RULES
from tools.count_sass import KERNELS, count
from tools.nvrtc import Compiled, compile_text

USUAL_TARGETS = [(12, 70), (12, 80), (12, 90), (13, 75), (13, 100), (13, 120)]
TARGETS = [
    *((12, architecture) for architecture in (70, 75, 80, 90, 100, 120)),
    *((13, architecture) for architecture in (75, 80, 90, 100, 120)),
]
"""CUDA versions and architectures; NVRTC 13 knows none below sm_75. The usual ones take minutes
already; the others are "slow"."""
FORMS = "OVERLAP_L1 | OVERLAP_SQUARED"
SMOOTHED = "BCE_FLIPPED | BCE_SPLIT"
FAMILIES = ("BCE | OVERLAP", "BCE | HARD | OVERLAP", "BCE_SPLIT | HARD | OVERLAP", "HARD")
KINDS = [(k, a) for k in ("BINARY", "SOFT", "WEIGHTED") for a in ("SIGMOID", "PROBS")]


def in_place(verb: str, real: str, *families: str, target: str = "unsigned char") -> list[str]:
    kind = "SOFT" if target == "float" else "BINARY"
    return [
        f"{verb}_in_place<Variant<{real}, {kind}, SIGMOID, {names}>, {element}, {target}>"
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


def updates(*types: str) -> list[str]:
    """Return the updates of parameters, and perhaps states, of these types."""
    return [f"update<{rule}, {pair}>" for rule in RULES.values() for pair in types]


def sigmoids() -> list[str]:
    pairs = ((element, "double" if element == "double" else "float") for element in TYPES.values())
    return [f"sigmoid_in_place<{real}, {element}>" for element, real in pairs]


def softmax(verb: str, real: str) -> list[str]:
    """Return the usual kernel, and the one that does all that there is."""
    held = {"float": "8, ", "double": "4, "}[real] if verb == "statistics" else ""
    usual, every = "0", f"FOCAL_CE | {FORMS}"
    if held:
        usual, every = "CE | OVERLAP", f"CE | CE_UNIFORM | FOCAL_CE | HARD | OVERLAP | {FORMS}"
    counted = "CURVE | LOVASZ" if held else "LOVASZ"
    plain, any_other = f"{real}, unsigned char, unsigned", "Any, Any, unsigned long long"
    return [
        f"{verb}_softmax<Softmax<{real}, true, false, {usual}>, {held}{plain}>",
        f"{verb}_softmax<Softmax<{real}, false, true, {every}>, {held}{any_other}>",
        f"{verb}_softmax<Softmax<{real}, true, false, {counted}>, {held}{plain}>",
        *([] if held else [f"errors_softmax<Softmax<{real}, false, true>, {any_other}>"]),
    ]


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
    "statistics in place, other targets": Group(
        "overlap.cu",
        [
            *in_place("statistics", "float", *FAMILIES[:3], target="float"),
            *in_place("statistics", "float", *FAMILIES[:3], target="long long"),
        ],
        152,
    ),
    "statistics anywhere": Group("overlap.cu", anywhere("statistics", *FAMILIES[2:]), 128),
    "statistics, forms": Group(
        "overlap.cu",
        [
            *in_place("statistics", "float", "BCE | OVERLAP_L1", target="float"),
            *in_place("statistics", "float", "BCE | OVERLAP_SQUARED"),
            *anywhere("statistics", f"BCE | HARD | OVERLAP | {FORMS}"),
        ],
        152,
    ),
    "statistics, focal": Group(
        "overlap.cu",
        [
            *in_place("statistics", "float", "FOCAL_BCE | OVERLAP", SMOOTHED),
            *anywhere("statistics", f"FOCAL_BCE | {SMOOTHED}"),
        ],
        152,
    ),
    "gradient, focal": Group(
        "overlap.cu",
        [
            *in_place("gradient", "float", "FOCAL_BCE", "BCE_FLIPPED"),
            *anywhere("gradient", "BCE_FLIPPED | FOCAL_BCE"),
        ],
        112,
    ),
    "gradient, forms": Group(
        "overlap.cu",
        [
            *in_place("gradient", "float", "OVERLAP_L1", target="float"),
            *in_place("gradient", "float", "OVERLAP_SQUARED"),
            *anywhere("gradient", FORMS),
        ],
        80,
    ),
    "statistics, histograms": Group(
        "overlap.cu",
        [
            *in_place("statistics", "float", "BCE | CURVE | LOVASZ | OVERLAP"),
            *anywhere("statistics", "CURVE | HARD | LOVASZ"),
        ],
        128,
    ),
    "gradient, histograms": Group(
        "overlap.cu",
        [
            *in_place("gradient", "float", "LOVASZ", "SORTED"),
            *anywhere("gradient", f"LOVASZ | {FORMS}"),
        ],
        96,
    ),
    "sorting": Group(
        "sorting.cu",
        [
            f"{kernel}<{real}>"
            for kernel in ("write_sizes", "write_labels", "weigh", "add_extensions")
            for real in ("float", "double")
        ],
        96,
    ),
    "errors": Group("overlap.cu", anywhere("errors", "0"), 80),
    "sum of tasks": Group("overlap.cu", ["add_tasks", "widen_counts"], 64),
    "evaluation": Group("evaluation.cu", ["evaluate"], 248),
    "gradient in place": Group("overlap.cu", in_place("gradient", "float", "0"), 40),
    "gradient in place, other targets": Group(
        "overlap.cu",
        [
            *in_place("gradient", "float", "0", target="float"),
            *in_place("gradient", "float", "0", target="long long"),
        ],
        48,
    ),
    "gradient in place, double": Group("overlap.cu", in_place("gradient", "double", "0"), 64),
    "gradient anywhere": Group("overlap.cu", anywhere("gradient", "0"), 80),
    "softmax statistics": Group("softmax.cu", softmax("statistics", "float"), 248),
    "softmax statistics, double": Group("softmax.cu", softmax("statistics", "double"), 224),
    "softmax gradient": Group("softmax.cu", softmax("gradient", "float"), 128),
    # 120 without the focal loss
    "softmax gradient, double": Group("softmax.cu", softmax("gradient", "double"), 184),
    "sigmoid in place": Group("logistic.cu", sigmoids(), 40),
    "sigmoid anywhere": Group(
        "logistic.cu",
        [f"sigmoid_anywhere<{real}, unsigned>" for real in ("float", "double")],
        64,
    ),
    "labels": Group("labels.cu", ["count_labels<unsigned>"], 80),
    "updates": Group("updates.cu", updates("float", "double"), 144),
    "updates with masters": Group("updates.cu", updates("__half", "__nv_bfloat16"), 96),
    "updates with small states": Group(
        "updates.cu",
        updates(*(f"{param}, __nv_bfloat16" for param in ("float", "__half", "__nv_bfloat16"))),
        104,
    ),
    "norms": Group("updates.cu", [f"squares<{element}>" for element in TYPES.values()], 64),
    "steps": Group("updates.cu", ["count_step", "norm_of"], 64),
    "memory": Group("memory.cu", ["upload", "clear"], 40),
}


POOL = ThreadPoolExecutor(2)


@cache
def compilations(
    name: str, targets: tuple[tuple[int, int], ...]
) -> dict[tuple[int, int], Future[Compiled]]:
    """Start to compile a group for these targets, two at a time."""
    group = GROUPS[name]
    return {
        (major, architecture): POOL.submit(
            compile_text, text(group.file), tuple(group.names), architecture, major=major
        )
        for major, architecture in targets
    }


USAGE = re.compile(
    r"entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.parametrize(
    ("major", "architecture"),
    [t if t in USUAL_TARGETS else pytest.param(*t, marks=pytest.mark.slow) for t in TARGETS],
)
@pytest.mark.parametrize("name", GROUPS)
def test_kernels_compile_within_their_bounds(name, major, architecture):
    usual = (major, architecture) in USUAL_TARGETS
    targets = tuple(target for target in TARGETS if (target in USUAL_TARGETS) == usual)
    group, log = GROUPS[name], compilations(name, targets)[major, architecture].result().log
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
    group = GROUPS[name]
    assembly = compile_text(text(group.file), tuple(group.names), 90, ptx=True).code.decode()
    assert re.search(instruction, assembly), sorted(
        set(re.findall(r"[ls][dt]\.global\S*", assembly))
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.title)
def test_loops_keep_their_number_of_instructions(kernel):
    """Those of docs/cuda.md, from which the bandwidth follows that they allow."""
    assert count(kernel)["all"] <= kernel.instructions


def test_a_spill_would_be_seen():
    """The check above reads the log rightly: a kernel that must spill is found to."""
    crowded = text("overlap.cu").replace("V::resident", "8")
    log = compile_text(crowded, tuple(GROUPS["statistics in place"].names), 70).log
    assert any(int(usage["stores"]) > 0 for usage in USAGE.finditer(log))
