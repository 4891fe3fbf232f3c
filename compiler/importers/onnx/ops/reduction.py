"""Reductions over axes, ArgMax/ArgMin."""

from __future__ import annotations

import math

from ....tvm import relax
from ..compose import apply
from ..node import Node
from ..registry import converter
from ..values import Refusal, Value
from ..vectors import Vector, chosen_axes, compact

_PLAIN = {
    "ReduceSum": relax.op.sum,
    "ReduceMean": relax.op.mean,
    "ReduceMax": relax.op.max,
    "ReduceMin": relax.op.min,
    "ReduceProd": relax.op.prod,
}

#: reductions as a function before, a plain reduction, and a function after it
_COMPOSED = {
    "ReduceL1": (relax.op.abs, "ReduceSum", None),
    "ReduceL2": (lambda value: relax.op.multiply(value, value), "ReduceSum", relax.op.sqrt),
    "ReduceSumSquare": (lambda value: relax.op.multiply(value, value), "ReduceSum", None),
    "ReduceLogSum": (None, "ReduceSum", relax.op.log),
}


#: what is computed in float64 for integers, and cut to their type
_IRRATIONAL = frozenset({"ReduceL2", "ReduceLogSum", "ReduceLogSumExp"})


@converter(*_PLAIN, *_COMPOSED, "ReduceLogSumExp")
def reduce(node: Node) -> Value:
    value = node.tensor(0)
    whole = node.dtype(value) if "int" in node.dtype(value) and node.op in _IRRATIONAL else None
    value = value if whole is None else node.emit(relax.op.astype(value, "float64"))
    before, operator, after = _COMPOSED.get(node.op, (None, node.op, None))
    computed = node.at_run_time(1) and len(Vector.of(node, 1)) > 0
    listed = [] if node.at_run_time(1) else node.axes(1, node.rank(value))
    axes = listed or ([] if node.attr("noop_with_empty_axes", 0) else list(range(node.rank(value))))
    value = value if before is None else node.emit(before(value))
    keep = bool(node.attr("keepdims", 1))
    if computed:
        value = _reduce_at_run_time(node, operator, value, keep)
    elif axes:
        value = _reduce(node, operator, value, axes, keep)
    value = value if after is None else node.emit(after(value))
    return value if whole is None else relax.op.astype(value, whole)


def _reduce(node: Node, operator: str, value: relax.Expr, axes: list[int], keep: bool) -> relax.Expr:
    if node.dtype(value) == "bool":  # whether any or all hold: the extreme of 0 and 1
        reduced = _reduce(node, operator, node.emit(relax.op.astype(value, "uint8")), axes, keep)
        return node.emit(relax.op.not_equal(reduced, node.scalar(0, "uint8")))
    if operator == "ReduceMean":
        return _mean(node, value, axes, keep)
    if operator != "ReduceLogSumExp":
        return node.emit(_PLAIN[operator](value, axes, keepdims=keep))
    peak = node.emit(relax.op.max(value, axes, keepdims=True))
    infinite = node.emit(relax.op.equal(node.emit(relax.op.abs(peak)), node.scalar(math.inf, node.dtype(peak))))
    peak = node.emit(relax.op.where(infinite, node.scalar(0, node.dtype(peak)), peak))
    shifted = node.emit(relax.op.exp(node.emit(relax.op.subtract(value, peak))))
    total = node.emit(relax.op.log(node.emit(relax.op.sum(shifted, axes, keepdims=True))))
    result = node.emit(relax.op.add(total, peak))
    return result if keep else node.reshape(result, [size for axis, size in enumerate(node.shape(result)) if axis not in axes])


def _mean(node: Node, value: relax.Expr, axes: list[int], keep: bool) -> relax.Expr:
    """Of integers cut to an integer; of nothing, NaN."""
    shape, dtype = node.shape(value), node.dtype(value)
    count = node.dims.product([shape[axis] for axis in axes])
    if isinstance(count, int) and count == 0:
        if "float" not in dtype:
            raise Refusal(f"the mean of no elements of type {dtype}")
        target = [1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes]
        return node.emit(relax.op.broadcast_to(node.scalar(math.nan, dtype), target))
    if "float" in dtype:
        return node.emit(relax.op.mean(value, axes, keepdims=keep))
    total, number = node.emit(relax.op.sum(value, axes, keepdims=keep)), Vector.sizes(node, [count]).expr
    number = node.reshape(number if dtype == "int64" else node.emit(relax.op.astype(number, dtype)), [])
    return apply(node, "Div", total, number)


def _reduce_at_run_time(node: Node, operator: str, value: relax.Expr, keep: bool) -> relax.Expr:
    """The axes are computed: each axis in turn is reduced or left, by sizes that are known while the model runs."""
    shape = node.shape(value)
    chosen = chosen_axes(node, 1, len(shape))
    extents = chosen.where(1, Vector.sizes(node, shape)).dims()
    for axis, extent in enumerate(extents):
        reduced = _reduce(node, operator, value, [axis], True)
        target = [extent if position == axis else size for position, size in enumerate(node.shape(value))]
        if not node.dims.compare(">=", shape[axis], 1):  # one element more than none, so that the slice lies inside
            value = node.emit(relax.op.concat([value, reduced], axis))
        left = node.emit(relax.op.strided_slice(value, [axis], [0], [extent], assume_inbound=True))
        value = node.emit(relax.op.where(chosen.take(axis).expr, node.emit(relax.op.broadcast_to(reduced, target)), left))
    if keep:
        return value
    dims = compact(Vector.sizes(node, shape), chosen == 0, len(shape) - len(Vector.of(node, 1))).dims()
    flat = node.reshape(value, [node.dims.product(node.shape(value))])
    return node.reshape(node.cast_shape(flat, [node.dims.product(dims)]), dims)


@converter("ArgMax", "ArgMin")
def arg_extreme(node: Node) -> Value:
    value = node.tensor(0)
    shape = node.shape(value)
    axis = node.axis(node.attr("axis", 0), len(shape))
    make = relax.op.argmax if node.op == "ArgMax" else relax.op.argmin
    keep = bool(node.attr("keepdims", 1))
    if not node.attr("select_last_index", 0):
        return make(value, axis, keep)
    last = node.static([shape[axis]], "the axis searched for the last index")[0] - 1
    found = node.emit(make(node.emit(relax.op.flip(value, axis)), axis, keep))
    return relax.op.subtract(node.scalar(last, "int64"), found)
