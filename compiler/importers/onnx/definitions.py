"""What the installed onnx says of operators; asked once per operator and opset, as its answers are copies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx


def standard(domain: str) -> str:
    """The domain, "" for both spellings of the standard one."""
    return "" if domain == "ai.onnx" else domain


@dataclass(frozen=True)
class Formal:
    """An input of an operator. variable: what its type is called ("T"), operands of one name being of one type where `homogeneous`; types: "tensor(float)" and so on."""

    variable: str
    homogeneous: bool
    types: frozenset[str]


@cache
def schema_of(operator: str, opset: int, domain: str) -> Any:
    """The operator's definition in an opset of its domain, None where there is none."""
    try:
        return onnx.defs.get_schema(operator, opset, domain)
    except onnx.defs.SchemaError:
        return None


@cache
def defaults_of(operator: str, opset: int, domain: str) -> dict[str, onnx.AttributeProto]:
    """The default of every attribute, UNDEFINED where there is none; not to be changed."""
    schema = schema_of(operator, opset, domain)
    return {} if schema is None else {name: definition.default_value for name, definition in schema.attributes.items()}


@cache
def formals_of(operator: str, opset: int, domain: str) -> tuple[Formal, ...]:
    """The inputs, the last one standing for all that follow where it is variadic."""
    schema = schema_of(operator, opset, domain)
    inputs = () if schema is None else schema.inputs
    return tuple(Formal(formal.type_str, formal.is_homogeneous, frozenset(formal.types)) for formal in inputs)
