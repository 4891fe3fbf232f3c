"""Operators that read or write at computed positions."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ...sort_keys import sort_keys
from ..node import Node
from ..registry import converter, evaluator
from ..values import Host, Refusal, Value, host
from ..vectors import Vector, chosen_axes, from_the_front
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
@converter("Scatter", since=9)
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


@converter("TensorScatter", since=24)
def tensor_scatter(node: Node) -> relax.Expr:
    """update [B, ..., s, ...] written into past [B, ..., S, ...], from a place per sample on; positions outside raise, or in circular mode start anew."""
    past, update = node.tensor(0), node.tensor(1)
    shape, new = node.shape(past), node.shape(update)
    axis, mode = node.axis(node.attr("axis", -2), len(shape)), node.attr("mode", "linear")
    if axis == 0:
        raise Refusal("the first dim is the batch, and cannot be written along")
    if mode not in ("linear", "circular"):
        raise Refusal(f"mode '{mode}'")
    steps = node.emit(relax.op.arange(0, new[axis], 1, "int64"))
    places = node.reshape(steps, [new[axis] if position == axis else 1 for position in range(len(new))])
    if node.has(2):
        first = node.tensor(2) if mode == "circular" else node.to_tensor(from_the_front(node, node.value(2)))
        first = node.reshape(first, [new[0] if position == 0 else 1 for position in range(len(new))])
        places = node.emit(relax.op.add(places, first if node.dtype(first) == "int64" else node.emit(relax.op.astype(first, "int64"))))
    if mode == "circular":
        places = node.emit(relax.op.floor_mod(places, Vector.sizes(node, [shape[axis]]).expr))
    places = node.emit(relax.op.broadcast_to(places, new))
    return relax.op.scatter_elements(past, places, update, axis, "update")


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
    if node.rank(values) != 1 or (isinstance(count := node.shape(values)[0], int) and count != 2):
        raise Refusal("values must be one tensor of two: `off` and `on`")
    if not isinstance(count, int):
        values = node.cast_shape(values, [2])
    off, on = (node.reshape(node.emit(relax.op.strided_slice(values, [0], [i], [i + 1], assume_inbound=True)), []) for i in (0, 1))
    return relax.op.where(node.emit(relax.op.equal(spread, places)), on, off)


@converter("TopK", since=10)
def top_k(node: Node) -> tuple[relax.Expr, ...]:
    data, count = node.tensor(0), node.sizes(1)[0]
    axis, dtype = node.axis(node.attr("axis", -1), node.rank(data)), node.dtype(data)
    if isinstance(count, int) and count == 0:  # to TVM that means all
        empty = [0 if position == axis else size for position, size in enumerate(node.shape(data))]
        return tuple(relax.op.full(empty, node.scalar(0, kind), kind) for kind in (dtype, "int64"))
    keys, known = sort_keys(node.emit, data), isinstance(count, int)
    places = node.emit(relax.op.topk(keys, count if known else -1, axis, "indices", bool(node.attr("largest", 1)), "int64"))
    if not known:  # everything sorted, and as much of it as asked for; more than there is raises
        first = node.emit(relax.op.arange(0, count, 1, "int64"))
        places = node.emit(relax.op.take(places, first, axis, mode="fast"))
    return relax.op.gather_elements(data, places, axis), places


@converter("CumSum", since=11)
@converter("CumProd", since=26)
def cumulate(node: Node) -> Value:
    data = node.tensor(0)
    if node.at_run_time(1):
        return _cumulative_at_run_time(node, data)
    axis = node.axis(node.ints(1)[0], node.rank(data))
    return cumulative(node, data, axis)


def cumulative(node: Node, data: relax.Expr, axis: int) -> relax.Expr:
    reverse, exclusive = node.attr("reverse", 0), bool(node.attr("exclusive", 0))
    if reverse:
        data = node.emit(relax.op.flip(data, axis))
    make = relax.op.cumprod if node.op == "CumProd" else relax.op.cumsum
    result = node.emit(make(data, axis, node.dtype(data), exclusive))
    return node.emit(relax.op.flip(result, axis)) if reverse else result


def _cumulative_at_run_time(node: Node, data: relax.Expr) -> Value:
    """The axis is computed: sums or products along every axis are made, and the chosen one is taken."""
    chosen = chosen_axes(node, 1, node.rank(data))
    result = data
    for axis in range(node.rank(data)):
        sums = cumulative(node, data, axis)
        result = node.emit(relax.op.where(chosen.take(axis).expr, sums, result))
    return result


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
    if node.at_run_time(1):
        return _triangle_at_run_time(node, node.tensor(0))
    return make(node.tensor(0), node.sizes(1)[0] if node.has(1) else 0)


def _triangle_at_run_time(node: Node, value: relax.Expr) -> relax.Expr:
    rows, columns = node.shape(value)[-2:]
    row = node.reshape(node.emit(relax.op.arange(0, rows, 1, "int64")), [rows, 1])
    distance = node.emit(relax.op.subtract(node.emit(relax.op.arange(0, columns, 1, "int64")), row))
    keep = (relax.op.greater_equal if node.attr("upper", 1) else relax.op.less_equal)(distance, node.reshape(node.tensor(1), []))
    return relax.op.where(node.emit(keep), value, node.scalar(0, node.dtype(value)))


@converter("ReverseSequence", since=10)
def reverse_sequence(node: Node) -> relax.Expr:
    return relax.op.reverse_sequence(node.tensor(0), node.tensor(1), node.attr("time_axis", 0), node.attr("batch_axis", 1))
