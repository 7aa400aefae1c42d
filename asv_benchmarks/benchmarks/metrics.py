"""Hard scores: of logits, and of volumes that are segmented already."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastseg as fs

from . import device
from .common import BACKENDS, Call, over, placed, statistics_limit, volume

SIZES = (64, 128, 256)


class _Score:
    """A score; ``track_`` is its time over the limit of reading its arrays."""

    params = (BACKENDS, SIZES)
    param_names = ("backend", "size")
    timeout = 300
    unit = "time / limit"
    timer = staticmethod(device.clock)

    def setup(self, backend: str, size: int) -> None:
        self.backend, self.arrays = backend, placed(volume("float32", size, "uint8"), backend)
        self.call = self.make_call()
        self.call()  # compiles

    def make_call(self) -> Call:
        raise NotImplementedError

    def time_score(self, *params: Any) -> None:
        self.call()


class OfLogits(_Score):
    """The hard Jaccard index of logits."""

    def make_call(self) -> Call:
        return lambda: fs.jaccard_index(self.arrays.logits, self.arrays.targets)

    def track_over_limit(self, *params: Any) -> float:
        limit = statistics_limit(self.arrays)
        if self.backend != "cpu":
            limit = device.copy(int(self.arrays.logits.nbytes + self.arrays.targets.nbytes))
        return over(self.call, limit, backend=self.backend)


class OfLabels(_Score):
    """Those of two classes of label volumes; on the CPU, NumPy's way is the peer."""

    unit = "time / NumPy's"

    def make_call(self) -> Call:
        labels = self.arrays.targets
        return lambda: fs.jaccard_index(labels, labels, num_classes=2)

    def track_fastseg_over_numpy(self, backend: str, size: int) -> float:
        if backend != "cpu":
            raise NotImplementedError("NumPy computes on the CPU")  # asv skips it
        labels = self.arrays.targets.reshape(self.arrays.targets.shape[0], -1)

        def count() -> None:
            for one, other in zip(labels, labels, strict=True):
                np.bincount(one.astype(np.intp) * 2 + other, minlength=4)

        return over(self.call, count)
