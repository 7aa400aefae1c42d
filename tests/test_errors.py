"""Bad input: a clear error that names the argument, the rule and the value, and nothing changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastseg as fs
from cases import make

LOSS = fs.BCE() + fs.SoftJaccard()
X, T = make((2, 3, 5, 7))
X1, T1 = make((2, 1, 5, 7))


class FakeDask:
    """Stands for a dask array: recognised by its module alone."""


FakeDask.__module__ = "dask.array.core"


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def shifted_overlap() -> tuple[np.ndarray, np.ndarray]:
    memory = np.zeros(2 * 3 * 5 * 7 + 1, np.float32)
    return memory[:-1].reshape(X.shape), memory[1:].reshape(X.shape)


def strided(a: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    """Return a writable array of ``a``'s shape in new memory, with other strides."""
    return np.lib.stride_tricks.as_strided(np.zeros(a.size, a.dtype), a.shape, strides)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def masked(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, it says
        return torch.masked.masked_tensor(tensor, tensor > 0)


LINE = np.linspace(-3, 3, 20_001, dtype=np.float32)
XT, TT = torch.from_numpy(X.copy()), torch.from_numpy(T.copy())
Row = tuple[Callable[[], Any], type[Exception], str]
BAD: list[Row] = [
    # kinds and dtypes
    (lambda: LOSS([[0.0]], T), TypeError, "logits must be an array of NumPy, CuPy or PyTorch, .*, got list"),
    (lambda: LOSS(X, [[0]]), TypeError, "targets must be an array of NumPy, CuPy or PyTorch, .*, got list"),
    (lambda: LOSS(3.0, T), TypeError, "got float: pass numpy.asarray"),
    (lambda: LOSS(None, T), TypeError, "logits must be an array of NumPy, CuPy or PyTorch, .*, got NoneType"),
    (lambda: LOSS(FakeDask(), T), TypeError, "statistics of chunks add up"),
    (lambda: LOSS(X.astype(int), T), TypeError, "logits must be floating point, got int64"),
    (lambda: LOSS(T > 0, T), TypeError, "logits must be floating point, got bool"),
    (lambda: LOSS(X.astype(complex), T), TypeError, "logits must have one of the dtypes .* complex128"),
    (lambda: LOSS(X.astype(np.longdouble), T), TypeError, "logits must have one of the dtypes"),
    (lambda: LOSS(X, T.astype(object)), TypeError, "targets must have one of the dtypes .* object"),
    (lambda: LOSS(X, T.astype("datetime64[s]")), TypeError, "targets must have one of the dtypes"),
    (lambda: LOSS(np.ma.array(X), T), TypeError, "MaskedArray, whose mask would be ignored"),
    (lambda: LOSS(X, np.ma.array(T)), TypeError, "targets is a numpy.ma.MaskedArray"),
    (lambda: LOSS(X, torch.from_numpy(T)), TypeError, "one library, got numpy and torch"),
    (lambda: LOSS(torch.from_numpy(X), T), TypeError, "one library, got torch and numpy"),
    (lambda: LOSS(X, T, mask=torch.ones(2, 5, 7)), TypeError, "logits and mask must come from one"),
    (lambda: LOSS(X, T, mask=np.ones(X.shape)), TypeError, "mask must be boolean or integer"),
    (lambda: LOSS(X, T, weight_map=[1.0]), TypeError, "weight_map must be an array of NumPy"),
    (
        lambda: LOSS(torch.zeros(2, 3, 5, 7, requires_grad=True), torch.from_numpy(T)),
        TypeError,
        "logits requires grad: use fastseg.torch.Loss",
    ),
    (
        lambda: LOSS(torch.zeros(2, 3, 5, 7, device="meta"), torch.from_numpy(T)),
        TypeError,
        "computes on the CPU and on NVIDIA GPUs",
    ),
    (
        lambda: LOSS(torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3)),
        TypeError,
        "logits must be a dense tensor",
    ),
    (lambda: LOSS(torch.zeros(1, 1, 2, dtype=torch.complex64), torch.zeros(1, 1, 2)), TypeError, "dtypes"),
    # shapes and layouts
    (lambda: LOSS(X, T[:1]), ValueError, r"targets must have shape \(2, 3, 5, 7\), got \(1, 3, 5, 7\)"),
    (lambda: LOSS(X, T[:, 0]), ValueError, r"targets must have shape \(2, 3, 5, 7\), got \(2, 5, 7\)"),
    (lambda: LOSS(X, T[:, :1]), ValueError, "targets must have shape"),
    (lambda: LOSS(X1, T), ValueError, r"\(2, 1, 5, 7\) or \(2, 5, 7\), got \(2, 3, 5, 7\)"),
    (lambda: LOSS(X[0, 0, 0], T[0, 0, 0]), ValueError, r"axes 'NC' .*got shape \(7,\)"),
    (lambda: LOSS(np.float32(1.0)[None][0:1].reshape(()), T), ValueError, "axes 'NC'|NumPy array"),
    (
        lambda: LOSS(X, T, mask=np.ones((2, 2, 5, 7), bool)),
        ValueError,
        r"mask must have shape \(2, 3, 5, 7\) or \(2, 1, 5, 7\) or \(2, 5, 7\), got \(2, 2, 5, 7\)",
    ),
    (lambda: LOSS(X, T, weight_map=np.ones((5, 7))), ValueError, "weight_map must have shape"),
    (lambda: LOSS.replace(layout="N")(X, T[0]), ValueError, "targets must have shape"),
    # options
    (lambda: LOSS.replace(layout="NHWC"), ValueError, "layout must be 'NC', 'N', 'C' or '', got 'NHWC'"),
    (lambda: LOSS.replace(activation="tanh"), ValueError, "activation must be 'auto', 'sigmoid'"),
    (lambda: LOSS.replace(reduction="avg"), ValueError, "reduction must be one of none, mean, sum"),
    (lambda: LOSS.replace(ignore_index=1.5), ValueError, "ignore_index must be an integer or None"),
    (lambda: LOSS.replace(ignore_index=True), ValueError, "ignore_index must be an integer"),
    (lambda: LOSS.replace(positive="yes"), ValueError, "positive must be an integer, 'nonzero' or None"),
    (lambda: LOSS.replace(positive=2**70), ValueError, "positive must fit 64 bits"),
    (lambda: LOSS.replace(positive=300)(X, T), ValueError, "positive=300 cannot occur in .* uint8"),
    (lambda: LOSS.replace(smooth=1.0), TypeError, "replace takes the options .*got smooth"),
    (lambda: fs.BCE(pos_weight=-1.0), ValueError, "pos_weight must be a finite number >= 0, got -1.0"),
    (lambda: fs.BCE(pos_weight=math.nan), ValueError, "pos_weight must be a finite number"),
    (lambda: fs.BCE(normalize="mean"), ValueError, "normalize must be one of 'valid', 'all', None"),
    (lambda: fs.Tversky(alpha=-0.1), ValueError, "alpha must be a finite number >= 0, got -0.1"),
    (lambda: fs.SoftJaccard(link="exp"), ValueError, "link must be one of 'one_minus', 'negative'"),
    (lambda: fs.SoftJaccard(scope="voxel"), ValueError, "scope must be one of 'sample', 'batch'"),
    (lambda: fs.SoftJaccard(empty="nan"), ValueError, "empty must be one of 'formula', 'one', 'zero'"),
    (lambda: LOSS.replace(compute_dtype="float32"), ValueError, "compute_dtype must be 'auto' or 'float64'"),
    (lambda: fs.SoftDice(eps=math.inf), ValueError, "eps must be a finite number >= 0, got inf"),
    (lambda: fs.BCE(class_weights=(1.0, -1.0)), ValueError, "class_weights must be finite and >= 0"),
    (lambda: fs.BCE(class_weights=(1.0, 2.0))(X, T), ValueError, "one entry per class, got 2 for 3"),
    (lambda: fs.BCE(classes=(3,))(X, T), ValueError, r"classes must be in \[0, 3\), got \(3,\)"),
    (lambda: fs.BCE(classes=(0.5,)), ValueError, r"classes must be a sequence of indices, or None, got \(0.5,\)"),
    (lambda: fs.BCE(classes=np.array([False, True])), ValueError, "classes must be a sequence of indices"),
    (lambda: fs.BCE(classes=()), ValueError, r"classes must be a sequence of indices, or None, got \(\)"),
    (lambda: fs.BCE(classes=1), ValueError, "classes must be a sequence of indices, or None, got 1"),
    (lambda: fs.BCE(class_weights=2.0), ValueError, "class_weights must be a sequence of numbers"),
    (lambda: fs.BCE(pos_weight=True), ValueError, "pos_weight must be a finite number >= 0, got True"),
    (lambda: fs.FocalBCE(gamma=-1.0), ValueError, "gamma must be a finite number >= 0, got -1.0"),
    (lambda: fs.FocalCrossEntropy(gamma=1e4), ValueError, r"gamma must be in \[0, 1000\], got 10000.0"),
    (lambda: fs.FocalBCE(alpha=1.5), ValueError, r"alpha must be in \[0, 1\], got 1.5"),
    (lambda: fs.BCE(label_smoothing=2), ValueError, r"label_smoothing must be in \[0, 1\], got 2.0"),
    (lambda: (fs.FocalBCE() + fs.FocalBCE(gamma=1)).families(), ValueError, "must have the same gamma, got focal_bce_1.0, focal_bce_2.0"),
    (lambda: fs.Tversky(gamma=0.75), ValueError, "gamma must be 1 unless link='power', got gamma=0.75"),
    (lambda: math.inf * fs.BCE(), ValueError, "multiplied by a finite number, got inf"),
    (lambda: "2" * fs.BCE(), TypeError, "can't multiply|unsupported operand"),
    (lambda: fs.BCE() + 1.0, TypeError, "unsupported operand"),
    (
        lambda: fs.BCE().replace(layout="N") + fs.SoftDice().replace(layout="C"),
        ValueError,
        "losses that are added must have the same options",
    ),
    (
        lambda: fs.SoftJaccard(scope="batch").replace(reduction="none")(X, T),
        ValueError,
        'reduction="none" keeps the samples apart',
    ),
    (lambda: LOSS.statistics(X, T, track=("soft",)), ValueError, "track must be a tuple of overlap"),
    (lambda: LOSS.statistics(X, T, track="hard"), ValueError, "track must be a tuple"),
    (lambda: LOSS.statistics(X, T, samples="a"), ValueError, "samples must name each of the 2 samples"),
    (lambda: LOSS(X, T, weight_map=-np.ones(X.shape, np.float32)), ValueError, r"weight_map must be at least 0, got -1.0 \(invalid voxels: 210 of 210\)"),
    (lambda: LOSS(X, T, weight_map=np.full(X.shape, np.nan)), ValueError, "weight_map must be at least 0, got nan"),
    # gradients
    (
        lambda: LOSS.gradient(X, T, LOSS.statistics(X[:1], T[:1])),
        ValueError,
        "s must have the statistics of these 2 samples and 3 classes, got 1 and 3; rows=",
    ),
    (
        lambda: LOSS.gradient(X, T, LOSS.statistics(X, T), rows=slice(0, 1)),
        ValueError,
        "these 2 samples and 3 classes, got 1 and 3",
    ),
    (lambda: LOSS.value_and_grad(X, T, grad_scale=np.ones(3)), ValueError, r"grad_scale must have shape \(\)"),
    (
        lambda: LOSS.replace(reduction="none").value_and_grad(X, T, grad_scale=np.ones(3)),
        ValueError,
        r"grad_scale must have shape \(N, C\) = \(2, 3\), got \(3,\)",
    ),
    (lambda: LOSS.value_and_grad(X, T, out=X[:1].copy()), ValueError, "out must have the shape of logits"),
    (lambda: LOSS.value_and_grad(X, T, out=read_only(X)), ValueError, "out must be writable"),
    (lambda: LOSS.value_and_grad(X, T, out=X.astype(int)), TypeError, "out must have dtype .*int64"),
    (
        lambda: LOSS.value_and_grad(X.astype(np.float64), T, out=np.empty(X.shape, np.float16)),
        TypeError,
        "out must have dtype float32, float64 for float64 logits, got float16",
    ),
    (lambda: LOSS.value_and_grad(X, T, out=strided(X, (0, 140, 28, 4))), ValueError, "out must not be a broadcast"),
    (lambda: LOSS.value_and_grad(X, T, out=strided(X, (4, 140, 28, 4))), ValueError, "out must not be a broadcast"),
    (lambda: LOSS.value_and_grad(X, T, grad_scale=None), TypeError, "grad_scale must be a number .* got None"),
    (lambda: LOSS.value_and_grad(X, T, grad_scale="2"), TypeError, "grad_scale must be a number"),
    (lambda: LOSS.value_and_grad(X, T, grad_scale=1j), TypeError, "grad_scale must be a number"),
    (
        lambda: LOSS.value_and_grad(XT, TT, out=torch.zeros(X.shape, dtype=torch.complex64).conj().imag),
        ValueError,
        "out must hold its own values, got a negated or conjugated view",
    ),
    (lambda: LOSS.value_and_grad(XT, TT, out=XT.clone().requires_grad_()), TypeError, "out requires grad"),
    # tensors without memory
    (lambda: LOSS(freed(XT), TT), TypeError, "logits has no memory to be read, got a Tensor"),
    (lambda: LOSS(XT, torch._efficientzerotensor(X.shape, dtype=torch.uint8)), TypeError, "targets has no memory"),
    (lambda: LOSS(masked(XT), TT), TypeError, "logits has no memory to be read, got a MaskedTensor"),
    (lambda: fs.Adam(freed(XT)), TypeError, "has no memory"),
    (lambda: LOSS.value_and_grad(X, T, out=torch.empty(X.shape)), TypeError, "one library"),
    (lambda: LOSS.value_and_grad(X, T, out=[1.0]), TypeError, "out must be an array of NumPy"),
    # metrics and functions
    (lambda: fs.jaccard_index(X, T, kind="logit"), ValueError, "kind must be 'logits', 'probs'"),
    (lambda: fs.jaccard_index(X, T, threshold=0.0), ValueError, r"threshold must be .* \(0, 1\], got 0"),
    (lambda: fs.jaccard_index(T, T, threshold=0.3), ValueError, "threshold has no meaning"),
    (lambda: fs.jaccard_index(T, T, mask=np.ones(T.shape)), TypeError, "mask must be boolean or integer"),
    (lambda: fs.jaccard_index(T, T, positive=1), ValueError, "positive has no meaning"),
    (lambda: fs.jaccard_index(X, T, num_classes=3), ValueError, "num_classes is for kind='labels'"),
    (lambda: fs.jaccard_index(T, T, num_classes=1), ValueError, "num_classes must be at least 2"),
    (lambda: fs.jaccard_index(T, 2 * T), ValueError, r"targets must hold labels in \[0, 2\).*num_classes="),
    (lambda: fs.jaccard_index(3 * T, T, num_classes=3), ValueError, r"pred must hold labels in \[0, 3\)"),
    (lambda: fs.jaccard_index(X, T, reduction="median"), ValueError, "reduction must be one of"),
    (lambda: fs.jaccard_index(X, T * 255), ValueError, "targets must be 0 or 1, got 255"),
    (lambda: LOSS(X, T * np.float32(np.nan)), ValueError, r"in \[0, 1\], got nan \(invalid voxels: 210 of 210\)$"),
    (lambda: LOSS(X, np.full(T.shape, -np.inf)), ValueError, r"got -inf \(invalid voxels: 210 of 210\)$"),
    (lambda: LOSS(T.astype(np.float32), X), ValueError, "got -?[0-9.]+ .*; are the arguments exchanged"),
    (lambda: LOSS(X, T.astype(int) - 1), ValueError, r"got -1 .*; loss.replace\(ignore_index=-1\) leaves"),
    (lambda: fs.jaccard_index(T * 255, T * 255), ValueError, "for 0/255 masks pred > 0"),
    (lambda: LOSS.value(sum([])), TypeError, "s must be Statistics, got int"),
    (lambda: fs.jaccard_index(X, T * 255), ValueError, r'use positive="nonzero" or positive=<label>'),
    (lambda: fs.jaccard_index(X / 100 + 2, T, kind="probs"), ValueError, r"pred must hold probabilities in \[0, 1\]"),
    (lambda: fs.jaccard_index(T, T, kind="probs"), TypeError, "pred must be floating point, got uint8"),
    (lambda: fs.jaccard_index(T, T, layout="C"), ValueError, "labels have no class axis: layout must be"),
    (lambda: fs.sigmoid(T), TypeError, "x must be floating point, got uint8"),
    (lambda: fs.sigmoid(X, out=X[:1].copy()), ValueError, "out must have the shape of x"),
    (lambda: fs.sigmoid(X, out=T.copy()), TypeError, "out must have dtype .* for float32 x, got uint8"),
    (lambda: fs.sigmoid(X.astype(float), out=np.empty(X.shape, np.float16)), TypeError, "out must have dtype float32, float64"),
    (lambda: fs.sigmoid(X, out=strided(X, (0, 140, 28, 4))), ValueError, "out must not be a broadcast"),
    (lambda: fs.sigmoid(LINE[:-1], out=LINE[1:]), ValueError, "out must not overlap x in memory"),
    (lambda: fs.sigmoid(LINE[::-1], out=LINE), ValueError, "out must not overlap x in memory"),
    (lambda: fs.sigmoid(X, out=read_only(X)), ValueError, "out must be writable"),
    (lambda: fs.set_num_threads(0), ValueError, "count must be a positive integer or None, got 0"),
    (lambda: fs.set_num_threads(1.5), ValueError, "count must be a positive integer or None, got 1.5"),
    (lambda: fs.Statistics(np.zeros((2, 3)), ["count"]), ValueError, r"array must have shape \(N, C, 1\)"),
    (lambda: fs.Statistics(np.zeros((2, 3, 1)), ["counts"]), ValueError, "names must be those of columns, got counts"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_gets_a_clear_error(call, error, message):
    before = X.tobytes(), T.tobytes()
    with pytest.raises(error, match=message):
        call()
    assert (X.tobytes(), T.tobytes()) == before


def test_partial_overlap_of_out_is_refused():
    logits, out = shifted_overlap()
    with pytest.raises(ValueError, match="out must not overlap logits"):
        LOSS.value_and_grad(logits, T, out=out)
    both = np.zeros((*X.shape, 2), np.float32)  # interleaved, but no element is shared
    LOSS.value_and_grad(both[..., 0], T, out=both[..., 1])
    assert np.all(both[..., 0] == 0)
    assert np.any(both[..., 1] != 0)
    memory = np.zeros(X.size * 4, np.uint8)
    with pytest.raises(ValueError, match="out must not overlap targets"):
        LOSS.value_and_grad(
            X, memory[: X.size].reshape(X.shape), out=memory.view(np.float32).reshape(X.shape)
        )


def test_too_many_scattered_axes_are_refused_with_advice():
    array = np.zeros((1, 1, *([4] * 8)), np.float32)[
        (slice(None),) * 2 + (slice(None, None, 2),) * 8
    ]
    with pytest.raises(
        ValueError, match=r"at most 6 spatial axes .* got 8; pass contiguous copies"
    ):
        LOSS(array, np.zeros(array.shape, bool))
