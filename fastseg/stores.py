"""Volumes in files, of which parts are read: NumPy, zarr and OME-Zarr, HDF5, NIfTI, TIFF.

Each format is read by the library made for it; this module finds the format, and gives all of
them one face. Files are not trusted: nothing is unpickled, and a header that promises more than its
file or this machine can hold is an error before memory is taken.
"""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["UnreadableError", "Volume", "block_shape", "blocks"]

BLOCK_VOXELS = 2**24
"""Voxels that a block holds where nobody says: 64 MB of float32."""
MOST_OF_DEFLATE = 1032
"""Bytes that one byte of deflate's can become at most (zlib's technical notes)."""
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


class Volume:
    """An array in a file, for whoever wants parts of it as NumPy arrays.

    It can be sliced by a tuple of slices, is read from several threads, and is pickled as its path:
    workers open the file themselves. `dask.array.from_array` takes it.

    Parameters
    ----------
    path
        ``.npy``, ``.nii``, ``.nii.gz``, ``.tif``, ``.tiff``; ``.h5`` or ``.hdf5``, with ``:name``
        behind it unless it holds one array only; ``.zarr`` or a path inside one (a group of
        OME-Zarr: its first, largest level).

    Attributes
    ----------
    shape, dtype, ndim
        As of the array that slices are parts of: integers that NIfTI scales are floats.
    chunks
        In which the file holds it, of zarr its shards; or None.
    fortran
        Whether its first axis is the fastest.
    sequential
        Whether a part costs what lies before it: a compressed NIfTI is read from the front.
    affine
        Of NIfTI, float64 (4, 4); or None.

    Raises
    ------
    UnreadableError
        A ValueError, for what is no volume, not a whole one, or of a format that is not known.
    ModuleNotFoundError
        If the library for the format is not installed.

    Examples
    --------
    >>> import numpy as np, fastseg.stores, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "volume.npy"
    >>> np.save(path, np.arange(24.0).reshape(2, 3, 4))
    >>> volume = fastseg.stores.Volume(path)
    >>> volume.shape, float(volume[1:2, 0:1, 3:4].sum())
    ((2, 3, 4), 15.0)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.format = format_of(self.path)
        absent = [name for name in NEEDS.get(self.format, ()) if not _is_installed(name)]
        if absent:
            raise ModuleNotFoundError(
                f"{self.path} needs {', '.join(absent)}: pip install {' '.join(absent)}"
            )
        _ = self._opened

    @cached_property
    def _opened(self) -> Opened:
        try:
            opened: Opened = _OPENERS[self.format](self.path)
        except UnreadableError:
            raise
        except FileNotFoundError:
            raise UnreadableError(f"{self.path} does not exist") from None
        except Exception as error:  # whatever a library says of a file that is not as it should be
            raise UnreadableError(f"{self.path} cannot be read: {_first_line(error)}") from error
        if opened.dtype.kind not in "biuf" or opened.dtype.itemsize > 8:
            raise UnreadableError(
                f"{self.path} must hold booleans, integers or floats, got {opened.dtype}"
            )
        if opened.close:
            weakref.finalize(self, opened.close)
        size = opened.dtype.itemsize * math.prod(opened.chunks or ())
        if opened.chunks and size > _memory() // 4:
            raise UnreadableError(
                f"{self.path} has chunks of {size} bytes, more than a quarter of this machine's "
                f"memory ({_memory()})"
            )
        return opened

    shape = property(lambda self: self._opened.shape)
    dtype = property(lambda self: self._opened.dtype)
    chunks = property(lambda self: self._opened.chunks)
    fortran = property(lambda self: self._opened.fortran)
    sequential = property(lambda self: self._opened.sequential)
    affine = property(lambda self: self._opened.affine)
    ndim = property(lambda self: len(self._opened.shape))

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Return a part, given by slices (or an ellipsis), as a NumPy array."""
        given = index if isinstance(index, tuple) else (index,)
        if Ellipsis in given:
            at = given.index(Ellipsis)
            missing = self.ndim - len(given) + 1
            given = (*given[:at], *(slice(None),) * missing, *given[at + 1 :])
        given = (*given, *(slice(None),) * (self.ndim - len(given)))
        if not all(isinstance(each, slice) for each in given):
            raise TypeError(f"a Volume is indexed by slices, got {index!r}")
        try:
            return np.asarray(self._opened.read(given))
        except MemoryError:
            raise
        except Exception as error:
            raise UnreadableError(f"{self.path} cannot be read: {_first_line(error)}") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[...], dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return Volume, (os.path.abspath(self.path),)  # noqa: PTH100  (":name" may be behind it)

    def __repr__(self) -> str:
        return f"<Volume {self.path} {self.shape} {self.dtype}>"

    def identity(self) -> list[Any]:
        """Return what changes when the file does: its path, size and time of change.

        Of a zarr the newest time of its directories, one of which changes with each chunk.
        """
        place = self._opened.place or Path(_container(self.path, self.format)[0])
        state = place.stat()
        if not place.is_dir():
            return [os.path.abspath(self.path), state.st_size, state.st_mtime_ns]  # noqa: PTH100
        times = (Path(folder).stat().st_mtime_ns for folder, _, _ in os.walk(place))
        return [os.path.abspath(place), 0, max(times)]  # noqa: PTH100

    def __dask_tokenize__(self) -> Any:
        return ("fastseg.stores.Volume", *self.identity())


