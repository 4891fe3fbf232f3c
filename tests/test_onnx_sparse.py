"""Sparse initializers and constants: they are the dense tensors that they stand for, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper
from onnx_models import small
from tcompile.compiler.api import import_model
from tcompile.compiler.importers.onnx.sparse import dense


def sparse(values: Any, indices: Any, dims: list[int], dtype: str = "float32", index_dtype: str = "int64") -> SparseTensorProto:
    tensors = numpy_helper.from_array(np.array(values, dtype), "w"), numpy_helper.from_array(np.array(indices, index_dtype), "places")
    return SparseTensorProto(values=tensors[0], indices=tensors[1], dims=dims)


def initialized(tensor: SparseTensorProto) -> ModelProto:
    """x + w"""
    model = small([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [2, 3]}, ["y"])
    model.graph.sparse_initializer.append(tensor)
    return model


def held(tensor: SparseTensorProto) -> ModelProto:
    """The same with a Constant node, inside of a branch and of a function."""
    constant = helper.make_node("Constant", [], ["w"], sparse_value=tensor)
    nodes = [constant, helper.make_node("Add", ["a", "w"], ["b"])]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    branch = helper.make_graph([helper.make_node("f", ["x"], ["t"], domain="local")], "branch", [], [helper.make_empty_tensor_value_info("t")])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model = small([choice], {"x": [2, 3]}, ["y"], {"c": np.array(True)})
    model.opset_import.append(imports[1])
    model.functions.append(helper.make_function("local", "f", ["a"], ["b"], nodes, imports))
    return model


@pytest.mark.parametrize("make", [initialized, held])
@pytest.mark.parametrize("places", [[1, 5], [[0, 1], [1, 2]]], ids=["flat", "rows"])
def test_sparse_tensors_are_dense_ones(make, places):
    x = np.arange(6, dtype="float32").reshape(2, 3)
    compiled = tcompile.compile(make(sparse([7, 8], places, [2, 3])))
    np.testing.assert_array_equal(compiled(x=x), x + np.array([[0, 7, 0], [0, 0, 8]], "float32"))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_place(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    array = np.array(data.draw(st.lists(st.integers(-1, 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), "int8").reshape(shape)
    flat = np.flatnonzero(array)
    rows = np.argwhere(array)
    for places in [flat, *([rows] if shape else [])]:
        np.testing.assert_array_equal(dense(sparse(array[array != 0], places, shape, "int8"), None), array)


@pytest.mark.parametrize("make", [initialized, held])
@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (sparse([7, 8], [1, 6], [2, 3]), "outside"),
        (sparse([7, 8], [-1, 5], [2, 3]), "outside"),
        (sparse([7, 8], [[0, 1], [1, 3]], [2, 3]), "outside"),
        (sparse([7, 8], [[0, 1], [1, -1]], [2, 3]), "outside"),
        (sparse([7, 8], [5, 1], [2, 3]), "ascend"),
        (sparse([7, 8], [1, 1], [2, 3]), "ascend"),
        (sparse([7, 8], [1], [2, 3]), "malformed"),
        (sparse([7, 8], [[1], [2]], [2, 3]), "malformed"),
        (sparse([[7, 8]], [1, 5], [2, 3]), "malformed"),
        (sparse([7, 8], [1, 5], [2, 3], index_dtype="int32"), "malformed"),
        (sparse([7, 8], [[], []], []), "ascend"),
        (sparse([7, 8], [1, 5], [2, -3]), "cannot exist"),
        (sparse([7, 8], [1, 5], [1 << 40, 1 << 40]), "at most"),
        (sparse([7, 8], [1, 5], [1 << 20, 1 << 10]), "more than"),
        (SparseTensorProto(values=TensorProto(name="w", data_type=99), dims=[2, 3]), "element type"),
        (SparseTensorProto(), "element type"),
    ],
)
def test_malformed_ones_are_refused(make, tensor, word):
    with pytest.raises(tcompile.UnsupportedModel, match=word):
        import_model(make(tensor))


def test_many_together_are_bounded():
    model = initialized(sparse([7], [1], [1 << 25]))
    for at in range(3):
        tensor = sparse([7], [1], [1 << 25])
        tensor.values.name = f"w{at}"
        model.graph.sparse_initializer.append(tensor)
    with pytest.raises(tcompile.UnsupportedModel, match="more than"):
        import_model(model)


def test_the_model_is_left_as_it_was():
    model = initialized(sparse([7, 8], [1, 5], [2, 3]))
    before = model.SerializeToString(deterministic=True)
    import_model(model)
    assert model.SerializeToString(deterministic=True) == before
