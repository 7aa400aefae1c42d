"""The command ``fastseg score``: what its options mean, its progress bar and its table."""

# No `from __future__ import annotations`: Typer reads annotations.

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastseg.blocks import draw_error_map
from fastseg.files import write_json
from fastseg.installed import check_installed
from fastseg.score_files import (
    Answer,
    Pair,
    Question,
    Report,
    pairs,
    parse_labels,
    score,
    summary,
)

if TYPE_CHECKING:
    from rich.console import Console


def run(
    pred: str,
    target: str,
    question: Callable[[dict[str, tuple[int, ...]], int | None], Question],
    *,
    labels: str | None,
    json_path: Path | None,
    table: Path | None,
    error_map: Path | None,
    address: str | None,
    allow_missing: bool,
    bars: Callable[[], Any],
    fail: Callable[[str], Any],
) -> None:
    """Score files behind a progress bar, print a table, and write what was asked for.

    One line says what failed of each pair, the others are scored; then ``fail`` ends the command.
    """
    from rich.console import Console

    console, errors = Console(highlight=False, markup=False), Console(stderr=True, highlight=False)
    for path in (json_path, error_map):
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"{path.parent} is no directory")
    if table is not None:
        check_installed("--table", "zarr")
    if error_map is not None:
        check_installed("--error-map", "matplotlib")
    found, warnings = pairs(pred, target, allow_missing)
    if error_map is not None and len(found) > 1:
        fail(f"--error-map is for one pair, and there are {len(found)}")
    asked = question(*parse_labels(labels))
    answers: list[Answer] = []
    failed: list[str] = []
    with _executor(address, fail) as executor, bars() as bar:
        for k, pair in enumerate(found):
            report = _report(bar, k, len(found))
            where = _table_of(table, pair, len(found))
            try:
                answers.append(score(pair, asked, executor=executor, table=where, report=report))
            except Exception as error:  # whatever it is, the other cases are not lost
                failed.append(_line(pair, error))
    document = summary(answers, asked, failed)
    document["fastseg"]["warnings"] = [*warnings, *document["fastseg"]["warnings"]]
    if answers:
        _print(console, document, [answer.pair.name for answer in answers])
    for line in document["fastseg"]["warnings"]:
        errors.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)
    if json_path is not None and (answers or len(found) > 1):
        write_json(document, json_path)
    if error_map is not None and answers:
        values = 1.0 - answers[0].table.scores()
        draw_error_map(values, error_map, answers[0].pair.name, "1 - Jaccard index")
    if failed:
        if len(found) == 1:
            fail(failed[0])
        for line in failed:
            errors.print(f"not scored: {line}", markup=False, soft_wrap=True)
        fail(f"{len(failed)} of {len(found)} were not scored")


def _line(pair: Pair, error: Exception) -> str:
    """Return what went wrong with a pair; what is not expected is named."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | ModuleNotFoundError):
        text = f"{type(error).__name__}: {text}"
    return text if Path(pair.pred).name in text else f"{pair.name}: {text}"


def _report(bar: Any, k: int, count: int) -> Report:
    def report(name: str, done: int, total: int) -> None:
        bar("scoring", k * total + done, count * total, f"{name} ({k + 1} of {count})")

    return report


def _table_of(table: Path | None, pair: Pair, count: int) -> Path | None:
    """Return where the table of a pair is: what was asked for, or for several a folder's entry."""
    return table / f"{pair.name}.zarr" if table is not None and count > 1 else table


@contextlib.contextmanager
def _executor(address: str | None, fail: Callable[[str], Any]) -> Iterator[Executor | None]:
    if address is None:
        yield None
        return
    check_installed("--dask", "distributed")
    import distributed

    try:
        client: Any = distributed.Client(address, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        fail(f"no scheduler of dask answers at {address}: {error}")
    with client:
        yield client.get_executor()


def _print(console: "Console", document: dict[str, Any], names: list[str]) -> None:
    from rich.table import Table

    classes = document["fastseg"]["classes"]
    table = Table("case", "class", "Jaccard", "Dice", "TP", "FP", "FN", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    cases = list(zip(names, document["metric_per_case"], strict=True))
    rows = [(name, case["metrics"]) for name, case in cases]
    if len(rows) > 1:
        rows.append(("mean", document["mean"]))
    for name, metrics in rows:
        for k, (key, values) in enumerate(metrics.items()):
            counts = (f"{values[count]:,.0f}" for count in ("TP", "FP", "FN"))
            shown = (_number(values["IoU"]), _number(values["Dice"]))
            table.add_row(name if k == 0 else "", classes[key], *shown, *counts)
        table.add_section()
    console.print(table)
    threshold = document["metric_per_case"][0].get("threshold")
    if threshold is not None:
        console.print(f"threshold with the largest mean Jaccard index: {threshold:g}")


def _number(value: float) -> str:
    return "no foreground" if math.isnan(value) else f"{value:.4f}"
