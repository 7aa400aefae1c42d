"""The command ``fastseg score``: nnU-Net's numbers, from any pair of formats."""

import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

import fastseg as fs
from fastseg import cli
from fastseg.score_files import parse_labels

SHAPE = (17, 12, 9)
LABELS = "1=liver,2=tumor,1+2=both"


def nnunet_metrics(truth, pred, ignore=None):
    """Return what nnU-Net counts for each class, from its definitions."""
    keep = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    found = {}
    for key, labels in (("1", [1]), ("2", [2]), ("(1, 2)", [1, 2])):
        p, t = np.isin(pred, labels) & keep, np.isin(truth, labels) & keep
        tp, fp, fn = (int(np.sum(x)) for x in (p & t, p & ~t, ~p & t))
        empty = tp + fp + fn == 0
        found[key] = {
            "Dice": None if empty else 2 * tp / (2 * tp + fp + fn),
            "IoU": None if empty else tp / (tp + fp + fn),
            "TP": tp,
            "FP": fp,
            "FN": fn,
            "TN": int(keep.sum()) - tp - fp - fn,
            "n_pred": tp + fp,
            "n_ref": tp + fn,
        }
    return found


def run(*arguments):
    """Run the command; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["score", *map(str, arguments)])
    return ended.value.code


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, SHAPE).astype(np.uint8)
    pred = np.where(rng.random(SHAPE) < 0.8, truth, rng.integers(0, 3, SHAPE)).astype(np.uint8)
    return pred, truth


def save(path, array, affine=None):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".zarr":
        zarr.create_array(str(path), shape=array.shape, dtype=array.dtype, chunks=(5, 12, 4))[:] = (
            array
        )
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("endings", [(".npy", ".nii.gz"), (".zarr", ".npy"), (".nii", ".tif")])
@pytest.mark.parametrize("ignore", [None, 5])
def test_scores_are_nnunets(endings, ignore, labels, tmp_path, capsys):
    pred, truth = labels
    options = []
    if ignore is not None:
        truth[3:6] = ignore
        pred[4, 4, 4] = 77  # where nothing counts
        options = ["--ignore-index", ignore]
    files = [save(tmp_path / f"{n}{e}", a) for n, e, a in zip("pt", endings, labels, strict=True)]
    assert run(*files, "--labels", LABELS, "--json", tmp_path / "s.json", *options) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    expected = nnunet_metrics(truth, pred, ignore)
    assert found["metric_per_case"][0]["metrics"] == found["mean"]
    assert found["mean"] == expected
    assert found["metric_per_case"][0]["prediction_file"] == str(files[0])
    for name, value in found["foreground_mean"].items():
        assert value == pytest.approx(np.mean([each[name] for each in expected.values()]))
    assert found["fastseg"]["version"] == fs.__version__
    assert found["fastseg"]["classes"]["(1, 2)"] == "both"
    shown = capsys.readouterr().out
    assert "liver" in shown and f"{expected['1']['IoU']:.4f}" in shown


def test_directories_are_matched_by_name(labels, tmp_path, capsys):
    pred, truth = labels
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    empty = np.zeros(SHAPE, np.uint8)
    cases = {"a": (pred, truth), "b": (truth, truth), "c": (empty, empty)}
    for name, (p, t) in cases.items():
        save(tmp_path / "p" / f"{name}.nii.gz", p)
        save(tmp_path / "t" / f"{name}.npy", t)
    save(tmp_path / "p" / "alone.npy", pred)
    (tmp_path / "t" / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "tumor": [1, 2], "ignore": 3}})
    )
    labels_file = tmp_path / "t" / "dataset.json"
    output = tmp_path / "s.json"
    where = (tmp_path / "p", tmp_path / "t")
    assert run(*where, "--labels", labels_file, "--json", output) == 0
    found = json.loads(output.read_text())
    assert [case["metrics"]["1"]["Dice"] for case in found["metric_per_case"]][1:] == [1.0, None]
    expected = nnunet_metrics(truth, pred)
    assert found["mean"]["1"]["Dice"] == pytest.approx((expected["1"]["Dice"] + 1) / 2)
    assert (
        set(found["mean"]) == {"1", "(1, 2)"} and found["fastseg"]["options"]["ignore_index"] == 3
    )
    assert "1 predictions have no truth: alone" in capsys.readouterr().err
    (tmp_path / "p" / "b.nii.gz").unlink()
    assert run(*where, "--labels", labels_file) == 2
    assert "1 of" in (line := capsys.readouterr().err) and "have no prediction" in line
    assert run(*where, "--labels", labels_file, "--allow-missing", "--json", output) == 0
    assert len(json.loads(output.read_text())["metric_per_case"]) == 2


def test_one_bad_case_does_not_lose_the_others(labels, tmp_path, capsys):
    for folder in "pt":
        (tmp_path / folder).mkdir()
        for name in "ab":
            save(tmp_path / folder / f"{name}.nii.gz", labels[0])
    bad = tmp_path / "p" / "a.nii.gz"
    bad.write_bytes(bad.read_bytes()[:50])
    output = tmp_path / "s.json"
    assert run(tmp_path / "p", tmp_path / "t", "--labels", LABELS, "--json", output) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "fastseg: 1 of 2 were not scored"
    assert said[-2].startswith("not scored: ") and "a.nii.gz is truncated" in said[-2]
    found = json.loads(output.read_text())
    assert len(found["metric_per_case"]) == 1 and len(found["fastseg"]["failed"]) == 1
    assert found["mean"]["1"]["Dice"] == 1.0


def test_whatever_happens_to_a_case_the_others_are_kept(labels, tmp_path, monkeypatch, capsys):
    from fastseg import cli_score, score_files

    for folder in "pt":
        (tmp_path / folder).mkdir()
        for name in "ab":
            save(tmp_path / folder / f"{name}.npy", labels[0])

    def failing(pair, *args, **kwargs):
        if pair.name == "a":
            raise MemoryError("no more")
        return score_files.score(pair, *args, **kwargs)

    monkeypatch.setattr(cli_score, "score", failing)
    output = tmp_path / "s.json"
    assert run(tmp_path / "p", tmp_path / "t", "--labels", LABELS, "--json", output) == 2
    assert "not scored: a: MemoryError: no more\n" in capsys.readouterr().err
    assert len(json.loads(output.read_text())["metric_per_case"]) == 1


def test_a_mask_is_kept_beside_an_ignored_label():
    from fastseg.score_sums import LabelScores

    rng = np.random.default_rng(4)
    pred, truth = (rng.integers(0, 3, SHAPE).astype(np.uint8) for _ in range(2))
    mask = rng.random(SHAPE) < 0.5
    sums = LabelScores(((1,), (1, 2)), ignore_index=0).statistics(pred, truth, mask)
    assert sums["count"].tolist() == [[np.sum(mask & (truth != 0))] * 2]


def test_labels_that_are_not_named_are_counted_where_they_count():
    from fastseg.score_sums import LabelScores

    pred, truth = np.zeros((2, 4, 4, 4), np.uint8)
    truth[0], pred[0], pred[2, 2, 2] = 9, 7, 3
    with pytest.raises(
        ValueError, match=r"predictions hold 3 \(1 voxels\), which is none of the labels 1: add 3"
    ):
        LabelScores(((1,),), ignore_index=9).statistics(pred, truth)


def test_keys_are_in_the_order_of_the_dataset():
    assert parse_labels("0=background,2+1=both")[0] == {"both": (2, 1)}


# Logits and probabilities


@pytest.fixture
def binary():
    rng = np.random.default_rng(1)
    truth = (rng.random(SHAPE) < 0.4).astype(np.uint8)
    logits = (rng.normal(size=SHAPE) + 2.0 * truth - 1.5).astype(np.float32)
    return logits, truth


def dice_of(found):
    return found["foreground_mean"]["Dice"]


def scored(tmp_path, pred, truth, *options):
    save(tmp_path / "p.npy", pred)
    save(tmp_path / "t.npy", truth)
    code = run(tmp_path / "p.npy", tmp_path / "t.npy", "--json", tmp_path / "s.json", *options)
    assert code == 0
    return json.loads((tmp_path / "s.json").read_text())


def test_logits_probabilities_and_stored_probabilities(binary, tmp_path):
    logits, truth = binary
    flat = {"layout": ""}
    assert dice_of(scored(tmp_path, logits, truth)) == fs.dice_score(logits, truth, **flat)
    got = scored(tmp_path, logits, truth, "--threshold", "-0.7")
    assert dice_of(got) == fs.dice_score((logits >= -0.7).astype(int), truth, **flat)
    probs = fs.sigmoid(logits)
    got = scored(tmp_path, probs, truth, "--kind", "probs", "--threshold", "0.3")
    assert dice_of(got) == fs.dice_score((probs >= 0.3).astype(int), truth, **flat)
    for level in ("-800", "38", "-4.0"):
        wide = np.round(logits.astype(np.float64) * 8) / 8
        got = scored(tmp_path, wide, truth, "--threshold", level)
        assert got["mean"]["1"]["n_pred"] == np.sum(wide >= float(level))
    got = scored(tmp_path, logits[None], truth)  # one channel, as networks give it
    assert dice_of(got) == fs.dice_score(logits, truth, **flat)
    for dtype, top in (("uint8", 255), ("uint16", 65535)):
        stored = np.round(probs * top).astype(dtype)
        for level in (0, 1, 77, 127.3, 128, top):
            got = scored(tmp_path, stored, truth, "--kind", "probs", "--threshold", level)
            assert dice_of(got) == fs.dice_score((stored >= level).astype(int), truth, **flat)
        got = scored(tmp_path, stored, truth, "--kind", "probs")
        assert dice_of(got) == fs.dice_score((stored >= (top + 1) // 2).astype(int), truth, **flat)
    labels = np.where(truth, 4, 0).astype(np.int16)
    assert dice_of(scored(tmp_path, logits, labels, "--labels", "4=it")) == fs.dice_score(
        logits, truth, **flat
    )


@pytest.mark.parametrize("stored", [None, "uint8", "uint16"])
def test_the_best_threshold(stored, binary, tmp_path):
    logits, truth = binary
    pred, options = logits, []
    if stored:
        top = np.iinfo(stored).max
        pred, options = np.round(fs.sigmoid(logits) * top).astype(stored), ["--kind", "probs"]
    found = scored(tmp_path, pred, truth, "--best-threshold", *options)
    threshold = found["metric_per_case"][0]["threshold"]
    assert found["fastseg"]["threshold"] == threshold
    got = found["mean"]["1"]["IoU"]
    assert got == fs.jaccard_index((pred >= threshold).astype(int), truth, layout="")
    every = np.linspace(-4, 4, 257)
    if stored:  # the first values of the curve's 1024 bins
        every = -(-np.arange(1, 1024) * int(top) // 1024)
    best = max(fs.jaccard_index((pred >= t).astype(int), truth, layout="") for t in every)
    assert got == best


@pytest.mark.parametrize("ending", [".zarr", ".nii.gz"])
def test_axes_in_the_opposite_order(ending, labels, tmp_path):
    pred, truth = labels
    scores = np.moveaxis(np.eye(3, dtype=np.float32)[pred], -1, 0)
    target = save(tmp_path / "t.npy", truth)
    for k, (array, extra) in enumerate(((pred, []), (scores, ["--kind", "logits"]))):
        turned = np.transpose(
            array, (*range(array.ndim - 3), *range(array.ndim - 3, array.ndim)[::-1])
        )
        path = tmp_path / f"p{k}.npy" if k else save(tmp_path / f"p{ending}", turned)
        if k:
            np.save(path, turned)
        output = tmp_path / "s.json"
        options = ("--labels", LABELS, "--transpose", "--json", output, *extra)
        assert run(path, target, *options) == 0
        assert json.loads(output.read_text())["mean"] == nnunet_metrics(truth, pred)


def test_scores_of_classes_predict_the_largest(labels, tmp_path):
    pred, truth = labels
    scores = np.moveaxis(np.eye(3, dtype=np.float32)[pred], -1, 0)
    found = scored(tmp_path, scores, truth, "--labels", LABELS)
    assert found["mean"] == nnunet_metrics(truth, pred)


def test_the_table_goes_on_and_the_map_is_drawn(labels, tmp_path):
    files = [save(tmp_path / f"{n}.npy", a) for n, a in zip("pt", labels, strict=True)]
    options = (
        "--labels",
        LABELS,
        "--table",
        tmp_path / "t.zarr",
        "--error-map",
        tmp_path / "e.png",
    )
    assert run(*files, *options) == run(*files, *options) == 0
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert not [p.name for p in tmp_path.iterdir() if "partial" in p.name]


# What is wrong


def bad(make, *options, message):
    return pytest.param(make, options, message, id=message)


BAD = [
    bad(lambda p, t: (p[1:], t), message="p.npy has shape (16, 12, 9) and"),
    bad(lambda p, t: (p.T, t), message="their axes are in opposite order: --transpose"),
    bad(lambda p, t: (p + 1, t), "--labels", LABELS, message="predictions hold 3 ("),
    bad(lambda p, t: (p * 2, t), "--labels", "1=a,4=b", message="hold 2 ("),
    bad(lambda p, t: (p, t * 2), "--labels", LABELS, message="targets hold 4 ("),
    bad(lambda p, t: (p / 3, t), "--kind", "labels", message="must be labels, got 0."),
    bad(lambda p, t: (p, t), "--kind", "scores", message="kind must be logits, probs or labels"),
    bad(lambda p, t: (p, t), "--labels", "one", message="labels must read like 1=liver"),
    bad(lambda p, t: (p, t), "--labels", "1=a 2=b", message="labels must read like 1=liver"),
    bad(lambda p, t: (p, t), "--labels", "1=a;2=b", message="labels must read like 1=liver"),
    bad(
        lambda p, t: ((p > 0) * np.uint8(255), t),
        message="which is none of the labels 1: --labels 25",
    ),
    bad(lambda p, t: (p, t), "--transpose", message="after --transpose, and would fit without"),
    bad(lambda p, t: (np.stack([p / 3, p / 3], -1), t), message="must be the first, not the last"),
    bad(lambda p, t: (p, t), "--labels", "none.json", message="none.json does not exist"),
    bad(lambda p, t: (p, t), "--labels", "1=a,2=a", message="labels name 'a' twice"),
    bad(lambda p, t: (p, t), "--threshold", "1", message="p.npy holds labels"),
    bad(
        lambda p, t: (p / 3, t),
        "--labels",
        LABELS,
        message="names 3 classes; --kind labels if it holds",
    ),
    bad(lambda p, t: (p, t), "--kind", "logits", message="must hold floats as logits, got uint8"),
    bad(lambda p, t: (p, t), "--json", "none/s.json", message="none is no directory"),
    bad(lambda p, t: (p, t), "--dask", "tcp://127.0.0.1:1", message="no scheduler of dask answers"),
    bad(lambda p, t: (p * 1.0, t), "--kind", "probs", message="must hold probabilities in [0, 1]"),
    bad(lambda p, t: (p * 1.0, t), message="whole numbers: --kind says whether they are labels"),
    bad(lambda p, t: (p / 3 * np.nan, t), message="p.npy holds 1836 NaN"),
    bad(lambda p, t: (p / 3 * np.nan, t), "--threshold", "1", message="must be numbers, got NaN"),
    bad(lambda p, t: (np.stack([p, t]) * np.nan, t), message="must be numbers, got NaN"),
    bad(
        lambda p, t: (p, t),
        "--kind",
        "probs",
        "--threshold",
        "300",
        message="255 being probability 1, got 300",
    ),
    bad(lambda p, t: (p, t), "--kind", "probs", "--threshold", "0.5", message="1, got 0.5"),
    bad(lambda p, t: (p.astype("i4"), t), "--kind", "probs", message="bool, uint8 or uint16, got"),
    bad(lambda p, t: (p, t), "--labels", "1=a,1=b", message="labels name 1 twice"),
    bad(lambda p, t: (p, t), "--labels", "0=background", message="a class beside background"),
    bad(lambda p, t: (p.astype("g"), t), message="integers or floats, got float128"),
    bad(lambda p, t: (p[..., :0], t), message="has shape (17, 12, 0) and"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD)
@pytest.mark.filterwarnings("ignore:.*")  # of distributed, when nobody answers
def test_what_is_wrong_is_one_line(make, options, message, labels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, array in zip(("p.npy", "t.npy"), make(*labels), strict=True):
        np.save(name, array)
    before = sorted(tmp_path.iterdir())
    assert run("p.npy", "t.npy", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert sorted(tmp_path.iterdir()) == before


def test_affines_that_differ_are_a_warning(labels, tmp_path, capsys):
    files = [
        save(tmp_path / f"{n}.nii", a, np.diag([k, 1.0, 1.0, 1.0]))
        for k, n, a in zip((1, 2), "pt", labels, strict=True)
    ]
    assert run(*files, "--labels", LABELS) == 0
    assert "warning: p: the affines differ by up to 1" in capsys.readouterr().err


def test_on_workers_of_dask(labels, tmp_path):
    distributed = pytest.importorskip("distributed")
    files = [save(tmp_path / f"{n}.zarr", a) for n, a in zip("pt", labels, strict=True)]
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50
    ) as cluster:
        address = cluster.scheduler_address
        output = tmp_path / "s.json"
        assert run(*files, "--labels", LABELS, "--json", output, "--dask", address) == 0
    assert json.loads(output.read_text())["mean"] == nnunet_metrics(labels[1], labels[0])


def test_labels_of_the_command_line():
    assert parse_labels(None) == ({"1": (1,)}, None)
    assert parse_labels("1=a, 2+3=b c,7") == ({"a": (1,), "b c": (2, 3), "7": (7,)}, None)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 65536\)"):
        parse_labels("70000=a")


def test_the_command_is_there():
    environment = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "COLUMNS": "200"}
    command = [sys.executable, "-m", "fastseg", "score", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--best-threshold" in done.stdout
