"""Operators on 8-bit codes against onnxruntime: integers exactly, codes within one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto, helper
from onnx_models import small

MICROSOFT = "com.microsoft"


def random(*shape: int, seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, *shape])


def codes(dtype: str, *shape: int, seed: int = 0, whole: bool = False) -> np.ndarray:
    """Random integers; int8 of 7 bits unless the `whole` range is asked for: without VNNI, onnxruntime adds pairs of u8 x s8 products with saturation."""
    bounds = np.iinfo(dtype)
    low, high = (-64, 63) if dtype == "int8" and not whole else (bounds.min, bounds.max)
    return random(*shape, seed=seed).integers(low, high + 1, shape).astype(dtype)


def floats(*shape: int) -> np.ndarray:
    return random(*shape).standard_normal(shape).astype(np.float32)


def f(value: float | list[float]) -> np.ndarray:
    return np.array(value, np.float32)


def run(
    op: str, inputs: list[np.ndarray | None], run_time: int = 1, kind: str | None = None, domain: str = MICROSOFT, dims: Any = None, **attributes: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(ours, onnxruntime's) result of one node. run_time: how many of the leading inputs are inputs of the model, the others are constants; -1: all."""
    names = ["" if array is None else f"i{index}" for index, array in enumerate(inputs)]
    known = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True) if array is not None}
    feeds = {name: known[name] for name in list(known)[: len(known) if run_time < 0 else run_time]}
    infos = {name: (dims or list(array.shape), helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in feeds.items()}
    result = ("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind or str(inputs[0].dtype))))  # pyright: ignore[reportOptionalMemberAccess]
    constants = {name: array for name, array in known.items() if name not in feeds}
    model = small([helper.make_node(op, names, ["y"], domain=domain, **attributes)], infos, [result], constants)
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return compare(model, feeds)


def compare(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    want = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    have = tcompile.compile(model)(**feeds)
    assert isinstance(want, np.ndarray)
    assert have.dtype == want.dtype and have.shape == want.shape
    return have, want


def within_a_step(pair: tuple[np.ndarray, np.ndarray]) -> None:
    have, want = (array.astype(int) for array in pair)
    assert np.abs(have - want).max(initial=0) <= 1
    assert np.count_nonzero(have != want) <= max(1, have.size // 20)


@pytest.mark.sweep
@pytest.mark.parametrize("run_time", [1, -1])
@pytest.mark.parametrize(("a", "b"), [("uint8", "uint8"), ("uint8", "int8"), ("int8", "int8")])
def test_integer_products(a: str, b: str, run_time: int) -> None:
    x, w = codes(a, 2, 5, 7), codes(b, 7, 3)
    for zero_a, zero_b in ((None, None), (codes(a), codes(b)), (codes(a), codes(b, 3))):
        have, want = run("MatMulInteger", [x, w, zero_a, zero_b], run_time, "int32", "")
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(("left", "right"), [("uint8", "int8"), ("int8", "uint8")])
def test_zero_points_per_row(left: str, right: str) -> None:
    """onnxruntime has neither these nor int8 by uint8."""
    a, zero, w, zero_w = (codes(dtype, *shape, whole=True) for dtype, shape in ((left, (5, 7)), (left, (5,)), (right, (7, 3)), (right, (3,))))
    want = (a.astype(int) - zero[:, None].astype(int)) @ (w.astype(int) - zero_w.astype(int))
    for run_time in (["a"], ["a", "za"], ["a", "w", "za", "zw"]):
        arrays = {"a": a, "w": w, "za": zero, "zw": zero_w}
        infos = {name: (list(arrays[name].shape), helper.np_dtype_to_tensor_dtype(arrays[name].dtype)) for name in run_time}
        constants = {name: array for name, array in arrays.items() if name not in run_time}
        model = small([helper.make_node("MatMulInteger", list(arrays), ["y"])], infos, [("y", TensorProto.INT32)], constants)
        np.testing.assert_array_equal(tcompile.compile(model)(**{name: arrays[name] for name in run_time}), want)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options",
    [{}, {"pads": [1, 0, 2, 1], "strides": [2, 1]}, {"group": 3, "dilations": [2, 1], "pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}],
    ids=str,
)
@pytest.mark.parametrize("zeros", ["none", "constant", "run time"])
def test_integer_convolutions(zeros: str, options: dict) -> None:
    x = codes("uint8", 2, 6, 9, 8)
    w = codes("uint8", 9, 6 // options.get("group", 1), 3, 2)
    zero_x, zero_w = (None, None) if zeros == "none" else (codes("uint8", seed=3), np.uint8(128))
    names = ["x", "w"] if zero_x is None else ["x", "w", "zx", "zw"]
    arrays = {name: np.asarray(array) for name, array in zip(names, (x, w, zero_x, zero_w), strict=False)}
    feeds = {name: arrays[name] for name in (["x", "zx"] if zeros == "run time" else ["x"])}
    infos = {name: (list(array.shape), TensorProto.UINT8) for name, array in feeds.items()}
    constants = {name: array for name, array in arrays.items() if name not in feeds}
    model = small([helper.make_node("ConvInteger", names, ["y"], **options)], infos, [("y", TensorProto.INT32)], constants)
    np.testing.assert_array_equal(*compare(model, feeds))


@pytest.mark.sweep
@pytest.mark.parametrize("run_time", [1, -1])
@pytest.mark.parametrize("a", ["uint8", "int8"])
def test_qlinear_matmul(a: str, run_time: int) -> None:
    x, w = codes(a, 2, 5, 37), codes("int8", 37, 6)
    per_tensor = [x, f(0.02), codes(a), w, f(0.01), np.int8(3), f(0.35), codes(a, seed=1)]
    within_a_step(run("QLinearMatMul", per_tensor, run_time, domain=""))
    per_column = [x, f(0.02), codes(a), w, floats(6) ** 2 / 50, np.zeros(6, np.int8), f(0.35), codes(a, seed=1)]
    within_a_step(run("QLinearMatMul", per_column, run_time, domain=""))


@pytest.mark.sweep
@pytest.mark.parametrize("run_time", [1, -1])
@pytest.mark.parametrize("a", ["uint8", "int8"])
@pytest.mark.parametrize("last", [0, 1])
def test_qlinear_convolution(last: int, a: str, run_time: int) -> None:
    x, w = codes(a, 2, 5, 9, 8), codes("int8", 7, 5, 3, 2)
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x
    bias = random(7).integers(-(2**15), 2**15, 7).astype(np.int32)
    inputs = [x, f(0.02), codes(a), w, floats(7) ** 2 / 50, np.zeros(7, np.int8), f(0.7), codes(a, seed=1), bias]
    domain, options = (MICROSOFT, {"channels_last": 1}) if last else ("", {})
    within_a_step(run("QLinearConv", inputs, run_time, domain=domain, pads=[1, 0, 1, 2], strides=[1, 2], **options))


def test_one_and_three_axes() -> None:
    zero = np.uint8(7)
    for shape, kernel in (((2, 4, 11), (3, 4, 3)), ((1, 2, 5, 4, 6), (3, 2, 2, 3, 2))):
        inputs = [codes("uint8", *shape), f(0.02), zero, codes("uint8", *kernel), f(0.01), np.uint8(100), f(0.4), np.uint8(90)]
        within_a_step(run("QLinearConv", inputs, domain=""))


@pytest.mark.parametrize("transposed", [(0, 0), (1, 1)])
@pytest.mark.parametrize("quantized", [False, True])
def test_gemm(quantized: bool, transposed: tuple[int, int]) -> None:
    a, b = codes("uint8", 5, 9), codes("int8", 9, 6)
    a, b = (np.ascontiguousarray(value.T) if flag else value for value, flag in zip((a, b), transposed, strict=True))
    c = random(6).integers(-9999, 9999, 6).astype(np.int32)
    inputs = [a, f(0.02), codes("uint8"), b, floats(6) ** 2 / 50, np.zeros(6, np.int8), c, *([f(0.5), np.uint8(99)] if quantized else [])]
    options = {"transA": transposed[0], "transB": transposed[1], "alpha": 1.5}
    if quantized:
        within_a_step(run("QGemm", inputs, **options))
    else:
        np.testing.assert_allclose(*run("QGemm", inputs, kind="float32", **options), rtol=1e-5, atol=1e-4)


def test_products_that_give_floats() -> None:
    w, scale, bias = codes("int8", 9, 6), floats(6) ** 2 / 50, floats(6)
    for zero in (None, codes("int8"), codes("int8", 6)):
        inputs = [codes("uint8", 2, 5, 9), w, f(0.02), scale, codes("uint8"), zero, bias]
        np.testing.assert_allclose(*run("MatMulIntegerToFloat", inputs, kind="float32"), rtol=1e-5, atol=1e-4)
        have, want = run("DynamicQuantizeMatMul", [floats(2, 5, 9), w, scale, zero, bias])
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-3)
    within = run("DynamicQuantizeMatMul", [floats(5, 9), codes("uint8", 9, 6), f(0.02), np.uint8(120)], dims=["rows", 9])
    np.testing.assert_allclose(*within, rtol=1e-4, atol=1e-3)


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "run_time"), [("uint8", 1), ("int8", 1), ("int8", -1)])
def test_element_wise(dtype: str, run_time: int) -> None:
    x, y = codes(dtype, 3, 5, 7), codes(dtype, 5, 1)
    parameters = [f(0.05), codes(dtype, seed=2)]
    results = [f(0.09), codes(dtype, seed=4)]
    within_a_step(run("QLinearAdd", [x, *parameters, y, f(0.03), codes(dtype, seed=5), *results], run_time))
    within_a_step(run("QLinearMul", [x, *parameters, y, f(0.03), codes(dtype, seed=5), *results], run_time))
    within_a_step(run("QLinearLeakyRelu", [x, *parameters, *results], run_time, alpha=0.2))
    within_a_step(run("QLinearSigmoid", [x, *parameters, f(1 / 256), results[1]], run_time))
    within_a_step(run("QLinearSigmoid", [x, f(0.05), None, f(1 / 128), None], run_time))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("opset", "axis"), [(12, 1), (13, 1), (13, -1)])
def test_softmax(opset: int, axis: int, dtype: str) -> None:
    low = np.iinfo(dtype).min
    within_a_step(run("QLinearSoftmax", [codes(dtype, 3, 5, 7), f(0.05), codes(dtype), f(1 / 256), np.array(low, dtype)], opset=opset, axis=axis))


@pytest.mark.sweep
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_pools(dtype: str, last: int) -> None:
    x = codes(dtype, 2, 7, 9, 5)
    parameters = [f(0.05), codes(dtype, seed=2), f(0.04), codes(dtype, seed=4)]
    within_a_step(run("QLinearGlobalAveragePool", [x, *parameters], channels_last=last))
    options = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1], "channels_last": last}
    within_a_step(run("QLinearAveragePool", [x, *parameters], **options))
    within_a_step(run("QLinearAveragePool", [x, *parameters], count_include_pad=1, **options))


