"""The command ``fastseg``: what this installation is, a demo, scores, and a warm cache.

Typer and Rich come with the extra ``cli`` and are imported when the command runs, not before.
"""

# No `from __future__ import annotations`: Typer reads annotations, and these are made in functions.

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import fastseg as fs

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.progress import TaskID

EXPECTED_FAILURE = 2
"""Exit code of everything that is the caller's to mend; there is no traceback then."""
MISSING = "fastseg's command line needs typer and rich: pip install typer rich"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (``sys.argv`` by default) and exit.

    Raises
    ------
    SystemExit
        With code 0, 2 for what the caller can mend (said in one line on standard error), or 130
        after Ctrl-C.
    """
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        _fail(MISSING)
    try:
        code = _application()(
            args=None if arguments is None else list(arguments),
            prog_name="fastseg",
            standalone_mode=False,
        )
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except OSError as error:  # a directory that cannot be written, a file that is absent
        _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # Click's, by whichever name Typer has it
            raise
        _fail(error.format_message())
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    print(line if line.startswith("fastseg") else f"fastseg: {line}", file=sys.stderr)
    raise SystemExit(EXPECTED_FAILURE)


def _application() -> "typer.Typer":
    """Return the Typer application."""
    import typer

    application = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @application.callback(invoke_without_command=True)
    def fastseg(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        """Fused losses, gradients, metrics and parameter updates for segmentation."""
        if version:
            print(f"fastseg {fs.__version__}")
        elif context.invoked_subcommand is None:
            print(context.get_help())

    @application.command()
    def info(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show versions, CPU, threads, the cache of compiled kernels, and the GPU's state."""
        show_info(as_json)

    @application.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Directory for demo.png and demo.json.")] = Path(
            "fastseg_demo"
        ),
        quick: Annotated[bool, typer.Option("--quick", help="Less data, fewer steps.")] = False,
        steps: Annotated[int | None, typer.Option(min=1, help="Steps of training.")] = None,
        seed: Annotated[int, typer.Option(min=0, help="Of the bias field and the noise.")] = 0,
    ) -> None:
        """Train a voxel-wise model to find grey matter in a brain template (under a minute)."""
        show_demo(out, quick, steps, seed)

    @application.command()
    def bench(
        out: Annotated[Path, typer.Option(help="Directory for bench.json and bench.png.")] = Path(
            "fastseg_bench"
        ),
        quick: Annotated[bool, typer.Option("--quick", help="Small arrays.")] = False,
    ) -> None:
        """Time fastseg, NumPy and the peers that are installed on this machine (half a minute)."""
        show_bench(out, quick)

    @application.command()
    def score(
        pred: Annotated[str, typer.Argument(help="Prediction, or a directory of them.")],
        target: Annotated[str, typer.Argument(help="Truth, or a directory, matched by name.")],
        kind: Annotated[
            str | None,
            typer.Option(
                help="logits, probs or labels; by default labels if integers, else logits."
            ),
        ] = None,
        labels: Annotated[
            str | None,
            typer.Option(help="dataset.json, or 1=liver,2=tumor,1+2=both. By default label 1."),
        ] = None,
        ignore_index: Annotated[
            int | None, typer.Option(help="Label of voxels of the truth that do not count.")
        ] = None,
        threshold: Annotated[
            float | None, typer.Option(help="Foreground from here on, in stored units.")
        ] = None,
        best_threshold: Annotated[
            bool, typer.Option("--best-threshold", help="That of the largest mean Jaccard index.")
        ] = False,
        transpose: Annotated[
            bool,
            typer.Option("--transpose", help="The prediction's axes are z, y, x; truth x, y, z."),
        ] = False,
        json_path: Annotated[
            Path | None, typer.Option("--json", help="Write nnU-Net's summary, and more.")
        ] = None,
        table: Annotated[
            Path | None,
            typer.Option(help="Zarr table of the blocks' sums; a stopped run goes on from it."),
        ] = None,
        error_map: Annotated[
            Path | None, typer.Option(help="PNG of where the errors are, block by block.")
        ] = None,
        dask: Annotated[
            str | None, typer.Option(help="Address of a dask scheduler whose workers compute.")
        ] = None,
        allow_missing: Annotated[
            bool, typer.Option("--allow-missing", help="Leave out truth without a prediction.")
        ] = False,
    ) -> None:
        """Score predictions in files against the truth: npy, zarr, HDF5, NIfTI, TIFF."""
        from fastseg import cli_score
        from fastseg.score_files import Question

        def question(regions: dict[str, tuple[int, ...]], ignored: int | None) -> Question:
            ignore = ignored if ignore_index is None else ignore_index
            choices = (threshold, best_threshold, transpose)
            return Question(regions, kind, ignore, *choices)  # type: ignore[arg-type]

        try:
            cli_score.run(
                pred,
                target,
                question,
                labels=labels,
                json_path=json_path,
                table=table,
                error_map=error_map,
                address=dask,
                allow_missing=allow_missing,
                bars=_Bars,
                fail=_fail,
            )
        except (ValueError, ModuleNotFoundError) as error:
            _fail(str(error))

    @application.command()
    def warmup() -> None:
        """Compile the kernels of the usual cases ahead of their first use (one to two minutes)."""
        show_warmup()

    return application


