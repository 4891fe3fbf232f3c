"""Ensembles of decision trees: all trees go down one level at a time, as gathers from tables of nodes.

Leaves are nodes that lead to themselves, so every tree takes as many steps as the deepest one has levels. A test for membership of a set becomes a chain of tests for
equality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....tvm import relax
from ..load import read_tensor
from ..node import Node
from ..registry import converter
from ..values import Refusal

DOMAIN = "ai.onnx.ml"

_MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "MEMBER")
_COMPARE = {
    "BRANCH_LEQ": relax.op.less_equal,
    "BRANCH_LT": relax.op.less,
    "BRANCH_GTE": relax.op.greater_equal,
    "BRANCH_GT": relax.op.greater,
    "BRANCH_EQ": relax.op.equal,
}
#: levels of a tree, each of which is a few kernels
_DEEPEST = 64


@dataclass
class _Forest:
    """Tables with one entry per node, inner ones and leaves; votes: (node, target, weight)."""

    targets: int
    roots: list[int] = field(default_factory=list)
    mode: list[str] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)
    split: list[float] = field(default_factory=list)
    missing: list[bool] = field(default_factory=list)
    children: list[tuple[int, int]] = field(default_factory=list)
    votes: list[tuple[int, int, float]] = field(default_factory=list)

    def leaf(self) -> int:
        """A new leaf."""
        place = self.add("LEAF", 0, 0.0, False)
        self.children[place] = (place, place)
        return place

    def add(self, mode: str, feature: int, split: float, missing: bool) -> int:
        """A new inner node whose children are to be set."""
        for column, value in zip(
            (self.mode, self.feature, self.split, self.missing, self.children), (mode, feature, split, missing, (0, 0)), strict=True
        ):
            column.append(value)  # pyright: ignore[reportArgumentType]
        return len(self.mode) - 1

    def branch(self, place: int, yes: int, no: int) -> None:
        """Set the children of an inner node. Unequal is not equal, with the children exchanged; NaN is unequal to all."""
        if self.mode[place] == "BRANCH_NEQ":
            self.mode[place], self.missing[place], yes, no = "BRANCH_EQ", False, no, yes
        self.children[place] = (yes, no)

    def depth(self) -> int:
        """Levels below the roots; refuses cycles and trees that are too deep."""
        level, now = 0, set(self.roots)
        while any(self.mode[place] != "LEAF" for place in now):
            now = {child for place in now for child in self.children[place]}
            level += 1
            if level > _DEEPEST:
                raise Refusal(f"a tree has more than {_DEEPEST} levels, or is none")
        return level


@converter("TreeEnsemble", domain=DOMAIN, since=5)
def tree_ensemble(node: Node) -> relax.Expr:
    """x [N, F] -> [N, targets]"""
    forest = _Forest(node.attr("n_targets"))
    modes = [_MODES[int(mode)] for mode in _numbers(node, "nodes_modes")]
    splits, weights = _numbers(node, "nodes_splits"), _numbers(node, "leaf_weights")
    members = iter(_numbers(node, "membership_values"))
    features, missing = node.attr("nodes_featureids"), node.attr("nodes_missing_value_tracks_true") or [0] * len(modes)
    targets = node.attr("leaf_targetids")
    branches = [(node.attr(f"nodes_{side}nodeids"), node.attr(f"nodes_{side}leafs")) for side in ("true", "false")]
    made: dict[tuple[int, int], int] = {}

    def make(index: int, leaf: int) -> int:
        """The node and all below it, the true side first: the order of the sets of members."""
        if (index, leaf) in made:
            return made[index, leaf]
        if leaf:
            place = forest.leaf()
            forest.votes.append((place, targets[index], weights[index]))
        elif modes[index] == "MEMBER":
            values = []
            while not math.isnan(value := next(members, math.nan)):
                values.append(value)
            chain = [forest.add("BRANCH_EQ", features[index], value, bool(missing[index])) for value in values]
            yes, no = (make(ids[index], leaves[index]) for ids, leaves in branches)
            for this, following in zip(chain, [*chain[1:], no], strict=True):
                forest.branch(this, yes, following)
            place = chain[0] if chain else no
        else:
            place = forest.add(modes[index], features[index], splits[index], bool(missing[index]))
            forest.branch(place, *(make(ids[index], leaves[index]) for ids, leaves in branches))
        made[index, leaf] = place
        return place

    try:
        for root in node.attr("tree_roots"):
            (yes, yes_leaf), (no, no_leaf) = ((ids[root], leaves[root]) for ids, leaves in branches)
            single = bool(yes_leaf and no_leaf and yes == no)
            forest.roots.append(make(yes if single else root, int(single)))
    except (IndexError, RecursionError):
        raise Refusal("the tables of nodes and leaves do not make trees") from None
    function = ("AVERAGE", "SUM", "MIN", "MAX")[node.attr("aggregate_function", 1)]
    transform = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")[node.attr("post_transform", 0)]
    return _transformed(node, _votes(node, forest, function, None), transform)


@converter("TreeEnsembleRegressor", domain=DOMAIN)
def tree_ensemble_regressor(node: Node) -> relax.Expr:
    forest = _older_forest(node, "target", node.attr("n_targets") or 1)
    total = _votes(node, forest, node.attr("aggregate_function", "SUM"), _numbers(node, "base_values"))
    result = _transformed(node, total, node.attr("post_transform", "NONE"))
    return result if node.dtype(result) == "float32" else relax.op.astype(result, "float32")


@converter("TreeEnsembleClassifier", domain=DOMAIN)
def tree_ensemble_classifier(node: Node) -> tuple[relax.Expr, ...]:
    """The best label of each row, and the scores of all labels."""
    labels = node.attr("classlabels_int64s")
    if not labels:
        raise Refusal("class labels that are strings are not supported")
    if len(labels) < 2 or (len(labels) == 2 and len(set(node.attr("class_ids"))) == 1):
        raise Refusal("two classes that share one score are not supported")
    total = _votes(node, _older_forest(node, "class", len(labels)), "SUM", _numbers(node, "base_values"))
    best = node.emit(relax.op.argmax(total, 1))
    scores = _transformed(node, total, node.attr("post_transform", "NONE"))
    scores = scores if node.dtype(scores) == "float32" else node.emit(relax.op.astype(scores, "float32"))
    return relax.op.take(node.array(np.array(labels), "int64"), best, 0, mode="fast"), scores


def _numbers(node: Node, name: str) -> list[float]:
    """An attribute that is a list, or a tensor of that name or `name`_as_tensor."""
    value = node.attr(name)
    value = node.attr(f"{name}_as_tensor") if value is None or (isinstance(value, list) and not value) else value
    return [] if value is None else list(value) if isinstance(value, list) else read_tensor(value, None).array.reshape(-1).tolist()


def _older_forest(node: Node, kind: str, targets: int) -> _Forest:
    """The tables of the older operators, where leaves stand among the nodes and have any number of votes."""
    forest = _Forest(targets)
    modes = [mode.decode() if isinstance(mode, bytes) else mode for mode in node.attr("nodes_modes")]
    unknown = set(modes) - {*_COMPARE, "BRANCH_NEQ", "LEAF"}
    if unknown:
        raise Refusal(f"nodes of mode {sorted(unknown)[0]}")
    trees, ids, features, values = (
        node.attr("nodes_treeids"),
        node.attr("nodes_nodeids"),
        node.attr("nodes_featureids"),
        _numbers(node, "nodes_values"),
    )
    missing = node.attr("nodes_missing_value_tracks_true") or [0] * len(modes)
    place: dict[tuple[int, int], int] = {}
    for tree, name, mode, feature, value, tracks in zip(trees, ids, modes, features, values, missing, strict=True):
        place[tree, name] = forest.leaf() if mode == "LEAF" else forest.add(mode, feature, value, bool(tracks))
    try:
        for tree, name, mode, yes, no in zip(trees, ids, modes, node.attr("nodes_truenodeids"), node.attr("nodes_falsenodeids"), strict=True):
            if mode != "LEAF":
                forest.branch(place[tree, name], place[tree, yes], place[tree, no])
        forest.roots = [place[tree, 0] for tree in dict.fromkeys(trees)]
        votes = zip(
            node.attr(f"{kind}_treeids"), node.attr(f"{kind}_nodeids"), node.attr(f"{kind}_ids"), _numbers(node, f"{kind}_weights"), strict=True
        )
        forest.votes = [(place[tree, name], target, weight) for tree, name, target, weight in votes]
    except KeyError as error:
        raise Refusal(f"there is no node {error} (tree, number)") from None
    return forest


def _votes(node: Node, forest: _Forest, function: str, base: Sequence[float] | None) -> relax.Expr:
    """[N, targets]: what the leaves that a row reaches give to each target, joined over the trees; 0 for a target without votes."""
    x = node.tensor(0)
    x = node.reshape(x, [1, *node.shape(x)]) if node.rank(x) == 1 else x
    dtype = node.dtype(x) if node.dtype(x) in ("float32", "float64") else "float32"
    x = x if node.dtype(x) == dtype else node.emit(relax.op.astype(x, dtype))
    if not forest.roots or any(not 0 <= target < forest.targets for _, target, _ in forest.votes):
        raise Refusal("there is no tree, or a vote for a target that there is not")
    identity = {"SUM": 0.0, "AVERAGE": 0.0, "MIN": math.inf, "MAX": -math.inf}[function]
    table = np.full((len(forest.mode), forest.targets), identity)
    join: Callable[[float, float], float] = {"MIN": min, "MAX": max}.get(function, lambda left, right: left + right)
    for place, target, weight in forest.votes:
        table[place, target] = join(table[place, target], weight)
    given = node.emit(relax.op.take(node.array(table, dtype), _reached(node, forest, x, dtype), 0, mode="fast"))
    if function in ("MIN", "MAX"):
        total = node.emit((relax.op.min if function == "MIN" else relax.op.max)(given, 1))
        voted = np.isin(np.arange(forest.targets), [target for _, target, _ in forest.votes])
        nobody = node.emit(relax.op.equal(total, node.scalar(identity, dtype)))
        total = node.emit(relax.op.where(nobody, node.scalar(0, dtype), total)) if not voted.all() or len(forest.mode) > 1 else total
    else:
        total = node.emit(relax.op.sum(given, 1))
    if function == "AVERAGE":
        total = node.emit(relax.op.divide(total, node.scalar(len(forest.roots), dtype)))
    return node.emit(relax.op.add(total, node.array(np.asarray(base), dtype))) if base else total


def _reached(node: Node, forest: _Forest, x: relax.Expr, dtype: str) -> relax.Expr:
    """[N, trees]: the leaf that each row reaches in each tree."""
    op, emit = relax.op, node.emit
    place: Any = emit(op.broadcast_to(node.array(np.array([forest.roots]), "int64"), [node.shape(x)[0], len(forest.roots)]))
    tables = {
        "feature": node.array(np.array(forest.feature), "int64"),
        "split": node.array(np.array(forest.split), dtype),
        "yes": node.array(np.array([yes for yes, _ in forest.children]), "int64"),
        "no": node.array(np.array([no for _, no in forest.children]), "int64"),
    }
    used = [mode for mode in _COMPARE if mode in forest.mode]
    modes = node.array(np.array([used.index(mode) if mode in used else 0 for mode in forest.mode]), "int32")
    missing = node.array(np.array(forest.missing), "int8")

    def at(table: relax.Expr) -> relax.Expr:
        return emit(op.take(table, place, 0, mode="fast"))

    for _ in range(forest.depth()):
        value, split = emit(op.gather_elements(x, at(tables["feature"]), 1)), at(tables["split"])
        holds = emit(_COMPARE[used[0]](value, split))
        for number, mode in enumerate(used[1:], 1):
            this = emit(op.equal(at(modes), node.scalar(number, "int32")))
            holds = emit(op.where(this, emit(_COMPARE[mode](value, split)), holds))
        if any(forest.missing):
            lost = emit(op.logical_and(emit(op.isnan(value)), emit(op.equal(at(missing), node.scalar(1, "int8")))))
            holds = emit(op.logical_or(holds, lost))
        place = emit(op.where(holds, at(tables["yes"]), at(tables["no"])))
    return place


def _transformed(node: Node, scores: relax.Expr, transform: str) -> relax.Expr:
    if transform == "NONE":
        return scores
    if transform == "SOFTMAX":
        return node.emit(relax.op.nn.softmax(scores, 1))
    if transform == "LOGISTIC":
        return node.emit(relax.op.sigmoid(scores))
    raise Refusal(f"post_transform {transform} is not supported")