class Transposed:
    """A volume whose last ``axes`` axes are in the opposite order: (z, y, x) read as (x, y, z).

    It is what `Volume` is; whatever is read of it is a view of what was read.
    """

    def __init__(self, volume: Volume, axes: int) -> None:
        self._volume, self._axes, self.path = volume, axes, volume.path
        self.dtype, self.ndim = volume.dtype, volume.ndim
        self.shape = self._turned(volume.shape)
        self.chunks = None if volume.chunks is None else self._turned(volume.chunks)
        self.fortran, self.sequential = not volume.fortran, volume.sequential

    def _turned(self, each: tuple[Any, ...]) -> tuple[Any, ...]:
        lead = len(each) - self._axes
        return (*each[:lead], *each[lead:][::-1])

    def __getitem__(self, index: INDEX) -> NDArray[Any]:
        """Return a part, given by a slice for each axis."""
        part = self._volume[self._turned(index)]
        return part.transpose(self._turned(tuple(range(part.ndim))))

    def identity(self) -> list[Any]:
        """Return what changes when the file does, or the order of the axes."""
        return [*self._volume.identity(), "transposed"]


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


def _container(path: str, its_format: str) -> tuple[str, str]:
    """Return the file and what is asked for in it."""
    if its_format == "hdf5":
        file, ending, name = re.split(r"(\.h5|\.hdf5)(?::|$)", path, maxsplit=1, flags=re.I)
        return file + ending, name
    return path, ""


def _is_installed(module: str) -> bool:
    try:
        import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# The formats


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
    file, name = _container(path, "hdf5")
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
    image = nibabel.load(path, keep_file_open=compressed)
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
    read = lambda index: proxy[index].astype(scaled, copy=False)  # noqa: E731
    return Opened(
        read, image.shape, scaled, fortran=True, sequential=compressed, affine=image.affine
    )


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


_OPENERS: dict[str, Callable[[str], Opened]] = {
    "npy": _open_npy,
    "zarr": _open_zarr,
    "hdf5": _open_hdf5,
    "nifti": _open_nifti,
    "tiff": _open_tiff,
}


# Blocks


def block_shape(array: Any, axes: int | None = None, voxels: int = BLOCK_VOXELS) -> tuple[int, ...]:
    """Return a shape for blocks of an array: whole chunks, and no more voxels than asked for.

    Parameters
    ----------
    array
        A `Volume`, or whatever has a shape and, maybe, ``shards`` or ``chunks``.
    axes
        How many of its last axes are cut; all by default.
    voxels
        That a block shall hold at most, unless one chunk has more.

    Examples
    --------
    >>> import numpy as np, fastseg.stores
    >>> fastseg.stores.block_shape(np.zeros((40, 30, 20)), voxels=6000)
    (10, 30, 20)
    """
    axes = len(array.shape) if axes is None else axes
    shape = tuple(array.shape)[len(array.shape) - axes :]
    whole = getattr(array, "shards", None) or getattr(array, "chunks", None)
    if whole is None or not all(isinstance(each, int) for each in whole):
        whole = (1,) * len(array.shape)
    block = [max(1, min(*pair)) for pair in zip(whole[len(whole) - axes :], shape, strict=True)]
    fastest_first = range(axes) if getattr(array, "fortran", False) else reversed(range(axes))
    for axis in fastest_first:
        times = max(1, voxels // math.prod(block))
        block[axis] = max(1, min(shape[axis], block[axis] * times))
    return tuple(block)


def block_at(shape: Sequence[int], block: Sequence[int], number: int) -> INDEX:
    """Return the slices of one of the blocks that cover a shape, the last axis running fastest."""
    grid = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    place = np.unravel_index(number, grid) if grid else ()
    starts = [int(each) * step for each, step in zip(place, block, strict=True)]
    ends = (min(start + step, size) for start, step, size in zip(starts, block, shape, strict=True))
    return tuple(map(slice, starts, ends))


def count_blocks(shape: Sequence[int], block: Sequence[int]) -> int:
    """Return how many blocks cover a shape."""
    return math.prod(-(-size // step) for size, step in zip(shape, block, strict=True))


def blocks(shape: Sequence[int], block: Sequence[int]) -> Iterator[INDEX]:
    """Yield the slices of all blocks in their order.

    Examples
    --------
    >>> import fastseg.stores
    >>> [index[0] for index in fastseg.stores.blocks((5, 4), (2, 4))]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for number in range(count_blocks(shape, block)):
        yield block_at(shape, block, number)
