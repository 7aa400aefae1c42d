"""A stand-in for the part of CuPy that launches kernels: the same CUDA text, run on the CPU.

docs/cuda_without_gpu.md tells how it works and what it finds. Environment variables, read at each
launch: ``HOSTCUDA_ORDER`` (0 forward, 1 reverse, more: shuffled), ``HOSTCUDA_WORKERS`` (blocks at a
time); read when a module is compiled: ``HOSTCUDA_SANITIZE`` (as g++'s -fsanitize).
"""

from hostcuda.build import HostCudaError
from hostcuda.module import RawKernel, RawModule

__all__ = ["HostCudaError", "RawKernel", "RawModule"]
