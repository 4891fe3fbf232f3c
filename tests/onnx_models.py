"""Small ONNX files for the tests of the command and the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper, save


def mlp(rows: int | str = 2, *, layers: int = 1, width: int = 3) -> ModelProto:
    """y[rows, width] = relu(... relu(x[rows, 4] @ w0) ... @ wN): seeded weights."""
    generator = np.random.default_rng(0)
    nodes, weights, value, size = [], [], "x", 4
    for layer in range(layers):
        weights.append(numpy_helper.from_array(generator.standard_normal((size, width), dtype=np.float32) / np.float32(np.sqrt(size)), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"], name=f"matmul_{layer}"))
        value, size = "y" if layer == layers - 1 else f"r{layer}", width
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [value], name=f"relu_{layer}"))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saved_mlp(folder: Path, **options: object) -> Path:
    path = folder / "mlp.onnx"
    save(mlp(**options), path)  # type: ignore[arg-type]
    return path


def unsupported(folder: Path) -> Path:
    """Two nodes of a domain that nobody knows."""
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["a"], name="first", domain="acme"),
        helper.make_node("Twiddle", ["a"], ["y"], name="second", domain="acme"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "odd", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)], ir_version=8)
    path = folder / "odd.onnx"
    save(model, path)
    return path


def small(nodes, inputs: dict, outputs: list[str], constants: dict[str, np.ndarray] | None = None, opset: int = 18) -> ModelProto:
    """A model of opset 18. inputs: name -> dims of a float32 tensor, or (dims, element type); outputs: names, or (name, element type)."""

    def info(name, spec):
        dims, kind = spec if isinstance(spec, tuple) else (spec, TensorProto.FLOAT)
        return helper.make_tensor_value_info(name, kind, dims)

    results = [info(*((name, (None, TensorProto.FLOAT)) if isinstance(name, str) else (name[0], (None, name[1])))) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "small", [info(name, spec) for name, spec in inputs.items()], results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def one_node(op: str, inputs: Mapping[str, tuple[int, Sequence[Any]]], types: Sequence[int] = (TensorProto.FLOAT,), **attributes: Any) -> ModelProto:
    """A model of opset 21 whose only node is called the_node. inputs: name -> (element type, dims); types: those of the outputs y0, y1, ..."""
    names = [f"y{index}" for index in range(len(types))]
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), names, name="the_node", **attributes)],
        "g",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, types, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def canonicalized(compiled, rule: str) -> int:
    """How often a rule of `canonicalize` rewrote something, in all of its runs."""
    return sum(step["matches"].get(rule, 0) for step in compiled.report()["passes"] if step["name"] == "canonicalize")
