"""The sums of every block of a volume: as a map, and as what a run in zarr goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastseg.files import replacing
from fastseg.installed import check_installed
from fastseg.losses import Loss
from fastseg.statistics import Statistics

MOST_FILES = 4096
"""Files that a table in zarr has at most; of more blocks, several share one."""
UNDONE = -1.0
"""What stands in the table where a block is not done; no sum of ``voxels`` is negative."""


class BlockTable:
    """The sums of every block of a volume.

    Attributes
    ----------
    shape, block
        Of the volume's spatial axes, and of a block; blocks at the ends are smaller.
    grid
        How many blocks there are along each axis.
    names
        Of the sums, as in `Statistics`.
    sums
        float64 (blocks, N, C, K), the last axis of the grid running fastest; -1 where a block is
        not done.

    Examples
    --------
    >>> import numpy as np, fastseg as fs, fastseg.blocks
    >>> volume, what = np.arange(6, dtype=np.uint8) % 2, fs.HardScores(num_classes=2, layout="")
    >>> table = fastseg.blocks.statistics_per_block(what, volume, volume, block=(2,))
    >>> table.scores().tolist(), float(table.total().jaccard_index())
    ([1.0, 1.0, 1.0], 1.0)
    """

    def __init__(
        self,
        shape: Sequence[int],
        block: Sequence[int],
        names: Sequence[str],
        sums: NDArray[np.float64],
    ) -> None:
        self.shape, self.block, self.names = tuple(shape), tuple(block), tuple(names)
        self.grid = tuple(-(-a // b) for a, b in zip(self.shape, self.block, strict=True))
        self.sums = sums

    def __repr__(self) -> str:
        return f"<BlockTable of {self.shape}, {self.done.sum()} of {len(self.sums)} blocks done>"

    @property
    def done(self) -> NDArray[np.bool_]:
        """Return which blocks are done, (blocks,)."""
        return np.asarray(self.sums[:, 0, 0, self.names.index("voxels")] != UNDONE)

    def statistics(self, number: int) -> Statistics:
        """Return the sums of one block."""
        return Statistics(self.sums[number], self.names)

    def total(self, samples: str | Sequence[str] | None = None) -> Statistics:
        """Return the sums of the volume, added up in the order of the grid.

        Raises
        ------
        ValueError
            If a block is not done.
        """
        undone = np.count_nonzero(~self.done)
        if undone:
            raise ValueError(f"{undone} of {len(self.sums)} blocks are not done yet")
        return Statistics(self.sums.sum(axis=0), self.names, samples)

    def values(self, loss: Loss) -> NDArray[np.float64]:
        """Return the loss of each block for itself, float64 of the grid's shape: the error map.

        NaN where a block is not done, or has no voxel that counts.
        """
        made = np.full(len(self.sums), np.nan)
        for number in np.flatnonzero(self.done).tolist():
            made[number] = np.mean(loss.value(self.statistics(number)))
        return made.reshape(self.grid)

    def scores(self, name: str = "jaccard_index") -> NDArray[np.float64]:
        """Return the hard score of each block, ``jaccard_index`` or ``dice_score``, likewise."""
        made = np.full(len(self.sums), np.nan)
        for number in np.flatnonzero(self.done).tolist():
            made[number] = getattr(self.statistics(number), name)()
        return made.reshape(self.grid)


class Table:
    """Rows of sums, in memory or in a zarr array whose attributes say of what they are."""

    def __init__(self, path: str | Path | None, about: dict[str, Any] | None, rows: int) -> None:
        self._path, self._about, self._rows = path, about, rows
        self._stored: Any = None
        self._names: tuple[str, ...] = ()
        self._sums: NDArray[np.float64] | None = None
        if path is not None:
            check_installed("a table in a file", "zarr")
            self._open()

    def _open(self) -> None:
        zarr: Any = import_module("zarr")
        try:
            self._stored = zarr.open_array(
                str(self._path), mode="r" if self._about is None else "r+"
            )
        except FileNotFoundError:
            if self._about is None:
                raise ValueError(f"{self._path} is no table of blocks: it does not exist") from None
            return
        about = self._stored.attrs.asdict().get("fastseg")
        if not isinstance(about, dict) or not {"names", "shape", "block"} <= about.keys():
            raise ValueError(f"{self._path} is no table of blocks")
        self._names = tuple(about.pop("names"))
        if self._about is None:
            self._about = about
            return
        wanted = json.loads(json.dumps(self._about))
        for key, value in wanted.items():
            held = about.get(key)
            if held == value:
                continue
            said = f"it was made with {key} {held}, not {value}"
            if key == "arrays" and isinstance(held, dict):
                names = sorted(n for n in {*held, *value} if held.get(n) != value.get(n))
                said = f"{', '.join(names)} changed since, or are others"
            raise ValueError(
                f"{self._path} is a table of something else: {said}; remove it, or take another "
                "path"
            )

    @property
    def _per_file(self) -> int:
        return max(1, -(-self._rows // MOST_FILES)) if self._path is not None else 1

    def units(self, part: tuple[int, int]) -> list[range]:
        """Return the blocks that are to be computed and written together."""
        k, n = part
        if not 0 <= k < n:
            raise ValueError(f"part must be (k, n) with 0 <= k < n, got {part}")
        step = self._per_file
        starts = range(0, self._rows, step)
        mine = starts[k * len(starts) // n : (k + 1) * len(starts) // n]
        return [range(start, min(start + step, self._rows)) for start in mine]

    def pending(self, units: list[range]) -> list[range]:
        """Return which of some units, one after the other, the table does not have."""
        if self._stored is None or not units:
            return units
        first, last = units[0].start, units[-1].stop
        column = self._names.index("voxels")
        done = np.asarray(self._stored[first:last, 0, 0, column]) != UNDONE
        return [unit for unit in units if not done[unit.start - first : unit.stop - first].all()]

    def write(self, unit: range, names: tuple[str, ...], sums: NDArray[np.float64]) -> None:
        """Write the sums of a unit's blocks; in zarr, as one file that is there or not."""
        rows = slice(unit.start, unit.stop)
        self._names = self._names or names
        shape = (self._rows, *sums.shape[1:])
        if self._path is None:
            if self._sums is None:
                self._sums = np.full(shape, UNDONE)
            self._sums[rows] = sums
            return
        if self._stored is None:
            self._create(shape)
        if names != self._names:
            raise ValueError(f"the table holds {', '.join(self._names)}, not {', '.join(names)}")
        self._stored[rows] = sums

    def _create(self, shape: tuple[int, ...]) -> None:
        zarr: Any = import_module("zarr")
        try:
            self._stored = zarr.create_array(
                str(self._path),
                shape=shape,
                chunks=(self._per_file, *shape[1:]),
                dtype="float64",
                fill_value=UNDONE,
                attributes={"fastseg": {**(self._about or {}), "names": list(self._names)}},
            )
        except (FileExistsError, zarr.errors.ContainsArrayError):  # another process was first
            self._open()

    def read(self) -> BlockTable:
        """Return what is known."""
        assert self._about is not None
        sums = self._sums if self._stored is None else np.asarray(self._stored[:])
        names = self._names or ("voxels",)
        if sums is None:
            sums = np.full((self._rows, 1, 1, len(names)), UNDONE)
        return BlockTable(self._about["shape"], self._about["block"], names, sums)


