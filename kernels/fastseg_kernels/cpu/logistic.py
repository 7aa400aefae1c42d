"""The logistic function over a volume: one read, one write."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import numpy as np

from fastseg_kernels.cpu import threads
from fastseg_kernels.cpu.compiled import Kernel, function
from fastseg_kernels.cpu.conversions import conversion
from fastseg_kernels.cpu.elementary import REALS, make_exp_negative
from fastseg_kernels.cpu.intrinsics import address_of, carray, pointer_to, stack_array, wide_vectors
from fastseg_kernels.cpu.jobs import JOB
from fastseg_kernels.cpu.operands import SCRATCH_WORDS, STAGE, load_converted, store_converted
from fastseg_kernels.cpu.overlap import block_length
from fastseg_kernels.cpu.plans import fill_geometry
from fastseg_kernels.cpu.threads import SHARED_FROM
from fastseg_kernels.problem import compute_type
from fastseg_kernels.views import View


@cache
def sigmoid_kernel(real_name: str) -> Kernel:
    """Compile the kernel that writes sigma(``job.logits``) to ``job.out``."""
    real = REALS[real_name]
    T = real.scalar
    zero, one = T(0), T(1)
    exp_negative = make_exp_negative(real)

    @function
    def probabilities(x, count, q):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(count):
            e = exp_negative(abs(x[i]))
            r = one / (one + e)
            q[i] = r if x[i] >= zero else e * r

    def sigmoid(job_address, first, last):  # type: ignore[no-untyped-def]
        job = carray(pointer_to(job_address, JOB), 1)[0]
        x, q = stack_array(STAGE, T), stack_array(STAGE, T)
        scratch = address_of(stack_array(SCRATCH_WORDS, np.int64))
        for block in range(first, last):
            voxel, end = block * job.block, min(job.voxels, (block + 1) * job.block)
            while voxel < end:
                count = min(STAGE, end - voxel)
                raw = load_converted(job.logits, job, 0, 0, voxel, count, scratch, address_of(x))
                probabilities(pointer_to(raw, T), count, q)
                store_converted(job.out, job, 0, 0, voxel, count, address_of(q), scratch)
                voxel += count

    return Kernel(sigmoid, f"sigmoid-{real_name}")


def sigmoid(x: View, out: View) -> None:
    """Write the logistic function of ``x`` to ``out``, an array of the same shape (or ``x``)."""
    job: Any = np.zeros(1, JOB)
    record = job[0]
    shape = (1, 1, *x.shape)
    rows = {
        name: view.layout._replace(shape=shape, strides=(0, 0, *view.strides))
        for name, view in (("logits", x), ("out", out))
    }
    fill_geometry(record, rows)
    record["logits"]["address"], record["out"]["address"] = x.address, out.address
    real, voxels = compute_type(x.dtype), prod(x.shape)
    record["logits"]["convert"] = conversion(x.dtype, real)
    record["out"]["convert"] = conversion(real, out.dtype)
    block = block_length(voxels)
    record["voxels"], record["block"] = voxels, block
    kernel = sigmoid_kernel(real)
    tasks = -(-voxels // block)
    threads.run(kernel, job.ctypes.data, tasks, voxels >= SHARED_FROM, (job, x, out))
