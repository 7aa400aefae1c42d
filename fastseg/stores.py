"""Volumes in files, of which parts are read: NumPy, zarr and OME-Zarr, HDF5, NIfTI, TIFF.

``formats.py`` knows the formats; this module gives all of them one face, and cuts volumes into
blocks. A volume that would not fit this machine is an error before memory is taken.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.formats import (
    INDEX,
    NEEDS,
    OPENERS,
    Opened,
    UnreadableError,
    container,
    format_of,
    one_line,
)
from fastseg.installed import check_installed

__all__ = ["UnreadableError", "Volume", "block_shape", "blocks"]

BLOCK_VOXELS = 2**24
"""Voxels that a block holds where nobody says: 64 MB of float32."""


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
        check_installed(self.path, *NEEDS.get(self.format, ()))
        _ = self._opened

    @cached_property
    def _opened(self) -> Opened:
        try:
            opened: Opened = OPENERS[self.format](self.path)
        except UnreadableError:
            raise
        except FileNotFoundError:
            raise UnreadableError(f"{self.path} does not exist") from None
        except Exception as error:  # whatever a library says of a file that is not as it should be
            raise UnreadableError(f"{self.path} cannot be read: {one_line(error)}") from error
        if opened.close:
            weakref.finalize(self, opened.close)
        if opened.dtype.kind not in "biuf" or opened.dtype.itemsize > 8:
            raise UnreadableError(
                f"{self.path} must hold booleans, integers or floats, got {opened.dtype}"
            )
        size = opened.dtype.itemsize * math.prod(opened.chunks or ())
        if opened.chunks and size > memory() // 4:
            raise UnreadableError(
                f"{self.path} has chunks of {size} bytes, more than a quarter of this machine's "
                f"memory ({memory()})"
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
            raise TypeError(f"a Volume is indexed by slices, as 3:4, got {index!r}")
        try:
            return np.asarray(self._opened.read(given))
        except MemoryError:
            raise
        except Exception as error:
            raise UnreadableError(f"{self.path} cannot be read: {one_line(error)}") from error

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
        place = self._opened.place or Path(container(self.path, self.format)[0])
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


def memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
