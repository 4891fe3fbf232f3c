"""The element types of a node's operands, as far as the standard ties them to one another."""

from __future__ import annotations

import onnx

from ...tvm import relax
from .node import Node
from .values import Host, Refusal, Stored, Value

#: the first opset that is taken at its word: Tile's counts, say, were of the data's type once, and integers in every model
_STRICT = 7


def check_types(node: Node) -> None:
    """Raises Refusal where operands that share a type in the operator's definition are of two types."""
    if not onnx.defs.has(node.op, node.domain) or (node.domain == "" and node.opset < _STRICT):
        return
    try:
        formals = onnx.defs.get_schema(node.op, node.opset, node.domain).inputs
    except onnx.defs.SchemaError:
        return
    bound: dict[str, str] = {}
    for place, value in enumerate(node.inputs):
        formal = formals[min(place, len(formals) - 1)] if formals else None
        dtype = None if value is None else _dtype(value)
        if formal is None or dtype is None or formal.type_str.startswith("tensor(") or not formal.is_homogeneous:
            continue
        if bound.setdefault(formal.type_str, dtype) != dtype:
            raise Refusal(f"operands are of types {bound[formal.type_str]} and {dtype}, where the standard asks for one type")


def _dtype(value: Value) -> str | None:
    if isinstance(value, (Host, Stored)):
        return value.dtype
    return str(value.ty.dtype) if isinstance(value, relax.Expr) and isinstance(value.ty, relax.TensorType) else None
