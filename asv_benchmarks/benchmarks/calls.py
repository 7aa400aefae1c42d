"""What is left of a call when its arrays are small, and what the first one costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import fastseg as fs

from .common import volume
from .losses import LOSS
from .updates import LR, parameters

FIRST_CALL = """
import time
import numpy as np, fastseg as fs
imported = time.time()
logits = np.zeros((2, 1, 8, 8, 8), np.float32)
loss = fs.BCE() + fs.SoftJaccard()
loss.value_and_grad(logits, np.ones(logits.shape, np.uint8))
print(imported, time.time())
"""


def first_gradient(cache: str | None = None) -> tuple[float, float]:
    """Return the seconds from a process' start to fastseg's import, and to the first gradient."""
    environment = dict(os.environ)
    if cache is not None:
        environment["FASTSEG_CACHE_DIR"] = cache
    start = time.time()
    command = [sys.executable, "-c", FIRST_CALL]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    imported, done = map(float, answer.stdout.split())
    return imported - start, done - start


class Small:
    """A call of each kind over a few hundred numbers."""

    def setup(self) -> None:
        logits, targets, out = volume("float32", 8, "uint8")
        params, grads = parameters(10, 100)
        step = fs.Adam(params, lr=LR).step
        self.loss = lambda: LOSS.value_and_grad(logits, targets, out=out)
        self.step = lambda: step(grads)
        self.loss()
        self.step()

    def time_value_and_grad(self) -> None:
        self.loss()

    def time_step_of_10_arrays(self) -> None:
        self.step()


class FirstGradient:
    """A new process, from its start to its first gradient."""

    params = (("cached kernels", "empty cache"),)
    param_names = ("cache",)
    timeout = 300
    unit = "seconds"

    def setup(self, cache: str) -> None:
        if cache == "cached kernels":
            first_gradient()

    def track_first_gradient(self, cache: str) -> float:
        if cache == "cached kernels":
            return min(first_gradient()[1] for _ in range(3))
        with tempfile.TemporaryDirectory() as empty:
            return first_gradient(empty)[1]
