"""Operators whose results are as long as the data say, against numpy and onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx_models import one_node
from tcompile.compiler.errors import TcompileError
from tcompile.compiler.program import DimRange

INT64, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL


def sparse(*shape: int, seed: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) * (generator.random(shape) > 0.5)).astype(np.float32)


def test_non_zero_of_dynamic_shapes():
    compiled = tcompile.compile(one_node("NonZero", {"x": (FLOAT, ["a", 3, "b"])}, [INT64]), shapes={"x": (DimRange(0), 3, DimRange(0))})
    for shape in ((2, 3, 5), (1, 3, 1), (0, 3, 2), (7, 3, 0), (13, 3, 11)):
        x = sparse(*shape)
        np.testing.assert_array_equal(compiled(x), np.stack(np.nonzero(x)))
    for x in (np.zeros((2, 3, 1), np.float32), np.full((2, 3, 1), np.nan, np.float32)):
        np.testing.assert_array_equal(compiled(x), np.stack(np.nonzero(x)))


def test_non_zero_of_vectors_and_scalars():
    vector = tcompile.compile(one_node("NonZero", {"x": (BOOL, ["n"])}, [INT64]), shapes={"x": (DimRange(0),)})
    for x in (np.array([True, False, True]), np.zeros(0, bool), np.zeros(5, bool)):
        np.testing.assert_array_equal(vector(x), np.stack(np.nonzero(x)))
    scalar = tcompile.compile(one_node("NonZero", {"x": (INT64, [])}, [INT64]))
    assert scalar(np.int64(3)).shape == (0, 1)
    assert scalar(np.int64(0)).shape == (0, 0)


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_compress(axis: int | None):
    options = {} if axis is None else {"axis": axis}
    compiled = tcompile.compile(one_node("Compress", {"x": (FLOAT, [5, 3]), "c": (BOOL, ["n"])}, [FLOAT], **options), shapes={"c": (DimRange(0),)})
    x = sparse(5, 3)
    for condition in ([True, False, True], [False], [], [False, True]):
        np.testing.assert_array_equal(compiled(x, np.array(condition, bool)), np.compress(np.array(condition, bool), x, axis))
    with pytest.raises(TcompileError, match="the_node"):
        compiled(x, np.ones(16, bool))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=40), st.booleans())
def test_unique_elements(values: list[int], ordered: bool):
    compiled = _unique_elements(ordered)
    x = np.array(values, np.int64)
    found = compiled(x)
    y, first, group, count = np.unique(x, return_index=True, return_inverse=True, return_counts=True)
    order = np.arange(len(first)) if ordered else np.argsort(first)
    wanted = (y[order], first[order], np.argsort(order)[group] if len(x) else group, count[order])
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(have, want)


_COMPILED: dict[bool, Any] = {}


def _unique_elements(ordered: bool) -> Any:
    if ordered not in _COMPILED:
        _COMPILED[ordered] = tcompile.compile(
            one_node("Unique", {"x": (INT64, ["n"])}, [INT64] * 4, sorted=int(ordered)), shapes={"x": (DimRange(0),)}
        )
    return _COMPILED[ordered]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_unique_slices(axis: int):
    compiled = tcompile.compile(one_node("Unique", {"x": (FLOAT, [7, 5, 2])}, [FLOAT, INT64, INT64, INT64], axis=axis))
    x = np.random.default_rng(5).integers(0, 2, (7, 5, 2)).astype(np.float32)
    y, first, group, count = np.unique(x, return_index=True, return_inverse=True, return_counts=True, axis=axis)
    for have, want in zip(compiled(x), (y, first, group.reshape(-1), count), strict=True):
        np.testing.assert_array_equal(have, want)


def test_unique_takes_nan_as_one_value_behind_all_others():
    compiled = tcompile.compile(one_node("Unique", {"x": (FLOAT, [6])}, [FLOAT, INT64, INT64, INT64]))
    y, first, group, count = compiled(np.array([np.nan, 2, np.inf, np.nan, -1, 2], np.float32))
    np.testing.assert_array_equal(y, np.array([-1, 2, np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(first, [4, 1, 2, 0])
    np.testing.assert_array_equal(group, [3, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(count, [1, 2, 1, 2])


@pytest.mark.parametrize("centred", [0, 1])
def test_non_max_suppression(centred: int):
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = {"boxes": (FLOAT, [2, "n", 4]), "scores": (FLOAT, [2, 3, "n"]), "most": (INT64, [1]), "iou": (FLOAT, [1]), "score": (FLOAT, [1])}
    graph = one_node("NonMaxSuppression", inputs, [INT64], center_point_box=centred)
    sizes = {"boxes": (2, DimRange(0), 4), "scores": (2, 3, DimRange(0))}
    compiled, session = tcompile.compile(graph, shapes=sizes), onnxruntime.InferenceSession(graph.SerializeToString())
    generator = np.random.default_rng(11)
    for count, most, overlap, least in (
        (37, 5, 0.4, 0.2),
        (37, 100, 0.0, -1.0),
        (1, 3, 0.5, 0.0),
        (0, 3, 0.5, 0.0),
        (23, 0, 0.5, 0.0),
        (23, 7, 1.0, 0.9),
    ):
        boxes = generator.random((2, count, 4), dtype=np.float32)
        scores = np.round(generator.random((2, 3, count), dtype=np.float32), 1)  # with equal ones
        values = (boxes, scores, np.array([most]), np.array([overlap], np.float32), np.array([least], np.float32))
        np.testing.assert_array_equal(compiled(*values), session.run(None, dict(zip(inputs, values, strict=True)))[0])


def test_non_max_suppression_chooses_nothing_by_default():
    compiled = tcompile.compile(one_node("NonMaxSuppression", {"boxes": (FLOAT, [1, 3, 4]), "scores": (FLOAT, [1, 1, 3])}, [INT64]))
    assert compiled(np.ones((1, 3, 4), np.float32), np.ones((1, 1, 3), np.float32)).shape == (0, 3)
