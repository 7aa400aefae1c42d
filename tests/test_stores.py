"""fastseg.stores and fastseg.blocks: every format gives the numbers of the array in memory."""

import concurrent.futures
import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import dask
import dask.array as da
import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr

import fastseg as fs
import fastseg.blocks
import fastseg.dask as fsd
from fastseg import block_table, stores
from fastseg.blocks import gradient_per_block, read_table, statistics_per_block
from fastseg.stores import UnreadableError, Volume, block_shape, blocks

SHAPE = (19, 14, 23)
LOSS = (fs.BCE() + fs.SoftJaccard()).replace(layout="", compute_dtype="float64")
CHUNKS = (5, 14, 8)


def save_zarr(path, array, **options):
    zarr.create_array(str(path), shape=array.shape, dtype=array.dtype, **options)[:] = array
    return path


def save_ome(path, array):
    levels = [{"path": "0"}, {"path": "1"}]
    attributes = {"ome": {"version": "0.5", "multiscales": [{"datasets": levels}]}}
    group = zarr.open_group(str(path), mode="w", attributes=attributes)
    for name, level in (("0", array), ("1", array[::2, ::2, ::2])):
        group.create_array(name, shape=level.shape, dtype=level.dtype)[:] = level
    return path


def save_hdf5(path, array, name="volumes/prediction"):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=array, chunks=CHUNKS, compression="gzip")
    return path


def save_nifti(path, array):
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 1.0, 1.0, 1.0])), path)
    return path


def save_npy(path, array, order="C"):
    np.save(path, np.asarray(array, order=order))
    return path


