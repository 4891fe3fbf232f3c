"""Sequences and optionals. Lengths and positions are known at import, so that sequences vanish: an element is a value of the walk like any other.

A sequence of unknown length, or an optional that is there or not by the data, cannot be compiled: graph inputs and outputs of these types are refused.
"""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Absent, Host, Refusal, Sequence, Value, concrete, host
from .shape import join, known_shape

#: parts that a tensor is split into at most
_MOST_PARTS = 4096


def sequence(node: Node, index: int = 0) -> Sequence:
    value = node.value(index)
    if not isinstance(value, Sequence):
        raise Refusal(f"input {index} must be a sequence")
    return value


def _position(node: Node, index: int, length: int) -> int:
    """Input `index` as a position in 0..length-1."""
    positions = node.ints(index)
    if len(positions) != 1:
        raise Refusal("a position must be one number")
    if not -length <= positions[0] < length:
        raise Refusal(f"position {positions[0]} is outside of a sequence of {length}")
    return positions[0] % length


@converter("SequenceEmpty", since=11)
def sequence_empty(node: Node) -> Sequence:
    return Sequence(())


@converter("SequenceConstruct", since=11)
def sequence_construct(node: Node) -> Sequence:
    return Sequence(tuple(node.value(index) for index in range(len(node.inputs))))


@converter("SequenceAt", since=11)
def sequence_at(node: Node) -> Value:
    items = sequence(node).items
    return items[_position(node, 1, len(items))]


@converter("SequenceLength", since=11)
def sequence_length(node: Node) -> Host:
    return concrete(np.array(len(sequence(node).items)), "int64")


@converter("SequenceInsert", since=11)
def sequence_insert(node: Node) -> Sequence:
    items = sequence(node).items
    if not node.has(2):
        return Sequence((*items, node.value(1)))
    place = len(items) if node.ints(2) == [len(items)] else _position(node, 2, len(items))
    return Sequence((*items[:place], node.value(1), *items[place:]))


@converter("SequenceErase", since=11)
def sequence_erase(node: Node) -> Sequence:
    items = sequence(node).items
    place = _position(node, 1, len(items)) if node.has(1) else _last(items)
    return Sequence((*items[:place], *items[place + 1 :]))


def _last(items: tuple[Value, ...]) -> int:
    if not items:
        raise Refusal("an empty sequence has no element to erase")
    return len(items) - 1


@converter("SplitToSequence", since=11)
def split_to_sequence(node: Node) -> Sequence:
    value = node.value(0)
    shape = known_shape(node, value)
    axis = node.axis(node.attr("axis", 0), len(shape))
    squeezed = not node.has(1) and not node.attr("keepdims", 1)
    bounds = np.cumsum([0, *_lengths(node, shape[axis])]).tolist()
    parts = [part(node, value, axis, low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
    return Sequence(tuple(without(node, part, axis) for part in parts) if squeezed else tuple(parts))


def _lengths(node: Node, size: Dim) -> list[int]:
    """The lengths of the parts of a dim of `size`."""
    whole = node.static([size], "the dim that is split")[0]
    wanted = node.constant(1) if node.has(1) else np.array(1)
    if wanted.ndim == 0 and wanted > 0:
        if whole > _MOST_PARTS * int(wanted):
            raise Refusal(f"a sequence of more than {_MOST_PARTS} parts is not supported")
        return [min(int(wanted), whole - start) for start in range(0, whole, int(wanted))]
    lengths = [int(length) for length in wanted.reshape(-1)]
    if wanted.ndim == 0 or any(length < 0 for length in lengths) or sum(lengths) != whole:
        raise Refusal(f"lengths {wanted.tolist()} do not divide a dim of {whole}")
    return lengths


def part(node: Node, value: Value, axis: int, low: int, high: int) -> Value:
    if isinstance(value, Host):
        return host(value.array[(slice(None),) * axis + (slice(low, high),)], value.dtype)
    return node.emit(relax.op.strided_slice(node.to_tensor(value), [axis], [low], [high], assume_inbound=True))


def without(node: Node, value: Value, axis: int) -> Value:
    """The value without its `axis`, which has one element."""
    if isinstance(value, Host):
        return Host(value.array.squeeze(axis), value.dtype)
    tensor = node.to_tensor(value)
    return node.reshape(tensor, [size for position, size in enumerate(node.shape(tensor)) if position != axis])


@converter("ConcatFromSequence", since=11)
def concat_from_sequence(node: Node) -> Value:
    tensors = [node.to_tensor(item) for item in sequence(node).items]
    if not tensors:
        raise Refusal("an empty sequence cannot be concatenated")
    rank, axis = node.rank(tensors[0]), node.attr("axis")
    if not node.attr("new_axis", 0):
        return join(node, tensors, node.axis(axis, rank)) if len(tensors) > 1 else tensors[0]
    return stack(node, tensors, node.axis(axis, rank + 1))


def stack(node: Node, tensors: list[relax.Expr], axis: int) -> relax.Expr:
    """The tensors behind one another along a new axis."""
    wide = []
    for tensor in tensors:
        shape = node.shape(tensor)
        wide.append(node.reshape(tensor, [*shape[:axis], 1, *shape[axis:]]))
    return join(node, wide, axis) if len(wide) > 1 else wide[0]


@converter("Optional", since=15)
def optional(node: Node) -> Value:
    return node.value(0) if node.has(0) else Absent()


@converter("OptionalHasElement", since=15)
def optional_has_element(node: Node) -> Host:
    return concrete(np.array(node.has(0) and not isinstance(node.value(0), Absent)), "bool")


@converter("OptionalGetElement", since=15)
def optional_get_element(node: Node) -> Value:
    value = node.value(0)
    if isinstance(value, Absent):
        raise Refusal("the optional has no element")
    return value
