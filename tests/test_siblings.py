"""Products of one tensor as one product: when, and that nobody can tell from the results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor
from tcompile.compiler.runtime import CompiledModel

RNG = np.random.default_rng(0)


def projections(
    columns: tuple[int, ...], *, k: int = 24, rows: Any = 5, bias: tuple[bool, ...] = (), after: str = ""
) -> tuple[ModelProto, list[np.ndarray]]:
    """x [1, rows, k] by weights [k, n] for n of `columns`, each with a bias where `bias` says so, then as heads of 4, [1, n / 4, rows, 4], or, with
    `after`, a unary operator's result."""
    weights = [RNG.standard_normal((k, n)).astype("float32") for n in columns]
    biases = [RNG.standard_normal(n).astype("float32") for n in columns]
    nodes, held, outputs = [], [], []
    for i, (weight, addend) in enumerate(zip(weights, biases, strict=True)):
        held += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(addend, f"b{i}")]
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"], name=f"product{i}"))
        result = f"m{i}"
        if not bias or bias[i]:
            nodes.append(helper.make_node("Add", [result, f"b{i}"], [f"a{i}"], name=f"bias{i}"))
            result = f"a{i}"
        else:
            addend[:] = 0
        if after:
            nodes.append(helper.make_node(after, [result], [f"y{i}"], name=f"after{i}"))
        else:
            held.append(numpy_helper.from_array(np.array([1, -1, columns[i] // 4, 4], "int64"), f"shape{i}"))
            nodes.append(helper.make_node("Reshape", [result, f"shape{i}"], [f"h{i}"], name=f"heads{i}"))
            nodes.append(helper.make_node("Transpose", [f"h{i}"], [f"y{i}"], perm=[0, 2, 1, 3], name=f"turned{i}"))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, k])
    model = helper.make_model(helper.make_graph(nodes, "siblings", [x], outputs, held), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model, [value for pair in zip(weights, biases, strict=True) for value in pair]


def alone(model: ModelProto, index: int) -> ModelProto:
    """The same model, of its results one alone."""
    extractor = Extractor(model)
    return extractor.extract_model(["x"], [f"y{index}"])


def merged(model: CompiledModel) -> dict[str, int]:
    return next(step["matches"] for step in model.report()["passes"] if step["name"] == "merge_siblings")


def reference(x: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
    found = [x @ weight + bias for weight, bias in zip(weights[::2], weights[1::2], strict=True)]
    return [value.reshape(1, x.shape[1], -1, 4).transpose(0, 2, 1, 3) for value in found]


@pytest.mark.sweep
@pytest.mark.parametrize("columns", [(24, 24, 24), (24, 8, 8), (4, 20), (68, 12, 4, 16)])
@pytest.mark.parametrize("rows", [1, 7, "s"])
def test_results_are_those_of_separate_products(columns: tuple[int, ...], rows: int | str):
    onnx_model, weights = projections(columns, rows=rows)
    model = tcompile.compile(onnx_model)
    assert merged(model) == {"products": len(columns), "merged": 1}
    assert sum(entry["template"].startswith("gemm") for entry in model.report()["kernels"]) == 1
    x = RNG.standard_normal((1, 5 if rows == "s" else rows, 24)).astype("float32")
    for result, expected in zip(model(x), reference(x, weights), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"precision": "bf16"}, {"quantize": "int8"}], ids=["bf16", "int8"])
def test_compressed_products_are_merged_too(how: dict[str, str]):
    """Operands are rounded as they were: the very same numbers."""
    onnx_model, _ = projections((24, 8, 12), rows=9, k=68)
    x = RNG.standard_normal((1, 9, 68)).astype("float32")
    options = {**how, "calibration": [{"x": x}], "max_drop": 1e9} if "quantize" in how else how
    model = tcompile.compile(onnx_model, **options)
    assert merged(model) == {"products": 3, "merged": 1}
    for index, result in enumerate(model(x)):
        np.testing.assert_array_equal(result, tcompile.compile(alone(onnx_model, index), **options)(x))


def test_all_nodes_are_named():
    model = tcompile.compile(projections((24, 8))[0])
    (kernel,) = [entry for entry in model.report()["kernels"] if entry["template"].startswith("gemm")]
    assert list(kernel["nodes"]) == ["product0 + product1", "bias0 + bias1"]


@pytest.mark.parametrize("case", ["a bias on one", "element by element", "mostly zeros", "a result"])
def test_stays_apart(case: str):
    """What a merged kernel would not do as well, or would do differently."""
    onnx_model, weights = projections((24, 24), bias=(True, case != "a bias on one"), after="Sigmoid" if case == "element by element" else "")
    if case == "mostly zeros":
        for i in range(2):
            weights[2 * i][:, RNG.permutation(24)[:12]] = 0
            next(held for held in onnx_model.graph.initializer if held.name == f"w{i}").CopyFrom(numpy_helper.from_array(weights[2 * i], f"w{i}"))
    elif case == "a result":
        onnx_model.graph.output.append(helper.make_tensor_value_info("a0", TensorProto.FLOAT, None))
    model = tcompile.compile(onnx_model)
    assert not merged(model)


def test_a_bias_that_adds_a_dimension_ends_the_chain():
    """[5, 24] plus [1, 1, 24] is [1, 5, 24]: its transposition is of three dimensions, merged or not."""
    weights, biases = ([RNG.standard_normal(shape).astype("float32") for _ in range(2)] for shape in ((24, 24), (1, 1, 24)))
    nodes = [
        node
        for i in range(2)
        for node in (
            helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"]),
            helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"]),
            helper.make_node("Transpose", [f"a{i}"], [f"y{i}"], perm=[1, 0, 2]),
        )
    ]
    held = [numpy_helper.from_array(value, f"{kind}{i}") for kind, values in (("w", weights), ("b", biases)) for i, value in enumerate(values)]
    x, outputs = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 24]),
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(2)],
    )
    model = tcompile.compile(
        helper.make_model(helper.make_graph(nodes, "g", [x], outputs, held), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    )
    data = RNG.standard_normal((5, 24)).astype("float32")
    for result, weight, bias in zip(model(data), weights, biases, strict=True):
        np.testing.assert_allclose(result, (data @ weight + bias).transpose(1, 0, 2), rtol=1e-4, atol=1e-5)
