"""Standard operators inside of converters: fused operators are written as the operators that they fuse. Registration of ONNX Runtime's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from ...tvm import Constant, relax
from .node import Node
from .registry import Converter, converter, find_converter
from .values import Refusal, Value

#: the version of the standard whose meaning `apply` gives
OPSET = 21
#: the domain of the operators that ONNX Runtime contributes
MICROSOFT = "com.microsoft"


def apply(node: Node, operator: str, *inputs: Value | None, **attributes: Any) -> relax.Expr:
    """The first result of a standard operator of opset 21 in the place of `node`, bound under its name. None stands for an optional input that is left out."""
    names = ["" if value is None else f"input_{index}" for index, value in enumerate(inputs)]
    proto = onnx.helper.make_node(operator, names, list(node.proto.output[:1]), node.proto.name, **attributes)
    convert = find_converter("", operator, OPSET)
    if convert is None:
        raise Refusal(f"it is made of the operator {operator}, which is not supported")
    result = convert(Node(proto, OPSET, list(inputs), node.builder, node.dims, node.subgraph))
    first = result[0] if isinstance(result, tuple) else result
    value = node.to_tensor(first)
    return value if isinstance(value, (relax.Var, Constant)) else node.emit(value)


def given(node: Node, *names: str) -> dict[str, Any]:
    """The attributes of `node` among `names` that are set, to be handed on."""
    return {name: value for name in names if (value := node.attr(name)) is not None}


def contributed(*operators: str, attributes: str = "") -> Callable[[Converter], Converter]:
    """Register a converter for ONNX Runtime's operators of these names. attributes: the names it knows; a node with any other is refused, as there is no schema to say so."""
    names = frozenset(attributes.split())

    def register(function: Converter) -> Converter:
        def convert(node: Node) -> Value | tuple[Value, ...]:
            for attribute in node.proto.attribute:
                if attribute.name not in names:
                    raise Refusal(f"attribute '{attribute.name}' is not supported")
            return function(node)

        converter(*operators, domain=MICROSOFT)(convert)
        return function

    return register
