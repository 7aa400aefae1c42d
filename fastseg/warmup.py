"""Compile the kernels of the usual cases ahead of their first use: ``fastseg warmup``.

Kernels are compiled by the first call that needs them and kept on disk. An image of a container, or
a machine whose workers have a read-only home, is built with a warm cache instead.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastseg as fs
from fastseg.dispatch import cpu
from fastseg.optimizers import Adam, GradientDescent, Momentum


def compile_ahead(progress: Callable[[str, int, int], None] | None = None) -> float:
    """Compile, or find in the cache, the kernels of the usual cases.

    Those are float32 and float16 logits with labels of one byte or 64 bits and the families of sums
    of `BCE`, the region terms and the hard scores; soft targets; arrays that cannot be read in
    place; `sigmoid`; label volumes; the optimisers. What another dtype needs besides, its
    conversion, takes a fraction of a second.

    Parameters
    ----------
    progress
        Called as ``progress(name, done, total)`` before each case and once after the last.

    Returns
    -------
    Seconds that it took.

    Examples
    --------
    >>> from fastseg.warmup import compile_ahead
    >>> compile_ahead() > 0
    True
    """
    start = time.perf_counter()
    cases = _cases()
    for done, (name, run) in enumerate(cases):
        if progress is not None:
            progress(name, done, len(cases))
        run()
    if progress is not None:
        progress("done", len(cases), len(cases))
    return time.perf_counter() - start


@contextlib.contextmanager
def announced_compilation(say: Callable[[str], None]) -> Iterator[None]:
    """Pass the name of each kernel that is compiled meanwhile to ``say``, before it is."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("compiling "):
                say(message.removeprefix("compiling "))

    logger, handler = logging.getLogger("fastseg.compile"), Handler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _cases() -> list[tuple[str, Callable[[], Any]]]:
    """Return the name and the call of each case, on few voxels or one parameter."""
    logits = np.zeros((1, 1, 2), np.float32)
    labels = np.zeros((1, 1, 2), np.uint8)
    soft = np.full((1, 1, 2), 0.5, np.float32)
    mask = np.ones((1, 1, 2), bool)
    bce, region = fs.BCE(), fs.SoftJaccard(smooth_num=1.0, smooth_den=1.0)
    both = bce + region
    own = np.zeros((1, 1, 2), np.float32)
    classes, indices = np.zeros((1, 2, 2), np.float32), np.zeros((1, 2), np.uint8)
    softmax = fs.CrossEntropy() + region
    half, wide = logits.astype(np.float16), labels.astype(np.int64)
    large = np.zeros((1, 1, 2**15), np.float32)  # which threads share

    return [
        ("threads", lambda: cpu().describe()),
        ("statistics of BCE + region terms", lambda: both(logits, labels)),
        ("gradient", lambda: both.value_and_grad(logits, labels)),
        ("many voxels", lambda: both.value_and_grad(large, large.astype(np.uint8))),
        ("float16", lambda: both.value_and_grad(half, labels)),
        ("labels of 64 bits", lambda: both.value_and_grad(logits, wide)),
        ("statistics of region terms", lambda: region(logits, labels)),
        ("statistics of BCE", lambda: bce(logits, labels)),
        ("statistics with hard scores", lambda: both.evaluate(logits, labels, track=("hard",))),
        ("hard scores of logits", lambda: fs.jaccard_index(logits, labels, empty=1.0)),
        ("masks, labels and strides", lambda: both(logits, labels, mask=mask)),
        ("gradients in place of logits", lambda: both.value_and_grad(own, labels, out=own)),
        ("soft targets", lambda: both.value_and_grad(logits, soft)),
        ("soft targets, masked", lambda: both.value_and_grad(logits, soft, mask=mask)),
        ("softmax over classes", lambda: softmax.value_and_grad(classes, indices)),
        ("indices of 64 bits", lambda: softmax.value_and_grad(classes, wide[:, 0])),
        ("cross-entropy", lambda: fs.CrossEntropy()(classes, indices)),
        ("softmax with hard scores", lambda: softmax.statistics(classes, indices, track=("hard",))),
        ("sigmoid", lambda: fs.sigmoid(logits)),
        ("label volumes", lambda: fs.jaccard_index(labels[0], labels[0], empty=1.0)),
        *((rule.__name__, _stepper(rule)) for rule in (GradientDescent, Momentum, Adam)),
    ]


def _stepper(rule: Callable[..., Any]) -> Callable[[], Any]:
    """Return a call that takes one step of an optimiser."""
    return lambda: rule(np.zeros(1, np.float32), lr=0.1).step(np.zeros(1, np.float32))
