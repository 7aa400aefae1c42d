"""The CUDA kernels under the sanitizers, on sizes that leave tails, in layouts with strides.

test_hostcuda.py proves that planted bugs are found this way.
"""

from __future__ import annotations

import pytest

from test_hostcuda import LIBRARIES, pytestmark, sanitized  # noqa: F401

PROGRAM = """
import sys
import numpy as np
import fastseg as fs
import fastseg.formula, fastseg.functional, fastseg.losses, fastseg.metrics, fastseg.updater
from hostcuda.runtime import host_backend

backend = host_backend()
for module in (fs.losses, fs.functional, fs.metrics, fs.updater):
    module.backend_of = lambda library, array: backend
fs.formula.cpu = lambda: backend

rng = np.random.default_rng(0)
loss = fs.BCE() + fs.SoftJaccard()
for shape in sys.argv[1:]:
    shape = tuple(map(int, shape.split("x")))
    x = rng.standard_normal(shape).astype(np.float32)
    t = (rng.random(shape) < 0.3).astype(np.uint8)
    out = np.empty_like(x)
    loss.value_and_grad(x, t, out=out)
    loss.value_and_grad(x, t, mask=t == t, out=np.empty_like(x.T).T)
    if shape[1] > 1:
        several = fs.CrossEntropy(label_smoothing=0.1) + fs.SoftJaccard()
        several.evaluate(x, t[:, 0], track=("hard",), out=out)
        several.value_and_grad(x, t.astype(np.float32), weight_map=np.abs(x[:, 0]))
    fs.sigmoid(x, out=out)
    fs.sigmoid(x[..., ::2])
    fs.jaccard_index(t[:, 0], t[:, 0], empty=1.0)
    opt = fs.Adam([x, out], lr=0.1)
    opt.step([np.ones_like(x), np.ones_like(x)], zero_grads=True)
    half = x.astype(np.float16)
    opt = fs.Adam([half, out], lr=0.1, amsgrad=True, state_dtype="bfloat16")
    opt.step([half + half, np.ones_like(x)], max_norm=1.0, skip_non_finite=True, zero_grads=True)
print("clean")
"""


@pytest.mark.parametrize(
    ("sanitize", "shapes"),
    [("address,undefined", ("1x1x1", "2x3x5x7", "1x2x4099")), ("thread", ("2x1x4099",))],
)
def test_kernels_are_clean(sanitize, shapes):
    done = sanitized(sanitize, *shapes, program=PROGRAM)
    assert (done.returncode, done.stdout.strip()) == (0, "clean"), done.stderr[-3000:]
