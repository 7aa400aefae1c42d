"""The README's tables of trainers: fastseg.torch's optimisers and fastseg.jax, beside their peers.

    python asv_benchmarks/compare_trainers.py [--quick] [--threads N]

As `compare.py` measures: in turns, medians, kernels compiled in a call that does not count. Peers
get the same number of threads (XLA takes what the machine has).
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from benchmarks.common import Call, interleaved, volume
from compare import LOSS, machine
from tables import ratio, shown, table

import fastseg as fs
import fastseg.jax
import fastseg.torch

MAX_NORM = 1.0


def parameters(count: int, size: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Make parameters with gradients."""
    made = []
    for _ in range(count):
        param = torch.nn.Parameter(torch.randn(size).to(dtype))
        param.grad = torch.randn(size).to(dtype)
        made.append(param)
    return made


def clipped(params: list[torch.nn.Parameter], step: Call) -> Call:
    """Return a step after PyTorch's clipping."""

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        step()

    return call


def by_hand(params: list[torch.nn.Parameter]) -> Call:
    """Return a step of PyTorch's over float32 masters that a trainer keeps itself."""
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    opt = torch.optim.Adam(masters, fused=True)

    def call() -> None:
        for master, param in zip(masters, params, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
        opt.step()
        with torch.no_grad():
            for master, param in zip(masters, params, strict=True):
                param.copy_(master)

    return call


def steps_of_adam(count: int, size: int) -> dict[str, tuple[Call, Call]]:
    """Return PyTorch's step and fastseg's of each kind."""

    def make(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        return parameters(count, size, dtype)

    def fused(params: list[torch.nn.Parameter]) -> Call:
        return torch.optim.Adam(params, fused=True).step

    ours, clipping, measured = fastseg.torch.Adam, make(), make()
    grads = [param.grad for param in measured]
    norm = fs.GradientDescent(measured, lr=1.0).grad_norm
    return {
        "the norm of the gradients alone": (
            lambda: torch.nn.utils.get_total_norm(grads),
            lambda: norm(grads),
        ),
        "float32": (fused(make()), ours(make()).step),
        "float32, norm clipped": (
            clipped(clipping, fused(clipping)),
            ours(make(), max_norm=MAX_NORM).step,
        ),
        "bfloat16 with float32 masters": (
            by_hand(make(torch.bfloat16)),
            ours(make(torch.bfloat16)).step,
        ),
        "float32, moments of bfloat16 (torch: float32)": (
            fused(make()),
            ours(make(), state_dtype="bfloat16").step,
        ),
    }


def optimisers(lists: dict[str, tuple[int, int]], rounds: int) -> str:
    """Time Adam's steps."""
    lines = []
    for name, numbers in lists.items():
        for kind, (theirs, ours) in steps_of_adam(*numbers).items():
            seconds = interleaved({"torch": theirs, "fastseg": ours}, rounds)
            times = ratio(seconds, "torch", "fastseg"), shown(seconds["fastseg"])
            lines.append([f"{name}, {kind}", *times])
    return table(["step of `fastseg.torch.Adam`", "torch, fused / fastseg", "fastseg"], lines)


def loss_of_jax(logits: Any, targets: Any) -> Any:
    """Return BCE + soft Jaccard, written as one would."""
    q, p, axes = jax.nn.sigmoid(logits), targets.astype(jnp.float32), (2, 3, 4)
    inner, total = (p * q).sum(axes), p.sum(axes) + q.sum(axes)
    return jnp.mean(jax.nn.softplus(logits) - p * logits) + jnp.mean(1 - inner / (total - inner))


def calls_of_jax(size: int) -> dict[str, Call]:
    """Return value and gradient by JAX and by fastseg, checked against each other."""
    arrays = volume("float32", size, "uint8")
    x, t = jnp.asarray(arrays.logits), jnp.asarray(arrays.targets)
    jitted = jax.jit(jax.value_and_grad(loss_of_jax))
    inside = jax.jit(jax.value_and_grad(fastseg.jax.Loss(LOSS)))
    calls: dict[str, Call] = {
        "jax": lambda: jax.block_until_ready(jitted(x, t)),
        "inside": lambda: jax.block_until_ready(inside(x, t)),
        "outside": lambda: jax.block_until_ready(fastseg.jax.value_and_grad(LOSS, x, t)),
    }
    value, grad = jitted(x, t)
    for other in (inside(x, t), fastseg.jax.value_and_grad(LOSS, x, t)):
        np.testing.assert_allclose(other[0], value, rtol=1e-5)
        np.testing.assert_allclose(other[1], grad, rtol=1e-3, atol=1e-9)
    return calls


def losses(sizes: tuple[int, ...], rounds: int) -> str:
    """Time value and gradient of JAX's arrays."""
    lines = []
    for size in sizes:
        seconds = interleaved(calls_of_jax(size), rounds)
        ratios = (ratio(seconds, "jax", name) for name in ("outside", "inside"))
        lines.append([f"2x1x{size}³", *ratios, shown(seconds["outside"])])
    head = ["`value_and_grad` of BCE + soft Jaccard, JAX arrays"]
    head += [f"jax.jit / fastseg {place} jit" for place in ("outside", "inside")]
    return table([*head, "fastseg outside jit"], lines)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller arrays")
    parser.add_argument("--threads", type=int, default=2, help="of fastseg and of PyTorch")
    options = parser.parse_args()
    fs.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else 15
    size = 2**20 if options.quick else 16 * 2**20
    lists = {f"1 of {size // 2**20}M": (1, size), "2000 of 1000": (2000, 1000)}
    print(machine(), f"jax {jax.__version__}", end="\n\n")
    print(
        optimisers(lists, rounds),
        losses((64,) if options.quick else (64, 128, 256), rounds),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
