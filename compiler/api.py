"""The Python front door: compile() and load()."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..targets.base import Target
from .accuracy import Accuracy
from .artifact import Artifact, build
from .calibration import load as load_calibration
from .errors import UsageError
from .feeds import random_feeds
from .metrics import checked
from .options import CompileOptions
from .program import TensorSpec
from .progress import stage
from .runtime import CompiledModel, load
from .shapes import normalize_shapes
from .timing import interleaved

if TYPE_CHECKING:
    from .program import Program

__all__ = ["build_artifact", "compile", "compile_program", "import_model", "load"]


def compile(
    model: Any,
    target: str | Target = "cpu",
    *,
    example_inputs: Any = None,
    shapes: Mapping[str, Any] | None = None,
    precision: str | None = None,
    quantize: Any = None,
    calibration: Any = None,
    metric: Any = None,
    max_drop: Any = None,
    sparsity: Any = None,
    target_latency: Any = None,
    token_keep: Any = None,
    attention_scores: Any = None,
    report: str | Path | None = None,
    restore_tokens: bool = False,
    generate: bool = False,
    recipe: str | Path | None = None,
    tune_trials: int = 0,
    time_budget: Any = None,
    tuning_db: Any = None,
    seed: int = 0,
    threads: int | None = None,
    emit_only: bool = False,
) -> CompiledModel:
    """Compile a model and return it ready to be called or saved.

    model: path of an ONNX file (or `.pt2` saved by torch.export), `onnx.ModelProto`, `torch.nn.Module` or `ExportedProgram`. target: `cpu` (this
    machine), `cpu:NAME` or `cuda:NAME`. example_inputs: what a `torch.nn.Module` is traced with. shapes: `{"x": (1, 3, 224, 224)}` or `{"x": "1..8..32x128"}`
    (min..opt..max of a dim). recipe: TOML file with the passes to run.

    quantize, sparsity, token_keep, attention_scores ("int8"): compression, each a name or number as on the command line, or a configured pass (`Quantize("int8", smooth=0.5)`).
    calibration: a `.npz` file, a folder of them, or an iterable of inputs (dicts or tuples), on which passes observe the model and the loss is measured.
    metric: "cosine" (default), "relative" or "top1". max_drop: largest loss allowed.
    tune_trials, time_budget ("10m"): search schedules by measuring, so many candidates per kernel, so long in all; tuning_db: the database to take winners from and to
    add to. report: write what was done as one HTML page. seed: of every random choice. threads: worker threads of the returned model,
    and what schedules are chosen for (default: all cores).

    precision: of products: "fp32" (default) or "bf16", on a CPU also "bf16x2" or "bf16x3", on a GPU "tf32" or "fp16". emit_only: sources without a library, for targets that have them.

    Raises UnsupportedModel with every blocker at once, UsageError for a wrong request (also for an option whose feature is not available yet),
    ToolchainError for a missing linker or package, VerificationError for a loss above `max_drop`.
    """
    later = dict(target_latency=target_latency, restore_tokens=restore_tokens or None, generate=generate or None)
    if asked := [name for name, value in later.items() if value is not None]:
        raise UsageError(f"not available yet: {', '.join(asked)}; leave {'it' if len(asked) == 1 else 'them'} out")
    target = target if isinstance(target, Target) else Target.parse(target)
    compression = {"quantize": quantize, "sparsity": sparsity, "token_keep": token_keep, "attention_scores": attention_scores}
    database = None if tuning_db is None else Path(tuning_db)
    options = CompileOptions(
        None if recipe is None else Path(recipe), compression, seed=seed, threads=threads, precision=precision, emit_only=emit_only
    )
    if report is not None:
        from .page import writable_page

        writable_page(report)
        options = replace(options, profile=True)
    program = import_model(model, example_inputs=example_inputs, shapes=shapes)
    accuracy = accuracy_on(program, calibration, metric=metric, max_drop=max_drop, threads=threads)
    with tuned(program, target, options, accuracy, trials=tune_trials, budget=time_budget, database=database) as found:
        compiled = compile_program(program, target, found, accuracy)
    if report is not None:
        write_report(report, program, compiled, accuracy)
    return compiled


@contextmanager
def tuned(
    program: Program, target: Target, options: CompileOptions, accuracy: Accuracy | None, *, trials: int, budget: Any, database: Path | None
) -> Iterator[CompileOptions]:
    """The options with a tuning database in them: tuned first where trials or a time budget ask for it, in a temporary file where none is named."""
    if not trials and budget is None:
        yield options if database is None else replace(options, tuning_db=database)
        return
    from .tuning import TRIALS, parse_budget, tune_program

    with tempfile.TemporaryDirectory(prefix="tcompile-") as folder:
        path = database if database is not None else Path(folder) / "tuning.db"
        tune_program(program, target, options, path, accuracy=accuracy, trials=trials or TRIALS, seconds=parse_budget(budget))
        yield replace(options, tuning_db=path)


def compile_program(program: Program, target: Target, options: CompileOptions | None = None, accuracy: Accuracy | None = None) -> CompiledModel:
    """Compile an imported program; errors as in `compile`."""
    options = options or CompileOptions()
    return CompiledModel(build_artifact(program, target, options, accuracy), threads=options.threads)


def write_report(path: str | Path, program: Program, compiled: CompiledModel, accuracy: Accuracy | None = None) -> Path:
    """Write the page of what `compile` did to `program`, with the time of both models where this machine runs them.

    The two are timed interleaved, on the first calibration sample or on random inputs. UsageError where the page cannot be written.
    """
    from .page import ROUNDS, write_page

    options = CompileOptions(threads=compiled.threads)
    contestants: dict[str, Callable[[], object]] = {}
    if compiled.manifest["target"]["kind"] == "cpu":
        feeds = accuracy.calibration[0] if accuracy is not None else random_feeds(program.inputs, program.dims)
        compiled.start()
        contestants["compiled"] = lambda: compiled(**feeds)
        if any(entry.get("lossy") for entry in compiled.report()["passes"]):
            original = compile_program(program, Target.parse(compiled.manifest["target"]["text"]), options).start()
            contestants["original"] = lambda: original(**feeds)
    with stage("timing"):
        timings = interleaved(contestants, rounds=ROUNDS) if contestants else {}
    return write_page(path, compiled.artifact, original_bytes=constant_bytes(program), timings=timings)


def constant_bytes(program: Program) -> int:
    """Size of all constants of a program."""
    from .tvm import Constant, relax

    found: dict[Any, int] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, Constant) and isinstance(expr.ty, relax.TensorType):
            found[expr] = expr.value.numpy().nbytes

    relax.analysis.post_order_visit(program.main, visit)
    return sum(found.values())


def accuracy_on(
    program: Program, calibration: Any, *, metric: str | None = None, max_drop: float | None = None, threads: int | None = None
) -> Accuracy | None:
    """The loss measurement of `program` on calibration data, None without. Raises UsageError for data or limits that make no sense."""
    if metric is not None:
        checked(metric)
    if max_drop is not None and not max_drop >= 0:
        raise UsageError(f"max_drop must be a loss of at least 0, not {max_drop!r}")
    if calibration is None:
        if max_drop is not None:
            raise UsageError("max_drop needs calibration data to measure the loss on: give --calibration DATA.npz (Python: calibration=...)")
        return None
    calls = load_calibration(calibration, program.inputs, program.dims)

    def executor(changed: Program) -> Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]:
        model = compile_program(_own_outputs(changed), Target.parse("cpu"), CompileOptions(threads=threads, quick=True)).start()

        def run(feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
            result = model(**feeds)
            return result if isinstance(result, tuple) else (result,)

        return run

    return Accuracy(program, calls, executor, metric or "cosine", max_drop)


def _own_outputs(program: Program) -> Program:
    """The program with as many output specs as its `main` returns: passes observe by returning more."""
    kind = program.main.ret_ty
    count = len(kind.fields) if hasattr(kind, "fields") else 1
    if count == len(program.outputs):
        return program
    return replace(program, outputs=tuple(TensorSpec(f"output{index}", (), "float32") for index in range(count)))


def build_artifact(program: Program, target: Target, options: CompileOptions, accuracy: Accuracy | None = None) -> Artifact:
    """Lower and link `program` without loading what comes out. Schedules are chosen for `options.threads` cores where given."""
    from .pipeline import lower

    if options.threads is not None:
        target = replace(target, cores=options.threads)
    lowered = lower(program, target, options, accuracy)
    with stage("linking"):
        return build(lowered)


def import_model(model: Any, *, example_inputs: Any = None, shapes: Mapping[str, Any] | None = None) -> Program:
    """The Program of anything that `compile` takes. Raises UsageError for a kind of model that it does not."""
    shapes = normalize_shapes(shapes)
    with stage("importing"):
        if isinstance(model, (str, os.PathLike)) and Path(model).suffix != ".pt2":
            from .importers.onnx import import_onnx

            return import_onnx(Path(model), shapes=shapes)
        kind = type(model).__module__.partition(".")[0]
        if kind == "onnx" or type(model).__name__ == "ModelProto":
            from .importers.onnx import import_onnx

            return import_onnx(model, shapes=shapes)
        if isinstance(model, (str, os.PathLike)):
            model = _load_exported(Path(model))
        elif not any(base.__module__.partition(".")[0] == "torch" for base in type(model).__mro__):
            raise UsageError(
                f"cannot compile a {type(model).__name__}: expected a path, onnx.ModelProto, torch.nn.Module or torch.export.ExportedProgram"
            )
        from .importers.torch import import_torch

        return import_torch(model, example_inputs=example_inputs, shapes=shapes)


def _load_exported(path: Path) -> Any:
    """The ExportedProgram in a `.pt2` file."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{path}: reading a .pt2 file needs torch; `pip install tcompile[torch]`") from error
    try:
        return torch.export.load(str(path))
    except Exception as error:  # torch raises whatever its zip and JSON readers meet
        raise UsageError(f"{path} is not a program saved by torch.export.save: {str(error).splitlines()[0]}") from error