def test_concatenation_and_choice() -> None:
    x, y = codes("uint8", 2, 3, 5), codes("uint8", 2, 4, 5)
    within_a_step(run("QLinearConcat", [f(0.06), np.uint8(100), x, f(0.05), np.uint8(90), y, f(0.07), np.uint8(3)], -1, "uint8", axis=1))
    seen = random(2, 3, 5).random((2, 3, 5)) > 0.5
    inputs = [seen, x, f(0.05), np.uint8(90), codes("uint8", 3, 1), f(0.07), np.uint8(3), f(0.06), np.uint8(100)]
    within_a_step(run("QLinearWhere", inputs, -1, "uint8"))


def test_layers_run_in_integer_kernels() -> None:
    nodes = [
        helper.make_node("QLinearConv", ["x", "s", "zx", "w0", "s0", "z0", "s", "zx"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QLinearAdd", ["c", "s", "zx", "c", "s", "zx", "s", "zx"], ["a"], domain=MICROSOFT),
        helper.make_node("QLinearConv", ["a", "s", "zx", "w1", "s0", "z0", "s", "zx"], ["y"]),
    ]
    constants = {
        "s": f(0.05),
        "zx": np.uint8(120),
        "s0": f(0.01),
        "z0": np.int8(0),
        "w0": codes("int8", 16, 8, 3, 3),
        "w1": codes("int8", 16, 16, 1, 1),
    }
    model = small(nodes, {"x": ([1, 8, 10, 12], TensorProto.UINT8)}, [("y", TensorProto.UINT8)], constants)
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    kernels = tcompile.compile(model).report()["kernels"]
    assert sum("u8s8" in str(kernel["workload"]) for kernel in kernels) == 2


def test_refusals() -> None:
    inputs = [codes("uint8", 5, 9), f(0.02), np.uint8(3), codes("int8", 9, 6), f(0.1), np.int8(0), floats(6) ** 2, np.zeros(6, np.uint8)]
    with pytest.raises(tcompile.UnsupportedModel, match="where one for all elements is supported"):
        model = small(
            [helper.make_node("QLinearMatMul", [f"i{index}" for index in range(8)], ["y"])],
            {"i0": ([5, 9], TensorProto.UINT8)},
            [("y", TensorProto.UINT8)],
            {f"i{index}": array for index, array in enumerate(inputs) if index},
        )
        tcompile.compile(model)
