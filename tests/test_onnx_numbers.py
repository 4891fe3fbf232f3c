"""Integers, NaN, infinities and empty axes in element-wise operators and reductions, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
from onnx import helper, numpy_helper
from tcompile.compiler.errors import UnsupportedModel


def run(op: str, *values: Any, constants: tuple[Any, ...] = (), outputs: tuple[Any, ...] = (), **attributes: Any) -> Any:
    """The outputs of one node. outputs: their types, that of the first value by default."""
    arrays = [np.asarray(value) for value in values]
    names, extra = [f"x{index}" for index in range(len(arrays))], [f"c{index}" for index in range(len(constants))]
    results = [(f"y{index}", np.dtype(kind)) for index, kind in enumerate(outputs or (arrays[0].dtype,))]

    def info(name: str, kind: np.dtype, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), shape)

    graph = helper.make_graph(
        [helper.make_node(op, names + extra, [name for name, _ in results], **attributes)],
        "g",
        [info(name, array.dtype, array.shape) for name, array in zip(names, arrays, strict=True)],
        [info(name, kind, None) for name, kind in results],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in zip(extra, constants, strict=True)],
    )
    return tcompile.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))(*arrays)


@pytest.mark.parametrize("kind", [np.int8, np.int64])
def test_division_towards_zero_of_the_lowest_integer(kind: type):
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    x, y = np.array([low, low, 5, -7, 7, high], kind), np.array([7, 3, low, 2, -2, -1], kind)
    quotients = [int(abs(int(a)) // abs(int(b))) * (1 if (a < 0) == (b < 0) else -1) for a, b in zip(x, y, strict=True)]
    np.testing.assert_array_equal(run("Div", x, y), np.array(quotients, kind))
    np.testing.assert_array_equal(run("Mod", x, y, fmod=1), np.array([int(a) - q * int(b) for a, b, q in zip(x, y, quotients, strict=True)], kind))
    np.testing.assert_array_equal(run("Mod", x, y), np.mod(x, y))


def test_unsigned_remainders():
    x, y = np.array([7, 200, 0], np.uint8), np.array([3, 7, 9], np.uint8)
    np.testing.assert_array_equal(run("Mod", x, y, fmod=1), x % y)


def test_powers_of_integers_take_fractions():
    np.testing.assert_array_equal(run("Pow", np.array([4, 9, 27], np.int32), np.array([0.5, 1.5, 0], np.float32)), [2, 27, 1])


def test_the_upper_bound_of_clip_wins():
    for kind in (np.float32, np.int32):
        x = np.array([-3, 0, 9], kind)
        np.testing.assert_array_equal(run("Clip", x, constants=(kind(2), kind(1))), np.ones(3, kind))
        np.testing.assert_array_equal(run("Clip", x, kind(2), kind(1)), np.ones(3, kind))


def test_the_sign_of_nan():
    x = np.array([np.nan, -2, 0, 3], np.float32)
    np.testing.assert_array_equal(run("Sign", x), np.sign(x))


def test_logarithms_of_sums_with_infinities():
    x = np.array([[np.inf, 1], [-np.inf, -np.inf], [-np.inf, 2]], np.float32)
    np.testing.assert_allclose(run("ReduceLogSumExp", x, constants=(np.array([1]),), keepdims=0), np.logaddexp(x[:, 0], x[:, 1]), rtol=1e-6)


def test_reductions_of_integers():
    x = np.array([[5, -7, 4], [3, 4, 0]], np.int32)
    axis = (np.array([1]),)
    np.testing.assert_array_equal(run("ReduceMean", x, constants=axis, keepdims=0), [0, 2])
    np.testing.assert_array_equal(run("ReduceL2", x, constants=axis, keepdims=0), [9, 5])


def test_means_of_nothing():
    found = run("ReduceMean", np.zeros((2, 0, 3), np.float32), constants=(np.array([1]),))
    assert found.shape == (2, 1, 3) and np.isnan(found).all()
    with pytest.raises(UnsupportedModel, match="no elements"):
        run("ReduceMean", np.zeros((0,), np.int32))


def test_the_first_none():
    values, places = run("TopK", np.ones((2, 5), np.float32), constants=(np.array([0]),), outputs=(np.float32, np.int64))
    assert values.shape == places.shape == (2, 0)


def test_error_functions_of_float64_are_refused():
    for op in ("Erf", "Gelu"):
        with pytest.raises(UnsupportedModel, match="float64"):
            run(op, np.zeros(3))


@pytest.mark.parametrize("count", [5, 33])
@pytest.mark.parametrize("op", ["Equal", "Less", "GreaterOrEqual"])
def test_the_opposite_of_a_comparison_with_nan(op: str, count: int):
    x = np.where(np.arange(count) % 3 == 1, np.nan, np.arange(count)).astype(np.float32)
    compare = {"Equal": np.equal, "Less": np.less, "GreaterOrEqual": np.greater_equal}[op]
    for names in (["x", "two"], ["x", "x"]):
        nodes = [helper.make_node(op, names, ["compared"]), helper.make_node("Not", ["compared"], ["y"])]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", 1, [count])],
            [helper.make_tensor_value_info("y", 9, None)],
            [numpy_helper.from_array(np.float32(2), "two")],
        )
        compiled = tcompile.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
        np.testing.assert_array_equal(compiled(x), ~compare(x, np.float32(2) if "two" in names else x))