FORMATS = {
    "npy": lambda p, a: save_npy(p / "v.npy", a),
    "npy of Fortran": lambda p, a: save_npy(p / "v.npy", a, "F"),
    "zarr": lambda p, a: save_zarr(p / "v.zarr", a, chunks=CHUNKS),
    "zarr sharded": lambda p, a: save_zarr(p / "v.zarr", a, chunks=(5, 7, 4), shards=(10, 14, 8)),
    "zarr of format 2": lambda p, a: save_zarr(p / "v.zarr", a, chunks=CHUNKS, zarr_format=2),
    "in a zarr group": lambda p, a: save_zarr(p / "g.zarr" / "a", a, chunks=CHUNKS),
    "ome-zarr": lambda p, a: save_ome(p / "v.ome.zarr", a),
    "hdf5": lambda p, a: save_hdf5(p / "v.h5", a),
    "hdf5 by name": lambda p, a: Path(f"{save_hdf5(p / 'v.hdf5', a)}:volumes/prediction"),
    "nifti": lambda p, a: save_nifti(p / "v.nii", a),
    "nifti.gz": lambda p, a: save_nifti(p / "v.nii.gz", a),
    "tiff": lambda p, a: (tifffile.imwrite(p / "v.tif", a), p / "v.tif")[1],
    "tiff in tiles": lambda p, a: (
        tifffile.imwrite(p / "v.tiff", a, tile=(16, 16), compression="zlib"),
        p / "v.tiff",
    )[1],
}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=SHAPE).astype(np.float32)
    return logits, (rng.random(SHAPE) < 0.3).astype(np.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_volumes_are_what_was_stored(name, data, tmp_path):
    volume = Volume(FORMATS[name](tmp_path, data[0]))
    assert volume.shape == SHAPE and volume.dtype == np.float32 and volume.ndim == 3
    np.testing.assert_array_equal(volume[...], data[0])
    part = (slice(3, 9), slice(0, 14), slice(20, 23))
    np.testing.assert_array_equal(volume[part], data[0][part])
    np.testing.assert_array_equal(volume[4:6], data[0][4:6])
    again = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(again[..., 3:4], data[0][..., 3:4])
    assert again.identity() == volume.identity()
    with pytest.raises(TypeError, match="indexed by slices"):
        volume[3]


@pytest.mark.parametrize("name", FORMATS)
def test_every_store_gives_the_numbers_of_memory(name, data, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    logits, targets = (FORMATS[name](tmp_path / k, a) for k, a in zip("pt", data, strict=True))
    x, t = Volume(logits), Volume(targets)
    whole = LOSS.statistics(*data, track=("hard",))
    table = statistics_per_block(LOSS, x, t, track=("hard",), block=(7, 14, 8))
    assert table.grid == (3, 1, 3) and table.done.all()
    np.testing.assert_allclose(table.total().array, whole.array, rtol=1e-12)
    assert table.total().jaccard_index() == whole.jaccard_index()
    out = zarr.create_array(str(tmp_path / "g.zarr"), shape=SHAPE, chunks=CHUNKS, dtype="float32")
    gradient_per_block(LOSS, x, t, whole, out)
    expected = LOSS.gradient(*data, whole)
    np.testing.assert_array_equal(out[:], expected)
    chunks = x.chunks or (8, 14, 23)
    arrays = da.from_array(x, chunks=chunks), da.from_array(t, chunks=(19, 5, 23))
    s = fsd.statistics(LOSS, *arrays)
    made, grad = dask.compute(s, fsd.gradient(LOSS, *arrays, s))
    np.testing.assert_allclose(made.array, whole.array[:, :, : made.array.shape[2]], rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_scaled_nifti_are_floats(tmp_path, data):
    image = nibabel.Nifti1Image((data[0] * 100).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.01, 0)
    nibabel.save(image, tmp_path / "scaled.nii")
    volume = Volume(tmp_path / "scaled.nii")
    assert volume.dtype == np.float64 and volume[:1].dtype == np.float64
    np.testing.assert_allclose(volume[...], nibabel.load(tmp_path / "scaled.nii").get_fdata())


# What is no volume


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def promised(path, shape):
    """Write a NIfTI whose header promises more than there is."""
    save_nifti(path, np.zeros((4, 4, 4), np.float32))
    content = bytearray(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    )
    content[40:56] = np.array([3, *shape, 1, 1, 1, 1], np.int16).tobytes()
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


def cut(path, length=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if length is None else length])
    return path


def flipped(path):
    """Turn a bit of the checksum at the end."""
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    return path


BAD = {
    "absent": (lambda p, a: p / "none.npy", "does not exist"),
    "absent zarr": (lambda p, a: p / "none.zarr", "does not exist"),
    "unknown": (lambda p, a: p / "v.mha", "must end in one of .npy, .ome.zarr, .zarr"),
    "cut npy": (lambda p, a: cut(save_npy(p / "v.npy", a)), "v.npy cannot be read"),
    "no npy": (lambda p, a: (p / "v.npy").write_text("text") and p / "v.npy", "cannot be read"),
    "pickled": (
        lambda p, a: (np.save(p / "v.npy", np.array([Evil()], object)), p / "v.npy")[1],
        "cannot be read",
    ),
    "cut nifti": (lambda p, a: cut(save_nifti(p / "v.nii", a)), "truncated"),
    "cut nifti.gz": (lambda p, a: cut(save_nifti(p / "v.nii.gz", a)), "cannot be read"),
    "nifti.gz cut in its checksum": (
        lambda p, a: cut(save_nifti(p / "v.nii.gz", a), -4),
        "ended before the end-of-stream",
    ),
    "nifti.gz with another bit": (
        lambda p, a: flipped(save_nifti(p / "v.nii.gz", a)),
        "CRC check failed",
    ),
    "nifti.gz cut in its header": (
        lambda p, a: cut(save_nifti(p / "v.nii.gz", a), 30),
        "is truncated: it ends in its header",
    ),
    "huge nifti.gz": (lambda p, a: promised(p / "v.nii.gz", (30000,) * 3), "truncated"),
    "huge nifti": (lambda p, a: promised(p / "v.nii", (30000,) * 3), "truncated"),
    "cut hdf5": (lambda p, a: cut(save_hdf5(p / "v.h5", a)), "cannot be read"),
    "hdf5 of two": (lambda p, a: two_in_hdf5(p / "v.h5", a), "holds a, b; write"),
    "huge chunks": (
        lambda p, a: Path(
            zarr.create_array(
                str(p / "v.zarr"), shape=(2**40,), chunks=(2**40,), dtype="f4"
            ).store_path.store.root
        ),
        "chunks of 4398046511104 bytes",
    ),
    "group": (lambda p, a: group_of(p / "g.zarr", a), "group of a; add"),
    "cut tiff": (
        lambda p, a: cut((tifffile.imwrite(p / "v.tif", a), p / "v.tif")[1], 40),
        "cannot be read",
    ),
    "complex": (lambda p, a: save_npy(p / "v.npy", a + 1j), "booleans, integers or floats"),
}


def group_of(path, array):
    zarr.open_group(str(path), mode="w").create_array("a", data=array)
    return path


def two_in_hdf5(path, array):
    with h5py.File(path, "w") as file:
        file["a"] = file["b"] = array
    return path


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*")  # what the libraries say of such files
def test_what_is_no_volume_says_so_and_takes_no_memory(name, data, tmp_path):
    make, message = BAD[name]
    path = make(tmp_path, data[0])
    with pytest.raises(UnreadableError, match=message):
        Volume(path)[...]
    assert not Path("evil").exists()


def test_blocks_cover_a_shape_once():
    seen = np.zeros(SHAPE, int)
    for index in blocks(SHAPE, (4, 5, 23)):
        seen[index] += 1
    assert (seen == 1).all()


class Shaped:
    def __init__(self, shape, chunks=None, fortran=False):
        self.shape, self.chunks, self.fortran = shape, chunks, fortran


def test_blocks_are_whole_chunks_and_not_too_large():
    cube = (1024,) * 3
    assert block_shape(Shaped(cube)) == (16, 1024, 1024)
    assert block_shape(Shaped(cube, fortran=True)) == (1024, 1024, 16)
    assert block_shape(Shaped(cube, (128, 128, 128))) == (128, 128, 1024)
    assert block_shape(Shaped((2, *cube)), axes=3) == (16, 1024, 1024)
    assert block_shape(Shaped((100000, 100000), (30000, 30000))) == (30000, 30000)
    assert block_shape(Shaped((5, 3), (2, 2))) == (5, 3)
    assert stores.BLOCK_VOXELS == 16 * 1024**2


# The table


def test_a_run_that_was_stopped_goes_on(data, tmp_path):
    path, seen = tmp_path / "table.zarr", []

    def stop_at_four(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statistics_per_block(LOSS, *data, block=(5, 7, 23), path=path, report=stop_at_four)
    assert read_table(path).done.sum() == 4
    assert repr(read_table(path)) == "<BlockTable of (19, 14, 23), 4 of 8 blocks done>"
    with pytest.raises(ValueError, match="4 of 8 blocks are not done yet"):
        read_table(path).total()
    table = statistics_per_block(
        LOSS, *data, block=(5, 7, 23), path=path, report=lambda done, total: seen.append(done)
    )
    assert seen == [4, 5, 6, 7, 8]
    plain = statistics_per_block(LOSS, *data, block=(5, 7, 23))
    assert table.total() == plain.total() == read_table(path).total()
    np.testing.assert_array_equal(table.sums, plain.sums)


def test_a_killed_process_loses_no_finished_block(data, tmp_path):
    np.save(tmp_path / "x.npy", data[0])
    np.save(tmp_path / "t.npy", data[1])
    code = f"""
import os, signal, fastseg as fs, fastseg.blocks
from fastseg.stores import Volume
loss = {LOSS!r}
loss = (fs.BCE() + fs.SoftJaccard()).replace(layout="", compute_dtype="float64")
def report(done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
fastseg.blocks.statistics_per_block(loss, Volume("x.npy"), Volume("t.npy"), block=(5, 7, 23),
                                    path="table.zarr", report=report)
""".replace(f"loss = {LOSS!r}\n", "")
    environment = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == -9
    assert read_table(tmp_path / "table.zarr").done.sum() == 3
    x, t = Volume(tmp_path / "x.npy"), Volume(tmp_path / "t.npy")
    table = statistics_per_block(LOSS, x, t, block=(5, 7, 23), path=tmp_path / "table.zarr")
    assert table.total() == statistics_per_block(LOSS, *data, block=(5, 7, 23)).total()


def test_parts_fill_one_table(data, tmp_path):
    path = tmp_path / "table.zarr"
    for k in (2, 0, 1):
        seen = []
        table = statistics_per_block(
            LOSS,
            *data,
            block=(5, 7, 23),
            path=path,
            part=(k, 3),
            report=lambda done, total, seen=seen: seen.append((done, total)),
        )
        mine = 8 * (k + 1) // 3 - 8 * k // 3
        assert seen == [(done, mine) for done in range(mine + 1)]
    assert table.total() == statistics_per_block(LOSS, *data, block=(5, 7, 23)).total()
    with pytest.raises(ValueError, match="part must be"):
        statistics_per_block(LOSS, *data, part=(3, 3))


def test_many_blocks_share_files(data, tmp_path, monkeypatch):
    monkeypatch.setattr(block_table, "MOST_FILES", 3)
    path = tmp_path / "table.zarr"
    table = statistics_per_block(LOSS, *data, block=(5, 7, 23), path=path)
    assert len(list((path / "c").iterdir())) == 3
    np.testing.assert_array_equal(
        table.sums, statistics_per_block(LOSS, *data, block=(5, 7, 23)).sums
    )


def test_a_table_of_something_else_is_refused(data, tmp_path):
    path = tmp_path / "table.zarr"
    statistics_per_block(LOSS, *data, block=(5, 7, 23), path=path)
    with pytest.raises(ValueError, match=r"made with block \[5, 7, 23\], not \[5, 14, 23\]"):
        statistics_per_block(LOSS, *data, block=(5, 14, 23), path=path)
    with pytest.raises(ValueError, match=r"made with sums \(BCE"):
        statistics_per_block(2 * LOSS, *data, block=(5, 7, 23), path=path)
    with pytest.raises(ValueError, match="is no table of blocks"):
        read_table(save_zarr(tmp_path / "other.zarr", data[0]))
    with pytest.raises(ValueError, match="does not exist"):
        read_table(tmp_path / "none.zarr")


def test_what_changed_is_not_gone_on_with(data, tmp_path):
    """Chunks rewritten in place, arrays in memory, another level of an OME-Zarr."""
    path = tmp_path / "table.zarr"

    def run(logits):
        return statistics_per_block(LOSS, logits, data[1], block=(19, 7, 23), path=path)

    stored = save_zarr(tmp_path / "x.zarr", data[0], chunks=CHUNKS)
    run(Volume(stored))
    run(Volume(stored))
    zarr.open(str(stored), mode="r+")[:5, :, :8] = 7
    with pytest.raises(ValueError, match="changed since, or are others"):
        run(Volume(stored))
    ome = Volume(save_ome(tmp_path / "o.ome.zarr", data[0]))
    before = ome.identity()
    zarr.open(str(tmp_path / "o.ome.zarr" / "0"), mode="r+")[...] = 1
    assert ome.identity() != before
    path = tmp_path / "memory.zarr"
    run(data[0])
    run(data[0].copy())
    with pytest.raises(ValueError, match="changed since, or are others"):
        run(-data[0])


def test_processes_that_start_together_make_one_table(data, tmp_path, monkeypatch):
    path, opened = tmp_path / "table.zarr", block_table.Table._open
    statistics_per_block(LOSS, *data, block=(5, 7, 23), path=path, part=(0, 2))
    calls = []

    def late(self):  # looks before the other has made it
        calls.append(self)
        if len(calls) > 1:
            opened(self)

    monkeypatch.setattr(block_table.Table, "_open", late)
    table = statistics_per_block(LOSS, *data, block=(5, 7, 23), path=path, part=(1, 2))
    assert table.total() == statistics_per_block(LOSS, *data, block=(5, 7, 23)).total()


def test_a_volume_elsewhere_is_the_same_file(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", data[0])
    volume = Volume("x.npy")
    stored = pickle.dumps(volume)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    np.save("x.npy", data[0] + 1)
    np.testing.assert_array_equal(pickle.loads(stored)[...], data[0])


def test_blocks_of_many_classes_are_smaller():
    assert fastseg.blocks._checked_block(None, (1024,) * 3, Shaped((64, 1024, 1024, 1024))) == (
        1,
        256,
        1024,
    )
    assert block_shape(Shaped((4, 0, 3))) == (4, 1, 3)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_any_executor_gives_the_same_bits(kind, data, tmp_path):
    np.save(tmp_path / "x.npy", data[0])
    np.save(tmp_path / "t.npy", data[1])
    x, t = Volume(tmp_path / "x.npy"), Volume(tmp_path / "t.npy")
    expected = statistics_per_block(LOSS, x, t, block=(4, 14, 23))
    import multiprocessing

    make = {
        "threads": lambda: concurrent.futures.ThreadPoolExecutor(3),
        "processes": lambda: concurrent.futures.ProcessPoolExecutor(
            2, mp_context=multiprocessing.get_context("spawn")
        ),
    }[kind]
    with make() as executor:
        table = statistics_per_block(LOSS, x, t, block=(4, 14, 23), executor=executor)
        grad = np.empty(SHAPE, np.float32)
        gradient_per_block(LOSS, x, t, table.total(), grad, executor=executor, block=(6, 5, 23))
    np.testing.assert_array_equal(table.sums, expected.sums)
    np.testing.assert_array_equal(grad, LOSS.gradient(*data, table.total()))


def test_hard_scores_and_classes_per_block(data):
    rng = np.random.default_rng(2)
    pred, truth = (rng.integers(0, 4, SHAPE).astype(np.uint8) for _ in range(2))
    scores = fs.HardScores(num_classes=4, layout="", ignore_index=3)
    table = statistics_per_block(scores, pred, truth, block=(7, 14, 8))
    assert table.total() == scores.statistics(pred, truth)
    assert table.scores("dice_score").shape == table.grid
    logits = rng.normal(size=(4, *SHAPE)).astype(np.float32)
    loss = fs.CrossEntropy().replace(layout="C")
    table = statistics_per_block(loss, logits, truth, block=(7, 14, 8))
    np.testing.assert_allclose(loss.value(table.total()), loss(logits, truth), rtol=1e-6)
    out = np.empty_like(logits)
    gradient_per_block(loss, logits, truth, table.total(), out, block=(7, 14, 8))
    np.testing.assert_allclose(out, loss.value_and_grad(logits, truth)[1], rtol=1e-5, atol=1e-12)


def test_the_error_map_shows_where_the_loss_is(data, tmp_path):
    targets = data[1]
    good = np.where(targets > 0, 9.0, -9.0).astype(np.float32)
    good[10:15, 7:14] *= -1
    table = statistics_per_block(LOSS, good, targets, block=(5, 7, 23), track=("hard",))
    values = table.values(LOSS)
    assert np.unravel_index(values.argmax(), values.shape) == (2, 1, 0)
    assert np.delete(values.ravel(), values.argmax()).max() < 0.01
    fastseg.blocks.draw_error_map(values, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
    fastseg.blocks.draw_error_map(np.full((2, 2), np.nan), tmp_path / "map")  # nothing is known
    assert (tmp_path / "map").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="one to three axes"):
        fastseg.blocks.draw_error_map(np.zeros((1,) * 4), tmp_path / "map.png")


def test_files_are_whole_or_not_there(tmp_path):
    from fastseg.files import replacing, write_json

    write_json({"a": [1, np.nan, (2, "x")]}, tmp_path / "a.json")
    before = (tmp_path / "a.json").read_text()
    assert json.loads(before) == {"a": [1, None, [2, "x"]]}
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert (tmp_path / "a.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_errors_name_the_block_and_keep_what_is_done(data, tmp_path):
    wrong = data[1].copy()
    wrong[12, 0, 0] = 9
    with pytest.raises(ValueError, match=r"targets must be 0 or 1, got 9 .*\[in the block 10:15"):
        statistics_per_block(LOSS, data[0], wrong, block=(5, 14, 23), path=tmp_path / "t.zarr")
    assert read_table(tmp_path / "t.zarr").done.tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="targets must have shape"):
        statistics_per_block(LOSS, data[0], data[1][1:])
    with pytest.raises(
        ValueError, match=r"positive number for each of the 3 spatial axes, got \(0, 1\)"
    ):
        statistics_per_block(LOSS, *data, block=(0, 1))
    with pytest.raises(ValueError, match="out must have the shape of logits"):
        gradient_per_block(LOSS, *data, LOSS.statistics(*data), np.empty(3, np.float32))
    with pytest.raises(ValueError, match="track and weight_map are a loss's"):
        statistics_per_block(fs.HardScores(layout=""), *data, track=("hard",))


FORKED = """
import os, sys
import numpy as np
from fastseg.stores import Volume
volume, array = Volume(sys.argv[1]), np.load(sys.argv[2])
assert np.array_equal(volume[:, :, :3], array[:, :, :3])
children = []
for start in range(0, 40, 10):
    children.append(os.fork())
    if children[-1] == 0:
        part = np.s_[:, :, start : start + 10]
        os._exit(0 if np.array_equal(volume[part], array[part]) else 1)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert np.array_equal(volume[:, :, ::-1], array[:, :, ::-1])
"""


def test_a_compressed_volume_is_read_by_forked_processes(tmp_path):
    """Each has a place of its own in a file that is larger than what is read ahead of it."""
    array = np.random.default_rng(0).integers(0, 256, (128, 128, 40), np.uint8)
    paths = save_nifti(tmp_path / "v.nii.gz", array), save_npy(tmp_path / "v.npy", array)
    done = subprocess.run([sys.executable, "-c", FORKED, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_lies_behind_a_compressed_volume_is_not_its(tmp_path):
    array = np.random.default_rng(0).integers(0, 3, (30, 40, 50), np.uint8)
    path = save_nifti(tmp_path / "v.nii.gz", array)
    path.write_bytes(path.read_bytes() + b"garbage")
    assert np.array_equal(np.asarray(Volume(path)), array)


def test_blocks_of_one_axis_and_of_numpy(tmp_path):
    loss = fs.BCE().replace(layout="")
    logits, targets = np.zeros(20, np.float32), np.ones(20, np.uint8)
    for block in (8, (8,), np.array([8])):
        table = statistics_per_block(loss, logits, targets, block=block)
        assert repr(table) == "<BlockTable of (20,), 3 of 3 blocks done>"
