"""Integers and truth values computed behind a convolution, in its kernel: what the analyzer of bounds cannot hold as a constant (found by the fuzzer: any Selu behind a biased convolution)."""

from __future__ import annotations

import numpy as np
import onnx_models
import pytest
import tcompile
from onnx import TensorProto, helper

onnxruntime = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(3)
FLOAT, INT32, INT64, BOOL, UINT8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT8
CONSTANTS = {
    "tenth": np.float32(0.1),
    "nine": np.float32(9),
    **{f"{name}{bits}": np.dtype(f"int{bits}").type(value) for name, value in (("low", -2), ("high", 5)) for bits in (32, 64)},
}


def cast(source, result, to):
    return helper.make_node("Cast", [source], [result], to=to)


def node(operator, inputs, result):
    return helper.make_node(operator, inputs.split(), [result])


TAILS = {
    "selu": [node("Selu", "c", "s")],
    "truth": [node("Greater", "c tenth", "b"), cast("b", "i", INT32), cast("i", "f", FLOAT), node("Mul", "c f", "s")],
    "both": [
        node("Greater", "c tenth", "b"),
        node("Less", "c nine", "b2"),
        node("And", "b b2", "b3"),
        cast("b3", "f", FLOAT),
        node("Mul", "f c", "s"),
    ],
    "bounded": [cast("c", "i", INT32), node("Clip", "i low32 high32", "j"), cast("j", "f", FLOAT), node("Mul", "c f", "s")],
    "bounded64": [cast("c", "i", INT64), node("Min", "i high64", "j"), node("Max", "j low64", "k"), cast("k", "s", FLOAT)],
    "chosen": [cast("c", "i", INT32), node("Clip", "i low32 high32", "j"), node("Greater", "j low32", "b"), node("Where", "b c tenth", "s")],
    "arithmetic": [cast("c", "b", BOOL), cast("b", "i", INT32), node("Mul", "i high32", "j"), node("Add", "j low32", "k"), cast("k", "s", FLOAT)],
    "bytes": [
        node("Clip", "c tenth nine", "d"),
        cast("d", "u", UINT8),
        cast("u", "i", INT32),
        node("Clip", "i low32 high32", "j"),
        cast("j", "s", FLOAT),
    ],
}


@pytest.mark.sweep
@pytest.mark.parametrize(("tail", "groups"), [*((tail, 16) for tail in TAILS), ("selu", 1), ("bounded", 1)])
def test_against_onnxruntime(tail, groups):
    """Between two pointwise convolutions, so that it stays channels-last and fuses."""
    weights = {
        "p": RNG.standard_normal((16, 16, 1, 1)).astype("float32") / 4,
        "w": RNG.standard_normal((16, 16 // groups, 3, 3)).astype("float32"),
        "bias": RNG.standard_normal(16).astype("float32"),
    }
    before = [
        helper.make_node("Conv", ["x", "p"], ["a"]),
        helper.make_node("Conv", ["a", "w", "bias"], ["c"], pads=[1, 1, 1, 1], group=groups),
    ]
    nodes = [*before, *TAILS[tail], helper.make_node("Conv", ["s", "p"], ["y"])]
    used = {name for each in nodes for name in each.input}
    model = onnx_models.small(nodes, {"x": [2, 16, 5, 7]}, ["y"], weights | {name: value for name, value in CONSTANTS.items() if name in used})
    x = RNG.standard_normal((2, 16, 5, 7)).astype("float32")
    compiled = tcompile.compile(model)
    assert len(compiled.report()["kernels"]) <= 5
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(compiled(x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
