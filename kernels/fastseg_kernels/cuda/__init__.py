"""The CUDA backend: kernels in CUDA C++, launched through CuPy.

It exports what ``fastseg.dispatch.Backend`` types, as the CPU backend does.
"""

from fastseg_kernels.cuda.evaluation import evaluate
from fastseg_kernels.cuda.labels import count_labels
from fastseg_kernels.cuda.logistic import sigmoid
from fastseg_kernels.cuda.overlap import gradient, statistics
from fastseg_kernels.cuda.updates import Table as update_table
from fastseg_kernels.cuda.updates import adam, gradient_descent, momentum, momentum_pytorch

__all__ = [
    "adam",
    "count_labels",
    "evaluate",
    "gradient",
    "gradient_descent",
    "momentum",
    "momentum_pytorch",
    "sigmoid",
    "statistics",
    "update_table",
]
