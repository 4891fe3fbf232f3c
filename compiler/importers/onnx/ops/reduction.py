"""Reductions over axes, ArgMax/ArgMin."""

from __future__ import annotations

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Value

_PLAIN = {
    "ReduceSum": relax.op.sum, "ReduceMean": relax.op.mean, "ReduceMax": relax.op.max, "ReduceMin": relax.op.min, "ReduceProd": relax.op.prod,
    "ReduceL1": relax.op.sum, "ReduceL2": relax.op.sum, "ReduceSumSquare": relax.op.sum, "ReduceLogSum": relax.op.sum,
}  # fmt: skip


@converter(*_PLAIN, "ReduceLogSumExp")
def reduce(node: Node) -> Value:
    value = node.tensor(0)
    axes, keep = node.axes(1, node.rank(value)), bool(node.attr("keepdims", 1))
    if not axes:
        if node.attr("noop_with_empty_axes", 0):
            return value
        axes = list(range(node.rank(value)))
    if not axes:  # a scalar: the reduction of one element
        return value
    if node.op == "ReduceLogSumExp":
        peak = node.emit(relax.op.max(value, axes, keepdims=True))
        shifted = node.emit(relax.op.exp(node.emit(relax.op.subtract(value, peak))))
        total = node.emit(relax.op.log(node.emit(relax.op.sum(shifted, axes, keepdims=True))))
        result = node.emit(relax.op.add(total, peak))
        return result if keep else node.reshape(result, [size for axis, size in enumerate(node.shape(result)) if axis not in axes])
    if node.op == "ReduceL1":
        value = node.emit(relax.op.abs(value))
    if node.op in ("ReduceL2", "ReduceSumSquare"):
        value = node.emit(relax.op.multiply(value, value))
    result = _PLAIN[node.op](value, axes, keepdims=keep)
    if node.op in ("ReduceL2", "ReduceLogSum"):
        return (relax.op.sqrt if node.op == "ReduceL2" else relax.op.log)(node.emit(result))
    return result


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
