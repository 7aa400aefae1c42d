"""The regression check of ratios fails where something became slower, and only there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "asv_benchmarks"


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ratios")


def test_what_is_slow_each_time_is_named_and_what_was_slow_once_is_not(ratios):
    measured = {"slow": iter([2.0, 1.9, 1.8]), "noisy": iter([3.0, 1.1]), "same": iter([1.0])}
    found, grown = ratios.check(
        lambda pairs: {name: next(measured[name]) for name in pairs},
        dict.fromkeys(measured),
        dict.fromkeys(measured, 1.0),
    )
    assert found == {"slow": 1.8, "noisy": 1.1, "same": 1.0}
    assert grown == {"slow": 1.8}


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (0.5, 1)])
def test_the_exit_status_tells(ratios, monkeypatch, tmp_path, capsys, factor, status):
    monkeypatch.setattr(ratios, "losses", lambda: {"a loss": None})
    monkeypatch.setattr(ratios, "updates", lambda: {"an update": None})
    monkeypatch.setattr(ratios, "measure", lambda pairs: dict.fromkeys(pairs, 2.0))
    baseline = tmp_path / "ratios.json"
    assert ratios.main(["--update", "--baseline", str(baseline)]) == 0
    stored = json.loads(baseline.read_text())
    for kind in stored:
        stored[kind]["a loss"] *= factor
    baseline.write_text(json.dumps(stored))
    assert ratios.main(["--baseline", str(baseline)]) == status
    assert ("2.00 times as slow" in capsys.readouterr().out) == bool(status)
