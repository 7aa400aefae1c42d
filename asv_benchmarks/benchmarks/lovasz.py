"""The Lovász losses, sorted and counted in bins, beside the peers' way of sorting."""

from __future__ import annotations

from typing import Any

import fastseg as fs

from . import device, peers
from .common import BACKENDS, over, placed, volume

SIZES = (64, 128)
WAYS: dict[str, int | None] = {"sorted": None, "4096 bins": 4096}


class LovaszHinge:
    """Value and gradient over the batch; ``track_`` is its time over the peer's, on the CPU."""

    params = (BACKENDS, SIZES, tuple(WAYS))
    param_names = ("backend", "size", "way")
    timeout = 300
    unit = "time / peer's"
    timer = staticmethod(device.clock)

    def setup(self, backend: str, size: int, way: str) -> None:
        loss = fs.LovaszHinge(scope="batch", bins=WAYS[way])
        logits, targets, out = placed(volume("float32", size, "uint8"), backend)
        self.call = lambda: loss.value_and_grad(logits, targets, out=out)
        self.call()  # compiles

    def time_value_and_grad(self, *params: Any) -> None:
        self.call()

    def peakmem_value_and_grad(self, *params: Any) -> None:
        self.call()

    def track_fastseg_over_peer(self, backend: str, size: int, way: str) -> float:
        if backend != "cpu":
            raise NotImplementedError("the peer computes on the CPU")  # asv skips it
        try:
            peer = peers.lovasz_hinge(volume("float32", size, "uint8"))
        except ImportError as error:
            raise NotImplementedError(str(error)) from error
        return over(self.call, peer)
