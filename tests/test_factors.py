"""Constant factors behind products: divisions that become multiplications, factors that become one, and those that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((24, 33)).astype("float32")


def model(nodes: list[tuple[str, list[str], str]], **constants: Any) -> ModelProto:
    """x [5, 24] -> y; `w` is the weight of a product."""
    held = [numpy_helper.from_array(np.asarray(value, "float32"), name) for name, value in {"w": WEIGHT, **constants}.items()]
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 24]), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=f"{op}_{output}") for op, inputs, output in nodes], "quotients", [x], [y], held
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def matches(compiled: Any) -> dict[str, int]:
    return next(step["matches"] for step in compiled.report()["passes"] if step["name"] == "merge_factors")


def replaced(compiled: Any) -> int:
    return matches(compiled).get("divisions", 0)


HARD_SWISH = [
    ("MatMul", ["x", "w"], "p"),
    ("Add", ["p", "three"], "a"),
    ("Clip", ["a", "zero", "six"], "c"),
    ("Mul", ["p", "c"], "m"),
    ("Div", ["m", "six"], "y"),
]


def test_hard_swish_written_out() -> None:
    compiled = tcompile.compile(model(HARD_SWISH, zero=0, three=3, six=6))
    assert replaced(compiled) == 1
    (kernel,) = compiled.report()["kernels"]
    assert "divide" not in kernel["kernel"]
    x = RNG.standard_normal((5, 24)).astype("float32")
    p = x.astype("float64") @ WEIGHT
    np.testing.assert_allclose(compiled(x), p * np.clip(p + 3, 0, 6) / 6, rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.booleans())
def test_any_divisor(divisor: float, negative: bool) -> None:
    """As exact as the quotient of the very same sums: one bit in the last place at most."""
    divisor = -divisor if negative else divisor
    compiled, sums = (
        tcompile.compile(model([("MatMul", ["x", "w"], "p"), ("Div", ["p", "c"], "y")], c=divisor)),
        tcompile.compile(model([("MatMul", ["x", "w"], "y")])),
    )
    assert replaced(compiled) == 1
    x = RNG.standard_normal((5, 24)).astype("float32")
    np.testing.assert_array_max_ulp(compiled(x), sums(x) / np.float32(divisor), 1)


@pytest.mark.parametrize("constant", [0.0, np.inf, 1e-40, 3e38, np.nan], ids=str)
def test_constants_without_a_reciprocal(constant: float) -> None:
    compiled = tcompile.compile(model([("MatMul", ["x", "w"], "p"), ("Div", ["p", "c"], "y")], c=constant))
    assert replaced(compiled) == 0
    x = RNG.standard_normal((5, 24)).astype("float32")
    x[0] = 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(compiled(x), tcompile.compile(model([("MatMul", ["x", "w"], "y")]))(x) / np.float32(constant))


@pytest.mark.parametrize("rounding", ["Floor", "Ceil", "Round"])
def test_whole_numbers_stay_exact(rounding: str) -> None:
    """49 * (1 / 49) is less than 1: counts and positions would come out one too small, and codes at the middle between two."""
    values = np.tile(np.arange(24, dtype="float32") * 49, (5, 1))
    compiled = tcompile.compile(model([("Div", ["x", "c"], "q"), (rounding, ["q"], "y")], c=49))
    assert replaced(compiled) == 0
    np.testing.assert_array_equal(compiled(values), values / 49)
    behind = tcompile.compile(model([("MatMul", ["x", "w"], "p"), ("Div", ["p", "c"], "q"), (rounding, ["q"], "y")], c=49))
    assert replaced(behind) == 0


CODES = [("Round", ["m"], "r"), ("Clip", ["r", "low", "high"], "y")]


def test_factors_become_one() -> None:
    """A scale per column, a division and a number: one factor in two halves; of multiplications alone only where codes are made of them, and not where a value between is read as well."""
    scales = RNG.uniform(0.5, 2, 33).astype("float32")
    nodes = [("MatMul", ["x", "w"], "p"), ("Mul", ["p", "s"], "a"), ("Div", ["a", "d"], "b"), ("Mul", ["three", "b"], "y")]
    compiled = tcompile.compile(model(nodes, s=scales, d=7, three=3))
    assert matches(compiled) == {"divisions": 1, "merged": 2}
    x = RNG.standard_normal((5, 24)).astype("float32")
    want = (x.astype("float64") @ WEIGHT) * scales / 7 * 3
    np.testing.assert_allclose(compiled(x), want, rtol=1e-5, atol=1e-5)

    codes = tcompile.compile(model([*nodes[:2], ("Mul", ["a", "three"], "m"), *CODES], s=scales, three=3, low=-128, high=127))
    assert matches(codes) == {"merged": 1}
    want = np.clip(np.rint((x.astype("float64") @ WEIGHT) * scales * 3), -128, 127)
    assert np.abs(codes(x) - want).max() <= 1 and np.mean(codes(x) != want) < 0.01
    assert matches(tcompile.compile(model([*nodes[:2], ("Mul", ["a", "three"], "y")], s=scales, three=3))) == {}
    read = tcompile.compile(model([*nodes[:2], ("Mul", ["a", "three"], "b"), ("Add", ["a", "b"], "y")], s=scales, three=3))
    assert matches(read) == {}
    tiny = tcompile.compile(model([*nodes[:2], ("Mul", ["a", "three"], "m"), *CODES], s=1e-20, three=1e-20, low=-128, high=127))
    assert matches(tiny) == {}
    np.testing.assert_array_equal(tiny(x), 0)


@pytest.mark.parametrize("divisor", [6.0, -7.0, 3e-5])
def test_what_is_not_finite(divisor: float) -> None:
    compiled, sums = (
        tcompile.compile(model([("MatMul", ["x", "w"], "p"), *more], c=divisor)) for more in ([("Div", ["p", "c"], "y")], [("Identity", ["p"], "y")])
    )
    assert replaced(compiled) == 1
    x = RNG.standard_normal((5, 24)).astype("float32")
    x[0, 0], x[1, 3], x[2, 5], x[3] = np.inf, -np.inf, np.nan, 0
    with np.errstate(all="ignore"):
        np.testing.assert_array_max_ulp(np.nan_to_num(compiled(x)), np.nan_to_num(sums(x) / np.float32(divisor)), 1)
        np.testing.assert_array_equal(np.isnan(compiled(x)), np.isnan(sums(x)))


def test_a_factor_of_a_sum_goes_to_its_terms() -> None:
    """The residual sum between layers in int8. Not where a term is read elsewhere."""
    sums = [("MatMul", ["x", "w"], "p"), ("Mul", ["p", "s"], "a"), ("MatMul", ["x", "v"], "q"), ("Mul", ["q", "t"], "b"), ("Add", ["a", "b"], "c")]
    constants = {"v": RNG.standard_normal((24, 33)), "s": RNG.uniform(0.5, 2, 33), "t": 0.7, "f": 3.1}
    limits = {"low": -128, "high": 127}
    compiled = tcompile.compile(model([*sums, ("Mul", ["c", "f"], "m"), *CODES], **constants, **limits))
    assert matches(compiled) == {"merged": 1}
    x = RNG.standard_normal((5, 24)).astype("float32")
    a, b = (x.astype("float64") @ WEIGHT) * constants["s"], (x @ constants["v"]) * 0.7
    want = np.clip(np.rint((a + b) * 3.1), -128, 127)
    assert np.abs(compiled(x) - want).max() <= 1 and np.mean(compiled(x) != want) < 0.01
    read = tcompile.compile(model([*sums, ("Mul", ["c", "f"], "m"), CODES[0], ("Sub", ["r", "b"], "y")], **constants))
    assert matches(read) == {}
