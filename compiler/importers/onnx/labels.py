"""Names for the nodes of inlined bodies: messages and tables show the node that stands in the file."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from .graphs import nested_nodes, subgraphs
from .node import node_label


def label_bodies(before: onnx.ModelProto, after: onnx.ModelProto, inlined: Callable[[onnx.NodeProto], bool], *, detailed: bool) -> None:
    """Name the nodes of `after` that came in the place of nodes of `before`, for which `inlined` holds, after these. detailed: with their own name or operator behind it.

    The nodes behind a call are those that its outputs need, up to values that had a name before.
    """
    calls = [node for node in nested_nodes(before.graph.node) if inlined(node)]
    if not calls:
        return
    known = {name for node in nested_nodes(before.graph.node) for name in node.output}
    makers = {name: node for node in nested_nodes(after.graph.node) for name in node.output if name}
    done: set[int] = set()
    for call in calls:
        waiting = [makers[name] for name in call.output if name in makers]
        while waiting:
            node = waiting.pop()
            if id(node) in done:
                continue
            done.add(id(node))
            node.name = f"{node_label(call)}/{node.name or node.op_type}" if detailed else node_label(call)
            waiting += [makers[name] for name in node.input if name in makers and name not in known]
            waiting += [inner for graph in subgraphs(node) for inner in graph.node]
