"""Bodies of standard operators whose form depends on the types of their inputs, for nodes that leave out an input in the middle.

onnx's inliner asks for the type of the input that is not there, and fails. Such a node becomes a call of a function of its own here, which inlines.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.inliner

#: domain of the functions made here
DOMAIN = "tcompile.bodies"


def name_bodies(model: onnx.ModelProto, wanted: set[tuple[str, str]], opset: int) -> onnx.ModelProto:
    """The model, with types inferred, whose nodes of the operators `wanted`, (domain, name), call local functions where an input is left out."""
    types = {info.name: info.type for infos in (model.graph.input, model.graph.value_info, model.graph.output) for info in infos}
    types |= {tensor.name: onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if (node.domain, node.op_type) not in wanted or "" not in node.input or any(name and name not in types for name in node.input):
            continue
        body = _body(node, types, opset)
        if body is not None:
            body.domain, body.name = DOMAIN, f"{node.op_type}_{len(model.functions)}"
            node.domain, node.op_type = DOMAIN, body.name
            model.functions.append(body)
    if model.functions:  # those of the model itself are inlined already
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        model = onnx.inliner.inline_local_functions(model)
    return model


def _body(node: onnx.NodeProto, types: dict[str, onnx.TypeProto], opset: int) -> onnx.FunctionProto | None:
    """None where there is none that means the same at `opset`."""
    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    versions = [version for version in schema.context_dependent_function_opset_versions if version <= opset]
    if not versions:
        return None
    given = [(types[name] if name else onnx.TypeProto()).SerializeToString() for name in node.input]
    body = onnx.FunctionProto.FromString(schema.get_context_dependent_function_with_opset_version(max(versions), node.SerializeToString(), given))
    for part in body.opset_import:
        if part.domain == "":
            if any(_changed(inner, part.version, opset) for inner in body.node):
                return None
            part.version = opset
    return body


def _changed(node: onnx.NodeProto, old: int, new: int) -> bool:
    return onnx.defs.get_schema(node.op_type, old, node.domain).since_version != onnx.defs.get_schema(node.op_type, new, node.domain).since_version
