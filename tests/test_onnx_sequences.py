"""ONNX sequences and optionals inside of a graph, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto, helper
from onnx_models import small
from tcompile.compiler.errors import UnsupportedModel
from tcompile.compiler.importers.onnx import import_onnx

RNG = np.random.default_rng(3)
node = helper.make_node


def against_onnxruntime(model, *feeds: np.ndarray) -> None:
    names = [info.name for info in model.graph.input]
    expected = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, dict(zip(names, feeds, strict=True))
    )
    found = tcompile.compile(model)(*feeds)
    for want, have in zip(expected, found if isinstance(found, tuple) else (found,), strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_allclose(have, want, 1e-5, 1e-6)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def constants(**values: object) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.int64) for name, value in values.items()}


def test_insert_erase_at_and_length():
    nodes = [
        node("SequenceEmpty", [], ["empty"]),
        node("SequenceInsert", ["empty", "a"], ["one"]),
        node("SequenceInsert", ["one", "b", "zero"], ["two"]),
        node("SequenceInsert", ["two", "a", "minus"], ["three"]),
        node("SequenceInsert", ["three", "b", "end"], ["four"]),
        node("SequenceErase", ["four", "two_"], ["left"]),
        node("SequenceErase", ["left"], ["least"]),
        node("SequenceLength", ["left"], ["length"]),
        node("SequenceAt", ["least", "minus"], ["last"]),
        node("ConcatFromSequence", ["left"], ["joined"], axis=-1),
        node("Mul", ["last", "last"], ["squared"]),
    ]
    model = small(
        nodes,
        {"a": [3, 2], "b": [3, 5]},
        ["joined", "squared", ("length", TensorProto.INT64)],
        constants(zero=0, minus=-1, end=3, two_=2),
    )
    against_onnxruntime(model, floats(3, 2), floats(3, 5))


@pytest.mark.parametrize(
    ("split", "attributes"),
    [(None, {"axis": 1}), (None, {"axis": -1, "keepdims": 0}), (2, {"axis": 1}), (3, {"axis": 1}), ([1, 4, 0], {"axis": 1})],
)
@pytest.mark.parametrize("new_axis", [0, 1])
def test_split_and_join(split, attributes, new_axis):
    if new_axis and split is not None:
        pytest.skip("parts of different lengths cannot be stacked")
    nodes = [
        node("SplitToSequence", ["x"] + (["split"] if split is not None else []), ["parts"], **attributes),
        node("ConcatFromSequence", ["parts"], ["y"], axis=-1 if new_axis or "keepdims" not in attributes or split else 0, new_axis=new_axis),
        node("SequenceAt", ["parts", "first"], ["head"]),
    ]
    against_onnxruntime(small(nodes, {"x": [3, 5]}, ["y", "head"], constants(first=0, **({} if split is None else {"split": split}))), floats(3, 5))


def test_an_optional_is_its_element():
    nodes = [
        node("Optional", ["x"], ["maybe"]),
        node("OptionalHasElement", ["maybe"], ["has"]),
        node("OptionalGetElement", ["maybe"], ["value"]),
        node("Neg", ["value"], ["y"]),
    ]
    against_onnxruntime(small(nodes, {"x": [3]}, ["y", ("has", TensorProto.BOOL)]), floats(3))


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("SequenceConstruct", ["x", "x"], ["s"]), node("SequenceAt", ["s", "i"], ["y"])], "position 2 is outside of a sequence of 2"),
        ([node("SequenceConstruct", ["x"], ["s"]), node("Abs", ["s"], ["y"])], "a sequence cannot be used as a tensor"),
        ([node("SequenceConstruct", ["x"], ["y"])], "a sequence cannot be used as a tensor"),
        ([node("SequenceEmpty", [], ["s"]), node("SequenceErase", ["s"], ["t"]), node("SequenceAt", ["t", "i"], ["y"])], "an empty sequence"),
        ([node("SequenceEmpty", [], ["s"]), node("ConcatFromSequence", ["s"], ["y"], axis=0)], "an empty sequence"),
        (
            [
                node("SplitToSequence", ["x", "i"], ["s"], axis=0),
                node("Cast", ["x"], ["at"], to=TensorProto.INT64),
                node("SequenceAt", ["s", "at"], ["y"]),
            ],
            "run time",
        ),
        ([node("SequenceAt", ["x", "i"], ["y"])], "operand 0 is of type float32"),
    ],
)
def test_what_cannot_be_taken_is_named(nodes, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        import_onnx(small(nodes, {"x": [3]}, ["y"], constants(i=2)))
