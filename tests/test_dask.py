"""fastseg.dask: the plain verbs' numbers, chunk by chunk."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest

import cases
import fastseg as fs
import fastseg.dask as fsd
from fastseg import thread_shares as shares
from fastseg.columns import family_of
from fastseg_kernels.constants import HISTOGRAMS

SHAPE = (3, 2, 9, 14, 11)
CHUNKS = [
    ((2, 1), (2,), (4, 5), (14,), (11,)),
    ((3,), (1, 1), (9,), (5, 5, 4), (6, 5)),
    ((1, 1, 1), (2,), (2, 7), (3, 11), (11,)),
]
LOSSES = [
    fs.BCE() + 2.0 * fs.SoftJaccard(),
    (fs.BCE() + fs.SoftDice()).replace(reduction="none"),
    fs.SoftJaccard(scope="batch") + fs.Tversky(alpha=0.3, beta=0.7),
    fs.CrossEntropy() + fs.SoftJaccard(),
    fs.LovaszHinge(bins=1024),
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def data(loss, seed=0):
    logits, targets = cases.make(SHAPE, np.float32)
    rng = np.random.default_rng(seed)
    if "CrossEntropy" in repr(loss):
        targets = rng.integers(0, 2, (3, *SHAPE[2:])).astype(np.uint8)
    return logits, targets, rng.random((3, 1, *SHAPE[2:])) < 0.8


def chunked(array, k):
    chunks = CHUNKS[k]
    if array.ndim == 4:
        chunks = (chunks[0], *chunks[2:])
    elif array.shape[1] == 1:
        chunks = (chunks[0], (1,), *chunks[2:])
    return da.from_array(array, chunks=chunks)


@each_loss
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_verbs_are_those_of_the_whole(loss, scheduler):
    loss = loss.replace(compute_dtype="float64")  # sums of any chunks add up to 1e-12 then
    logits, targets, mask = data(loss)
    whole = loss.statistics(logits, targets, mask=mask, track=("hard", "curve"))
    for k, j, i in ((0, 0, 0), (0, 1, 2), (2, 1, 0)):
        arrays = chunked(logits, k), chunked(targets, j)
        s = fsd.statistics(loss, *arrays, mask=chunked(mask, i), track=("hard", "curve"))
        value = fsd.value(loss, s)
        grad = fsd.gradient(loss, *arrays, s, mask=chunked(mask, i), grad_scale=2.0)
        assert grad.shape == logits.shape and grad.dtype == logits.dtype
        with dask.config.set(scheduler=scheduler):
            # Arrays last: dask 2026.8 answers in another order if delayed ones follow them.
            sums, number, best, slopes = dask.compute(s, value, s.jaccard_curve().best(), grad)
            assert s.jaccard_index().compute() == whole.jaccard_index()  # hard counts: exactly
        np.testing.assert_allclose(sums.array, whole.array, rtol=1e-12, atol=1e-12)
        counted = [k for k, name in enumerate(whole.names) if family_of(name) in HISTOGRAMS]
        assert len(counted) > 1024  # the curve's, and those of Lovasz: exactly
        np.testing.assert_array_equal(sums.array[:, :, counted], whole.array[:, :, counted])
        assert best == whole.jaccard_curve().best()
        np.testing.assert_allclose(number, loss.value(whole), rtol=1e-12)
        expected = loss.gradient(logits, targets, whole, mask=mask, grad_scale=2.0)
        np.testing.assert_allclose(slopes, expected, rtol=1e-6, atol=1e-12)


def test_the_same_chunks_give_the_same_bits():
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    s = fsd.statistics(loss, chunked(logits, 0), chunked(targets, 1))
    results = [s.compute(scheduler=name) for name in ("synchronous", "threads", "threads")]
    assert results[0] == results[1] == results[2]
    assert results[0].array.tobytes() == results[1].array.tobytes()


def test_chunks_are_cut_and_not_joined():
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    grad = fsd.value_and_grad(loss, chunked(logits, 0), chunked(targets, 2))[1]
    assert grad.chunks == ((1, 1, 1), (2,), (2, 2, 5), (3, 11), (11,))


def test_volumes_without_the_axes_of_samples_and_classes():
    logits, targets = (array[0, 0] for array in cases.make(SHAPE, np.float32))
    loss = (fs.BCE() + fs.SoftJaccard()).replace(layout="")
    x, t = da.from_array(logits, chunks=(4, 5, 11)), da.from_array(targets, chunks=(9, 7, 3))
    value, grad = dask.compute(*fsd.value_and_grad(loss, x, t))
    expected = loss.value_and_grad(logits, targets)
    assert value == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-9)
    named = fsd.statistics(loss, x, t, samples="case 1").compute()
    assert named.samples == ("case 1",)
    np.testing.assert_allclose(named.array, loss.statistics(logits, targets).array, rtol=1e-6)


def test_weights_and_arrays_in_memory():
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    weights = np.random.default_rng(1).random(SHAPE, np.float32)
    value, grad = fsd.value_and_grad(loss, chunked(logits, 1), targets, weight_map=weights)
    expected = loss.value_and_grad(logits, targets, weight_map=weights)
    assert value.compute() == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(grad.compute(), expected[1], rtol=1e-5, atol=1e-9)


def test_statistics_in_memory_give_gradients_of_chunks():
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    s = loss.statistics(logits, targets)
    grad = fsd.gradient(loss, chunked(logits, 0), chunked(targets, 0), s).compute()
    np.testing.assert_array_equal(grad, loss.gradient(logits, targets, s))


def test_sigmoid_of_blocks():
    logits, _, _ = data(LOSSES[0])
    made = chunked(logits, 1).map_blocks(fs.sigmoid, dtype=logits.dtype).compute()
    np.testing.assert_array_equal(made, fs.sigmoid(logits))


def test_wrong_input_says_why():
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    x, t = chunked(logits, 0), chunked(targets, 0)
    with pytest.raises(TypeError, match="logits must be a dask array, got ndarray"):
        fsd.statistics(loss, logits, t)
    with pytest.raises(ValueError, match=r"targets must have shape \(3, 2, 9, .* got \(2, 2, 9"):
        fsd.statistics(loss, x, t[:2])
    with pytest.raises(TypeError, match="loss must be a fastseg loss, got str"):
        fsd.value_and_grad("bce", x, t)
    with pytest.raises(TypeError, match="sorts its voxels"):
        fsd.statistics(fs.LovaszHinge(), x, t)
    with pytest.raises(ValueError, match=r"targets must be 0 or 1, got [78] "):
        fsd.value(loss, fsd.statistics(loss, x, t + 7)).compute(scheduler="threads")
    with pytest.raises(TypeError, match=r"logits must be an array .* fastseg\.dask"):
        loss(x, t)


def test_tasks_share_the_threads(threads):
    """Of four threads the first task has all, the second, beside it, two."""
    fs.set_num_threads(4)
    counts = []

    def task():
        with shares.share_of_threads():
            counts.append(fs.get_num_threads())

    with shares.share_of_threads():
        counts.append(fs.get_num_threads())
        other = threading.Thread(target=task)
        other.start()
        other.join()
    assert counts == [4, 2] and fs.get_num_threads() == 4
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    fsd.statistics(loss, chunked(logits, 0), chunked(targets, 0)).compute(scheduler="threads")
    assert shares._running == 0


FORKED = """
import os
from fastseg import thread_shares as shares
with shares.share_of_threads():
    child = os.fork()
    if child == 0:
        os._exit(shares._running)
