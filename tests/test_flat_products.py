"""Products over flattened rows take the dims of what follows, so that it runs in their kernels; where anything else reads the flat rows, or columns are cut, they stay."""

from __future__ import annotations

import numpy as np
import onnx_models
import pytest
import tcompile
from onnx import TensorProto, helper

small, canonicalized = onnx_models.small, onnx_models.canonicalized
RNG = np.random.default_rng(0)
B, S, K, N = 3, 7, 20, 13
BACK = {"flat": np.array([-1, K]), "back": np.array([B, S, N]), "single": np.array([1, B, S, N])}


def linear(after, weights=(), outputs=("y",), bias=(N,), **more):
    """Gemm over rows [B * S, K], then `after`, whose nodes read "g" (flat) and shapes "back" and "single"."""
    w = {"w": RNG.standard_normal((K, N)).astype("float32"), "b": RNG.standard_normal(bias).astype("float32")}
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["g"]),
    ]
    return small([*nodes, *after], {"x": [B, S, K], **more}, list(outputs), {**w, **BACK, **dict(weights)}), w


def kernels(compiled) -> int:
    return len(compiled.report()["kernels"])


def test_a_residual_and_an_activation_run_in_the_kernel():
    after = [
        helper.make_node("Relu", ["g"], ["r"]),
        helper.make_node("Reshape", ["r", "back"], ["z"]),
        helper.make_node("Add", ["z", "residual"], ["s"]),
        helper.make_node("Tanh", ["s"], ["y"]),
    ]
    graph, w = linear(after, residual=[B, S, N])
    compiled = tcompile.compile(graph)
    assert canonicalized(compiled, "unflattened") == 1
    assert kernels(compiled) == 1
    x, residual = RNG.standard_normal((B, S, K)).astype("float32"), RNG.standard_normal((B, S, N)).astype("float32")
    np.testing.assert_allclose(compiled(x, residual), np.tanh(np.maximum(x @ w["w"] + w["b"], 0) + residual), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [(N,), (1, N), (1,), ()])
@pytest.mark.parametrize("shape", ["back", "single"])
def test_constants_of_columns_and_other_ranks(bias, shape):
    graph, w = linear([helper.make_node("Reshape", ["g", shape], ["z"]), helper.make_node("Sigmoid", ["z"], ["y"])], bias=bias)
    compiled = tcompile.compile(graph)
    assert canonicalized(compiled, "unflattened") == 1
    x = RNG.standard_normal((B, S, K)).astype("float32")
    expected = 1 / (1 + np.exp(-(x @ w["w"] + w["b"])))
    np.testing.assert_allclose(compiled(x), expected.reshape(BACK[shape]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", ["read twice", "bias of rows", "columns cut"])
def test_others_stay(kept):
    bias, outputs, shape = (N,), ["y"], "back"
    if kept == "read twice":
        outputs.append("g")
    elif kept == "bias of rows":
        bias = (B * S, 1)
    else:
        shape = "cut"
    graph, w = linear(
        [helper.make_node("Reshape", ["g", shape], ["z"]), helper.make_node("Relu", ["z"], ["y"])], {"cut": np.array([B, S * N])}, outputs, bias=bias
    )
    compiled = tcompile.compile(graph)
    assert canonicalized(compiled, "unflattened") == 0
    x = RNG.standard_normal((B, S, K)).astype("float32")
    flat = x.reshape(-1, K) @ w["w"] + w["b"]
    have = compiled(x)
    for one, expected in zip(have if kept == "read twice" else [have], [np.maximum(flat, 0), flat], strict=False):
        np.testing.assert_allclose(one.reshape(B * S, N), expected.reshape(B * S, N), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_open_rows(rows):
    """A number of tokens that is known at run time, as exports over flattened rows have it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], end=2),
        helper.make_node("Concat", ["sizes", "columns"], ["open"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("Gemm", ["rows", "w", "b"], ["g"]),
        helper.make_node("Reshape", ["g", "open"], ["z"]),
        helper.make_node("Add", ["z", "residual"], ["y"]),
    ]
    w, b = RNG.standard_normal((K, N)).astype("float32"), RNG.standard_normal(N).astype("float32")
    graph = small(nodes, {"x": [2, "S", K], "residual": ([2, "S", N], TensorProto.FLOAT)}, ["y"], {"w": w, "b": b, "columns": np.array([N]), **BACK})
    compiled = tcompile.compile(graph)
    assert canonicalized(compiled, "unflattened") == 1
    x, residual = RNG.standard_normal((2, rows, K)).astype("float32"), RNG.standard_normal((2, rows, N)).astype("float32")
    np.testing.assert_allclose(compiled(x, residual), x @ w + b + residual, rtol=1e-5, atol=1e-5)
