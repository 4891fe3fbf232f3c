"""Operators that read or write at computed positions."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter, evaluator
from ..values import Host, Refusal, Value, host
from .host_arithmetic import fits

_REDUCTIONS = {"none": "update", "add": "add", "mul": "mul", "min": "min", "max": "max"}


@evaluator("Gather")
def gather_host(node: Node) -> Host | None:
    data, indices = node.host(0), node.host(1)
    if indices.symbolic:
        return None
    axis = node.axis(node.attr("axis", 0), data.array.ndim)
    size = data.array.shape[axis]
    if np.any((indices.array < -size) | (indices.array >= size)):
        raise Refusal(f"index outside of axis {axis} with {size} elements")
    elements = data.array.size // max(size, 1) * indices.array.size
    return host(np.asarray(np.take(data.array, indices.array, axis)), data.dtype) if fits(node, elements) else None


@converter("Gather")
def gather(node: Node) -> relax.Expr:
    """Constant indices are checked and made non-negative at import, others at run time."""
    data = node.tensor(0)
    shape = node.shape(data)
    axis = node.axis(node.attr("axis", 0), len(shape))
    known, size = node.maybe_host(1), shape[axis]
    if known is None or known.symbolic or not isinstance(size, int):
        return relax.op.take(data, node.tensor(1), axis, mode="fast")
    if np.any((known.array < -size) | (known.array >= size)):
        raise Refusal(f"index outside of axis {axis} with {size} elements")
    positive = node.array(np.where(known.array < 0, known.array + size, known.array), known.dtype)
    return relax.op.take(data, positive, axis, mode="fast")


@converter("GatherElements", since=11)
def gather_elements(node: Node) -> relax.Expr:
    data = node.tensor(0)
    shape = node.shape(data)
    axis = node.axis(node.attr("axis", 0), len(shape))
    return relax.op.gather_elements(data, node.tensor(1), axis)


@converter("GatherND", since=11)
def gather_nd(node: Node) -> relax.Expr:
    data, indices, batch = node.tensor(0), node.tensor(1), node.attr("batch_dims", 0)
    return relax.op.gather_nd(data, _wide(node, indices), batch)


def _wide(node: Node, indices: relax.Expr) -> relax.Expr:
    """Index tuples as int64, the only type that Relax takes; the last dim must be static."""
    node.static(node.shape(indices)[-1:], "the last dim of the indices")
    return indices if node.dtype(indices) == "int64" else node.emit(relax.op.astype(indices, "int64"))


@converter("ScatterElements", since=11)
def scatter_elements(node: Node) -> relax.Expr:
    data = node.tensor(0)
    shape = node.shape(data)
    axis = node.axis(node.attr("axis", 0), len(shape))
    reduction = _REDUCTIONS[node.attr("reduction", "none")]
    return relax.op.scatter_elements(data, node.tensor(1), node.tensor(2), axis, reduction)


@converter("ScatterND", since=11)
def scatter_nd(node: Node) -> relax.Expr:
    data = node.tensor(0)
    indices = _wide(node, node.tensor(1))
    return relax.op.scatter_nd(data, indices, node.tensor(2), _REDUCTIONS[node.attr("reduction", "none")])


@converter("OneHot", since=9)
def one_hot(node: Node) -> relax.Expr:
    """depth must follow from constants and shapes; indices outside of -depth..depth-1 give rows of `off`."""
    indices, depth = node.tensor(0), node.sizes(1)[0]
    rank = node.rank(indices) + 1
    axis = node.axis(node.attr("axis", -1), rank)
    if node.dtype(indices) != "int64":
        indices = node.emit(relax.op.astype(indices, "int64"))
    places = node.emit(relax.op.arange(0, depth, 1, "int64"))
    places = node.reshape(places, [depth if position == axis else 1 for position in range(rank)])
    negative = node.emit(relax.op.less(indices, node.scalar(0, "int64")))
    extent = (
        node.scalar(depth, "int64") if isinstance(depth, int) else node.reshape(node.emit(relax.op.shape_to_tensor(relax.ShapeExpr([depth]))), [])
    )
    counted = node.emit(relax.op.where(negative, node.emit(relax.op.add(indices, extent)), indices))
    remaining = iter(node.shape(counted))
    spread = node.reshape(counted, [1 if position == axis else next(remaining) for position in range(rank)])
    values = node.tensor(2)
    off, on = (node.reshape(node.emit(relax.op.strided_slice(values, [0], [i], [i + 1], assume_inbound=True)), []) for i in (0, 1))
    return relax.op.where(node.emit(relax.op.equal(spread, places)), on, off)


@converter("TopK", since=10)
def top_k(node: Node) -> tuple[relax.Expr, ...]:
    data, count = node.tensor(0), node.ints(1)[0]
    axis = node.axis(node.attr("axis", -1), node.rank(data))
    both = node.emit(relax.op.topk(data, count, axis, "both", bool(node.attr("largest", 1)), "int64"))
    return relax.TupleGetItem(both, 0), relax.TupleGetItem(both, 1)


@converter("CumSum", since=11)
def cumulative_sum(node: Node) -> Value:
    data = node.tensor(0)
    axis = node.axis(node.ints(1)[0], node.rank(data))
    reverse, exclusive = node.attr("reverse", 0), bool(node.attr("exclusive", 0))
    if reverse:
        data = node.emit(relax.op.flip(data, axis))
    result = relax.op.cumsum(data, axis, node.dtype(data), exclusive)
    return relax.op.flip(node.emit(result), axis) if reverse else result


@evaluator("Trilu")
def triangle_host(node: Node) -> Host | None:
    value = node.host(0)
    if value.symbolic or (node.has(1) and node.host(1).symbolic):
        return None
    offset = node.ints(1)[0] if node.has(1) else 0
    return host((np.triu if node.attr("upper", 1) else np.tril)(value.array, offset), value.dtype)


@converter("Trilu", since=14)
def triangle(node: Node) -> relax.Expr:
    make = relax.op.triu if node.attr("upper", 1) else relax.op.tril
    return make(node.tensor(0), node.sizes(1)[0] if node.has(1) else 0)


@converter("ReverseSequence", since=10)
def reverse_sequence(node: Node) -> relax.Expr:
    return relax.op.reverse_sequence(node.tensor(0), node.tensor(1), node.attr("time_axis", 0), node.attr("batch_axis", 1))
