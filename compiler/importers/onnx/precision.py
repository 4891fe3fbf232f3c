"""Which types a converter sees: float16 and bfloat16 are computed in float32, storage types are moved in their carriers.

Every output of a narrow type is rounded once, at the end of its node. That is what ONNX Runtime does on CPUs, whose kernels for these types widen what they read:
sums of products, reductions and the steps inside of an operator keep float32. Softmax and what contains it are the exception: `round_step` rounds every step, as the
standard's own definition of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx

from ...element_types import CARRIERS
from ...tvm import relax
from .definitions import schema_of
from .load import DTYPES
from .node import Node
from .registry import find_storage_converter
from .storage import dtype_of, from_carrier, numbers, stored, to_carrier
from .values import Host, Refusal, Sequence, Stored, Value, concrete

NARROW = ("float16", "bfloat16")
#: operators that give every element as it came
_MOVING = frozenset(
    "CenterCropPad Compress Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape ReverseSequence ScatterElements ScatterND Shape Size Slice"
    " SpaceToDepth Split Squeeze TensorScatter Tile Transpose Unsqueeze Where".split()
)
#: operators with subgraphs, sequences, or types that follow rules of their own
_OWN_RULES = frozenset(
    "BitCast Cast CastLike ConcatFromSequence Constant ConstantOfShape DequantizeLinear If Loop Optional OptionalGetElement OptionalHasElement QuantizeLinear Scan SequenceAt"
    " SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SplitToSequence".split()
)

Results = Value | tuple[Value, ...]


def convert(node: Node, converter: Callable[[Node], Results], domain: str) -> tuple[Value, ...]:
    """What `converter` makes of the node, which sees other types than the graph where the module says so. Raises Refusal for types it cannot have."""
    own = find_storage_converter(domain, node.op)
    results: Results | None = None if own is None else own(node)
    if results is None:
        results = _convert(node, converter)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(_checked(node, result) for result in results)


def _convert(node: Node, converter: Callable[[Node], Results]) -> Results:
    schema = schema_of(node.op, node.opset, node.domain)
    if node.op in _OWN_RULES or schema is None:
        return converter(node)
    moving = node.op in _MOVING and node.attr("reduction", "none") == "none"
    changed: dict[str, str] = {}  # type variable of the schema -> the graph's type
    for position, (value, variable) in enumerate(zip(list(node.inputs), _variables(schema.inputs), strict=False)):
        dtype = dtype_of(node, value)
        if value is None or dtype not in (CARRIERS if moving else NARROW):
            continue
        if changed.setdefault(variable, dtype) != dtype:
            raise Refusal(f"inputs of types {changed[variable]} and {dtype} must be of one type")
        node.inputs[position] = to_carrier(value) if moving else _widened(node, value)
        node.narrow = node.narrow if moving else node.narrow or dtype
    results = converter(node)
    if not changed:
        return results
    leave = from_carrier if moving else _rounded
    return tuple(
        leave(node, result, changed[variable]) if variable in changed and not isinstance(result, Sequence) else result
        for result, variable in zip(results if isinstance(results, tuple) else (results,), _variables(schema.outputs), strict=False)
    )


def _variables(parameters: Any) -> Iterator[str]:
    """The type variable of each input or output, without end where the last one is variadic."""
    for parameter in parameters:
        yield parameter.type_str
        while parameter.option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
            yield parameter.type_str


def _widened(node: Node, value: Value) -> Value:
    if isinstance(value, Stored):
        return numbers(node, value)
    if isinstance(value, relax.Expr):
        return node.emit(relax.op.astype(value, "float32"))
    assert isinstance(value, Host)
    if value.symbolic:
        return Host(value.array, "float32", value.name)
    if value.wide is None or value.wide.dtype != "float32":
        value.wide = concrete(value.array, "float32")
    return value.wide


def _rounded(node: Node, value: Value, dtype: str) -> Value:
    if isinstance(value, Host):
        return Host(value.array, dtype) if value.symbolic else concrete(value.array, dtype)
    assert isinstance(value, relax.Expr)
    bound = value if isinstance(value, relax.Var) else node.emit(value)
    if node.dtype(bound) != "float32":
        return bound
    return relax.op.astype(bound, dtype) if dtype not in CARRIERS else stored(node, bound, dtype)


def round_step(node: Node, value: relax.Expr) -> relax.Expr:
    """An intermediate float32 result, rounded to the type that the graph has in its place; as it is where that is no narrow one."""
    if node.narrow is None or node.dtype(value) != "float32":
        return value
    if node.narrow in CARRIERS:
        return numbers(node, stored(node, value, node.narrow))
    return node.emit(relax.op.astype(node.emit(relax.op.astype(value, node.narrow)), "float32"))


def _checked(node: Node, value: Value) -> Value:
    """Generated code has the types of `load.DTYPES` only; whatever converter made another one."""
    if not isinstance(value, relax.Expr):
        return value
    bound = value if isinstance(value, relax.Var) else node.emit(value)
    kind = bound.ty
    if isinstance(kind, relax.TensorType) and str(kind.dtype) not in DTYPES.values():
        raise Refusal(f"results of type {kind.dtype} are not supported")
    return bound
