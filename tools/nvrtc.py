"""NVIDIA's compiler and disassembler as pip installs them: no GPU, driver or toolkit is needed."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nvidia

from fastseg_kernels.cuda.modules import OPTIONS

CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy adds: small numbers are flushed to 0, and functions without a word are the device's."""
FOLDERS = {
    12: ("cuda_nvrtc/lib", ("cuda_runtime/include", "cuda_cccl/include")),
    13: ("cu13/lib", ("cu13/include", "cu13/include/cccl")),
}
"""Where the packages of a CUDA version put NVRTC and the headers."""


class Compiled(NamedTuple):
    """What the compiler says and makes of a text; ``names`` are those of the kernels in it."""

    log: str
    code: bytes  # PTX, or a cubin
    names: dict[str, str]


def _find(relative: str) -> Path:
    for base in nvidia.__path__:
        if Path(base, relative).exists():
            return Path(base, relative)
    raise FileNotFoundError(f"no nvidia/{relative}: install the extra [test]")


@cache
def _library(major: int) -> ctypes.CDLL:
    folder = _find(FOLDERS[major][0])
    return ctypes.CDLL(str(folder / f"libnvrtc.so.{major}"))


def compile_text(
    text: str, names: tuple[str, ...], architecture: int, *, major: int = 12, ptx: bool = False
) -> Compiled:
    """Compile a CUDA text with the options that CuPy gives; RuntimeError with the log if it fails.

    Parameters
    ----------
    names
        Name expressions of the kernels.
    architecture
        90 for sm_90.
    major
        Of the CUDA version: 12 or 13.
    ptx
        Stop at PTX; else go on to machine code, whose assembler reports registers in the log.
    """
    nvrtc, program = _library(major), ctypes.c_void_p()

    def call(function: str, *arguments: Any) -> int:
        code: int = getattr(nvrtc, function)(*arguments)
        return code

    def check(function: str, *arguments: Any) -> None:
        if code := call(function, *arguments):
            raise RuntimeError(f"{function} failed with code {code}")

    def read(what: str) -> bytes:
        size = ctypes.c_size_t()
        check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        check(f"nvrtcGet{what}", program, buffer)
        return buffer.raw[: size.value]

    check("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    try:
        for name in names:
            check("nvrtcAddNameExpression", program, name.encode())
        target = "compute" if ptx else "sm"
        options = [*OPTIONS, *CUPY_OPTIONS, f"-arch={target}_{architecture}", "--ptxas-options=-v"]
        options += [f"-I{_find(folder)}" for folder in FOLDERS[major][1]]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = call("nvrtcCompileProgram", program, len(options), array)
        log = read("ProgramLog").decode().rstrip("\0")
        if failed:
            raise RuntimeError(f"NVRTC refuses the text:\n{log}")
        lowered, pointer = {}, ctypes.c_char_p()
        for name in names:
            check("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(pointer))
            assert pointer.value is not None
            lowered[name] = pointer.value.decode()
        return Compiled(log, read("PTX" if ptx else "CUBIN"), lowered)
    finally:
        call("nvrtcDestroyProgram", ctypes.byref(program))


def disassemble(cubin: bytes) -> str:
    """Return the machine code of a cubin as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        command = [str(_find("cu13/bin/nvdisasm")), "-c", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