# Commands


def show_info(as_json: bool) -> None:
    """Print what `fastseg.info.collect` finds."""
    from fastseg.info import collect

    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section in ("versions", "cpu", "threads", "cache", "gpu"):
        for k, (name, value) in enumerate(found[section].items()):
            label = "size" if name == "bytes" else name
            table.add_row(section if k == 0 else "", label, _plain(name, value))
        table.add_section()
    console = Console(highlight=False, markup=False)  # paths may hold brackets
    console.print(table)
    for conflict in found["conflicts"]:
        console.print(f"conflict: {conflict}", style="bold red")


def _plain(name: str, value: Any) -> str:
    """Return a value of `fastseg.info.collect` in words."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(key, entry)}" for key, entry in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 1e6:.1f} MB" if name == "bytes" else str(value)


def show_warmup() -> None:
    """Compile ahead behind a progress bar."""
    from rich.console import Console

    from fastseg.info import is_writable
    from fastseg.warmup import announced_compilation, compile_ahead
    from fastseg_kernels.cpu import cache_directory

    directory = cache_directory()
    if directory is None:
        _fail("the cache is off (FASTSEG_CACHE_DIR is empty), so that nothing would be kept")
    if not is_writable(directory):
        _fail(f"{directory} is not writable: set FASTSEG_CACHE_DIR to a directory that is")
    console = Console(highlight=False, markup=False)
    compiled: list[str] = []
    with _Bars() as bars, announced_compilation(compiled.append):
        seconds = compile_ahead(lambda name, done, total: bars("compiling", done, total, name))
    done = f"{len(compiled)} kernels compiled in {seconds:.1f} s"
    console.print(f"{done}; all are kept in {directory}", soft_wrap=True)


def show_demo(out: Path, quick: bool, steps: int | None, seed: int) -> None:
    """Run the demo behind progress bars and print its scores."""
    from rich.console import Console

    from fastseg import demo
    from fastseg.installed import check_installed

    try:
        check_installed("fastseg demo", *demo.PACKAGES)
    except ModuleNotFoundError as error:
        _fail(str(error))
    out.mkdir(parents=True, exist_ok=True)  # what can fail at once does, before anything is said
    console = Console(highlight=False, markup=False)
    console.print(demo.NOTICE, style="yellow")
    with _Bars() as bars:
        found = demo.run(out, bars, quick=quick, steps=steps, seed=seed)
    _print_scores(console, found)
    console.print(f"picture: {out / 'demo.png'}\nnumbers: {out / 'demo.json'}", soft_wrap=True)


def _print_scores(console: "Console", found: dict[str, Any]) -> None:
    """Print the scores on the held-out slabs, and how long things took."""
    from rich.table import Table

    scores, speed, seconds = found["scores"], found["time_per_voxel"], found["seconds"]
    table = Table("held-out slabs", "Jaccard", "Dice", title_justify="left")
    names = {
        "threshold": f"best intensity threshold ({scores['threshold']['level']:.0f})",
        "logistic": f"logistic model of {len(found['data']['features'])} features",
    }
    for key, name in names.items():
        table.add_row(name, f"{scores[key]['jaccard']:.4f}", f"{scores[key]['dice']:.4f}")
    console.print(table)
    console.print(
        f"value and gradient of {found['loss']}, per voxel: fused {speed['fused_ns']:.2f} ns on "
        f"{speed['threads']} threads, {speed['fused_one_thread_ns']:.2f} ns on one; "
        f"NumPy {speed['numpy_ns']:.1f} ns"
    )
    if speed["threads"] > 1 and speed["fused_ns"] > 1.1 * speed["fused_one_thread_ns"]:
        console.print(_BUSY.format(""), style="yellow")
    console.print(
        f"{seconds['total']:.1f} s in all: compiling {seconds['compiling']:.1f} s, features "
        f"{seconds['features']:.1f} s, training {seconds['training']:.1f} s"
    )


def show_bench(out: Path, quick: bool) -> None:
    """Time everything behind a progress bar and print a table."""
    from rich.console import Console

    from fastseg import bench

    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False)
    with _Bars() as bars:
        found = bench.run(out, bars, quick=quick)
    _print_bench(console, found)
    written = f"numbers: {out / 'bench.json'}"
    try:
        bench.draw(found, out / "bench.png")
        written += f"\npicture: {out / 'bench.png'}"
    except ModuleNotFoundError:
        written += "; for a picture, pip install matplotlib"
    console.print(written, soft_wrap=True)


def _print_bench(console: "Console", found: dict[str, Any]) -> None:
    """Print a table of what was timed, and what is to be said of it."""
    from rich.table import Table

    from fastseg import bench

    rows = found["tasks"]
    peers = list(dict.fromkeys(n for row in rows for n in row["seconds"] if n != bench.OURS))
    table = Table("", "fastseg", *peers, "/ copying", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        ratios = (row["over_fastseg"].get(name) for name in peers)
        shown = ("-" if ratio is None else f"{ratio:.2g}x" for ratio in ratios)
        own = row["seconds"][bench.OURS]
        table.add_row(
            row["name"], f"{own * 1e3:.3g} ms", *shown, f"{row['fastseg_over_copy']:.2g}x"
        )
    console.print(table)
    machine = found["machine"]
    console.print(
        f"{machine['cpu']}, threads: {machine['threads']}. Losses are with their gradients; peers' "
        "times are over fastseg's; the last column is fastseg's time over that of copying as many "
        f"bytes as must be moved at least ({machine['copy_bytes_per_second'] / 1e9:.0f} GB/s; "
        f"below 1 they are in a cache). {found['seconds']:.0f} s in all."
    )
    if (machine["load"] or 0) > bench.BUSY * (os.cpu_count() or 1):
        console.print(_BUSY.format(f" (load {machine['load']:.1f})"), style="yellow")
    for line in dict.fromkeys(note for row in rows for note in row["notes"]):
        console.print(line, style="yellow")


_BUSY = (
    "other processes keep the CPUs busy{}: threads that wait for each other then wait for those, "
    "too; OMP_WAIT_POLICY=passive or FASTSEG_NUM_THREADS=1 helps"
)


class _Bars:
    """Progress bars, one per stage; a `fastseg.progress.Report`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        whole = Column(no_wrap=True)
        cut = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=12),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", table_column=cut, markup=False),
            console=(console := Console(stderr=True)),
            expand=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int | None, note: str) -> None:
        """Show that ``done`` of ``total`` parts of a stage are done; None pulses."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note=note)
        task = self._tasks[stage]
        self._progress.update(task, completed=done, total=total, note=note)
        if done in (0, total) or total is None:
            self._progress.refresh()  # compilation leaves the thread that repaints no time


if __name__ == "__main__":
    main()
