"""The CPU backend: kernels compiled by Numba.

``fastseg.dispatch.Backend`` types what it exports.
"""

from fastseg_kernels.cpu.compiled import cache_directory, compile_target
from fastseg_kernels.cpu.evaluation import evaluate, prepare
from fastseg_kernels.cpu.labels import count_labels
from fastseg_kernels.cpu.logistic import sigmoid
from fastseg_kernels.cpu.memory import (
    counter,
    current_stream,
    from_host,
    is_recording,
    state_like,
    to_host,
)
from fastseg_kernels.cpu.passes import gradient, keeps, sorted_slopes, statistics
from fastseg_kernels.cpu.small_calls import small_call
from fastseg_kernels.cpu.threads import (
    are_threads_chosen,
    describe,
    get_num_threads,
    limit_threads,
    set_num_threads,
)
from fastseg_kernels.cpu.updates import Table as update_table

__all__ = [
    "are_threads_chosen",
    "cache_directory",
    "compile_target",
    "count_labels",
    "counter",
    "current_stream",
    "describe",
    "evaluate",
    "from_host",
    "get_num_threads",
    "gradient",
    "is_recording",
    "keeps",
    "limit_threads",
    "prepare",
    "set_num_threads",
    "sigmoid",
    "small_call",
    "sorted_slopes",
    "state_like",
    "statistics",
    "to_host",
    "update_table",
]
