"""Volumes in chunks: a plain loop over memory maps, memory bounded by the chunk."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import fastseg as fs

LOSS = fs.BCE() + fs.SoftJaccard()


def save(path, shape, dtype):
    rng = np.random.default_rng(0)
    for name, kind in (("logits", dtype), ("targets", np.uint8)):
        array = np.lib.format.open_memmap(path / f"{name}.npy", "w+", kind, shape)
        noise = rng.standard_normal(shape, np.float32)
        array[...] = noise * 3 if name == "logits" else noise > 0.7
    return tuple(np.load(path / f"{name}.npy", mmap_mode="r") for name in ("logits", "targets"))


@pytest.mark.parametrize(
    ("shape", "step", "dtype", "compute_dtype", "rtol"),
    [
        # Slabs of whole tiles (256 voxels) are added up in the same groups as the whole volume.
        ((96, 64, 64), 16, np.float32, "auto", 1e-12),
        ((96, 61, 67), 7, np.float64, "auto", 1e-12),
        ((96, 61, 67), 7, np.float32, "float64", 1e-12),
        ((96, 61, 67), 7, np.float16, "float64", 1e-12),
        # Otherwise float32 groups of eight voxels fall differently.
        ((96, 61, 67), 7, np.float32, "auto", 1e-8),
    ],
)
def test_chunk_loop_equals_memory(tmp_path, shape, step, dtype, compute_dtype, rtol):
    logits, targets = save(tmp_path, shape, dtype)
    loss = LOSS.replace(layout="", compute_dtype=compute_dtype)
    slabs = [slice(i, i + step) for i in range(0, shape[0], step)]
    s = sum(loss.statistics(logits[k], targets[k], samples="volume") for k in slabs)
    _, expected_grad, whole = loss.evaluate(np.array(logits), np.array(targets))
    np.testing.assert_allclose(s.array, whole.array, rtol=rtol)
    np.testing.assert_allclose(loss.value(s), loss.value(whole), rtol=rtol)
    grad = np.lib.format.open_memmap(tmp_path / "grad.npy", "w+", dtype, shape)
    for k in slabs:
        loss.gradient(logits[k], targets[k], s, out=grad[k])
    np.testing.assert_allclose(grad, expected_grad, rtol=4 * np.finfo(dtype).eps + rtol)


def test_compute_dtype_float64_is_that_of_float64_logits():
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((2, 3, 999))).astype(np.float32)
    targets = rng.random(logits.shape) < 0.4
    loss = LOSS.replace(compute_dtype="float64")
    value, grad, s = loss.evaluate(logits, targets, track=("hard",))
    double, double_grad, double_s = LOSS.evaluate(logits.astype(float), targets, track=("hard",))
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, double, rtol=1e-15)
    np.testing.assert_allclose(s.array, double_s.array, rtol=1e-15)
    assert grad.dtype == np.float32
    np.testing.assert_allclose(grad, double_grad, rtol=0.5001 * 2.0**-23)


def test_nothing_of_the_volume_s_size_is_allocated(tmp_path):
    logits, targets = save(tmp_path, (64, 128, 128), np.float32)
    strided, labels = logits[:, ::2], targets[:, ::2].astype(np.int64)
    weights = np.ones(strided.shape, np.float16)
    out = np.empty(strided.shape, np.float32)
    loss = LOSS.replace(layout="")
    loss.value_and_grad(strided, labels, weight_map=weights, out=out)  # compile
    tracemalloc.start()
    loss.value_and_grad(strided, labels, weight_map=weights, out=out)
    loss.value_and_grad(strided, labels, weight_map=weights, out=out, mask=labels >= 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    mask = labels.size  # the comparison above is ours
    assert peak - mask < 200_000
