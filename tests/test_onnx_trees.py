"""Ensembles of decision trees against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tcompile
from onnx import TensorProto, helper
from tcompile.compiler.errors import UnsupportedModel

onnxruntime = pytest.importorskip("onnxruntime")

MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")


def random_forest(kind: str, targets: int, modes: tuple[str, ...], seed: int = 3) -> dict[str, Any]:
    """Attributes of five random trees over four features."""
    generator = np.random.default_rng(seed)
    nodes: dict[str, list[Any]] = {
        name: [] for name in ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids", "missing_value_tracks_true")
    }
    votes: dict[str, list[Any]] = {name: [] for name in ("treeids", "nodeids", "ids", "weights")}

    def grow(tree: int, depth: int, counter: list[int]) -> int:
        name = counter[0]
        counter[0] += 1
        place = len(nodes["nodeids"])
        leaf = depth == 0 or (depth < 2 and generator.random() < 0.3)
        mode = "LEAF" if leaf else modes[generator.integers(len(modes))]
        row = (tree, name, int(generator.integers(4)), float(generator.integers(-2, 3)), mode, 0, 0, int(generator.integers(2)))
        for column, value in zip(nodes.values(), row, strict=True):
            column.append(value)
        if leaf:
            for target in range(targets):
                for column, value in zip(votes.values(), (tree, name, target, float(generator.standard_normal())), strict=True):
                    column.append(value)
        else:
            nodes["truenodeids"][place], nodes["falsenodeids"][place] = (grow(tree, depth - 1, counter) for _ in range(2))
        return name

    for tree in range(5):
        grow(tree, 3, [0])
    return {f"nodes_{name}": column for name, column in nodes.items()} | {f"{kind}_{name}": column for name, column in votes.items()}


def build(op: str, outputs: list[int], **attributes: Any) -> Any:
    names = [f"y{index}" for index in range(len(outputs))]
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], names, domain="ai.onnx.ml", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, outputs, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=8)


def pair(op: str, outputs: list[int], **attributes: Any) -> tuple[Any, Any]:
    model = build(op, outputs, **attributes)
    return tcompile.compile(model), onnxruntime.InferenceSession(model.SerializeToString())


def rows(count: int) -> np.ndarray:
    x = np.random.default_rng(7).integers(-3, 4, (count, 4)).astype(np.float32)
    x[::5, 1] = np.nan
    return x


@pytest.mark.sweep
@pytest.mark.parametrize("function", ["AVERAGE", "MIN", "MAX"])
def test_regressors(function: str):
    attributes = random_forest("target", 2, MODES[:2])
    compiled, session = pair("TreeEnsembleRegressor", [1], n_targets=2, aggregate_function=function, base_values=[0.5, -0.25], **attributes)
    for count in (1, 37):
        np.testing.assert_allclose(compiled(rows(count)), session.run(None, {"x": rows(count)})[0], rtol=1e-5, atol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", MODES)
def test_each_way_to_branch(mode: str):
    attributes = random_forest("target", 1, (mode,))
    compiled, session = pair("TreeEnsembleRegressor", [1], n_targets=1, **attributes)
    np.testing.assert_allclose(compiled(rows(37)), session.run(None, {"x": rows(37)})[0], rtol=1e-5, atol=1e-6)


def test_classifiers_of_three_classes():
    attributes = random_forest("class", 3, MODES[:1])
    compiled, session = pair("TreeEnsembleClassifier", [7, 1], classlabels_int64s=[7, 5, 9], post_transform="SOFTMAX", **attributes)
    labels, scores = compiled(rows(37))
    wanted = session.run(None, {"x": rows(37)})
    np.testing.assert_array_equal(labels, wanted[0])
    np.testing.assert_allclose(scores, wanted[1], rtol=1e-5, atol=1e-6)


def test_trees_with_a_cycle_are_refused():
    attributes = random_forest("target", 1, MODES[:1])
    attributes["nodes_truenodeids"][0] = 0
    with pytest.raises(UnsupportedModel, match="levels"):
        tcompile.compile(build("TreeEnsembleRegressor", [1], n_targets=1, **attributes))
