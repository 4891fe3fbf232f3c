"""What happens to the graph before it is walked: versions are checked, functions inlined, nodes put in order, blockers listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference

from ...errors import Blocker, UnsupportedModel
from .bodies import name_bodies
from .definitions import schema_of, standard
from .graphs import nested_nodes, read_names, subgraphs
from .labels import label_bodies
from .node import node_label
from .registry import find_converter, oldest_opset

OLDEST_OPSET = 1
#: operators outside of the standard that exporters write into its domain, as ONNX Runtime registers them there
_FOREIGN = frozenset({"SimplifiedLayerNormalization"})
#: of a graph, those of its branches and of the functions it calls counted in
MOST_NODES = 1_000_000
#: inputs, and outputs, of one node
MOST_OPERANDS = 4096
#: of the bodies that replace a model's calls
MOST_INLINED_BYTES = 1 << 29


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
        _check_functions(model)
        whole, functions = model, {(standard(function.domain), function.name) for function in model.functions}
        model = _inlined(model, onnx.inliner.inline_local_functions)
        label_bodies(whole, model, lambda node: (standard(node.domain), node.op_type) in functions, detailed=True)
    versions = opset_versions(model)
    done: set[tuple[str, str]] = set()
    while True:
        wanted = {key for node in nested_nodes(model.graph.node) if (key := _function_to_inline(node, versions)) is not None} - done
        if not wanted:
            return model
        done |= wanted
        model = _inlined(model, lambda whole, chosen=wanted: _inline_selected(whole, chosen, versions.get("", OLDEST_OPSET)))


def _inline_selected(model: onnx.ModelProto, wanted: set[tuple[str, str]], opset: int) -> onnx.ModelProto:
    typed = onnx.shape_inference.infer_shapes(model)  # a copy
    _declare_initializers(typed.graph)
    for node in nested_nodes(typed.graph.node):
        if (node.domain, node.op_type) in wanted:
            _write_defaults(node, schema_of(node.op_type, opset, standard(node.domain)))
    named = name_bodies(typed, {(domain, name) for domain, name in wanted if standard(domain) == ""}, opset)
    result = onnx.inliner.inline_selected_functions(named, sorted(wanted), inline_schema_functions=True)
    label_bodies(model, result, lambda node: (node.domain, node.op_type) in wanted, detailed=False)
    return result


def _declare_initializers(graph: onnx.GraphProto) -> None:
    """onnx's inliner looks up the types of what a body reads among declared values, and those of initializers need not be."""
    known = {info.name for info in (*graph.input, *graph.value_info)}
    graph.value_info.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in graph.initializer if tensor.name not in known
    )
    for node in graph.node:
        for inner in subgraphs(node):
            _declare_initializers(inner)


def _write_defaults(node: onnx.NodeProto, schema: Any) -> None:
    """onnx's inliner drops what a body takes from an attribute that the node leaves out, instead of using its default."""
    if schema is None or not schema.has_function:
        return
    given = {attribute.name for attribute in node.attribute}
    for name, definition in schema.attributes.items():
        if name not in given and definition.default_value.type != onnx.AttributeProto.UNDEFINED:
            node.attribute.append(definition.default_value)


def _inlined(model: onnx.ModelProto, inline: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """onnx fails in many ways where types are missing or the model is inconsistent; all of them are a refusal here."""
    try:
        return inline(model)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(f"functions cannot be replaced by their bodies: {reason}") from None


def _check_functions(model: onnx.ModelProto) -> None:
    """Raises UnsupportedModel for functions that call themselves, and for calls whose bodies have more than `MOST_NODES` nodes or `MOST_INLINED_BYTES` bytes."""
    bodies = {(standard(function.domain), function.name): list(function.node) for function in model.functions}
    calls = {
        key: Counter(called for node in nested_nodes(nodes) if (called := (standard(node.domain), node.op_type)) in bodies)
        for key, nodes in bodies.items()
    }
    own_bytes = {(standard(function.domain), function.name): function.ByteSize() for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}  # nodes
    weights: dict[tuple[str, str], int] = {}  # bytes
    for start in calls:
        stack, open_ = [start], {start}
        while stack:
            key = stack[-1]
            inner = next((called for called in calls[key] if called not in sizes), None)
            if inner is None:
                sizes[key] = len(bodies[key]) + sum(count * sizes[called] for called, count in calls[key].items())
                weights[key] = own_bytes[key] + sum(count * weights[called] for called, count in calls[key].items())
                open_.discard(stack.pop())
            elif inner in open_:
                raise UnsupportedModel(f"function '{inner[1]}' calls itself")
            else:
                stack.append(inner)
                open_.add(inner)
    called = [(standard(node.domain), node.op_type) for node in nested_nodes(model.graph.node)]
    total, weight = sum(sizes.get(key, 1) for key in called), sum(weights.get(key, 0) for key in called)
    if total > MOST_NODES:
        raise UnsupportedModel(f"the model has {total} nodes once its functions are inlined; at most {MOST_NODES} are supported")
    if weight > MOST_INLINED_BYTES:
        raise UnsupportedModel(
            f"the bodies of the model's functions have {weight} bytes once they are inlined; at most {MOST_INLINED_BYTES} are supported"
        )


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
                for name in read_names(node):
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
    schema = schema_of(node.op_type, versions[domain], domain)
    return (node.domain, node.op_type) if schema is not None and (schema.has_function or schema.has_context_dependent_function) else None


def _blocking_reason(node: onnx.NodeProto, domain: str, versions: dict[str, int]) -> str | None:
    if domain not in versions:
        return f"the model does not import an opset of domain '{domain or 'ai.onnx'}'"
    opset = versions[domain]
    schema = schema_of(node.op_type, opset, domain)
    if domain == "" and node.op_type not in _FOREIGN and (schema is None or schema.deprecated):
        return f"opset {opset} has no such operator"
    if find_converter(domain, node.op_type, opset) is None:
        oldest = oldest_opset(domain, node.op_type)
        return "operator is not supported" if oldest is None else f"supported from opset {oldest} on, the model is of opset {opset}"
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            return f"attribute '{attribute.name}' refers to a function's attribute, outside of any function"
        if schema is not None and attribute.name not in schema.attributes:
            return f"opset {opset} defines no attribute '{attribute.name}'"
        expected = None if schema is None else int(schema.attributes[attribute.name].type)
        if attribute.type != expected and (expected is not None or attribute.type == onnx.AttributeProto.UNDEFINED):
            kinds = onnx.AttributeProto.AttributeType
            found, wanted = (kinds.Name(kind) if kind in kinds.values() else str(kind) for kind in (attribute.type, expected or 0))
            return f"attribute '{attribute.name}' is of type {found}" + (f" instead of {wanted}" if expected is not None else "")
    return None if schema is None else _wrong_count(node, schema)


def _wrong_count(node: onnx.NodeProto, schema: Any) -> str | None:
    for what, count, least, most in (
        ("input", len(node.input), schema.min_input, schema.max_input),
        ("output", len(node.output), schema.min_output, schema.max_output),
    ):
        if count > MOST_OPERANDS:
            return f"it has {count} {what}s; at most {MOST_OPERANDS} are supported"
        if not least <= count <= most:
            return f"it has {count} {what}s; {least if least == most else f'{least}..{most}' if most < 1 << 30 else f'{least} or more'} expected"
    present = {attribute.name for attribute in node.attribute}
    missing = next((name for name, attribute in schema.attributes.items() if attribute.required and name not in present), None)
    return None if missing is None else f"attribute '{missing}' is missing"
