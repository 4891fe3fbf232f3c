"""Operators as opsets 1 to 6 define them, and bodies of functions, against numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tcompile
from onnx import helper
from onnx_models import small
from tcompile.compiler.errors import UnsupportedModel


def one(op: str, inputs: list[np.ndarray], opset: int, constants: tuple[int, ...] = (), outputs: int = 1, **attributes: object) -> onnx.ModelProto:
    names = [f"x{index}" for index in range(len(inputs))]
    results = [f"y{index}" for index in range(outputs)]
    kinds = {
        name: (list(array.shape), helper.np_dtype_to_tensor_dtype(array.dtype))
        for index, (name, array) in enumerate(zip(names, inputs, strict=True))
        if index not in constants
    }
    return small([helper.make_node(op, names, results, **attributes)], kinds, results, {names[index]: inputs[index] for index in constants}, opset)


def check(expected: np.ndarray, op: str, inputs: list[np.ndarray], opset: int, constants: tuple[int, ...] = (), **attributes: object) -> None:
    compiled = tcompile.compile(one(op, inputs, opset, constants, **attributes))
    found = compiled(*(array for index, array in enumerate(inputs) if index not in constants))
    found = np.asarray(found[0] if isinstance(found, tuple) else found)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.sweep
@pytest.mark.parametrize("constant", [(), (1,), (0, 1)], ids=["computed", "constant", "folded"])
@pytest.mark.parametrize(
    ("right", "axis", "spread"),
    [((5,), None, (1, 1, 5)), ((3,), 1, (1, 3, 1)), ((2, 3), 0, (2, 3, 1)), ((3, 5), -2, (1, 3, 5)), ((1,), None, (1, 1, 1)), ((), None, ())],
)
def test_broadcast_from_an_axis(right: tuple, axis: int | None, spread: tuple, constant: tuple) -> None:
    a, b = floats(2, 3, 5), floats(*right) + 3
    options = {} if axis is None else {"axis": axis}
    for op, function in (("Add", np.add), ("Sub", np.subtract), ("Mul", np.multiply), ("Div", np.divide)):
        check(function(a, b.reshape(spread)), op, [a, b], 6, constant, broadcast=1, **options)


@pytest.mark.parametrize("options", [{}, {"broadcast": 1, "axis": 2}], ids=["not asked for", "beyond the end"])
def test_broadcast_is_refused(options: dict) -> None:
    with pytest.raises(UnsupportedModel, match=r"differ, without broadcast=1|does not fit"):
        tcompile.compile(one("Add", [floats(2, 3, 5), floats(3, 5)], 6, **options))


@pytest.mark.parametrize("opset", [1, 6])
def test_consumed_inputs_are_a_hint(opset: int) -> None:
    x = floats(3, 7)
    extra = {"consumed_inputs": [0]} if opset == 1 else {}
    check(np.maximum(x, 0), "Relu", [x], opset, **extra)
    check(np.clip(x, -0.5, 0.25), "Clip", [x], opset, min=-0.5, max=0.25, **extra)
    check(np.where(x > 0, x, 0.7 * np.expm1(x)), "Elu", [x], opset, alpha=0.7, **extra)


def test_sizes_as_attributes() -> None:
    x = floats(2, 3, 5)
    check(x.reshape(5, -1), "Reshape", [x], 1, shape=[5, -1])
    check(np.pad(x, ((0, 0), (1, 2), (3, 0)), constant_values=2), "Pad", [x], 1, paddings=[0, 1, 3, 0, 2, 0], value=2.0)
    check(np.tile(x, (1, 4, 1)), "Tile", [x, np.array([4], np.int64), np.array([1], np.int64)], 1, (1, 2))
    check(-np.sort(-x)[..., :2], "TopK", [x], 1, outputs=2, k=2)
    check(x.astype(np.int32), "Cast", [x], 1, to="INT32")
    check(x[:, 1:, :4], "Slice", [x], 1, axes=[1, 2], starts=[1, 0], ends=[9, 4])
    check(np.concatenate([x, x], 1), "Concat", [x, x], 1)
    image = floats(1, 2, 3, 5)
    check(image.repeat(2, 2).repeat(3, 3), "Upsample", [image], 1, height_scale=2.0, width_scale=3.0)
    check(image.repeat(2, 2).repeat(3, 3), "Upsample", [image], 7, scales=[1.0, 1.0, 2.0, 3.0])


def test_slope_per_channel() -> None:
    x, slope = floats(2, 3, 5), floats(3)
    check(np.where(x < 0, x * slope[:, None], x), "PRelu", [x, slope], 6)
    check(np.where(x < 0, x * slope[0], x), "PRelu", [x, slope[:1]], 6)


def test_sum_mean_max_and_gemm() -> None:
    x, y = floats(3, 5), floats(3, 5)[::-1].copy()
    for op, expected in (("Sum", x + y), ("Mean", (x + y) / 2), ("Max", np.maximum(x, y)), ("Min", np.minimum(x, y))):
        check(expected, op, [x, y], 6)
    w, c = floats(5, 7), floats(7)
    check(0.5 * x @ w + 2 * c, "Gemm", [x, w, c], 6, alpha=0.5, beta=2.0, broadcast=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_and_hardmax_over_the_last_axes_together(axis: int) -> None:
    x = floats(2, 3, 5)
    flat = x.reshape(int(np.prod(x.shape[:axis])), -1)
    shifted = np.exp(flat - flat.max(1, keepdims=True))
    check((shifted / shifted.sum(1, keepdims=True)).reshape(x.shape), "Softmax", [x], 6, axis=axis)
    check(np.eye(flat.shape[1], dtype=np.float32)[flat.argmax(1)].reshape(x.shape), "Hardmax", [x], 6, axis=axis)


def test_dropout_and_batch_normalization_by_is_test() -> None:
    x, (scale, shift, mean) = floats(4, 3, 5), floats(3, 3)
    variance = np.abs(floats(3)) + 1
    spread = [value[:, None] for value in (scale, shift, mean, variance)]
    check(x, "Dropout", [x], 6, is_test=1)
    with pytest.raises(UnsupportedModel, match="training mode"):
        tcompile.compile(one("Dropout", [x], 6))
    expected = spread[0] * (x - spread[2]) / np.sqrt(spread[3] + 1e-5) + spread[1]
    check(expected, "BatchNormalization", [x, scale, shift, mean, variance], 6, is_test=1)
    own = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
    check(spread[0] * own + spread[1], "BatchNormalization", [x, scale, shift, mean, variance], 6)


def test_batch_normalization_training() -> None:
    x, (scale, shift, mean) = floats(4, 3, 5), floats(3, 3)
    variance = np.abs(floats(3)) + 1
    compiled = tcompile.compile(one("BatchNormalization", [x, scale, shift, mean, variance], 15, outputs=3, training_mode=1, momentum=0.7))
    y, new_mean, new_variance = compiled(x, scale, shift, mean, variance)
    own = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, scale[:, None] * own + shift[:, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new_mean, 0.7 * mean + 0.3 * x.mean((0, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_variance, 0.7 * variance + 0.3 * x.var((0, 2)), rtol=1e-5, atol=1e-6)


def test_functions_that_cannot_be_inlined_are_refused() -> None:
    body = helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "missing"], ["b"])], [helper.make_opsetid("", 17)])
    model = small([helper.make_node("Twice", ["x"], ["y"], domain="own")], {"x": [2]}, ["y"], opset=17)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(body)
    with pytest.raises(UnsupportedModel):
        tcompile.compile(model)


def test_remainder_of_floats() -> None:
    a = np.array([0, -0.0, 5.5, -5.5, 5.5, -5.5, 3, -3, -1e10, np.inf, 1, np.nan], np.float32)
    b = np.array([-2, 2, 2, 2, -2, -2, np.inf, np.inf, 7, 2, 0, 1], np.float32)
    for fmod, function in ((0, np.mod), (1, np.fmod)):
        compiled = tcompile.compile(one("Mod", [a, b], 28 if fmod == 0 else 21, fmod=fmod))
        with np.errstate(invalid="ignore"):
            expected = function(a, b)
        found = np.asarray(compiled(a, b))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        known = ~np.isnan(expected)
        assert np.array_equal(np.signbit(found[known]), np.signbit(expected[known]))


def test_space_to_depth_by_columns_first() -> None:
    x = floats(2, 3, 4, 6)
    expected = x.reshape(2, 3, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 3)
    check(expected, "SpaceToDepth", [x], 28, blocksize=2, mode="CRD")


def test_default_attributes_reach_the_body_of_a_function() -> None:
    x = floats(2, 3, 5, 7)
    mean, deviation = x.mean((0, 2, 3), keepdims=True), x.std((0, 2, 3), keepdims=True)
    model = one("MeanVarianceNormalization", [x], 13)
    np.testing.assert_allclose(tcompile.compile(model)(x), (x - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert not model.graph.node[0].attribute  # the caller's model is as it was


def test_body_of_an_operator_with_an_input_left_out_in_the_middle() -> None:
    x, w, state = floats(2, 3, 5), floats(3, 1, 4), floats(2, 3, 3)
    node = helper.make_node("CausalConvWithState", ["x", "w", "", "s"], ["y", "new"])
    model = small([node], {"x": [2, 3, 5], "w": [3, 1, 4], "s": [2, 3, 3]}, ["y", "new"], opset=27)
    whole = np.concatenate([state, x], 2)
    expected = np.stack([(whole[:, :, t : t + 4] * w[:, 0]).sum(2) for t in range(5)], 2)
    np.testing.assert_allclose(tcompile.compile(model)(x, w, state)[0], expected, rtol=1e-4, atol=1e-5)
