"""Passes over a volume: statistics, gradient, and both, of BCE + soft Jaccard, and over classes."""

from __future__ import annotations

from typing import Any

import fastseg as fs

from . import device, peers
from .common import (
    BACKENDS,
    Call,
    Volume,
    classes,
    gradient_limit,
    over,
    placed,
    statistics_limit,
    value_and_grad_limit,
    volume,
)

DTYPES = ("float32", "bfloat16", "float64")
SIZES = (64, 128, 256)
ENDS = (SIZES[0], SIZES[-1])  # in the caches, and in memory
TARGETS = ("uint8", "int64", "float32")
LOSS = fs.BCE() + fs.SoftJaccard()
SOFTMAX_LOSS = fs.CrossEntropy() + fs.SoftJaccard()


class _Pass:
    """A pass over volumes of every dtype and size; ``track_`` is its time over the limit's.

    Every dtype of logits comes with bytes as targets, and every kind of targets with float32.
    """

    params = (BACKENDS, DTYPES, ENDS, TARGETS)
    param_names = ("backend", "dtype", "size", "targets")
    timeout = 300
    unit = "time / limit"
    timer = staticmethod(device.clock)

    def setup(self, backend: str, dtype: str, size: int, targets: str) -> None:
        if dtype != DTYPES[0] and targets != TARGETS[0]:
            raise NotImplementedError("a whole run is to take ten minutes")  # asv skips it
        self.backend, self.arrays = backend, placed(volume(dtype, size, targets), backend)
        self.call = self.make_call()
        self.call()  # compiles

    def make_call(self) -> Call:
        raise NotImplementedError

    def make_limit(self) -> Call:
        raise NotImplementedError

    def bytes_moved(self) -> int:
        """Return what a pass reads and writes, which a GPU's limit copies."""
        raise NotImplementedError

    def track_over_limit(self, *params: Any) -> float:
        limit = self.make_limit() if self.backend == "cpu" else device.copy(self.bytes_moved())
        return over(self.call, limit, backend=self.backend)


class Statistics(_Pass):
    def make_call(self) -> Call:
        logits, targets, _ = self.arrays
        return lambda: LOSS.statistics(logits, targets)

    def make_limit(self) -> Call:
        return statistics_limit(self.arrays)

    def bytes_moved(self) -> int:
        logits, targets, _ = self.arrays
        return int(logits.nbytes + targets.nbytes)

    def time_statistics(self, *params: Any) -> None:
        self.call()


class Gradient(_Pass):
    def make_call(self) -> Call:
        logits, targets, out = self.arrays
        s = LOSS.statistics(logits, targets)
        return lambda: LOSS.gradient(logits, targets, s, out=out)

    def make_limit(self) -> Call:
        return gradient_limit(self.arrays)

    def bytes_moved(self) -> int:
        logits, targets, out = self.arrays
        return int(logits.nbytes + targets.nbytes + out.nbytes)

    def time_gradient(self, *params: Any) -> None:
        self.call()


class ValueAndGrad(_Pass):
    params = (BACKENDS, DTYPES, SIZES, TARGETS)

    def make_call(self) -> Call:
        logits, targets, out = self.arrays
        return lambda: LOSS.value_and_grad(logits, targets, out=out)

    def make_limit(self) -> Call:
        return value_and_grad_limit(self.arrays)

    def bytes_moved(self) -> int:
        logits, targets, out = self.arrays
        return int(2 * (logits.nbytes + targets.nbytes) + out.nbytes)

    def time_value_and_grad(self, *params: Any) -> None:
        self.call()

    def peakmem_value_and_grad(self, *params: Any) -> None:
        self.call()


class OverClasses:
    """Value and gradient of cross-entropy + soft Jaccard over classes; as `_Pass`, on the CPU."""

    params = ((4, 16, 64),)
    param_names = ("classes",)
    timeout = 300
    unit = "time / limit"

    def setup(self, count: int) -> None:
        self.arrays = classes(count, 96)
        logits, targets, out = self.arrays
        self.call = lambda: SOFTMAX_LOSS.value_and_grad(logits, targets, out=out)
        self.call()  # compiles

    def time_value_and_grad(self, count: int) -> None:
        self.call()

    def peakmem_value_and_grad(self, count: int) -> None:
        self.call()

    def track_over_limit(self, count: int) -> float:
        return over(self.call, value_and_grad_limit(self.arrays))


class _Peer:
    """A peer's value and gradient; ``track_`` is fastseg's time over the peer's."""

    params = (SIZES[:2],)
    param_names = ("size",)
    timeout = 300
    unit = "time / peer's"

    def setup(self, size: int) -> None:
        self.arrays = volume("float32", size, "uint8")
        try:
            self.call = self.make_call(self.arrays)
        except ImportError as error:
            raise NotImplementedError(str(error)) from error  # asv skips it

    def make_call(self, arrays: Volume) -> Call:
        raise NotImplementedError

    def time_value_and_grad(self, size: int) -> None:
        self.call()

    def track_fastseg_over_peer(self, size: int) -> float:
        logits, targets, out = self.arrays
        return over(lambda: LOSS.value_and_grad(logits, targets, out=out), self.call)


class TorchEager(_Peer):
    make_call = staticmethod(peers.eager)


class Monai(_Peer):
    make_call = staticmethod(peers.monai)
