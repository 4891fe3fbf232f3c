"""Graphs inside of one another: what nodes hold, and what they read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx


def initializer_names(graph: onnx.GraphProto) -> set[str]:
    return {tensor.name for tensor in graph.initializer}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def nested_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, with those of all their branches."""
    for node in nodes:
        yield node
        for inner in subgraphs(node):
            yield from nested_nodes(inner.node)


def read_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names a node reads, with those its subgraphs take from around them."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        inside = (
            {tensor.name for tensor in graph.initializer}
            | {info.name for info in graph.input}
            | {name for inner in graph.node for name in inner.output}
        )
        captured = [name for inner in graph.node for name in read_names(inner)] + [output.name for output in graph.output]
        yield from (name for name in captured if name not in inside)
