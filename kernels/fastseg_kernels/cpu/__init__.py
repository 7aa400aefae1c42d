"""The CPU backend: kernels compiled by Numba.

``fastseg.dispatch.Backend`` types what it exports.
"""

from fastseg_kernels.cpu.compiled import cache_directory
from fastseg_kernels.cpu.evaluate import evaluate
from fastseg_kernels.cpu.labels import count_labels
from fastseg_kernels.cpu.passes import gradient, statistics
from fastseg_kernels.cpu.sigmoid import sigmoid
from fastseg_kernels.cpu.threads import describe, get_num_threads, set_num_threads

__all__ = [
    "cache_directory",
    "count_labels",
    "describe",
    "evaluate",
    "get_num_threads",
    "gradient",
    "set_num_threads",
    "sigmoid",
    "statistics",
]
