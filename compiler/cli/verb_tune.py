"""`tcompile tune`: search the schedules of a model's kernels by measuring them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from .terminal import INTERRUPTED, Json, Seed, Shape, Threads, guarded, print_json, print_table


@guarded
def tune_verb(
    model: Path = typer.Argument(..., help="ONNX file, or .pt2 file written by torch.export.save.", show_default=False),
    database: Path | None = typer.Option(
        None, "--tuning-db", help="SQLite file of the results, made or added to; default: MODEL's name with .tuning.db."
    ),
    trials: int = typer.Option(64, "--tune-trials", min=1, help="Candidates to measure per kernel, earlier sessions' included."),
    budget: str | None = typer.Option(None, "--time-budget", help="Stop after this long: 90s, 10m, 1.5h."),
    target: str = typer.Option("cpu", "--target", "-t", help="cpu (this machine), or cpu:NAME that it can run."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Compile with the results to this artifact."),
    shape: list[str] = Shape,
    threads: int | None = Threads,
    recipe: Path | None = typer.Option(None, "--recipe", help="TOML file with the passes to run."),
    seed: int = Seed,
    as_json: bool = Json,
) -> None:
    """Search the schedules of every kernel of MODEL on this machine. Each candidate is verified against the default schedule's result and measured beside it; only
    what is confirmed to be faster is used. Ctrl-C or the end of the budget keep what was found, and the next call goes on from there.

    Examples:

      tcompile tune resnet50.onnx --time-budget 10m -o resnet50.tcm

      tcompile resnet50.onnx --tuning-db resnet50.tuning.db
    """
    from ...targets.base import Target
    from ..api import build_artifact, import_model
    from ..artifact_writer import writable_path, write
    from ..options import CompileOptions
    from ..tuning import parse_budget, summary, tune_program
    from .verb_compile import parse_shapes, require_file

    require_file(model)
    path = database if database is not None else Path(model.with_suffix(".tuning.db").name)
    artifact = None if output is None else writable_path(output)
    seconds, resolved = parse_budget(budget), Target.parse(target)
    program = import_model(model, shapes=parse_shapes(shape))
    options = CompileOptions(recipe=recipe, seed=seed, threads=threads)
    with _live() as show:
        outcome = tune_program(program, resolved, options, path, trials=trials, seconds=seconds, show=show)
    if as_json:
        print_json({"database": str(path), **summary(outcome)})
    else:
        print_table(COLUMNS, _rows(outcome.progress))
        print(f"{path}  {outcome.seconds:.0f} s{', interrupted: what was found is kept' if outcome.interrupted else ''}")
    if outcome.interrupted:
        sys.stdout.flush()
        raise SystemExit(INTERRUPTED)
    if artifact is not None:
        tuned = CompileOptions(recipe=recipe, seed=seed, threads=threads, tuning_db=path)
        write(build_artifact(program, resolved, tuned), artifact)
        print(artifact, file=sys.stderr if as_json else sys.stdout)


COLUMNS = ("kernel", "calls", "trials", "rejected", "default us", "best us", "speedup", "best schedule")


def _rows(progress: Sequence[Any]) -> list[list[str]]:
    rows = []
    for entry in progress:
        default = entry.beside_us or entry.default_us
        best = [f"{entry.best_us:.1f}", f"{entry.speedup:.2f}", str(entry.best.schedule)] if entry.best is not None else ["", "1.00", "default"]
        times = [f"{default:.1f}" if default else ""]
        rows.append([entry.task.name, str(entry.task.calls), str(entry.trials + entry.resumed), str(entry.rejected), *times, *best])
    return rows


@contextmanager
def _live() -> Iterator[Callable[[Sequence[Any]], None]]:
    """A table on stderr that follows the search; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:

        def show(progress: Sequence[Any]) -> None:
            table = Table(*COLUMNS)
            for row in _rows(progress)[: max(5, live.console.height - 6)]:
                table.add_row(*row)
            live.update(table)

        yield show
