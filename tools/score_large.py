"""Score a prediction of many gigabytes, and say how fast, in how much memory, and how much is I/O.

    python tools/score_large.py [--gigabytes 16] [--folder DIR]

Four pairs of the same size: float32 logits in a sparse .npy (the file system makes the zeros),
float32 logits, uint8 probabilities and uint8 labels in zarr, each against uint8 truth. A zarr's
chunks are one chunk, linked; all of them are read and decompressed. The command runs in a process
of its own, whose peak memory the kernel tells, once reading alone has filled the caches and was
timed. The last column is a block in memory, counted by one thread.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr

import fastseg as fs
from fastseg.clock import interleaved
from fastseg.score_files import Question
from fastseg.stores import BLOCK_VOXELS, Volume, block_shape, blocks

EDGE = 128


def linked_zarr(path: Path, shape: tuple[int, ...], chunk: np.ndarray) -> Path:
    """Write a zarr whose chunks are all the same file."""
    array = zarr.create_array(
        str(path), shape=shape, chunks=chunk.shape, dtype=chunk.dtype, compressors="auto"
    )
    array[tuple(slice(0, edge) for edge in chunk.shape)] = chunk
    first = path / "c" / "0" / "0" / "0"
    for place in np.ndindex(*(a // b for a, b in zip(shape, chunk.shape, strict=True))):
        target = path / "c" / "/".join(map(str, place))
        if target != first:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(first, target)
    return path


def make(folder: Path, shape: tuple[int, ...]) -> dict[str, tuple[Path, Path, list[str]]]:
    """Return the pairs, and the options of the command for each."""
    rng = np.random.default_rng(0)
    truth = rng.random((EDGE,) * 3) < 0.3
    # Values of a network that was rounded, as stored ones are: they compress.
    logits = np.round(8 * (rng.normal(size=truth.shape) + 3 * truth - 2)).astype(np.float32) / 8
    for name, dtype in (("pred", np.float32), ("truth", np.uint8)):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    target = linked_zarr(folder / "truth.zarr", shape, truth.astype(np.uint8))
    probs = np.round(255 * fs.sigmoid(logits)).astype(np.uint8)
    return {
        "float32 logits, sparse npy": (folder / "pred.npy", folder / "truth.npy", []),
        "float32 logits, zarr": (linked_zarr(folder / "p.zarr", shape, logits), target, []),
        "uint8 probabilities, zarr": (
            linked_zarr(folder / "q.zarr", shape, probs),
            target,
            ["--kind", "probs"],
        ),
        "uint8 labels, zarr": (
            linked_zarr(folder / "l.zarr", shape, (logits >= 0).astype(np.uint8)),
            target,
            [],
        ),
    }


def read(pred: Path, target: Path, shape: tuple[int, ...]) -> float:
    """Return the seconds that reading both takes, block by block, with nothing computed."""
    start = time.perf_counter()
    volumes = Volume(pred), Volume(target)
    for index in blocks(shape, block_shape(volumes[0])):
        for volume in volumes:
            part = volume[index]
            part.reshape(-1)[:: 4096 // part.itemsize].max()  # touch each page
    return time.perf_counter() - start


def count(pred: Path, target: Path, options: list[str]) -> float:
    """Return the nanoseconds that counting takes per voxel of a block in memory, on one thread."""
    kind = options[1] if options else None
    volumes = Volume(pred), Volume(target)
    scores = Question({"1": (1,)}, kind).scores(*volumes)
    index = next(blocks(volumes[0].shape, block_shape(volumes[0])))
    arrays = [np.array(volume[index]) for volume in volumes]
    threads = fs.get_num_threads()
    fs.set_num_threads(1)
    seconds = interleaved({"count": lambda: scores.statistics(*arrays)}, 5)["count"]
    fs.set_num_threads(threads)
    return seconds / arrays[0].size * 1e9


def main() -> None:
    """Make, score, read, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=16.0, help="of float32 logits")
    parser.add_argument("--folder", help="where the files go; a temporary folder by default")
    options = parser.parse_args()
    slabs = max(1, round(options.gigabytes * 2**28 / (2048 * 2048 * EDGE)))
    shape = (slabs * EDGE, 2048, 2048)
    voxels = float(np.prod(shape))
    print(f"{shape}, {voxels:.3g} voxels, {fs.get_num_threads()} threads, blocks of {BLOCK_VOXELS}")
    print(
        "| pair | s | million voxels / s and core | peak memory | reading alone | counting alone |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for what, (pred, target, extra) in make(Path(name), shape).items():
            reading = min(read(pred, target, shape) for _ in range(2))  # the first fills caches
            command = [sys.executable, "-m", "fastseg", "score", str(pred), str(target), *extra]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            if status:
                raise SystemExit(f"{what}: the command ended with {status}")
            rate = voxels / seconds / fs.get_num_threads() / 1e6
            peak = usage.ru_maxrss * 1024 / 1e9
            counting = f"{count(pred, target, extra):.2f} ns"
            cells = (what, f"{seconds:.1f}", f"{rate:.0f}", f"{peak:.2f} GB", f"{reading:.1f} s")
            print(f"| {' | '.join(cells)} | {counting} |", flush=True)


if __name__ == "__main__":
    main()
