"""Helpers of the CUDA tests: models compiled to sources and run by the emulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tcompile
from tcompile.compiler.artifact import Artifact
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.compiler.program import Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tvm
from tcompile.targets.base import Target
from tcompile.targets.cuda.emulate import Emulation


def program_of(build: Callable[..., Sequence[relax.Expr]], inputs: dict[str, np.ndarray]) -> Program:
    """The program whose `main` takes tensors like `inputs` and returns what build(builder.emit, *variables) does."""
    variables = [relax.Var(name, relax.TensorType(value.shape, value.dtype.name)) for name, value in inputs.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", variables):
        with builder.dataflow():
            results = list(build(builder.emit, *variables))
            value = builder.emit_output(relax.Tuple(results) if len(results) > 1 else results[0])
        builder.emit_func_output(value)
    module = builder.finalize()
    kind = module["main"].ret_ty
    kinds = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
    outputs = [TensorSpec(f"y{i}", tuple(int(dim) for dim in each.shape), str(each.dtype)) for i, each in enumerate(kinds)]
    specs = [TensorSpec(name, value.shape, value.dtype.name) for name, value in inputs.items()]
    return Program(tvm.IRModule(dict(module.functions_items())), tuple(specs), tuple(outputs), Provenance("test", "relax"))


#: the target in place of the tests' own, where there is a GPU
TARGETS: list[str] = []


def compiled(program: Program, target: str = "cuda:sm_80", precision: str | None = None, **options: Any) -> Any:
    """The lowered program, sources alone unless `emit_only=False`."""
    return lower(
        program, Target.parse(TARGETS[-1] if TARGETS else target), CompileOptions(precision=precision, **({"emit_only": not RUNNERS} | options))
    )


def artifact_of(model: Any, **options: Any) -> Artifact:
    """The artifact of an ONNX model; sources alone unless there is a GPU."""
    return tcompile.compile(model, target=TARGETS[-1] if TARGETS else "cuda:sm_80", emit_only=not RUNNERS, **options).artifact


#: what runs a lowered program or an artifact: the emulation here, a GPU in tests/gpu
RUNNERS: list[Callable[[Any], Any]] = []


def emulation(lowered: Any) -> Any:
    """A callable with `error`, as `Emulation` has it."""
    if RUNNERS:
        return RUNNERS[-1](lowered)
    return Emulation(lowered.sources, lowered.weights, lowered.inputs, lowered.outputs, lowered.report["memory"]["workspace_bytes"])


def run(build: Callable[..., Sequence[relax.Expr]], inputs: dict[str, np.ndarray], **options: Any) -> tuple[tuple[np.ndarray, ...], Any]:
    """(outputs by the emulation, the lowered program)."""
    lowered = compiled(program_of(build, inputs), **options)
    model = emulation(lowered)
    outputs = model(*inputs.values())
    assert model.error == 0
    return outputs, lowered


def templates(lowered: Any) -> list[str]:
    return [row["template"] for row in lowered.report["kernels"]]
