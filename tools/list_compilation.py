"""List what is compiled when, and what a first call costs with a warm cache.

    python tools/list_compilation.py

Each scene is a process of its own with an empty cache; its calls are made one after the other. Then
the time from ``python -c`` to the first gradient, kernels being in the cache, and what of it NumPy
and Numba take to be imported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PREPARE = """
import json, logging, time
events = []

class Keep(logging.Handler):
    def emit(self, record):
        events.append((record.getMessage().split()[-1], time.perf_counter()))

log = logging.getLogger("fastseg.compile")
log.setLevel(logging.INFO)
log.addHandler(Keep())
import numpy as np
import fastseg as fs
x = np.linspace(-3, 3, 60, dtype=np.float32).reshape(1, 1, 60)
y = (x > 0).view(np.uint8)
found = []

def call(name, function):
    del events[:]
    function()
    ends = [*(began for _, began in events[1:]), time.perf_counter()]
    kernels = [(kernel, end - began) for (kernel, began), end in zip(events, ends)]
    found.append((name, kernels))

loss = fs.BCE() + fs.SoftJaccard()
"""
SCENES = {
    "one class": """
call("value_and_grad, float32, labels of a byte", lambda: loss.value_and_grad(x, y))
call("... of 64 bits", lambda: loss.value_and_grad(x, y.astype(np.int64)))
call("... float16", lambda: loss.value_and_grad(x.astype(np.float16), y))
call("... a volume of 32768 voxels", lambda: loss.value_and_grad(
    np.zeros((1, 1, 32768), np.float32), np.zeros((1, 1, 32768), np.uint8)))
call("the value alone", lambda: loss(x, y))
call("another loss", lambda: (fs.BCE(pos_weight=2.0) + fs.Tversky(alpha=0.3, beta=0.7))
     .value_and_grad(x, y))
call("with hard counts", lambda: loss.evaluate(x, y, track=("hard",)))
call("soft targets", lambda: loss.value_and_grad(x, x * 0 + np.float32(0.5)))
""",
    "classes": """
z = np.zeros((1, 4, 60), np.float32)
several = fs.CrossEntropy() + fs.SoftDice()
call("softmax, indices of a byte", lambda: several.value_and_grad(z, y[:, 0]))
call("... of 64 bits", lambda: several.value_and_grad(z, y[:, 0].astype(np.int64)))
""",
    "the rest": """
call("Adam", lambda: fs.Adam([x[0, 0]], lr=0.1).step([x[0, 0] * 1]))
call("sigmoid", lambda: fs.sigmoid(x))
call("jaccard_index of labels", lambda: fs.jaccard_index(y[0], y[0], empty=1.0))
call("Lovasz in bins", lambda: fs.LovaszHinge(bins=1024).value_and_grad(x, y))
call("Lovasz sorted", lambda: fs.LovaszHinge().value_and_grad(x, y))
""",
}
END = "\nprint(json.dumps(found))\n"
START = """
import numpy as np, fastseg as fs
x = np.zeros((1, 1, 60), np.float32)
(fs.BCE() + fs.SoftJaccard()).value_and_grad(x, np.zeros((1, 1, 60), np.uint8))
"""


def run(script: str, cache: str) -> str:
    """Run a script in an interpreter of its own."""
    environment = os.environ | {"FASTSEG_CACHE_DIR": cache}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    """Print the list."""
    for scene, script in SCENES.items():
        with tempfile.TemporaryDirectory() as cache:
            found = json.loads(run(PREPARE + script + END, cache))
        print(f"\n{scene}")
        for name, kernels in found:
            print(f"  {name}: {sum(seconds for _, seconds in kernels):.1f} s")
            for kernel, seconds in kernels:
                print(f"    {seconds:5.1f} s  {kernel}")
    with tempfile.TemporaryDirectory() as cache:
        run(START, cache)
        times: dict[str, list[float]] = {START: [], "import numpy, numba": []}
        for _ in range(9):
            for what, each in times.items():
                began = time.perf_counter()
                run(what, cache)
                each.append(time.perf_counter() - began)
    whole, imports = (statistics.median(each) for each in times.values())
    print(f"\nto the first gradient, warm: {whole:.2f} s; import numpy, numba: {imports:.2f} s")


if __name__ == "__main__":
    main()
