"""Epilogue fusion keeps products apart from larger tensors that their results are spread over."""

from __future__ import annotations

import numpy as np
import tcompile
from cuda_models import program_of
from onnx import TensorProto, helper, numpy_helper
from tcompile.compiler.api import compile_program
from tcompile.compiler.options import CompileOptions
from tcompile.compiler.pipeline import lower
from tcompile.compiler.tvm import relax
from tcompile.targets.base import Target

RNG = np.random.default_rng(0)


def test_a_gate_does_not_pull_its_convolution_into_the_gated_loops():
    """Squeeze and excite: sigmoid(conv(mean(x))) * x. Both convolutions keep their templates, and their nodes are found again."""
    w1, w2 = (RNG.standard_normal(shape).astype("float32") for shape in ((8, 16, 1, 1), (16, 8, 1, 1)))
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"], name="squeeze"),
        helper.make_node("Conv", ["p", "w1"], ["c"], name="reduce"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["e"], name="expand"),
        helper.make_node("Sigmoid", ["e"], ["g"], name="gate"),
        helper.make_node("Mul", ["x", "g"], ["y"], name="excite"),
    ]
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 16, 9, 7]), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "gate", [x], [y], [numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")])
    model = tcompile.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    kernels = model.report()["kernels"]
    found = {node: entry["template"] for entry in kernels for node in entry["nodes"] if node in ("relu", "expand", "gate", "excite")}
    assert found["relu"] != "generic" and found["expand"] != "generic"
    assert set(found) == {"relu", "expand", "gate", "excite"}
    data = RNG.standard_normal((2, 16, 9, 7)).astype("float32")
    hidden = np.maximum(data.mean((2, 3)) @ w1[:, :, 0, 0].T, 0)
    gate = 1 / (1 + np.exp(-(hidden @ w2[:, :, 0, 0].T)))
    np.testing.assert_allclose(model(data), data * gate[:, :, None, None], rtol=1e-4, atol=1e-5)


def test_what_is_added_to_a_product_may_be_computed_in_its_epilogue():
    """A gated branch that comes before the convolution whose result it is added to (the shortcut of a squeeze-and-excite network): the convolution keeps its template."""
    weight = RNG.standard_normal((1, 1, 16, 8)).astype("float32")
    data = {"x": RNG.standard_normal((2, 9, 7, 16)), "branch": RNG.standard_normal((2, 9, 7, 8)), "gate": RNG.standard_normal((2, 1, 1, 8))}
    data = {name: value.astype("float32") for name, value in data.items()}

    def build(emit, x, branch, gate):
        gated = emit(relax.op.multiply(branch, gate))
        shortcut = emit(relax.op.nn.conv2d(x, relax.const(weight), 1, 0, 1, 1, "NHWC", "HWIO", "NHWC"))
        return [emit(relax.op.nn.relu(emit(relax.op.add(gated, shortcut))))]

    program = program_of(build, data)
    for target, template in (("cpu:haswell", "conv_pointwise"), ("cuda:sm_80", "conv2d")):
        (row,) = lower(program, Target.parse(target), CompileOptions(emit_only=target.startswith("cuda"))).report["kernels"]
        assert row["template"] == template
    exact = np.einsum("nhwc,co->nhwo", data["x"], weight[0, 0]) + data["branch"] * data["gate"]
    np.testing.assert_allclose(compile_program(program, Target.parse("cpu"))(**data), np.maximum(exact, 0), rtol=1e-4, atol=1e-5)


def test_a_comparison_behind_a_product_keeps_the_template():
    w = RNG.standard_normal((16, 24)).astype("float32")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], name="product"), helper.make_node("Greater", ["p", "b"], ["y"], name="greater")]
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 16]), helper.make_tensor_value_info("y", TensorProto.BOOL, None)
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.float32(0.5), "b")]
    model = tcompile.compile(
        helper.make_model(helper.make_graph(nodes, "compare", [x], [y], constants), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    )
    data = RNG.standard_normal((5, 16)).astype("float32")
    product = data @ w
    sure = np.abs(product - 0.5) > 1e-4
    np.testing.assert_array_equal(model(data)[sure], (product > 0.5)[sure])
