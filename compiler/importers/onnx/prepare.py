"""What happens to the graph before it is walked: versions are checked, functions inlined, nodes put in order, blockers listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference

from ...errors import Blocker, UnsupportedModel
from .node import node_label
from .registry import find_converter, oldest_opset

OLDEST_OPSET = 7


def standard(domain: str) -> str:
    """The domain, "" for both spellings of the standard one."""
    return "" if domain == "ai.onnx" else domain


def opset_versions(model: onnx.ModelProto) -> dict[str, int]:
    """Domain -> opset. Raises UnsupportedModel for a standard opset that is too old, or newer than the installed onnx."""
    versions = {standard(entry.domain): entry.version for entry in model.opset_import}
    opset, newest = versions.get("", OLDEST_OPSET), onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise UnsupportedModel(
            f"the model is of ONNX opset {opset}; {OLDEST_OPSET}..{newest} are supported: export it anew, or use onnx.version_converter"
        )
    if opset > newest:
        raise UnsupportedModel(
            f"the model is of ONNX opset {opset}, newer than the {newest} that onnx {onnx.__version__} knows: install a newer onnx"
        )
    return versions


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Model-local functions, and standard operators that have no converter but a body in ONNX's own definition, replaced by their bodies."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    versions = opset_versions(model)
    done: set[tuple[str, str]] = set()
    while True:
        wanted = {key for node in _all_nodes(model.graph) if (key := _function_to_inline(node, versions)) is not None} - done
        if not wanted:
            return model
        done |= wanted
        model = onnx.inliner.inline_selected_functions(onnx.shape_inference.infer_shapes(model), sorted(wanted), inline_schema_functions=True)


def list_blockers(nodes: Iterable[onnx.NodeProto], versions: dict[str, int]) -> list[Blocker]:
    """Why nodes cannot be taken, as far as it shows without walking: unknown operators, versions and attributes."""
    found = []
    for node in nodes:
        domain = standard(node.domain)
        reason = _blocking_reason(node, domain, versions)
        if reason:
            found.append(Blocker(node_label(node), f"{domain or 'ai.onnx'}::{node.op_type}", reason))
    return found


def live_nodes(graph: onnx.GraphProto, known: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, each after those it reads. known: names defined outside of the nodes.

    Raises UnsupportedModel for cycles, names nobody defines, and names defined twice.
    """
    maker: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in maker or name in known:
                raise UnsupportedModel([Blocker(node_label(node), node.op_type, f"it defines '{name}', which is defined already")])
            maker[name] = index
    order: list[onnx.NodeProto] = []
    state: dict[int, bool] = {}  # False while the node's inputs are being visited, True when it is placed
    for output in graph.output:
        if output.name not in maker:
            if output.name not in known:
                raise UnsupportedModel(f"graph output '{output.name}' is not computed by any node")
            continue
        stack = [maker[output.name]]
        while stack:
            index = stack[-1]
            node = graph.node[index]
            if state.get(index) is None:
                state[index] = False
                for name in _read_names(node):
                    if name in maker and state.get(maker[name]) is None:
                        stack.append(maker[name])
                    elif name in maker and state[maker[name]] is False:
                        raise UnsupportedModel(
                            [Blocker(node_label(node), node.op_type, f"its input '{name}' depends on its own output: the graph has a cycle")]
                        )
                    elif name not in maker and name not in known:
                        raise UnsupportedModel([Blocker(node_label(node), node.op_type, f"its input '{name}' is not defined anywhere")])
            else:
                stack.pop()
                if not state[index]:
                    state[index] = True
                    order.append(node)
    return order


def _function_to_inline(node: onnx.NodeProto, versions: dict[str, int]) -> tuple[str, str] | None:
    domain = standard(node.domain)
    if domain not in versions or find_converter(domain, node.op_type, versions[domain]) is not None:
        return None
    schema = _schema(node.op_type, versions[domain], domain)
    return (node.domain, node.op_type) if schema is not None and (schema.has_function or schema.has_context_dependent_function) else None


def _blocking_reason(node: onnx.NodeProto, domain: str, versions: dict[str, int]) -> str | None:
    if domain not in versions:
        return f"the model does not import an opset of domain '{domain or 'ai.onnx'}'"
    opset = versions[domain]
    schema = _schema(node.op_type, opset, domain)
    if domain == "" and (schema is None or schema.deprecated):
        return f"opset {opset} has no such operator"
    if find_converter(domain, node.op_type, opset) is None:
        oldest = oldest_opset(domain, node.op_type)
        return "operator is not supported" if oldest is None else f"supported from opset {oldest} on, the model is of opset {opset}"
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            return f"attribute '{attribute.name}' refers to a function's attribute, outside of any function"
        if schema is not None and attribute.name not in schema.attributes:
            return f"opset {opset} defines no attribute '{attribute.name}'"
    return None


def _schema(operator: str, opset: int, domain: str) -> Any:
    try:
        return onnx.defs.get_schema(operator, opset, domain)
    except onnx.defs.SchemaError:
        return None


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)


def _read_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names a node reads, with those its subgraphs take from around them."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        inside = (
            {tensor.name for tensor in graph.initializer}
            | {info.name for info in graph.input}
            | {name for inner in graph.node for name in inner.output}
        )
        captured = [name for inner in graph.node for name in _read_names(inner)] + [output.name for output in graph.output]
        yield from (name for name in captured if name not in inside)
