"""Element types of ONNX models: those that are only stored, and float16 and bfloat16, against ml_dtypes, onnx's reference and numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import tcompile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_cast import cast_to
from onnx_models import small
from tcompile.compiler.element_types import CARRIERS, decode, encode, numpy_dtype
from tcompile.compiler.errors import UnsupportedModel, UsageError
from tcompile.compiler.importers.onnx.load import STORAGE
from tcompile.compiler.importers.onnx.storage import cast_array

FLOATS = {kind: name for kind, name in STORAGE.items() if "float" in name}
SMALL_FLOATS = {kind: name for kind, name in FLOATS.items() if "float8_e" in name}


def model(nodes, inputs, outputs, constants=None):
    graph = small(nodes, inputs, outputs, constants, opset=25)
    graph.ir_version = 11
    return graph


def one(op, inputs, output, **attributes):
    """A model of one node, its inputs of dynamic rank-1 shape unless a shape is given."""
    named = {f"x{index}": spec if isinstance(spec, tuple) else (["n"], spec) for index, spec in enumerate(inputs)}
    return model([helper.make_node(op, list(named), ["y"], **attributes)], named, [("y", output)])


def same_bits_or_nan(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    bits = encode(found) == encode(expected)
    assert np.all(bits | (np.isnan(found.astype(np.float32)) & np.isnan(expected.astype(np.float32))))


def awkward_floats():
    """Every float32 of few mantissa bits, the neighbours of some, infinities and NaN of both signs."""
    coarse = np.arange(0, 1 << 16, 3, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return np.concatenate([coarse, np.nextafter(coarse[::5], np.float32(0)), np.nextafter(coarse[::7], np.float32(np.inf))])


@pytest.mark.sweep
@pytest.mark.parametrize("kind,saturate", [(kind, saturate) for kind in FLOATS for saturate in ([1, 0] if kind in SMALL_FLOATS else [1])])
def test_casts_from_float_round_as_the_standard_says(kind, saturate):
    x = awkward_floats()
    if FLOATS[kind] == "float4_e2m1fn":
        x = x[~np.isnan(x)]
    attributes = {"saturate": saturate} if kind in SMALL_FLOATS else {}
    found = tcompile.compile(one("Cast", [T.FLOAT], kind, to=kind, **attributes))(x)
    with np.errstate(all="ignore"):
        expected = cast_to(x, kind, bool(saturate), "up")
    same_bits_or_nan(found, expected)
    same_bits_or_nan(cast_array(x, FLOATS[kind], bool(saturate)), expected)


@pytest.mark.parametrize("mode", ["up", "down", "nearest"])
def test_exponents_round_by_mode(mode):
    x = awkward_floats()
    found = tcompile.compile(one("Cast", [T.FLOAT], T.FLOAT8E8M0, to=T.FLOAT8E8M0, round_mode=mode))(x)
    same_bits_or_nan(found, cast_to(x, T.FLOAT8E8M0, True, mode))


@pytest.mark.parametrize("kind", STORAGE, ids=STORAGE.values())
def test_every_code_casts_to_float(kind):
    name = STORAGE[kind]
    count = {"bfloat16": 1 << 16, "float4_e2m1fn": 16}.get(name, 256)
    codes = np.arange(count).astype(CARRIERS[name])
    x = decode(codes, name) if "float" in name else decode(np.arange(*_range(name)).astype(CARRIERS[name]), name)
    found = tcompile.compile(one("Cast", [kind], T.FLOAT, to=T.FLOAT))(x)
    np.testing.assert_array_equal(found, x.astype(np.float32))


def _range(name):
    info = ml_dtypes.iinfo(numpy_dtype(name))
    return int(info.min), int(info.max) + 1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["int4", "uint4", "int2", "uint2"]), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
def test_small_integers_keep_the_low_bits(name, values):
    array = np.array(values, np.int32)
    expected = array.astype(numpy_dtype(name))
    np.testing.assert_array_equal(cast_array(array, name), expected)
    np.testing.assert_array_equal(decode(encode(expected), name), expected)


@pytest.mark.parametrize("kind", [T.INT4, T.UINT2, T.FLOAT8E5M2, T.FLOAT4E2M1, T.BFLOAT16])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_elements_are_moved_as_they_are(kind, n):
    x = np.arange(2 * n).reshape(n, 2).astype(np.float32).astype(numpy_dtype(STORAGE[kind]))
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"]),
        helper.make_node("Concat", ["t", "t"], ["c"], axis=0),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    found = tcompile.compile(model(nodes, {"x": ([n, 2], kind)}, [("y", kind)]))(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(encode(found), encode(np.concatenate([x.T, x.T])))


def test_what_has_no_arithmetic_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="int4"):
        tcompile.compile(one("Relu", [T.INT4], T.INT4))
    with pytest.raises(UnsupportedModel, match="float8_e5m2"):
        tcompile.compile(one("Add", [T.FLOAT8E5M2, T.FLOAT8E5M2], T.FLOAT8E5M2))


def test_other_types_are_not_reinterpreted():
    compiled = tcompile.compile(one("Identity", [T.INT4], T.INT4))
    with pytest.raises(UsageError, match="expected dtype int4, got int8"):
        compiled(np.zeros(3, np.int8))
    assert str(compiled.inputs[0]) == "x0: int4[n]"


def test_saved_models_keep_the_types(tmp_path):
    x = np.array([1, -8, 7], ml_dtypes.int4)
    tcompile.compile(one("Identity", [T.INT4], T.INT4)).save(tmp_path / "m.tcm")
    found = tcompile.load(tmp_path / "m.tcm")(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x)


def test_torch_tensors_of_storage_types():
    x = torch.tensor([1.5, -3.0, float("nan")], dtype=torch.bfloat16)
    found = tcompile.compile(one("Abs", [T.BFLOAT16], T.BFLOAT16))(x)
    torch.testing.assert_close(found, x.abs(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.sweep
@pytest.mark.parametrize("block,axis,size", [(0, 1, 5), (3, 1, 7), (2, 0, 3), (0, 0, 1)])
@pytest.mark.parametrize("kind", [T.INT4, T.UINT4, T.INT8, T.UINT16, T.FLOAT8E4M3FN, T.FLOAT4E2M1], ids=T.DataType.Name)
def test_quantization_by_tensor_axis_and_block(kind, block, axis, size):
    generator = np.random.default_rng(0)
    shape = [3, 7] if axis == 1 else [3, 5]
    if axis == 1 and not block:
        shape[1] = size
    count = -(-shape[axis] // block) if block else shape[axis]
    scales = [count if position == axis else dim for position, dim in enumerate(shape)] if block else [count]
    x = (generator.standard_normal(shape) * 20).astype(np.float32)
    scale = generator.uniform(0.5, 3, scales).astype(np.float32)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    zero = generator.integers(0, 3, scales).astype(dtype) if kind in (T.INT4, T.UINT4, T.INT8, T.UINT16) else np.zeros(scales, dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis, block_size=block),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis, block_size=block),
    ]
    graph = model(nodes, {"x": shape, "s": scales, "z": (scales, kind)}, [("q", kind), "y"])
    for have, want in zip(tcompile.compile(graph)(x, scale, zero), ReferenceEvaluator(graph).run(None, {"x": x, "s": scale, "z": zero}), strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), rtol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", [T.FLOAT16, T.BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("op,attributes", [("Exp", {}), ("ReduceSum", {"keepdims": 0}), ("MatMul", {}), ("Div", {}), ("Erf", {})])
def test_narrow_types_are_computed_in_float32_and_rounded_once(kind, op, attributes):
    """Equal to float32's result rounded, but for values at the border between two numbers, which may fall on either."""
    dtype = np.dtype(np.float16) if kind == T.FLOAT16 else np.dtype(ml_dtypes.bfloat16)
    generator = np.random.default_rng(0)
    inputs = 2 if op in ("MatMul", "Div") else 1
    values = [(generator.standard_normal((37, 37)) / 2).astype(dtype) for _ in range(inputs)]
    found = tcompile.compile(one(op, [([37, 37], kind)] * inputs, kind, **attributes))(*values)
    wide = tcompile.compile(one(op, [([37, 37], T.FLOAT)] * inputs, T.FLOAT, **attributes))(*(value.astype(np.float32) for value in values))
    expected = wide.astype(dtype)
    assert found.dtype == dtype
    different = found.astype(np.float32) != expected.astype(np.float32)
    assert different.mean() < 0.01
    ulp = 2.0 ** (-10 if kind == T.FLOAT16 else -7)
    np.testing.assert_allclose(found.astype(np.float64), wide.astype(np.float64), rtol=0.51 * ulp, atol=1e-6)


@pytest.mark.parametrize("source,target", [(T.FLOAT, T.INT32), (T.BFLOAT16, T.UINT16), (T.INT64, T.DOUBLE), (T.FLOAT8E5M2, T.INT8)])
def test_bits_are_read_as_another_type(source, target):
    dtype, other = (helper.tensor_dtype_to_np_dtype(kind) for kind in (source, target))
    x = np.array([0.0, 1.0, -2.0]).astype(dtype)
    graph = one("BitCast", [source], target, to=target)
    graph.opset_import[0].version = 26
    np.testing.assert_array_equal(tcompile.compile(graph)(x), x.view(other))


def test_initializers_and_constants_of_storage_types():
    weight = np.array([[1, -8, 7], [3, 0, -1]], ml_dtypes.int4)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("Add", ["x", "d"], ["y"])]
    graph = model(nodes, {"x": [2, 3]}, ["y"], {"s": np.float32(0.5)})
    graph.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(tcompile.compile(graph)(x), 1 + weight.astype(np.float32) / 2)