def draw_error_map(
    values: NDArray[np.float64], path: str | Path, title: str = "", quantity: str = "loss"
) -> None:
    """Draw a map of blocks as a PNG: for each axis, the largest value along it.

    ``values``: of `BlockTable.values`, or 1 - `BlockTable.scores`, with one to three axes; NaN is
    left blank. Needs matplotlib.

    Raises
    ------
    ValueError
        For values of no axis, or of more than three.

    Examples
    --------
    >>> import numpy as np, fastseg.blocks, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "map.png"
    >>> fastseg.blocks.draw_error_map(np.array([[0.1, 0.3], [0.2, np.nan]]), path)
    >>> path.stat().st_size > 0
    True
    """
    check_installed("an error map", "matplotlib")
    figure_module: Any = import_module("matplotlib.figure")
    if not 1 <= values.ndim <= 3:
        raise ValueError(f"values must have one to three axes, got shape {values.shape}")
    cube = values.reshape((1,) * (3 - values.ndim) + values.shape)
    lost = np.where(np.isnan(cube), -np.inf, cube)
    figure = figure_module.Figure(figsize=(12, 4), layout="constrained")
    known = cube[~np.isnan(cube)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    for axis, axes in enumerate(figure.subplots(1, 3)):
        worst = lost.max(axis=axis)
        shown = axes.imshow(
            np.where(np.isinf(worst), np.nan, worst), vmin=low, vmax=high, origin="lower"
        )
        first, second = (k for k in range(3) if k != axis)
        for ticks in (axes.xaxis, axes.yaxis):
            ticks.get_major_locator().set_params(integer=True)
        axes.set(
            title=f"largest along axis {axis}",
            xlabel=f"blocks along axis {second}",
            ylabel=f"blocks along axis {first}",
        )
    figure.colorbar(shown, ax=figure.axes, shrink=0.8, label=quantity)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
