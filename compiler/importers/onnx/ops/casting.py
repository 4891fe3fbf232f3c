"""Cast and CastLike from and to storage types, and BitCast."""

from __future__ import annotations

import numpy as np

from ....dialect.bitcast import bitcast
from ....element_types import BOUNDS, CARRIERS
from ....tvm import relax
from ..load import element_name
from ..node import Node
from ..registry import converter, storage_converter
from ..storage import cast, dtype_of, from_carrier, to_carrier
from ..values import Host, Refusal, Value


@storage_converter("Cast")
def cast_storage(node: Node) -> Value | None:
    return _cast(node, element_name(node.attr("to"))) if node.opset >= 6 else None  # before, `to` is a name, and there are no storage types


@storage_converter("CastLike")
def cast_like_storage(node: Node) -> Value | None:
    return _cast(node, dtype_of(node, node.value(1)))


@converter("BitCast", since=26)
def bit_cast(node: Node) -> Value:
    """The bits of each element as another type of the same width"""
    value, target = node.value(0), element_name(node.attr("to"))
    source = dtype_of(node, value)
    if source == target:
        return value
    if _bits(source) != _bits(target):
        raise Refusal(f"{source} and {target} differ in width")
    if source == "bool":
        return relax.op.astype(node.tensor(0), target)
    if source in BOUNDS or target in BOUNDS or target == "bool":
        raise Refusal(f"bits of {source} as {target} are not supported")
    held = to_carrier(value) if source in CARRIERS else value
    plain, wanted = CARRIERS.get(source, source), CARRIERS.get(target, target)
    if isinstance(held, Host) and not held.symbolic:
        result: Value = Host(np.ascontiguousarray(held.array).reshape(held.array.shape).view(wanted), wanted)
    else:
        result = node.to_tensor(held) if plain == wanted else node.emit(bitcast(node.to_tensor(held), wanted))
    return from_carrier(node, result, target) if target in CARRIERS else result


def _bits(dtype: str) -> int:
    if dtype in ("int4", "uint4", "float4_e2m1fn"):
        return 4
    return 2 if dtype in ("int2", "uint2") else np.dtype(CARRIERS.get(dtype, dtype)).itemsize * 8


def _cast(node: Node, target: str) -> Value | None:
    value = node.value(0)
    if target not in CARRIERS and dtype_of(node, value) not in CARRIERS:
        return None
    return cast(node, value, target, bool(node.attr("saturate", 1)), node.attr("round_mode", "up"))
