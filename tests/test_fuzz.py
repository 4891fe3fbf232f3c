"""The fuzzer's own parts: mutants follow from the seed, pieces are models of their own, finds are made smaller."""

from __future__ import annotations

from random import Random

import numpy as np
import onnx
import tcompile
from fuzz import run
from fuzz.mutate import mutate
from fuzz.networks import cut
from onnx import TensorProto, helper, numpy_helper
from onnx_models import small


def chain() -> onnx.ModelProto:
    scale = numpy_helper.from_array(np.array([2, 3], "float32"))
    nodes = [
        helper.make_node("Constant", [], ["scale"], value=scale),
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "scale"], ["b"]),
        helper.make_node("Add", ["b", "w"], ["c"]),
        helper.make_node("Sub", ["c", "a"], ["d"]),
        helper.make_node("Neg", ["d"], ["y"]),
    ]
    return small(nodes, {"x": [2]}, ["y"], {"w": np.array([10, 20], "float32")})


def test_pieces():
    model = onnx.shape_inference.infer_shapes(chain())
    part = cut(model, model.graph.node[2:4])
    assert [info.name for info in part.graph.input] == ["a"] and [info.name for info in part.graph.output] == ["c"]
    np.testing.assert_array_equal(tcompile.compile(part)(a=np.array([1, 1], "float32")), [12, 23])
    part = cut(model, model.graph.node[1:3])
    assert [info.name for info in part.graph.output] == ["a", "b"]  # a is also read outside


def test_mutants_follow_from_the_seed():
    content = chain().SerializeToString()
    mutants = [mutate(content, Random(seed), [content]) for seed in range(50)]
    assert mutants == [mutate(content, Random(seed), [content]) for seed in range(50)]
    assert len(set(mutants)) > 40


def test_finds_are_made_smaller(monkeypatch):
    """What is left of a model is what the fault needs."""

    def attempt(content: bytes, work: str) -> str:
        assert work == "inspect"
        model = onnx.ModelProto.FromString(content)
        if any(node.op_type == "Mul" for node in model.graph.node):
            raise ZeroDivisionError("the fault")
        return "inspected"

    monkeypatch.setattr(run, "attempt", attempt)
    found = run.Mutant(0, chain().SerializeToString(), "inspect")
    ((_, outcome),) = run.ends([found], 1, 60)
    assert outcome.fault == "raised ZeroDivisionError: the fault"
    rest = onnx.ModelProto.FromString(run.minimized(found, outcome.fault, 60)).graph
    assert [node.op_type for node in rest.node] == ["Mul"] and not rest.initializer and not rest.input


def test_an_attempt_ends_as_what_it_is():
    content = chain().SerializeToString()
    assert [run.attempt(content, work) for work in ("import", "run", "inspect")] == ["imported", "ran", "inspected"]
    refused = chain()
    refused.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    assert {run.attempt(refused.SerializeToString(), work) for work in ("import", "run", "inspect")} == {"refused"}
