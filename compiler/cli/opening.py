"""Opening a MODEL argument that may be an artifact or a source model, for run, bench and verify."""

from __future__ import annotations

from pathlib import Path

from ..artifact import SUFFIX
from ..feeds import random_feeds, read_feeds
from ..runtime import CompiledModel, load


def open_model(model: Path, *, shape: list[str], threads: int | None, target: str = "cpu", profile: bool = False) -> CompiledModel:
    """The artifact `model` loaded, or the source model `model` compiled in memory; profile: its kernels are timed, see the report."""
    if model.suffix == SUFFIX:
        return load(model, threads=threads)
    from ...targets.base import Target
    from ..api import compile_program, import_model
    from ..options import CompileOptions
    from .verb_compile import parse_shapes, require_file

    program = import_model(require_file(model), shapes=parse_shapes(shape))
    return compile_program(program, Target.parse(target), CompileOptions(threads=threads, profile=profile)).start()


def feeds_for(model: CompiledModel, inputs: list[str], seed: int) -> dict:
    """Arrays from --input, or random ones when there is none."""
    return read_feeds(inputs) if inputs else random_feeds(model.inputs, model.dims, seed=seed)
