"""g++ and its output: translation units become libraries, once per text and set of flags."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"
MAIN_HEADER = INCLUDE / "hostcuda.hpp"
CACHE = Path(
    os.environ.get("HOSTCUDA_CACHE") or Path(tempfile.gettempdir()) / f"hostcuda-{os.getuid()}"
)
FLAGS = (
    "-std=c++20", "-O1", "-g", "-fPIC", "-pthread", "-march=x86-64-v3", "-ffp-contract=off",
    "-Wall", "-Wno-unknown-pragmas", "-DHOSTCUDA",
    "-fno-strict-aliasing",  # kernels read four floats as one uint4
    "-fno-gnu-unique", "-fvisibility=hidden",  # two libraries must not share a kernel's __shared__
    "-fno-extern-tls-init",
)  # fmt: skip


class HostCudaError(RuntimeError):
    """A kernel that g++ refuses, or that went wrong while it ran."""


def flags(sanitize: str) -> tuple[str, ...]:
    """Return the flags of a build; ``sanitize`` is a list as g++'s -fsanitize takes it."""
    if not sanitize:
        return FLAGS
    return (
        *FLAGS,
        f"-fsanitize={sanitize}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    )


def library(source: str, sanitize: str = "") -> Path:
    """Return the shared library of a translation unit that includes hostcuda.hpp first."""
    header = _precompiled(sanitize)
    target = CACHE / f"{_key(header.parent.name, source)}.so"

    def build(temporary: Path) -> None:
        text = target.with_suffix(".cpp")
        text.write_text(source)
        arguments = (f"-I{header.parent}", f"-I{INCLUDE}", "-shared", str(text))
        _compile((*flags(sanitize), *arguments, "-o", str(temporary)))

    return _once(target, build)


def _precompiled(sanitize: str) -> Path:
    """Return the compiled header, which g++ takes in place of the text: half of a build's time."""
    texts = sorted(INCLUDE.rglob("*.*"))
    key = _key(*(path.read_bytes() for path in texts), *flags(sanitize))
    target = CACHE / key / "hostcuda.hpp.gch"
    arguments = (*flags(sanitize), f"-I{INCLUDE}", "-x", "c++-header", str(MAIN_HEADER))
    return _once(target, lambda temporary: _compile((*arguments, "-o", str(temporary))))


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode() if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()[:24]


def _compile(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise HostCudaError(f"g++ refuses the kernel:\n{done.stderr[:8000]}")


def _once(target: Path, build: Callable[[Path], None]) -> Path:
    """Build a file if it is not there; processes that want it at once wait for the first."""
    for folder in (CACHE, target.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid != os.getuid() or about.st_mode & 0o022:  # machine code is loaded from here
            raise HostCudaError(f"others may write to {folder}; set HOSTCUDA_CACHE")
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            build(temporary)
            temporary.replace(target)
    return target
