"""Models at the edges of the format: refused with the node named, or compiled to what onnxruntime computes."""

from __future__ import annotations

import time

import numpy as np
import onnx_models
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto as Kind
from onnx import helper
from onnx.helper import make_node as node
from tcompile.compiler.cli.main import main
from tcompile.compiler.compare import agree

W = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)
HUGE = 2**40


def size(*values):
    return np.array(values, "int64")


#: name -> (nodes, inputs, outputs, constants), words of the message
REFUSED = {
    "cycle": ([node("Add", ["x", "b"], ["a"], name="na"), node("Relu", ["a"], ["b"], name="nb")], {"x": [2]}, ["b"], {}, ["na", "cycle"]),
    "defined twice": ([node("Relu", ["x"], ["a"], name="na"), node("Abs", ["x"], ["a"], name="nb")], {"x": [2]}, ["a"], {}, ["nb", "already"]),
    "dangling": ([node("Add", ["x", "nope"], ["y"], name="na")], {"x": [2]}, ["y"], {}, ["na", "nope"]),
    "nothing computes the output": ([], {"x": [2]}, ["y"], {}, ["'y'"]),
    "huge input": ([node("Relu", ["x"], ["y"])], {"x": [HUGE]}, ["y"], {}, ["'x'", "bytes"]),
    "huge product": ([node("Relu", ["x"], ["y"])], {"x": [HUGE, HUGE, HUGE]}, ["y"], {}, ["'x'", "bytes"]),
    "huge Expand": ([node("Expand", ["x", "s"], ["y"])], {"x": [1]}, ["y"], {"s": size(HUGE)}, ["'y'", "bytes"]),
    "huge ConstantOfShape": ([node("ConstantOfShape", ["s"], ["y"])], {"x": [1]}, ["y"], {"s": size(HUGE)}, ["'y'", "bytes"]),
    "huge MatMul": ([node("MatMul", ["x", "w"], ["y"])], {"x": [2**20, 1]}, ["y"], {"w": np.ones((1, 2**20), "float32")}, ["'y'", "bytes"]),
    "huge Pad": ([node("Pad", ["x", "p"], ["y"])], {"x": [4]}, ["y"], {"p": size(0, HUGE)}, ["'y'", "bytes"]),
    "more parts than outputs": ([node("Split", ["x"], ["y", "z"], num_outputs=2**20)], {"x": [7]}, ["y"], {}, ["num_outputs", "2 outputs"]),
    "negative dim": ([node("Conv", ["x", "w"], ["y"])], {"x": [1, 3, 1, 1]}, ["y"], {"w": np.ones((4, 3, 3, 3), "float32")}, ["'y'", "cannot exist"]),
    "strides of 0": (
        [node("Conv", ["x", "w"], ["y"], strides=[0, 0])],
        {"x": [1, 3, 8, 8]},
        ["y"],
        {"w": np.ones((4, 3, 3, 3), "float32")},
        ["'y'", "Conv"],
    ),
    "shapes that do not fit": ([node("MatMul", ["x", "w"], ["y"])], {"x": [2, 5]}, ["y"], {"w": W}, ["'y'", "MatMul"]),
    "dtypes that do not fit": ([node("Add", ["x", "w"], ["y"])], {"x": [2]}, ["y"], {"w": size(1, 2)}, ["'y'", "Add"]),
    "permutation": ([node("Transpose", ["x"], ["y"], perm=[0, 0])], {"x": [2, 3]}, ["y"], {}, ["'y'", "Transpose"]),
    "strings": ([node("Identity", ["x"], ["y"])], {"x": ([2], Kind.STRING)}, [("y", Kind.STRING)], {}, ["'x'", "STRING"]),
}

