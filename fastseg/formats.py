"""Formats of volumes: which file is of which, and how a part of it is read.

Each is read by the library made for it. Files are not trusted: nothing is unpickled, and a header
that promises more than its file can hold is an error before memory is taken.
"""

from __future__ import annotations

import gzip
import math
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

MOST_OF_DEFLATE = 1032
"""Bytes that one byte of deflate's can become at most (zlib's technical notes)."""
NIFTI_HEADER = 348
"""Bytes of the smallest header."""
INDEX = tuple[slice, ...]
ENDINGS = {
    ".npy": "npy",
    ".ome.zarr": "zarr",
    ".zarr": "zarr",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".ome.tif": "tiff",
    ".ome.tiff": "tiff",
    ".tif": "tiff",
    ".tiff": "tiff",
}
NEEDS = {"zarr": ["zarr"], "hdf5": ["h5py"], "nifti": ["nibabel"], "tiff": ["tifffile", "zarr"]}


class UnreadableError(ValueError):
    """A file that is no volume, or not a whole one; the message names it.

    Examples
    --------
    >>> import fastseg.stores
    >>> try:
    ...     fastseg.stores.Volume("absent.npy")
    ... except fastseg.stores.UnreadableError as error:
    ...     print(error)
    absent.npy does not exist
    """


