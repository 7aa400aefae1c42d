"""Input of the demo: a brain template made difficult, and what a voxel-wise model sees of it.

The MNI152 template (a T1-weighted average of 152 brains) and its map of grey matter come with
nilearn's package and are read from there. As it is, a template is far too easy: it gets the two
faults of a real scan, a bias field and noise. That makes it semi-synthetic, and no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

BIAS = 0.45
"""Largest deviation of the bias field from 1."""
NOISE = 20.0
"""Sigma of the Rician noise, on the template's scale of 0 to 255."""
SLAB = 16
"""Axial slices (of 1 mm) of a slab. The template is its own mirror image, so that training on one
half and testing on the other would be training on the test: slabs are cut across that symmetry."""
GUARD = 2
"""Slices at either face of a slab that neither train nor test: they resemble their neighbours."""
QUICK_SLABS = slice(4, 7)
"""The slabs that ``quick`` keeps: one held out between two that train."""


class Scan(NamedTuple):
    """A degraded volume with its truth, cropped to the brain; axes are z, y, x."""

    image: FloatArray  # (D, H, W), 0 to about 300; 0 outside the brain
    heights: NDArray[np.float64]  # (D,), z of each slice in MNI space, mm
    targets: BoolArray  # (D, H, W), grey matter: probability of at least one half
    brain: BoolArray  # (D, H, W)
    train: BoolArray  # (D,), slices to learn from
    held_out: BoolArray  # (D,), slices to be judged by

    def voxels(self) -> tuple[BoolArray, BoolArray]:
        """Return the voxels of the brain that train and those held out, each (D, H, W)."""
        return self.brain & self.train[:, None, None], self.brain & self.held_out[:, None, None]


def template_file(tissue: str) -> Path:
    """Return where nilearn keeps the template's map of ``tissue`` ("t1", "gm").

    Raises
    ------
    FileNotFoundError
        If nilearn is not installed, or keeps it elsewhere.
    """
    spec = find_spec("nilearn")  # which does not import it: that would take two seconds
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    name = f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
    for place in places:
        path = Path(place) / "datasets" / "data" / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"nilearn's package has no {name} (looked in {places or 'no place'})")


