"""CUDA text, and the kernels compiled from it.

A header's text is put in the place of its ``#include``: what CuPy remembers of compiled modules, it
remembers by the text that it is given and not by what that includes. Constants that Python and CUDA
share are written into ``constants.cuh`` from `fastseg_kernels.constants`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from fastseg_kernels import constants, updates

THREADS = 256
"""Of a block: four warps for each of a multiprocessor's four schedulers at half occupancy."""
GROUP = 16
"""Voxels that a thread adds up in float32 before it widens them, as a lane of the CPU does."""
TYPES = {
    "float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16",
}  # fmt: skip
"""What CUDA calls the floating-point dtypes."""
CHUNK = 4096
"""Elements of a parameter update's task, or a part of them: four for each thread, four times."""
OPTIONS = ("--std=c++17",)
TABLE_NUMBERS = 448
"""Numbers of a table of terms that are passed by value: a kernel's arguments take 4096 bytes, and
this is 20 terms of 6 classes. Larger tables are uploaded."""
SOFTMAX_CLASSES = 256
"""Classes whose coefficients fit the shared memory that every GPU has, nine doubles each. The CPU's
limit is ``softmax_stage.MOST_CLASSES``; README promises the smaller."""
LABEL_CLASSES = 2048
"""Classes whose counts fit the shared memory that every GPU has, three numbers of 4 bytes each."""

HISTOGRAM_FLAGS = {"logit": "CURVE", "prob": "CURVE", "hinge": "LOVASZ", "errors": "LOVASZ"}
"""What the first words of histograms' families are in C++."""

_INCLUDE = re.compile(r'#include "(\w+\.cuh)"\n')
_FOLDER = Path(__file__).parent


def _enum(prefix: str, names: Any) -> str:
    entries = ", ".join(f"{prefix}_{name.upper()}" for name in names)
    return f"enum {{ {entries} }};\n"


def shared_constants() -> str:
    """Return the text of ``constants.cuh``."""
    return "".join(
        [
            f"constexpr int MAX_DIMS = {constants.MAX_DIMS};\n",
            f"constexpr int THREADS = {THREADS};  // of a block\n",
            f"constexpr int GROUP = {GROUP};  // voxels added up by a thread before widening\n",
            f"constexpr int UPDATE_COEFFICIENTS = {updates.COEFFICIENTS};\n",
            f"constexpr unsigned STEP_STRIDE = {updates.STEP_STRIDE}u;\n",
            f"constexpr int TABLE_NUMBERS = {TABLE_NUMBERS};\n",
            f"constexpr int SOFTMAX_CLASSES = {SOFTMAX_CLASSES};\n",
            f"constexpr int LABEL_CLASSES = {LABEL_CLASSES};\n",
            f"constexpr int TARGETS_AS_STORED = {constants.TARGETS_AS_STORED};\n",
            f"constexpr int TARGETS_NONZERO = {constants.TARGETS_NONZERO};\n",
            f"constexpr int TARGETS_EQUAL = {constants.TARGETS_EQUAL};\n",
            f"constexpr int COEFFICIENTS = {constants.COEFFICIENTS};\n",
            f"constexpr int CURVE_BINS = {constants.CURVE_BINS};\n",
            f"constexpr int OCTAVES = {constants.OCTAVES};\n",
            f"constexpr int FRACTION_BITS = {constants.FRACTION_BITS};\n",
            _enum("COEFFICIENT", constants.COEFFICIENT_NAMES),
            _enum("CODE", constants.DTYPE_CODES),
            _enum("TERM", (*constants.TERM_FIELDS, "fields")),
            _enum("KIND", constants.KINDS),
            _enum("FORM", constants.FORMS),
            _enum("LINK", constants.LINKS),
            _enum("SCOPE", constants.SCOPES),
            _enum("EMPTY", constants.EMPTY),
            _enum("NORMALIZE", constants.NORMALIZE),
            _enum("REDUCTION", constants.REDUCTIONS),
            _enum("SUM", (*constants.PICKED, "number")),
        ]
    )


def flags(families: frozenset[str]) -> str:
    """Return the C++ template argument that stands for families."""
    plain = constants.without_gamma(families)
    names = {HISTOGRAM_FLAGS.get(family.split("_")[0], family.upper()) for family in plain}
    return " | ".join(sorted(names)) or "0"


def slope_flags(families: frozenset[str]) -> str:
    """Return the template argument for those families whose gradient is code of its own."""
    own = {*constants.histograms(families)} - {*constants.CURVES}
    plain = constants.without_gamma(families)
    return flags(frozenset(own | (plain & (constants.SLOPE_FAMILIES | {"sorted"}))))


@cache
def text(file: str) -> str:
    """Return the text of a .cu file with its headers in place, each once."""
    seen: set[str] = set()

    def read(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        if name == "constants.cuh":
            return shared_constants()
        content = (_FOLDER / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: read(found[1]), content)

    return read(file)
