"""Helpers of the CUDA tests: models compiled to sources and run by the emulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tcompile
from tcompile.compiler.artifact import Artifact
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.compiler.program import DimRange, Program, Provenance, TensorSpec
from tcompile.compiler.tvm import relax, tirx, tvm
from tcompile.targets.base import Target
from tcompile.targets.cuda.emulate import Emulation


def program_of(
    build: Callable[..., Sequence[relax.Expr]],
    inputs: Mapping[str, np.ndarray | tuple[Sequence[int | str], str]],
    dims: Mapping[str, DimRange] | None = None,
) -> Program:
    """The program whose `main` takes tensors like `inputs`, arrays or (shape, dtype) with names of open dims, and returns what build(builder.emit, *variables) does.

    dims: ranges of the open dims; any size when left out.
    """
    symbols: dict[str, tirx.Var] = {}

    def size(dim: int | str) -> Any:
        return symbols.setdefault(dim, tirx.Var(dim, "int64")) if isinstance(dim, str) else dim

    kinds = {name: (given.shape, given.dtype.name) if isinstance(given, np.ndarray) else given for name, given in inputs.items()}
    variables = [relax.Var(name, relax.TensorType([size(dim) for dim in shape], dtype)) for name, (shape, dtype) in kinds.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", variables):
        with builder.dataflow():
            results = list(build(builder.emit, *variables))
            value = builder.emit_output(relax.Tuple(results) if len(results) > 1 else results[0])
        builder.emit_func_output(value)
    module = builder.finalize()
    kind = module["main"].ret_ty
    returned = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
    shapes = [tuple(int(dim) if isinstance(dim, tirx.IntImm) else str(dim) for dim in each.shape) for each in returned]
    outputs = [TensorSpec(f"y{i}", shape, str(each.dtype)) for i, (shape, each) in enumerate(zip(shapes, returned, strict=True))]
    specs = [TensorSpec(name, tuple(shape), dtype) for name, (shape, dtype) in kinds.items()]
    known = {name: DimRange(0) for name in symbols} | dict(dims or {})
    return Program(tvm.IRModule(dict(module.functions_items())), tuple(specs), tuple(outputs), Provenance("test", "relax"), known)


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
