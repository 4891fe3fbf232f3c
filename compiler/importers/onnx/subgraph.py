"""Subgraph: a graph in a node's attribute, ready to be walked any number of times with its inputs bound to values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx

from ...errors import Blocker
from .graphs import initializer_names, read_names, subgraphs
from .prepare import list_blockers, live_nodes
from .values import Poison, Refusal, Value


class Blocked(Exception):
    """Something inside of a subgraph was refused, and is on the list of blockers already."""


class Subgraph:
    """graph, outer: the graph, and the values that are visible around it.

    size: how many nodes one walk takes, inner graphs included. Raises Refusal where the graph gives an outer name another meaning, Blocked where an operator is unknown.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        outer: dict[str, Value],
        versions: dict[str, int],
        read: Callable[[onnx.TensorProto], Value],
        walk: Callable[[list[onnx.NodeProto], dict[str, Value]], None],
        blockers: list[Blocker],
    ):
        self.graph, self._walk, self._blockers = graph, walk, blockers
        self.inputs = [info.name for info in graph.input]
        own = initializer_names(graph) | set(self.inputs)
        shadowed = sorted((own | {name for node in graph.node for name in node.output}) & outer.keys() - {""})
        if shadowed:
            raise Refusal(f"'{shadowed[0]}' has one meaning inside of a subgraph and another around it")
        self._nodes = live_nodes(graph, set(outer) | own)
        found = list_blockers(self._nodes, versions)
        if found:
            blockers += found
            raise Blocked
        self.size = _size(self._nodes)
        wanted = {name for node in self._nodes for name in read_names(node)} | {info.name for info in graph.output}
        self._values = dict(outer) | {tensor.name: read(tensor) for tensor in graph.initializer if tensor.name in wanted}
        self._hoisted = False

    def __call__(self, inputs: Sequence[Value] = (), *, hoist: bool = False) -> list[Value]:
        """The values of the outputs. hoist: nodes that do not depend on the inputs are walked once for all calls; only for bodies that surely run.

        Raises Blocked where an output cannot be computed.
        """
        if len(inputs) != len(self.inputs):
            raise Refusal(f"a subgraph has {len(self.inputs)} inputs instead of {len(inputs)}")
        if hoist and not self._hoisted:
            self._hoist()
        values = self._values | dict(zip(self.inputs, inputs, strict=True))
        before = len(self._blockers)
        self._walk(self._nodes, values)
        results = [values[info.name] for info in self.graph.output]
        if len(self._blockers) > before or any(isinstance(result, Poison) for result in results):
            raise Blocked
        return results

    def _hoist(self) -> None:
        varying, fixed = set(self.inputs), []
        for node in self._nodes:
            if varying.isdisjoint(read_names(node)) and not node.op_type.startswith("Random"):
                fixed.append(node)
            else:
                varying.update(node.output)
        self._walk(fixed, self._values)
        self._nodes = [node for node in self._nodes if node not in fixed]
        self._hoisted = True


def _size(nodes: Sequence[onnx.NodeProto]) -> int:
    return sum(1 + sum(_size(graph.node) for graph in subgraphs(node)) for node in nodes)


def unavailable(graph: onnx.GraphProto) -> Subgraph:
    """For nodes that have no subgraphs."""
    raise Refusal("it has no subgraph")
