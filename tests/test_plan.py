"""tools/plan_run.py: the arithmetic of a large run is what playing it gives."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "tools" / "plan_run.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plan_run", PATH)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["plan_run"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plan_run"]


RUNS = [
    {"cores": 512},
    {"cores": 128, "days_between_failures": 0.5},
    {"cores": 500, "bandwidth": 1e13},
    {"cores": 300, "files": 1500, "days_between_failures": 1.0, "voxels": 3e14},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_the_arithmetic_is_what_playing_the_run_gives(tool, options):
    run = tool.Run(**options)
    found = tool.plan(run)
    played = [tool.simulate(run, seed) for seed in range(20)]
    end, failures, lost = (np.mean(each) for each in zip(*played, strict=True))
    assert end == pytest.approx(found.total, rel=0.1)
    spread = 4 * np.sqrt(found.failures / len(played))  # of a count of independent events
    assert abs(failures - found.failures) < spread + 0.05 * found.failures
    assert lost == pytest.approx(found.lost, rel=0.1, abs=4 * found.unit_seconds)
    assert found.total >= max(found.computing, found.reading)


def test_without_failures_there_are_only_waves(tool):
    run = tool.Run(cores=1000, days_between_failures=1e12, bandwidth=1e15)
    end, failures, lost = tool.simulate(run)
    assert failures == lost == 0
    assert end == pytest.approx(np.ceil(tool.plan(run).units / 1000) * tool.plan(run).unit_seconds)
    assert end == pytest.approx(tool.plan(run).total)