class Opened(NamedTuple):
    """An open file: how a part is read, and what is known before."""

    read: Callable[[INDEX], Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None = None
    fortran: bool = False  # the first axis is the fastest
    sequential: bool = False  # parts cost what lies before them
    place: Path | None = None  # of the array, where that is a directory
    affine: NDArray[np.float64] | None = None
    close: Callable[[], None] | None = None


def format_of(path: str) -> str:
    """Return the format of a path, by its ending or that of a folder that it is in."""
    name = path.rstrip("/")
    lower = name.lower()
    if re.search(r"\.(h5|hdf5):", lower):
        return "hdf5"
    for ending, its_format in ENDINGS.items():
        if lower.endswith(ending):
            return its_format
    if any(part.endswith(".zarr") for part in Path(lower).parts):
        return "zarr"
    if any((Path(name) / mark).exists() for mark in ("zarr.json", ".zarray", ".zgroup")):
        return "zarr"
    listed = ", ".join(ENDINGS)
    raise UnreadableError(f"{path} must end in one of {listed}")


def container(path: str, its_format: str) -> tuple[str, str]:
    """Return the file and what is asked for in it."""
    if its_format == "hdf5":
        file, ending, name = re.split(r"(\.h5|\.hdf5)(?::|$)", path, maxsplit=1, flags=re.I)
        return file + ending, name
    return path, ""


def one_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _open_npy(path: str) -> Opened:
    """Map the file anew for each part, so that no page of an earlier part counts as ours."""

    def mapped() -> Any:
        return np.load(path, mmap_mode="r", allow_pickle=False)

    array = mapped()
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    return Opened(lambda index: mapped()[index], array.shape, array.dtype, fortran=fortran)


def _open_zarr(path: str) -> Opened:
    zarr: Any = import_module("zarr")
    node = zarr.open(path, mode="r")
    if not hasattr(node, "shape"):
        attributes = dict(node.attrs)
        scales = attributes.get("ome", attributes).get("multiscales")
        if not scales:
            names = ", ".join(sorted(name for name, _ in node.arrays())) or "no array"
            raise UnreadableError(f"{path} is a group of {names}; add the array's name to the path")
        node = node[scales[0]["datasets"][0]["path"]]
    chunks = getattr(node, "shards", None) or node.chunks
    return Opened(
        lambda index: node[index],
        tuple(node.shape),
        np.dtype(node.dtype),
        tuple(chunks),
        place=Path(path) / node.path,
    )


def _open_hdf5(path: str) -> Opened:
    h5py: Any = import_module("h5py")
    file, name = container(path, "hdf5")
    handle = h5py.File(file, "r")
    if not name:
        found: list[str] = []
        handle.visititems(lambda key, item: found.append(key) if hasattr(item, "shape") else None)
        if len(found) != 1:
            listed = ", ".join(found) or "no array"
            raise UnreadableError(f"{path} holds {listed}; write {path}:name")
        name = found[0]
    node = handle[name]
    if not hasattr(node, "shape"):
        raise UnreadableError(f"{path} is a group, not an array")
    return Opened(
        lambda index: node[index], tuple(node.shape), node.dtype, node.chunks, close=handle.close
    )


def _open_nifti(path: str) -> Opened:
    nibabel: Any = import_module("nibabel")
    compressed = path.lower().endswith(".gz")
    if compressed:
        with gzip.open(path) as stream:
            try:
                stream.read(NIFTI_HEADER)
            except EOFError:
                raise UnreadableError(f"{path} is truncated: it ends in its header") from None
    image = nibabel.load(path)
    proxy = image.dataobj
    size = math.prod(image.shape) * proxy.dtype.itemsize
    held = Path(path).stat().st_size
    if compressed:
        held *= MOST_OF_DEFLATE
    if size > held:
        raise UnreadableError(
            f"{path} is truncated: {size} bytes of voxels are promised, and at most {held} there"
        )
    scaled = proxy.dtype if (proxy.slope, proxy.inter) == (1.0, 0.0) else np.dtype(np.float64)
    inner = _Gzipped(path, type(image)) if compressed else None

    def read(index: INDEX) -> Any:
        part = proxy[index] if inner is None else inner.read(index)
        return part.astype(scaled, copy=False)

    return Opened(
        read,
        image.shape,
        scaled,
        fortran=True,
        sequential=compressed,
        affine=image.affine,
        close=None if inner is None else inner.close,
    )


class _Gzipped:
    """A compressed image, through a stream that stays open: parts are read from the front on.

    It is opened by the first read, and anew in a process that was forked: a place in a file is the
    same for all who inherit it.
    """

    def __init__(self, path: str, kind: Any) -> None:
        self._path, self._kind = path, kind
        self._lock = Lock()
        self._stream: Any = None
        self._proxy: Any = None
        _GZIPPED.add(self)

    def _open(self) -> Any:
        nibabel: Any = import_module("nibabel")
        self._stream = gzip.open(self._path)  # noqa: SIM115  (it stays open)
        holder = nibabel.FileHolder(self._path, self._stream)
        self._proxy = self._kind.from_file_map({"image": holder}).dataobj
        return self._proxy

    def read(self, index: INDEX) -> Any:
        """Return a part; with the last voxels the checksum at the end of the file is compared."""
        with self._lock:
            proxy = self._open() if self._proxy is None else self._proxy
            part, last = proxy[index], proxy.shape[-1] - 1
            if last in range(*index[-1].indices(last + 1)):
                self._read_to_the_end()
        return part

    def _read_to_the_end(self) -> None:
        try:
            while self._stream.read(2**20):
                pass
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" not in str(error):  # what lies behind the last member
                raise

    def close(self) -> None:
        """Close the stream; a read opens another."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._proxy = None

    def forked(self) -> None:
        """Forget what belongs to the parent, a lock that one of its threads held included."""
        self._lock = Lock()
        self.close()


_GZIPPED: WeakSet[_Gzipped] = WeakSet()


def _forked() -> None:
    for each in _GZIPPED:
        each.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _open_tiff(path: str) -> Opened:
    tifffile: Any = import_module("tifffile")
    try:
        array = tifffile.memmap(path, mode="r")
    except ValueError:  # compressed, or in tiles
        zarr: Any = import_module("zarr")
        store = tifffile.imread(path, aszarr=True)
        node = zarr.open(store, mode="r")
        if not hasattr(node, "shape"):
            node = node["0"]  # the largest level of a pyramid
        chunks = tuple(node.chunks)
        return Opened(
            lambda index: node[index], tuple(node.shape), node.dtype, chunks, close=store.close
        )
    return Opened(lambda index: tifffile.memmap(path, mode="r")[index], array.shape, array.dtype)


OPENERS: dict[str, Callable[[str], Opened]] = {
    "npy": _open_npy,
    "zarr": _open_zarr,
    "hdf5": _open_hdf5,
    "nifti": _open_nifti,
    "tiff": _open_tiff,
}
