"""What a model holds and what it asks of a machine, known without compiling or running it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..targets.base import Target
from .errors import Blocker, UnsupportedModel
from .program import DimRange, Program

__all__ = ["inspect"]


def inspect(model: Any, target: str | Target = "cpu", *, example_inputs: Any = None, shapes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `tcompile inspect` prints of a model, as plain values. Nothing is compiled, run or measured.

    model, example_inputs, shapes: as for `compile`. target: whose peak rates and bandwidth the times are for.

    "blockers" lists every reason why the model cannot be compiled; the rest is then what the file alone says: "inputs", "outputs" and, of ONNX models,
    "operators" and "parameters". Without blockers there are also "dims" (range of each symbolic dim, the size used, and how often as many operations and bytes
    a size twice as large takes), "layers" and "total", as `compiler.roofline` counts them. Raises UsageError as `compile` does, UnsupportedModel for what is no model at all.
    """
    from .api import import_model

    target = target if isinstance(target, Target) else Target.parse(target)
    try:
        program = import_model(model, example_inputs=example_inputs, shapes=shapes)
    except UnsupportedModel as error:
        if not any(blocker.op for blocker in error.blockers):  # not a graph at all: there is nothing to show
            raise
        return {**_file_summary(model), "blockers": [vars(blocker) for blocker in error.blockers]}
    return {**_summary(program, target), "operators": _operators(model, program), "blockers": []}


def refusal(summary: Mapping[str, Any]) -> UnsupportedModel | None:
    """The exception that `compile` would raise for an inspected model."""
    blockers = [Blocker(**blocker) for blocker in summary["blockers"]]
    return UnsupportedModel(blockers) if blockers else None


def _summary(program: Program, target: Target) -> dict[str, Any]:
    from .roofline import default_size, layers, parameters

    sizes = {name: default_size(bounds) for name, bounds in program.dims.items()}
    found = layers(program, target, sizes)
    count, size = parameters(program)
    total = _total(found)
    dims = {}
    for name, bounds in program.dims.items():
        doubled = _total(layers(program, target, sizes | {name: 2 * sizes[name]}))
        factors = {f"{what}_factor": doubled[what] / total[what] if total[what] else 1.0 for what in ("flops", "bytes")}
        dims[name] = {"range": _range(bounds), "size": sizes[name], **factors}
    return {
        "inputs": [vars(spec) for spec in program.inputs],
        "outputs": [vars(spec) for spec in program.outputs],
        "parameters": {"count": count, "bytes": size},
        "target": target.text,
        "dims": dims,
        "layers": [{**asdict(layer), "intensity": layer.intensity} for layer in found],
        "total": total,
    }


def _total(found: list[Any]) -> dict[str, float]:
    return {what: sum(getattr(layer, what) for layer in found) for what in ("flops", "bytes", "milliseconds")}


def _range(bounds: DimRange) -> str:
    return f"{bounds.min}..{'' if bounds.max is None else bounds.max}"


def _operators(model: Any, program: Program) -> dict[str, int]:
    """Operator -> count, most frequent first: those of the ONNX graph, else those of the imported program."""
    if program.provenance.format == "onnx":
        return _file_summary(model)["operators"]
    names = [
        getattr(getattr(getattr(binding, "value", None), "op", None), "name", "") for block in program.main.body.blocks for binding in block.bindings
    ]
    return dict(Counter(name.removeprefix("relax.") for name in names if name).most_common())


def _file_summary(model: Any) -> dict[str, Any]:
    """What an ONNX file says of itself; weights in other files are not read, and declared output shapes are taken at their word."""
    import math

    import onnx

    if isinstance(model, (str, os.PathLike)):
        if Path(model).suffix == ".pt2":
            return {"inputs": [], "outputs": [], "operators": {}}
        model = onnx.load(os.fspath(model), load_external_data=False)
    if not isinstance(model, onnx.ModelProto):
        return {"inputs": [], "outputs": [], "operators": {}}
    graph = model.graph
    initialized = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node)
    sizes = [math.prod(max(0, dim) for dim in tensor.dims) for tensor in graph.initializer]
    return {
        "inputs": [_declared(info) for info in graph.input if info.name not in initialized],
        "outputs": [_declared(info) for info in graph.output],
        "parameters": {"count": sum(sizes), "bytes": None},
        "operators": dict(counts.most_common()),
    }


def _declared(info: Any) -> dict[str, Any]:
    import onnx

    tensor = info.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim] if tensor.HasField("shape") else None
    known = tensor.elem_type in onnx.TensorProto.DataType.values()
    return {"name": info.name, "shape": shape, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if known else str(tensor.elem_type)}
