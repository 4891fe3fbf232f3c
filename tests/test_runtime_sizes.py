"""Shapes, positions and axes that a model computes while it runs, against onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_models import one_node, small
from tcompile.compiler.errors import TcompileError

onnxruntime = pytest.importorskip("onnxruntime")

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


class Pair:
    """One node's model, compiled and in onnxruntime. inputs: name -> (type, shape); types: those of the outputs."""

    def __init__(self, op: str, inputs: dict[str, tuple[int, Sequence[Any]]], types: Sequence[int] = (FLOAT,), **attributes: Any):
        self.model = one_node(op, inputs, types, **attributes)
        self.compiled = tcompile.compile(self.model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)

    def agree(self, *values: Any) -> None:
        feeds = dict(zip([info.name for info in self.model.graph.input], map(np.asarray, values), strict=True))
        found = self.compiled(*feeds.values())
        for want, have in zip(self.session.run(None, feeds), found if isinstance(found, tuple) else (found,), strict=True):
            assert (have.dtype, have.shape) == (want.dtype, want.shape)
            np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_reshape_with_open_and_copied_dims():
    pair = Pair("Reshape", {"x": (FLOAT, [2, 3, "n"]), "shape": (INT64, [3])})
    for shape in ((6, 5, 1), (0, 0, 0), (-1, 5, 3), (0, -1, 1), (1, 2, -1)):
        pair.agree(data(2, 3, 5), ints(*shape))
    with pytest.raises(TcompileError):
        pair.compiled(data(2, 3, 5), ints(7, 5, 1))
    with pytest.raises(TcompileError, match="the_node|y0"):
        pair.compiled(data(2, 3, 5), ints(-2, -3, 5))


def test_a_computed_shape_of_one_dim_is_checked():
    pair = Pair("Reshape", {"x": (FLOAT, [2, 3]), "shape": (INT64, [1])})
    for size in (6, -1):
        pair.agree(data(2, 3), ints(size))
    for size in (5, 7):
        with pytest.raises(TcompileError):
            pair.compiled(data(2, 3), ints(size))


def test_expand_and_tile():
    expand = Pair("Expand", {"x": (FLOAT, [3, 1]), "shape": (INT64, [3])})
    for shape in ((2, 1, 6), (1, 3, 1), (1, 1, 1), (0, 3, 2)):
        expand.agree(data(3, 1), ints(*shape))
    with pytest.raises(TcompileError):
        expand.compiled(data(3, 1), ints(2, 5, 6))
    nodes = [helper.make_node("Concat", ["n", "n"], ["shape"], axis=0), helper.make_node("Expand", ["w", "shape"], ["y"])]
    row = tcompile.compile(small(nodes, {"n": ([1], INT64)}, ["y"], {"w": data(1, 3)}))  # a constant that only the sizes refuse
    np.testing.assert_array_equal(row(ints(3)), np.broadcast_to(data(1, 3), (3, 3)))
    with pytest.raises(TcompileError):
        row(ints(2))
    tile = Pair("Tile", {"x": (FLOAT, [2, 3]), "repeats": (INT64, [2])})
    for repeats in ((1, 1), (3, 2), (0, 1)):
        tile.agree(data(2, 3), ints(*repeats))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=2), st.tuples(st.integers(1, 7), st.integers(1, 5)))
def test_slice_bounds(bounds: list[tuple[int, int]], shape: tuple[int, int]):
    pair = _sliced()
    pair.agree(data(*shape), ints(*(low for low, _ in bounds)), ints(*(high for _, high in bounds)))


@settings(deadline=None, max_examples=60)
@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(-2, 1), st.integers(-3, 3).filter(bool), st.tuples(st.integers(1, 7), st.integers(1, 5)))
def test_slice_axes_and_steps(low: int, high: int, axis: int, step: int, shape: tuple[int, int]):
    _stepped().agree(data(*shape), ints(low), ints(high), ints(axis), ints(step))


_PAIRS: dict[str, Pair] = {}


def _sliced() -> Pair:
    if "sliced" not in _PAIRS:
        _PAIRS["sliced"] = Pair("Slice", {"x": (FLOAT, ["n", "m"]), "starts": (INT64, [2]), "ends": (INT64, [2])})
    return _PAIRS["sliced"]


def _stepped() -> Pair:
    if "stepped" not in _PAIRS:
        names = ("starts", "ends", "axes", "steps")
        _PAIRS["stepped"] = Pair("Slice", {"x": (FLOAT, ["n", "m"]), **{name: (INT64, [1]) for name in names}})
    return _PAIRS["stepped"]


def test_slice_errors_name_the_node():
    with pytest.raises(TcompileError, match="y0|the_node"):
        _stepped().compiled(data(3, 4), ints(0), ints(2), ints(5), ints(1))
    with pytest.raises(TcompileError, match="divided by zero"):
        _stepped().compiled(data(3, 4), ints(0), ints(2), ints(0), ints(0))