def _read(tissue: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return a map as (z, y, x), and the z of its slices in mm."""
    import nibabel

    image: Any = nibabel.load(template_file(tissue))
    volume = np.asarray(image.dataobj, np.uint8).T  # contiguous: NIfTI is in Fortran order
    return volume, image.affine[2, 3] + image.affine[2, 2] * np.arange(len(volume))


def load_scan(seed: int = 0, quick: bool = False) -> Scan:
    """Read the template, crop it to the brain, degrade it and cut it into slabs.

    Parameters
    ----------
    seed
        Of the bias field and the noise.
    quick
        Keep three slabs of the middle only.
    """
    (t1, heights), (grey, _) = _read("t1"), _read("gm")
    if quick:
        kept = slice(QUICK_SLABS.start * SLAB, QUICK_SLABS.stop * SLAB)
        t1, grey, heights = t1[kept], grey[kept], heights[kept]
    box = tuple(slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(t1))
    t1, grey = np.ascontiguousarray(t1[box]), np.ascontiguousarray(grey[box])
    brain = t1 > 0
    slab, depth = np.divmod(np.arange(len(t1)), SLAB)
    inner = (depth >= GUARD) & (depth < SLAB - GUARD)
    even = slab % 2 == 0
    image = degrade(t1.astype(np.float32), brain, np.random.default_rng(seed))
    return Scan(image, heights[box[0]], grey >= 127.5, brain, inner & even, inner & ~even)


def degrade(t1: FloatArray, brain: BoolArray, rng: np.random.Generator) -> FloatArray:
    """Multiply by a smooth bias field within 1 +- `BIAS` and add Rician noise of `NOISE`."""
    waves = [
        np.cos(np.pi * np.outer(np.arange(3), np.arange(size) + 0.5) / size).astype(np.float32)
        for size in t1.shape
    ]
    amplitudes = rng.standard_normal((3, 3, 3), np.float32)
    field: FloatArray = np.einsum("ijk,iz,jy,kx->zyx", amplitudes, *waves, optimize=True)
    field -= field[brain].mean()
    field *= BIAS / np.abs(field[brain]).max()
    real = t1 * (1.0 + field) + NOISE * rng.standard_normal(t1.shape, np.float32)
    imaginary = NOISE * rng.standard_normal(t1.shape, np.float32)
    return np.asarray(np.hypot(real, imaginary) * brain, np.float32)


# Features


class _Smoother:
    """Gaussian means over the brain alone: what lies outside has no weight."""

    def __init__(self, brain: BoolArray) -> None:
        self._brain = brain.astype(np.float32)

    def mass(self, sigma: float) -> FloatArray:
        """Return how much of the Gaussian lies in the brain."""
        return self._filter(self._brain, sigma)

    def __call__(self, volume: FloatArray, sigma: float) -> FloatArray:
        """Return the mean of ``volume`` around every voxel."""
        mean = self._filter(volume * self._brain, sigma)
        mean /= np.maximum(self.mass(sigma), 1e-3)
        return mean

    @staticmethod
    def _filter(volume: FloatArray, sigma: float) -> FloatArray:
        from scipy import ndimage

        return np.asarray(ndimage.gaussian_filter(volume, sigma, mode="constant", truncate=3.0))


def feature_volumes(image: FloatArray, brain: BoolArray) -> Iterator[tuple[str, FloatArray]]:
    """Yield the name and the volume of each feature, (D, H, W) float32."""
    smooth = _Smoother(brain)
    raw = image / np.float32(255.0)
    bias = smooth(raw, 12.0)
    flat: FloatArray = np.divide(raw, np.maximum(bias, np.float32(0.05)))
    yield "intensity", raw
    yield "bias", bias
    yield "corrected", flat
    means: dict[float, FloatArray] = {}
    for sigma in (0.7, 1.0, 1.5, 2.0, 3.0, 4.5, 7.0):
        means[sigma] = smooth(flat, sigma)
        yield f"mean {sigma:g} mm", means[sigma]
        yield f"mean {sigma:g} mm squared", means[sigma] ** 2
    yield from _shape_volumes(flat, means, smooth)
    yield from _place_volumes(means, brain, smooth)


def _shape_volumes(
    flat: FloatArray, means: dict[float, FloatArray], smooth: _Smoother
) -> Iterator[tuple[str, FloatArray]]:
    """Yield edges, blobs, texture and extremes."""
    from scipy import ndimage

    for sigma in (1.0, 1.5):
        yield f"mean {sigma:g} mm cubed", means[sigma] ** 3
    yield "mean 1 mm times 3 mm", means[1.0] * means[3.0]
    for sigma in (1.0, 1.5, 3.0):
        slopes = np.gradient(means[sigma])
        yield f"gradient {sigma:g} mm", np.sqrt(sum(slope * slope for slope in slopes))
    for sigma in (1.0, 1.5, 2.0, 3.0):
        yield f"Laplacian {sigma:g} mm", ndimage.laplace(means[sigma])
    for sigma in (1.5, 3.0):
        variance = smooth(flat * flat, sigma) - means[sigma] ** 2
        yield f"deviation {sigma:g} mm", np.sqrt(np.maximum(variance, 0.0))
    yield "minimum 5 mm", ndimage.minimum_filter(means[1.0], 5)
    yield "maximum 5 mm", ndimage.maximum_filter(means[1.0], 5)


def _place_volumes(
    means: dict[float, FloatArray], brain: BoolArray, smooth: _Smoother
) -> Iterator[tuple[str, FloatArray]]:
    """Yield where in the brain a voxel is, and that times its intensity."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(brain).astype(np.float32)
    for reach in (2.0, 5.0, 12.0):
        near = np.exp(-depth / np.float32(reach))
        yield f"depth {reach:g} mm", near
        if reach < 12.0:
            yield f"depth {reach:g} mm times mean", near * means[1.0]
    for sigma in (4.0, 9.0):
        yield f"brain within {sigma:g} mm", smooth.mass(sigma)
    lines = [np.linspace(-1.0, 1.0, size, dtype=np.float32) for size in brain.shape]
    lines[2] = np.abs(lines[2])  # left and right are alike
    for name, line in zip(("z", "y", "|x|"), np.ix_(*lines), strict=True):
        place = np.broadcast_to(line, brain.shape)
        yield name, place
        yield f"{name} squared", place * place
        yield f"{name} times mean", place * means[1.0]


class Features(NamedTuple):
    """What the model reads, standardised and decorrelated on the voxels that train."""

    names: tuple[str, ...]
    train: FloatArray  # (V, F)
    held_out: FloatArray  # (V', F)


def compute_features(scan: Scan, report: Callable[[int, int | None, str], None]) -> Features:
    """Compute the features of the voxels that train and of those held out.

    The decorrelation is a change of basis, learnt without a label: a voxel-wise model can express
    the same predictions before and after, and gradient descent arrives in a third of the steps.

    Parameters
    ----------
    scan
        From `load_scan`.
    report
        Called as ``report(done, total, note)`` after each feature; the total is None until known.
    """
    at = [np.flatnonzero(where) for where in scan.voxels()]
    names: list[str] = []
    rows: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    for name, volume in feature_volumes(scan.image, scan.brain):
        names.append(name)
        for part, where in zip(rows, at, strict=True):
            part.append(np.take(volume, where))
        report(len(names), None, name)
    train, held_out = (np.stack(part) for part in rows)
    mean, deviation = train.mean(axis=1, keepdims=True), train.std(axis=1, keepdims=True)
    for matrix in (train, held_out):
        matrix -= mean
        matrix /= deviation
    variances, axes = np.linalg.eigh(np.cov(train))
    basis = (axes / np.sqrt(variances + 1e-4)).astype(np.float32)  # (F, F); 1e-4: noise stays small
    report(len(names), len(names), f"{len(names)} per voxel")
    return Features(tuple(names), (basis.T @ train).T, (basis.T @ held_out).T)
