"""Tiny Relax programs lowered without the pipeline: stand-ins that let the runtime be tested alone."""

from __future__ import annotations

import numpy as np
import tcompile.compiler.tvm as _tvm
from tcompile.compiler.lowered import Lowered
from tcompile.compiler.program import DimRange, Provenance, TensorSpec
from tcompile.targets.base import Target

relax, tirx, tvm = _tvm.relax, _tvm.tirx, _tvm.tvm

HASWELL = Target("cpu", "haswell", mcpu="haswell", features=frozenset({"avx2", "fma"}))


def lowered(build, inputs, outputs, weights=None, dims=None, target=HASWELL) -> Lowered:
    """`build(builder, *inputs, weights tuple)` emits the body and returns the result; symbolic dims of equal name are one variable."""
    weights = weights or {}
    symbols: dict[str, tirx.Var] = {}
    builder = relax.BlockBuilder()

    def shape(spec):
        return [symbols.setdefault(dim, tirx.Var(dim, "int64")) if isinstance(dim, str) else dim for dim in spec.shape]

    params = [relax.Var(spec.name, relax.TensorType(shape(spec), spec.dtype)) for spec in inputs]
    packed = relax.Var("weights", relax.TupleType([relax.TensorType(array.shape, array.dtype.name) for array in weights.values()]))
    with builder.function("main", [*params, packed]):
        builder.emit_func_output(build(builder, *params, packed))
    executable = relax.build(builder.get(), tvm.target.Target({"kind": "llvm", "mcpu": target.mcpu}), exec_mode="compiled")
    return Lowered(
        executable,
        weights,
        tuple(inputs),
        tuple(outputs),
        target,
        Provenance("/somewhere/tiny.onnx", "onnx", "17"),
        dims or {},
        recipe={"passes": []},
        report={"passes": [{"name": "none", "seconds": 0.1}], "seconds": 1.5},
        sources={"main.tir": "# nothing"},
    )


def linear(rows: int | str = 5, bias: float = 1.0) -> Lowered:
    """y[rows, 3] = relu(x[rows, 4] @ w[4, 3] + bias)."""
    weights = {"w": np.arange(12, dtype="float32").reshape(4, 3) - 6, "b": np.full(3, bias, "float32")}

    def build(builder, x, packed):
        w, b = (builder.emit(relax.TupleGetItem(packed, index)) for index in range(2))
        return builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(builder.emit(relax.op.matmul(x, w)), b))))

    dims = {rows: DimRange(1, 8, 16)} if isinstance(rows, str) else {}
    return lowered(build, [TensorSpec("x", (rows, 4), "float32")], [TensorSpec("y", (rows, 3), "float32")], weights, dims)


def linear_reference(x: np.ndarray, bias: float = 1.0) -> np.ndarray:
    return np.maximum(x @ (np.arange(12, dtype="float32").reshape(4, 3) - 6) + np.float32(bias), 0)
