"""Operators whose results are as long as the data say: NonZero, Compress, Unique, NonMaxSuppression."""

from __future__ import annotations

import numpy as np

from ....dialect.selection import positions, suppress, unique
from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal, Value
from ..vectors import Vector


def _parts(node: Node, counted: relax.Expr, results: int) -> tuple[list[relax.Expr], Dim]:
    """The first results of a dialect operator that counts, cut to the number that it gives, and that number."""
    both = node.emit(counted)
    parts = [node.emit(relax.TupleGetItem(both, index)) for index in range(results + 1)]
    count = node.runtime_sizes(parts[-1])[0]
    return [node.emit(relax.op.strided_slice(part, [0], [0], [count], assume_inbound=True)) for part in parts[:-1]], count


def _flat(node: Node, value: relax.Expr) -> relax.Expr:
    return node.reshape(value, [node.dims.product(node.shape(value))])


@converter("NonZero", since=9)
def non_zero(node: Node) -> Value:
    """Coordinates [rank, N] of the elements that are not zero, in row-major order; a scalar gives [0, N]."""
    x = node.tensor(0)
    shape, dtype = node.shape(x), node.dtype(x)
    mask = x if dtype == "bool" else node.nonzero(x)
    (places,), count = _parts(node, positions(_flat(node, mask)), 1)
    if not shape:
        return relax.op.full([0, count], node.scalar(0, "int64"), "int64")
    if len(shape) == 1:
        return node.reshape(places, [1, count])
    strides = [node.dims.product(shape[axis + 1 :]) for axis in range(len(shape))]
    rows, place = [], Vector(node, places)
    for stride in strides:  # at least 1, as nothing is found in a tensor without elements
        row = place // Vector.sizes(node, [stride]).at_least(1) if not isinstance(stride, int) else place // max(stride, 1)
        place = place - row * (Vector.sizes(node, [stride]) if not isinstance(stride, int) else stride)
        rows.append(node.reshape(row.expr, [1, count]))
    return relax.op.concat(rows, 0)


@converter("Compress", since=9)
def compress(node: Node) -> Value:
    """The slices along `axis` (of all elements, where there is no axis) at which the condition holds; it may be shorter than the axis."""
    x, axis = node.tensor(0), node.attr("axis")
    if axis is None:
        x, axis = _flat(node, x), 0
    (places,), _ = _parts(node, positions(_flat(node, node.tensor(1))), 1)
    return relax.op.take(x, places, node.axis(axis, node.rank(x)), mode="fast")


@converter("Unique", since=11)
def distinct(node: Node) -> tuple[Value, ...]:
    """Distinct elements, or slices along `axis`; where each is first, which one each element is, and how many are alike."""
    x, axis = node.tensor(0), node.attr("axis")
    if axis is None:
        x, axis = _flat(node, x), 0
    shape = node.shape(x)
    axis = node.axis(axis, len(shape))
    rest = [position for position in range(len(shape)) if position != axis]
    moved = x if axis == 0 else node.emit(relax.op.permute_dims(x, [axis, *rest]))
    rows = node.reshape(moved, [shape[axis], node.dims.product([shape[position] for position in rest])])
    both = node.emit(unique(rows, bool(node.attr("sorted", 1))))
    first, group, count, number = (node.emit(relax.TupleGetItem(both, index)) for index in range(4))
    found = node.runtime_sizes(number)[0]
    first, count = (node.emit(relax.op.strided_slice(part, [0], [0], [found], assume_inbound=True)) for part in (first, count))
    return relax.op.take(x, first, axis, mode="fast"), first, group, count


@converter("NonMaxSuppression", since=10)
def non_max_suppression(node: Node) -> Value:
    """Rows (image, class, box), by falling score within a class; none without max_output_boxes_per_class."""
    boxes, scores = node.tensor(0), node.tensor(1)
    if node.rank(boxes) != 3 or node.rank(scores) != 3:
        raise Refusal(f"expected boxes and scores of rank 3, not {node.rank(boxes)} and {node.rank(scores)}")
    batch, count, _ = node.shape(boxes)
    if any(not node.dims.equal(have, want) for have, want in zip(node.shape(scores)[::2], (batch, count), strict=True)):
        scores = node.cast_shape(scores, [batch, node.shape(scores)[1], count])

    def number(index: int, dtype: str) -> relax.Expr | None:
        if not node.has(index):
            return None
        value = node.tensor(index)
        return node.reshape(value if node.dtype(value) == dtype else node.emit(relax.op.astype(value, dtype)), [1])

    known = node.maybe_host(2)
    room = 0 if known is None or known.symbolic else max(int(known.array.reshape(-1)[0]), 1)
    most, overlap = number(2, "int64"), number(3, "float32")
    call = suppress(
        boxes,
        scores,
        node.array(np.zeros(1), "int64") if most is None else most,
        node.array(np.zeros(1), "float32") if overlap is None else overlap,
        number(4, "float32"),
        centred=bool(node.attr("center_point_box", 0)),
        room=room if most is not None else 1,
    )
    (chosen,), _ = _parts(node, call, 1)
    return chosen