D, I32, I64, B = Kind.DOUBLE, Kind.INT32, Kind.INT64, Kind.BOOL
#: name -> (nodes, inputs, outputs, constants)
COMPILED = {
    "no node": ([], {"x": [2]}, ["x"], {}),
    "no node, no input": ([], {}, ["w"], {"w": W}),
    "output is an input": ([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y", "x"], {}),
    "output is an initializer": ([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y", "w"], {"w": W}),
    "one output twice": ([node("Relu", ["x"], ["y"]), node("Identity", ["y"], ["z"])], {"x": [2]}, ["y", "z"], {}),
    "no rows": ([node("MatMul", ["x", "w"], ["m"]), node("Softmax", ["m"], ["y"])], {"x": [0, 4]}, ["y"], {"w": W}),
    "nothing to sum": ([node("MatMul", ["x", "w"], ["y"])], {"x": [2, 0]}, ["y"], {"w": np.ones((0, 3), "float32")}),
    "no columns": ([node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4]}, ["y"], {"w": np.ones((4, 0), "float32")}),
    "sum of nothing": ([node("ReduceSum", ["x"], ["y"], keepdims=0)], {"x": [0, 3]}, ["y"], {}),
    "maximum of nothing": ([node("ReduceMax", ["x", "a"], ["y"], keepdims=0)], {"x": [0, 3]}, ["y"], {"a": size(0)}),
    "empty part": ([node("Concat", ["x", "w"], ["y"], axis=0)], {"x": [2, 3]}, ["y"], {"w": np.ones((0, 3), "float32")}),
    "scalars": ([node("Exp", ["x"], ["e"]), node("Add", ["e", "w"], ["y"])], {"x": []}, ["y"], {"w": np.float32(2)}),
    "hostile names": (
        [node("MatMul", ["a/b", "__w"], ["a b\n"], name="main"), node("Relu", ["a b\n"], ["main"], name="../../etc/'\"; rm")],
        {"a/b": [2, 4]},
        ["main"],
        {"__w": W},
    ),
    "names alike": ([node("Sub", ["a/b", "a_b"], ["é"]), node("Relu", ["é"], ["a.b"])], {"a/b": [2], "a_b": [2]}, ["a.b"], {}),
    "booleans": ([node("Not", ["x"], ["n"]), node("Or", ["n", "z"], ["y"])], {"x": ([37], B), "z": ([37], B)}, [("y", B)], {}),
    "count": ([node("Cast", ["x"], ["c"], to=1), node("ReduceSum", ["c"], ["y"], keepdims=0)], {"x": ([5, 37], B)}, ["y"], {}),
    "float64": ([node("MatMul", ["x", "w"], ["m"]), node("Softmax", ["m"], ["y"])], {"x": ([5, 4], D)}, [("y", D)], {"w": W.astype("float64")}),
    "float64 norm": (
        [node("LayerNormalization", ["x", "s", "b"], ["y"])],
        {"x": ([5, 3], D)},
        [("y", D)],
        {"s": np.ones(3), "b": np.linspace(0, 1, 3)},
    ),
    "int32": ([node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])], {"x": ([5, 4], I32)}, [("y", I32)], {"w": W.astype("int32")}),
    "int64": (
        [node("Mul", ["x", "w"], ["m"]), node("ReduceMax", ["m"], ["y"], keepdims=0)],
        {"x": ([5, 4], I64)},
        [("y", I64)],
        {"w": size(1, -2, 3, 4)},
    ),
    "folded int64": (
        [node("Neg", ["w"], ["n"]), node("Abs", ["n"], ["a"]), node("Mul", ["x", "a"], ["y"])],
        {"x": ([3], I64)},
        [("y", I64)],
        {"w": size(2**40, -3, 5)},
    ),
    "every index": ([node("Slice", ["x", "a", "b"], ["y"])], {"x": [4]}, ["y"], {"a": size(-(2**63)), "b": size(2**63 - 1)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path, capsys, monkeypatch):
    *parts, words = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.onnx").write_bytes(onnx_models.small(*parts).SerializeToString())
    assert main(["odd.onnx"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in words) and "Traceback" not in err and "Warning" not in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"]


@pytest.mark.parametrize("operator", ["HardSigmoid", "Neg", "And"])
def test_types_that_no_opset_has_are_refused_in_old_ones_too(operator):
    operands = ["x"] * (2 if operator == "And" else 1)
    kind = Kind.FLOAT if operator == "And" else Kind.BOOL
    proto = onnx_models.small([node(operator, operands, ["y"])], {"x": ([3], kind)}, [("y", kind)], opset=1)
    with pytest.raises(tcompile.UnsupportedModel, match="which the standard does not have"):
        tcompile.compile(proto)


def test_a_very_tall_product_is_scheduled_without_listing_its_tiles():
    started = time.process_time()
    proto = onnx_models.small([node("MatMul", ["x", "w"], ["y"])], {"x": [2**26, 2]}, ["y"], {"w": np.ones((2, 1), "float32")})
    tcompile.compile(proto, target="cpu:haswell")
    assert time.process_time() - started < 30  # tile by tile it would be hours


@pytest.mark.sweep
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    proto = onnx_models.small(*COMPILED[name])
    rng = np.random.default_rng(0)
    feeds = {}
    for info in proto.graph.input:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        feeds[info.name] = (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2 if dtype.kind == "b" else 9, shape)).astype(dtype)
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)
    result = tcompile.compile(proto)(**feeds)
    for ours, theirs in zip(result if isinstance(result, tuple) else (result,), want, strict=True):
        assert agree(ours, theirs).ok, agree(ours, theirs)


def test_a_long_range_is_computed_not_stored(tmp_path):
    nodes = [node("Range", ["a", "b", "c"], ["r"]), node("Cast", ["r"], ["f"], to=1), node("Mul", ["f", "x"], ["y"])]
    proto = onnx_models.small(nodes, {"x": [1]}, ["y"], {"a": size(3).reshape(()), "b": size(10**6).reshape(()), "c": size(7).reshape(())})
    model = tcompile.compile(proto)
    np.testing.assert_array_equal(model(np.full(1, 2, "float32")), 2 * np.arange(3, 10**6, 7).astype("float32"))
    path = model.save(tmp_path / "range.tcm")
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 100_000