assert shares._running == 0
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_none_of_its_parents_tasks():
    """In a process of its own: others here may have threads."""
    environment = {**os.environ, "PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    subprocess.run([sys.executable, "-c", FORKED], check=True, env=environment, timeout=300)


def test_one_class_and_one_voxel():
    loss = fs.BCE() + fs.SoftJaccard()
    for shape in ((1, 1, 7), (2, 1, 1), (2, 3)):
        x = np.linspace(-2, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        t = (x > 0).astype(np.uint8)
        value, grad = dask.compute(
            *fsd.value_and_grad(loss, da.from_array(x, chunks=1), da.from_array(t, chunks=2))
        )
        expected = loss.value_and_grad(x, t)
        assert value == pytest.approx(expected[0], rel=1e-6)
        np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-9)


# Hard scores

COUNTINGS = [
    ({}, "logits"),
    ({"threshold": 0.7, "ignore_index": 1}, "logits"),
    ({"kind": "probs", "track": ("curve",)}, "probs"),
    ({"num_classes": 5, "ignore_index": 4}, "labels"),
    ({}, "binary labels"),
]


@pytest.mark.parametrize(("options", "what"), COUNTINGS, ids=str)
def test_hard_scores_are_those_of_the_whole(options, what):
    logits, targets, mask = data(LOSSES[0])
    pred = {"logits": logits, "probs": fs.sigmoid(logits)}.get(what)
    if pred is None:
        rng = np.random.default_rng(3)
        most = 5 if "num_classes" in options else 2
        pred, targets = (rng.integers(0, most, (3, *SHAPE[2:]), np.int16) for _ in range(2))
        mask = mask[:, 0]
    arrays = chunked(pred, 0), chunked(targets, 1)
    scores = {k: v for k, v in options.items() if k != "track"}
    expected = fs.hard_statistics(pred, targets, mask=mask, **options)
    s = fsd.hard_statistics(*arrays, mask=chunked(mask, 2), **options)
    jaccard = fsd.jaccard_index(*arrays, mask=mask, **scores)
    dice = fsd.dice_score(*arrays, mask=chunked(mask, 2), reduction="none", empty=1.0, **scores)
    counts = fsd.stat_scores(*arrays, mask=chunked(mask, 2), **scores)
    got = dask.compute(s, jaccard, dice, counts)
    assert got[0] == expected  # counts are integers: exactly
    assert got[1] == fs.jaccard_index(pred, targets, mask=mask, **scores)
    np.testing.assert_array_equal(got[2], expected.dice_score(reduction="none", empty=1.0))
    for name, count in fs.stat_scores(pred, targets, mask=mask, **scores).items():
        np.testing.assert_array_equal(got[3][name], count)


def test_hard_scores_say_at_once_what_is_wrong():
    logits, targets, _ = data(LOSSES[0])
    x, t = chunked(logits, 0), chunked(targets, 0)
    with pytest.raises(TypeError, match="pred must be a dask array, got ndarray"):
        fsd.jaccard_index(logits, t)
    with pytest.raises(ValueError, match="num_classes is for kind='labels' only"):
        fsd.jaccard_index(x, t, num_classes=3)
    with pytest.raises(ValueError, match="targets must have shape"):
        fsd.stat_scores(x, t[..., 1:])
    with pytest.raises(ValueError, match=r"track must be \('curve',\)"):
        fsd.hard_statistics(x, t, track=("hard",))


# dask.distributed


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_two_workers_give_the_same_bits(client):
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    s = fsd.statistics(loss, chunked(logits, 0), chunked(targets, 1), track=("hard", "curve"))
    grad = fsd.gradient(loss, chunked(logits, 0), chunked(targets, 1), s)
    here = dask.compute(s, grad, scheduler="synchronous")
    there = client.gather(client.compute([s, grad]))
    assert there[0] == here[0]
    np.testing.assert_array_equal(there[1], here[1])


def threads_in_a_task():
    with shares.share_of_threads():
        return os.getpid(), fs.get_num_threads()


def test_a_worker_has_its_own_share_of_threads(client):
    counts = dict(client.gather(client.map(lambda _: threads_in_a_task(), range(8), pure=False)))
    assert set(counts.values()) == {1} and os.getpid() not in counts


class Machine:
    get_num_threads = staticmethod(lambda: 8)
    are_threads_chosen = staticmethod(lambda: False)


def test_workers_in_this_process_share_too(threads, monkeypatch):
    distributed = pytest.importorskip("distributed")
    options = {"processes": False, "dashboard_address": ":0", "silence_logs": 50}
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert client.submit(threads_in_a_task).result()[1] <= 2
        with monkeypatch.context() as patch:  # a machine of 8 CPUs
            patch.setattr(shares, "cpu", lambda: Machine)
            assert client.submit(shares._threads_of_process).result() == 2
        fs.set_num_threads(5)  # chosen: it holds
        assert client.submit(threads_in_a_task, pure=False).result()[1] == 5


def killing(block, path):
    """Return the block; the first task that comes here ends its process."""
    try:
        Path(path).touch(exist_ok=False)
    except FileExistsError:
        return block
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_costs_a_retry_and_not_the_answer(client, tmp_path):
    loss, (logits, targets, _) = LOSSES[0], data(LOSSES[0])
    path = str(tmp_path / "killed")
    x = chunked(logits, 0).map_blocks(killing, path, dtype=logits.dtype, meta=logits[:0])
    s = fsd.statistics(loss, x, chunked(targets, 1))
    expected = fsd.statistics(loss, chunked(logits, 0), chunked(targets, 1)).compute()
    got = client.compute(s).result(timeout=120)
    assert (tmp_path / "killed").exists() and got == expected
