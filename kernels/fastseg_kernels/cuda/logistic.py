"""The logistic function over a volume."""

from __future__ import annotations

from math import prod

from fastseg_kernels.cuda.job import Jobs, counter, is_run, make_job
from fastseg_kernels.cuda.modules import THREADS, TYPES
from fastseg_kernels.cuda.runtime import Device
from fastseg_kernels.problem import compute_type
from fastseg_kernels.views import View

FILE = "logistic.cu"


def sigmoid(device: Device, x: View, out: View) -> None:
    """Write the logistic function of ``x`` to ``out``, an array of the same shape (or ``x``)."""
    voxels = prod(x.shape)
    if voxels == 0:
        return
    shape = (1, 1, *x.shape)
    rows = {
        name: view.layout._replace(shape=shape, strides=(0, 0, *view.strides))
        for name, view in (("logits", x), ("out", out))
    }
    job, geometry = make_job(rows)
    real, grid = TYPES[compute_type(x.dtype)], device.grid(-(-voxels // (4 * THREADS)))
    runs = all(is_run(geometry, k, layout) for k, layout in enumerate(rows.values()))
    if x.dtype == out.dtype and runs:
        name = f"sigmoid_in_place<{real}, {TYPES[x.dtype]}>"
        device.launch(FILE, name, grid, x.address, voxels, out.address)
        return
    name = f"sigmoid_anywhere<{real}, {counter(voxels)}>"
    Jobs(job).launch(device, FILE, name, grid, (x.address, 0, 0, 0, out.address))
