"""The Python front door: compile() and load()."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..targets.base import Target
from .artifact import Artifact, build
from .errors import UsageError
from .options import CompileOptions
from .progress import stage
from .runtime import CompiledModel, load

if TYPE_CHECKING:
    from .program import Program

__all__ = ["build_artifact", "compile", "compile_program", "import_model", "load"]


def compile(
    model: Any,
    target: str | Target = "cpu",
    *,
    example_inputs: Any = None,
    shapes: Mapping[str, Any] | None = None,
    precision: Any = None,
    quantize: Any = None,
    calibration: Any = None,
    metric: Any = None,
    max_drop: Any = None,
    sparsity: Any = None,
    target_latency: Any = None,
    token_keep: Any = None,
    restore_tokens: bool = False,
    generate: bool = False,
    recipe: str | Path | None = None,
    tune_trials: int = 0,
    time_budget: Any = None,
    tuning_db: Any = None,
    seed: int = 0,
    threads: int | None = None,
) -> CompiledModel:
    """Compile a model and return it ready to be called or saved.

    model: path of an ONNX file (or `.pt2` saved by torch.export), `onnx.ModelProto`, `torch.nn.Module` or `ExportedProgram`. target: `cpu` (this
    machine) or `cpu:NAME`. example_inputs: what a `torch.nn.Module` is traced with. shapes: `{"x": (1, 3, 224, 224)}` or `{"x": "1..8..32x128"}`
    (min..opt..max of a dim). recipe: TOML file with the passes to run. seed: of every random choice. threads: worker threads of the returned model,
    and what schedules are chosen for (default: all cores).

    Raises UnsupportedModel with every blocker at once, UsageError for a wrong request (also for an option whose feature is not available yet),
    ToolchainError for a missing linker or package.
    """
    later = dict(precision=precision, quantize=quantize, calibration=calibration, metric=metric, max_drop=max_drop, sparsity=sparsity)
    later |= dict(target_latency=target_latency, token_keep=token_keep, restore_tokens=restore_tokens or None, generate=generate or None)
    later |= dict(tune_trials=tune_trials or None, time_budget=time_budget, tuning_db=tuning_db)
    if asked := [name for name, value in later.items() if value is not None]:
        raise UsageError(f"not available yet: {', '.join(asked)}; leave {'it' if len(asked) == 1 else 'them'} out")
    target = target if isinstance(target, Target) else Target.parse(target)
    options = CompileOptions(recipe=None if recipe is None else Path(recipe), seed=seed, threads=threads)
    return compile_program(import_model(model, example_inputs=example_inputs, shapes=shapes), target, options)


def compile_program(program: Program, target: Target, options: CompileOptions | None = None) -> CompiledModel:
    """Compile an imported program; errors as in `compile`."""
    options = options or CompileOptions()
    return CompiledModel(build_artifact(program, target, options), threads=options.threads)


def build_artifact(program: Program, target: Target, options: CompileOptions) -> Artifact:
    """Lower and link `program` without loading what comes out. Schedules are chosen for `options.threads` cores where given."""
    from .pipeline import lower

    if options.threads is not None:
        target = replace(target, cores=options.threads)
    lowered = lower(program, target, options)
    with stage("linking"):
        return build(lowered)


def import_model(model: Any, *, example_inputs: Any = None, shapes: Mapping[str, Any] | None = None) -> Program:
    """The Program of anything that `compile` takes. Raises UsageError for a kind of model that it does not."""
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
