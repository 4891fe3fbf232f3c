"""ONNX graphs with QuantizeLinear and DequantizeLinear run in integers and agree with onnxruntime within one step of a code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from .onnx_models import small

RNG = np.random.default_rng(0)
node = helper.make_node


class Samples(CalibrationDataReader):
    def __init__(self, samples: list[dict[str, np.ndarray]]):
        self.left = iter(samples)

    def get_next(self) -> Any:
        return next(self.left, None)


def floats(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def mlp() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """MatMul + Add, Gemm with a transposed weight, a residual Add, Reshape and Transpose between."""
    nodes = [
        node("MatMul", ["x", "w0"], ["m"]),
        node("Add", ["m", "b0"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Reshape", ["r", "flat"], ["f"]),
        node("Gemm", ["f", "w1", "b1"], ["g"], transB=1),
        node("Add", ["g", "f"], ["s"]),
        node("MatMul", ["s", "w2"], ["y"]),
    ]
    constants = {"w0": floats(12, 24), "b0": floats(24), "w1": floats(24, 24), "b1": floats(24), "w2": floats(24, 5), "flat": np.array([6, 24])}
    return small(nodes, {"x": [2, 3, 12]}, ["y"], constants), (2, 3, 12)


def convolutions() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """Padded, pooled, residual, depthwise."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c0"], ["r0"]),
        node("MaxPool", ["r0"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["p", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Sigmoid", ["c1"], ["g1"]),
        node("Mul", ["c1", "g1"], ["h1"]),
        node("Conv", ["h1", "wd"], ["d"], pads=[1, 1, 1, 1], group=16),
        node("Add", ["d", "p"], ["s"]),
        node("Conv", ["s", "w2"], ["c2"], pads=[0, 1, 1, 0]),
        node("GlobalAveragePool", ["c2"], ["y"]),
    ]
    constants = {"w0": floats(16, 3, 3, 3), "b0": floats(16), "w1": floats(16, 16, 3, 3), "b1": floats(16), "wd": floats(16, 1, 3, 3)}
    return small(nodes, {"x": [1, 3, 19, 22]}, ["y"], constants | {"w2": floats(7, 16, 2, 2)}), (1, 3, 19, 22)


def quantized(model: onnx.ModelProto, shape: tuple[int, ...], folder: Path, **options: Any) -> tuple[Path, list[dict[str, np.ndarray]]]:
    samples = [{"x": RNG.standard_normal(shape).astype(np.float32)} for _ in range(4)]
    source, result = folder / "float.onnx", folder / "qdq.onnx"
    onnx.save(model, source)
    quantize_static(source, result, Samples(samples), quant_format=QuantFormat.QDQ, weight_type=QuantType.QInt8, **options)
    return result, samples


def plain_session(path: Path) -> onnxruntime.InferenceSession:
    """onnxruntime reading the graph literally, in float32 where it says so."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def last_scale(path: Path) -> float:
    """The step of the codes that end in the model's output."""
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = [float(constants[entry.input[1]].max()) for entry in graph.node if entry.op_type == "QuantizeLinear"]
    return max(scales)


@pytest.mark.sweep
@pytest.mark.parametrize(("build", "matches"), [(mlp, {"matmul": 3}), (convolutions, {"conv2d": 4})])
@pytest.mark.parametrize(("per_channel", "activations"), [(False, QuantType.QUInt8), (True, QuantType.QInt8)])
def test_static_models_of_onnxruntime(build: Any, matches: dict[str, int], per_channel: bool, activations: QuantType, tmp_path: Path) -> None:
    extra = {"ActivationSymmetric": activations == QuantType.QInt8}
    path, samples = quantized(*build(), tmp_path, per_channel=per_channel, activation_type=activations, extra_options=extra)
    model = tcompile.compile(path)
    report = next(entry for entry in model.report()["passes"] if entry["name"] == "recognize-qdq")
    assert {kind: count for kind, count in report["matches"].items() if kind in matches} == matches
    session = plain_session(path)
    step = last_scale(path)
    for feeds in samples:
        want = session.run(None, feeds)[0]
        assert np.abs(model(**feeds) - want).max() <= step * 1.001
        assert np.median(np.abs(model(**feeds) - want)) < step * 0.05


def test_products_run_in_integers(tmp_path: Path) -> None:
    path, _ = quantized(*mlp(), tmp_path, per_channel=True)
    kernels = [kernel for kernel in tcompile.compile(path).report()["kernels"] if kernel["template"] == "gemm"]
    assert len(kernels) == 3 and all("u8s8" in kernel["workload"] for kernel in kernels)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_both_operators_alone(dtype: type, axis: int | None) -> None:
    size = () if axis is None else ((4,), (9,))[axis]
    scale = (RNG.uniform(0.01, 0.1, size)).astype(np.float32)
    zero = RNG.integers(-3, 9, size).clip(0 if dtype == np.uint8 else None).astype(dtype)
    kind = TensorProto.INT8 if dtype == np.int8 else TensorProto.UINT8
    attributes = {} if axis is None else {"axis": axis}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes), node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes)]
    model = small(nodes, {"x": [4, 9]}, [("q", kind), "y"], {"s": scale, "z": zero})
    x = (RNG.standard_normal((4, 9)) * 5).astype(np.float32)
    codes, values = tcompile.compile(model)(x)
    want = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert codes.dtype == dtype and np.abs(codes.astype(int) - want[0].astype(int)).max() <= 1
    assert (np.abs(values - want[1]) <= 1.001 * np.broadcast_to(scale[:, None] if axis == 0 else scale, x.shape)).all()


def test_integer_input_and_an_embedding(tmp_path: Path) -> None:
    nodes = [
        node("DequantizeLinear", ["table", "s", "z"], ["t"]),
        node("Gather", ["t", "ids"], ["e"]),
        node("DequantizeLinear", ["codes", "s", "z"], ["c"]),
        node("Add", ["e", "c"], ["y"]),
    ]
    constants = {"table": RNG.integers(-128, 128, (10, 6)).astype(np.int8), "s": np.float32(0.1), "z": np.int8(-5)}
    model = small(nodes, {"ids": ([3], TensorProto.INT64), "codes": ([3, 6], TensorProto.INT8)}, ["y"], constants)
    feeds = {"ids": np.array([2, 9, 0]), "codes": RNG.integers(-128, 128, (3, 6)).astype(np.int8)}
    want = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    np.testing.assert_allclose(tcompile.compile(model)(**feeds), want, rtol=1e-5, atol=1e-6)


def test_dynamic_quantization_and_integer_matmul() -> None:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("MatMulInteger", ["q", "w", "z"], ["i"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "s"], ["y"]),
    ]
    # without VNNI onnxruntime adds two products in 16 bits, so that larger weights would saturate there
    model = small(nodes, {"x": [3, 8]}, ["y"], {"w": RNG.integers(-64, 64, (8, 5)).astype(np.int8)})
    x = floats(3, 8)
    want = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(tcompile.compile(model)(x), want, rtol=1e-4, atol=1e-3)


def test_unsupported_codes_are_named() -> None:
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT8E8M0), node("DequantizeLinear", ["q", "s"], ["y"])]
    with pytest.raises(tcompile.UnsupportedModel, match="codes of type float8_e8m0fnu"):
        tcompile.compile(small(nodes, {"x": [3, 8]}, ["y"], {"s": np.float32(0.1)}, opset=21))
