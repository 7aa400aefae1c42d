"""The records by which kernels are told what to do: of a call, of a load, of a run of voxels."""

from __future__ import annotations

import numpy as np

from fastseg_kernels.constants import MAX_DIMS
from fastseg_kernels.cpu.operands import OPERAND

MOST_TALLIES = 2
TALLY = np.dtype(
    [
        ("kernel", np.int64),  # address of one of `histograms`
        ("bins", np.int64),
        ("octave_bits", np.int64),  # of errors: 2^octave_bits bins in an octave
        ("lowest", np.int64),  # of errors: exponent of the first octave
        ("first_word", np.int64),  # among those of a row in a task
        ("first_column", np.int64),  # among those of a row's counts
    ]
)
"""What counts voxels in a histogram, or looks their slopes up."""

JOB = np.dtype(
    [
        ("logits", OPERAND),
        ("targets", OPERAND),
        ("mask", OPERAND),
        ("weights", OPERAND),
        ("out", OPERAND),
        ("ndim", np.int64),
        ("sizes", np.int64, (MAX_DIMS,)),
        ("classes", np.int64),
        ("voxels", np.int64),  # of one row
        ("block", np.int64),  # voxels of one block
        ("blocks", np.int64),  # of one row
        ("inner_classes", np.int64),  # classes of one task: 1, or all
        ("direct", np.int64),  # 1: logits and targets are read where they lie
        ("labelled", np.int64),  # 1: targets are labels, also where the loop wants reals
        ("target_mode", np.int64),
        ("has_ignore", np.int64),
        ("ignore_label", np.int64),
        ("ignore_real", np.float64),
        ("positive_label", np.int64),
        ("positive_real", np.float64),
        ("threshold", np.float64),
        ("gamma", np.float64),  # of the focal sums
        ("excluded_input", np.float64),
        ("load", np.int64),  # address of the load kernel; only called unless direct
        ("classify", np.int64),  # address of a kernel of `label_codes`
        ("store", np.int64),  # address of the store kernel; only called unless in_place
        ("in_place", np.int64),  # 1: the gradient is computed where out lies
        ("of_run", np.int64),  # address of the kernel that computes, `tiles.sums_kernel` or a slope
        ("columns", np.int64),  # of the sums
        ("undefined_column", np.int64),  # where the walk counts NaN; 0: nowhere
        ("kept", np.int64),  # 1: statistics keep something in out
        ("probs", np.int64),  # 1: predictions are probabilities
        ("only_labels", np.int64),  # 1: soft targets are invalid
        ("sums", np.int64),  # address of float64 (samples, classes, blocks, columns)
        ("tallied", np.int64),  # how many of the tallies there are
        ("tallies", TALLY, (MOST_TALLIES,)),
        ("curve", np.int64),  # 1: one counts the largest class of soft targets
        ("row_words", np.int64),  # that a task counts a row in
        ("counted_columns", np.int64),
        ("counts", np.int64),  # address of int64 (samples, classes, counted columns)
        ("words", np.int64),  # address of int64 (parts, rows of a task, words), zeros
        ("parts", np.int64),  # how many calls of the kernel have taken their part of the words
        ("signed", np.int64),  # address of (samples, classes, words): slopes of a histogram
        ("slopes", np.int64),  # address of (samples, classes, voxels), of the type computed in
        ("coefficients", np.int64),  # address of float64 (samples, classes, coefficients)
        ("coefficient_width", np.int64),
    ]
)
"""What the kernels of the overlap family are told; addresses are of the caller's memory."""

PARTS = JOB.fields["parts"][1]  # type: ignore[index]
"""Where in a job the number of its parts lies that have begun."""


LOAD_REQUEST = np.dtype(
    [
        ("n", np.int64),
        ("c", np.int64),
        ("voxel", np.int64),  # of row (n, c), the first one
        ("count", np.int64),
        ("padded", np.int64),  # what is brought goes up to here, with excluded voxels
        ("x", np.int64),  # addresses of the buffers
        ("p", np.int64),
        ("w", np.int64),
        ("excluded", np.int64),
        ("scratch", np.int64),  # address of `SCRATCH_WORDS` words
        ("labels", np.int64),  # of a kernel of `label_codes`: where labels are, codes are to be,
        ("codes", np.int64),
        ("brief", np.int64),  # and ``count`` words of scratch
        ("x_at", np.int64),  # answer: where predictions and targets are, if not in the buffers
        ("p_at", np.int64),
        ("left_out", np.int64),  # answer: how many of the ``count`` voxels are excluded
    ]
)
"""What a load kernel is asked, and its answer. ``excluded`` is filled only if a voxel is."""

RUN = np.dtype(
    [
        ("x", np.int64),  # addresses of predictions, targets and weights
        ("p", np.int64),
        ("w", np.int64),
        ("count", np.int64),  # of voxels; for sums, of tiles
        ("out", np.int64),  # address of float64 sums, or of the numbers that are written
        ("keep", np.int64),  # where statistics keep a number for each voxel, if they do
        ("coefficients", np.int64),  # address of the row's, float64
        ("bad", np.int64),  # answer of sums: whether there is something to be counted
    ]
)
"""Contiguous voxels, as the kernels that compute are told of them."""
