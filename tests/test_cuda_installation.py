"""What is said of an installation that lacks something, and of errors of CUDA."""

from __future__ import annotations

import inspect
import re
import sys
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch

import cases
from cuda_device import LOSS, on_device
from fastseg import info, libraries
from fastseg_kernels.cuda import installation
from fastseg_kernels.cuda.runtime import CuPyDriver
from hostcuda import cupy
from stand_in import forget_libraries

pytestmark = pytest.mark.usefixtures("cupy_stand_in")


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(installation.InstallationError, match="CuPy, which launches") as caught:
        libraries.CUDAArray()
    assert "\n" not in str(caught.value)
    assert "pip install 'cupy-cuda12x[ctk]>=14.2'" in str(caught.value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(installation.InstallationError, match=r"cupy-cuda13x\[ctk\]"):
        installation.cupy_module()


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class DynamicLibNotFoundError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
            "the NVIDIA driver is missing or older",
        ),
        (CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device"), "no NVIDIA GPU is visible"),
        (DynamicLibNotFoundError("Failure finding libnvrtc.so"), "NVRTC, which compiles"),
    ],
)
def test_errors_of_an_installation_are_one_line(monkeypatch, error, line):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cupy.cuda, "Device", fail)
    with pytest.raises(installation.InstallationError, match=line) as caught:
        LOSS(*on_device(*cases.make((1, 1, 3))))
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_no_memory_left_keeps_its_class(monkeypatch):
    x, t = on_device(*cases.make((1, 1, 3)))
    LOSS(x, t)

    def fail(*arguments: object) -> None:
        raise OutOfMemoryError("Out of memory allocating 512 bytes")

    monkeypatch.setattr(cupy, "empty", fail)
    with pytest.raises(OutOfMemoryError) as caught:
        LOSS(x, t)
    (note,) = caught.value.__notes__
    assert note.startswith("fastseg: the device has no memory left") and "pass out=" in note


@pytest.mark.parametrize(
    ("driver", "cupy_found", "hint"),
    [
        (None, None, "computes on the CPU: no NVIDIA driver was found"),
        ("11.8", None, "the NVIDIA driver supports CUDA 11.8 only: update it to one for CUDA 12"),
        ("12.4", None, r"for the GPU: pip install 'cupy-cuda12x\[ctk\]"),
        ("13.1", None, r"for the GPU: pip install 'cupy-cuda13x\[ctk\]"),
        ("14.0", None, r"for the GPU: pip install 'cupy-cuda13x\[ctk\]"),
        ("12.4", ("cupy-cuda13x", "14.2.0"), "the NVIDIA driver is missing or older than the CUDA"),
    ],
)
def test_info_says_what_to_do(monkeypatch, driver, cupy_found, hint):
    def fail() -> int:
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    monkeypatch.setattr(installation, "driver_version", lambda: driver)
    monkeypatch.setattr(installation, "installed_cupy", lambda: cupy_found)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail, raising=False)
    found = info.collect()["gpu"]
    assert re.match(hint, found["hint"]) and "\n" not in found["hint"]


def test_info_names_the_devices(monkeypatch):
    properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0}
    monkeypatch.setattr(installation, "driver_version", lambda: "13.0")
    monkeypatch.setattr(installation, "installed_cupy", lambda: ("cupy-cuda13x", "14.2.0"))
    runtime = cupy.cuda.runtime
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: 1, raising=False)
    monkeypatch.setattr(runtime, "getDeviceProperties", lambda index: properties, raising=False)
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    monkeypatch.setattr(cupy.cuda, "nvrtc", nvrtc, raising=False)
    found = info.collect()["gpu"]
    assert found["devices"] == ["NVIDIA H200, compute capability 9.0"]
    assert found["hint"] == "arrays of CuPy and CUDA tensors are computed on their GPU"
    monkeypatch.setattr(installation, "driver_version", lambda: "12.8")
    assert "by NVRTC 13.0, and the driver supports CUDA 12.8" in info.collect()["gpu"]["hint"]


def test_the_real_cupy_without_a_gpu(monkeypatch):
    """What CuPy raises there is known to the advice; what else it has is what is used of it."""
    monkeypatch.delitem(sys.modules, "cupy")
    real = pytest.importorskip("cupy")
    if real.cuda.is_available():
        pytest.skip("there is a GPU: tests/test_gpu.py")
    forget_libraries()
    with pytest.raises(installation.InstallationError, match="the NVIDIA driver is missing"):
        CuPyDriver(0)
    runtime = real.cuda.runtime
    source = inspect.getsource(real.empty_like)
    assert "subok" in source and "raise TypeError" in source  # which the stand-in does as well
    names = ("eventRecord", "streamWaitEvent", "pointerGetAttributes", "getDevice")
    assert all(hasattr(runtime, name) for name in names)
    for path in (  # what the stand-in takes, CuPy takes
        "ndarray.get", "ndarray.set", "empty", "empty_like", "asarray", "RawModule",
        "RawModule.get_function", "get_default_memory_pool", "cuda.Device", "cuda.Event",
        "cuda.Stream.is_capturing", "cuda.using_allocator", "cuda.get_current_stream",
    ):  # fmt: skip
        theirs, ours = attrgetter(path)(real), attrgetter(path)(cupy)
        if not callable(ours):
            continue
        taken = set(inspect.signature(ours).parameters) - {"self", "index", "array", "values"}
        try:
            known = set(inspect.signature(theirs).parameters)
        except ValueError:  # of Cython, with the signature in its first line
            known = set(re.findall(r"(\w+)(?= *[=,)])", theirs.__doc__.partition("\n")[0]))
        assert taken <= known, (path, taken, known)


def test_other_errors_pass():
    with pytest.raises(KeyError), installation.explained():
        raise KeyError("x")