@pytest.mark.sweep
@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
                                "ReduceLogSumExp"])  # fmt: skip
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduction_axes(op: str, keepdims: int):
    pair = Pair(op, {"x": (FLOAT, [3, "n", 5]), "axes": (INT64, [2])}, keepdims=keepdims)
    for axes in ((0, 1), (-1, 0), (1, 2)):
        pair.agree(data(3, 7, 5), ints(*axes))
    pair.agree(data(3, 1, 5), ints(1, 2))
    with pytest.raises(TcompileError):
        pair.compiled(data(3, 7, 5), ints(0, 3))


def test_squeeze_and_unsqueeze():
    unsqueeze = Pair("Unsqueeze", {"x": (FLOAT, [3, "n"]), "axes": (INT64, [2])})
    for axes in ((0, 1), (-1, 0), (1, 3), (3, 2)):
        unsqueeze.agree(data(3, 5), ints(*axes))
    squeeze = Pair("Squeeze", {"x": (FLOAT, [1, 3, 1, "n"]), "axes": (INT64, [1])})
    for axis in (0, 2, -2, -4):
        squeeze.agree(data(1, 3, 1, 5), ints(axis))
    with pytest.raises(TcompileError):
        squeeze.compiled(data(1, 3, 1, 5), ints(1))


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_pad_widths(mode: str):
    pair = Pair("Pad", {"x": (FLOAT, [3, "n"]), "pads": (INT64, [4])}, mode=mode)
    for widths in ((0, 0, 0, 0), (1, 2, 2, 1), (0, 3, 1, 0), (2, 0, 0, 4)):
        pair.agree(data(3, 5), ints(*widths))


def test_pad_crops_and_fills():
    pair = Pair("Pad", {"x": (FLOAT, [3, 7]), "pads": (INT64, [4]), "fill": (FLOAT, [])})
    for widths in ((-1, 2, 0, -3), (1, -2, -1, 1), (2, 1, 3, 4)):
        pair.agree(data(3, 7), ints(*widths), np.float32(2.5))


@pytest.mark.parametrize("largest", [0, 1])
def test_the_greatest_of_what_is_no_number(largest):
    """NaN is greater than all numbers, zeros are equal, and the first of equal ones comes first."""
    nan, inf = np.nan, np.inf
    rows = np.array([[1, nan, 3, 3, nan, -1, 0], [inf, -inf, 0.0, -0.0, 5, 5, 1], [nan, -nan, nan, 1, 2, 3, 4]], np.float32)
    Pair("TopK", {"x": (FLOAT, [3, 7]), "k": (INT64, [1])}, types=[FLOAT, INT64], largest=largest).agree(rows, ints(4))


def test_split_range_and_top_k():
    split = Pair("Split", {"x": (FLOAT, [2, "n"]), "split": (INT64, [2])}, types=[FLOAT, FLOAT], axis=1)
    for first in (0, 3, 7):
        split.agree(data(2, 7), ints(first, 7 - first))
    with pytest.raises(TcompileError):
        split.compiled(data(2, 7), ints(3, 3))
    top = Pair("TopK", {"x": (FLOAT, [3, "n"]), "k": (INT64, [1])}, types=[FLOAT, INT64])
    for count in (1, 4, 7):
        top.agree(data(3, 7), ints(count))
    with pytest.raises(TcompileError):
        top.compiled(data(3, 7), ints(8))
    numbers = Pair("Range", {"start": (FLOAT, []), "limit": (FLOAT, []), "delta": (FLOAT, [])})
    for start, limit, delta in ((0, 5, 1), (1, -2, -0.5), (3, 1, 1), (0.5, 10, 3)):
        numbers.agree(np.float32(start), np.float32(limit), np.float32(delta))


def test_triangle_and_running_sum():
    triangle = Pair("Trilu", {"x": (FLOAT, [2, 4, "n"]), "k": (INT64, [])}, upper=0)
    for offset in (-5, -1, 0, 2, 9):
        triangle.agree(data(2, 4, 6), np.int64(offset))
    running = Pair("CumSum", {"x": (FLOAT, [3, "n"]), "axis": (INT64, [])}, reverse=1, exclusive=1)
    for axis in (0, 1, -1, -2):
        running.agree(data(3, 5), np.int64(axis))


@pytest.mark.parametrize(
    ("op", "weight", "options", "least"),
    [
        ("Conv", (3, 2, 5, 5), {}, 4),
        ("ConvTranspose", (2, 3, 2, 2), {"pads": [3, 3, 3, 3]}, 5),
        ("AveragePool", None, {"kernel_shape": [5, 5], "strides": [3, 3]}, 2),
    ],
)
def test_an_image_smaller_than_the_window(op: str, weight: tuple[int, ...] | None, options: dict[str, Any], least: int):
    """A result of size 0 is one; a negative size names the node."""
    constants = {} if weight is None else {"w": np.ones(weight, "float32")}
    node = helper.make_node(op, ["x", *constants], ["y"], name="windows", **options)
    model = tcompile.compile(small([node], {"x": [1, 2, "h", "w"]}, ["y"], constants))
    assert 0 in model(data(1, 2, least, least)).shape and 0 not in model(data(1, 2, 9, 9)).shape
    with pytest.raises(TcompileError, match="node 'windows': its result would have a negative size"):
        model(data(1, 2, least - 1, 9))
