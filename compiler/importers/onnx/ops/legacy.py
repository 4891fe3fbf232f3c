"""Operators as opsets 1 to 6 (some to 9) define them: sizes, axes and flags are attributes, and broadcasting has to be asked for.

`consumed_inputs`, a hint for in-place execution, is ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from ....tvm import relax
from ..load import dtype_name
from ..node import Node
from ..registry import converter, find_converter
from ..symbolic import Dim
from ..values import Host, Refusal, Value, concrete
from .shape import cast_like, join, known_shape, sizes_host

_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")


@converter(*_BINARY)
def binary(node: Node) -> Value | tuple[Value, ...]:
    """broadcast=1: the right operand covers the dims of the left one from `axis` on, by default its last ones."""
    left, right = (known_shape(node, node.value(index)) for index in (0, 1))
    if not node.attr("broadcast", 0):
        if len(left) != len(right) and right:
            raise Refusal(f"shapes {left} and {right} differ, without broadcast=1")
    else:
        axis = node.attr("axis")
        axis = len(left) - len(right) if axis is None else node.axis(axis, len(left))
        if axis < 0 or axis + len(right) > len(left):
            raise Refusal(f"shape {right} does not fit into {left} from axis {axis} on")
        node.inputs[1] = _reshaped(node, 1, right + [1] * (len(left) - len(right) - axis))
    return _modern(node, 7)


@converter("PRelu")
def prelu(node: Node) -> Value | tuple[Value, ...]:
    """One slope, or one for each channel."""
    slope, rank = known_shape(node, node.value(1)), node.rank(node.tensor(0))
    if len(slope) == 1 and rank > 1:
        node.inputs[1] = _reshaped(node, 1, slope + [1] * (rank - 2))
    return _modern(node, 7)


def _modern(node: Node, opset: int, *inputs: Value | None) -> Value | tuple[Value, ...]:
    """The node as one of a newer opset; `inputs` replace its own if there are any."""
    convert = find_converter("", node.op, opset)
    assert convert is not None
    node.opset = opset
    node.inputs = list(inputs) or node.inputs
    return convert(node)


def _reshaped(node: Node, index: int, dims: list[Dim]) -> Value:
    value = node.value(index)
    if isinstance(value, Host):
        return Host(value.array.reshape(node.static(dims, "the shape of a constant")), value.dtype)
    return node.reshape(node.to_tensor(value), dims)


@converter("Gemm")
def gemm(node: Node) -> Value | tuple[Value, ...]:
    return _modern(node, 7)


@converter("Reshape")
def reshape(node: Node) -> Value | tuple[Value, ...]:
    return _modern(node, 5, node.value(0), concrete(np.array(_required(node, "shape")), "int64"))


@converter("Pad")
def pad(node: Node) -> Value | tuple[Value, ...]:
    pads, fill = np.array(_required(node, "paddings")), np.array(node.attr("value", 0.0))
    return _modern(node, 11, node.value(0), concrete(pads, "int64"), concrete(fill, "float32"))


@converter("Concat")
def concat(node: Node) -> relax.Expr:
    """`axis` is 1 by default."""
    tensors = node.tensors()
    return tensors[0] if len(tensors) == 1 else join(node, tensors, node.axis(node.attr("axis", 1), node.rank(tensors[0])))


@converter("Cast")
def cast(node: Node) -> Value | tuple[Value, ...]:
    """`to` is the name of the type."""
    name = _required(node, "to").upper()
    if name not in TensorProto.DataType.keys():
        raise Refusal(f"there is no type '{name}'")
    node.inputs = [node.value(0), Host(np.empty(0), dtype_name(TensorProto.DataType.Value(name)))]
    return cast_like(node)


@converter("Tile")
def tile(node: Node) -> Value | tuple[Value, ...]:
    """`tiles` copies along one axis."""
    repeats: list[Dim] = [1] * node.rank(node.tensor(0))
    repeats[node.axis(node.ints(2)[0], len(repeats))] = node.sizes(1)[0]
    return _modern(node, 6, node.value(0), sizes_host(repeats))


@converter("TopK")
def top_k(node: Node) -> Value | tuple[Value, ...]:
    return _modern(node, 10, node.value(0), concrete(np.array([_required(node, "k")]), "int64"))


@converter("Upsample", since=7)
def upsample(node: Node) -> Value | tuple[Value, ...]:
    return _modern(node, 9, node.value(0), concrete(np.array(_required(node, "scales")), "float32"))


@converter("Upsample")
def upsample_by_height_and_width(node: Node) -> Value | tuple[Value, ...]:
    scales = [1.0, 1.0, _required(node, "height_scale"), _required(node, "width_scale")]
    return _modern(node, 9, node.value(0), concrete(np.array(scales), "float32"))


@converter("Dropout")
def dropout(node: Node) -> Value | tuple[Value, ...]:
    if not node.attr("is_test", 0) and node.attr("ratio", 0.5) != 0:
        raise Refusal("training mode (is_test=0) draws random numbers, which is not supported")
    return _modern(node, 7)


def _required(node: Node, name: str) -> Any:
    value = node.attr(name)
    if value is None:
        raise Refusal(f"attribute '{name}' is missing")
    return value
