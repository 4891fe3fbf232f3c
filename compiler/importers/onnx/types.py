"""What the standard asks of a node before its converter sees it: element types of operands, and counts that are at least one."""

from __future__ import annotations

from onnx import TensorProto

from ...element_types import CARRIERS
from ...tvm import relax
from .definitions import formals_of
from .load import DTYPES, STORAGE
from .node import Node
from .values import Host, Refusal, Stored, Value

#: the first opset that is taken at its word: Tile's counts, say, were of the data's type once, and integers in every model. Before, types of this one are taken, too
_STRICT = 7
#: attributes of windows, blocks and groups; what a zero or a negative one asks for does not exist
_COUNTS = ("kernel_shape", "strides", "dilations", "group", "blocksize", "size")
#: element types as operators' definitions write them
_WRITTEN = {name: f"tensor({TensorProto.DataType.Name(code).lower()})" for code, name in (DTYPES | STORAGE).items()}


def check_node(node: Node) -> None:
    """Raises Refusal where an operand is of a type that the operator's definition does not have, where operands that share a type there are of two, and
    where a count among the attributes is less than one."""
    formals = formals_of(node.op, node.opset, node.domain)
    if not formals:
        return
    old = node.domain == "" and node.opset < _STRICT
    newer = formals_of(node.op, _STRICT, node.domain) if old else None
    for name in _COUNTS:
        value = node.attr(name)
        if value is not None and min(value if isinstance(value, list) else [value], default=1) < 1:
            raise Refusal(f"{name} is {value}")
    operands = [(place, _dtype(value), formals[min(place, len(formals) - 1)]) for place, value in enumerate(node.inputs) if value is not None]
    known = [(place, dtype, formal) for place, dtype, formal in operands if dtype is not None]
    bound: dict[str, str] = {}
    for _, dtype, formal in [] if old else known:
        if not formal.variable.startswith("tensor(") and formal.homogeneous and bound.setdefault(formal.variable, dtype) != dtype:
            raise Refusal(f"operands are of types {bound[formal.variable]} and {dtype}, where the standard asks for one type")
    for place, dtype, formal in known:
        # what is only stored is moved by any operator that moves, in older opsets too; `precision` refuses the rest
        types = set(formal.types) | (set(newer[min(place, len(newer) - 1)].types) if newer else set())
        if dtype not in CARRIERS and _WRITTEN[dtype] not in types:
            raise Refusal(f"operand {place} is of type {dtype}, which the standard does not have for it in opset {node.opset}")


def _dtype(value: Value) -> str | None:
    if isinstance(value, (Host, Stored)):
        return value.dtype
    return str(value.ty.dtype) if isinstance(value, relax.Expr) and isinstance(value.ty, relax.TensorType) else None
