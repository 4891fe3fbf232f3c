"""Pad in all modes, with widths and a fill that may be computed at run time."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal, Value
from ..vectors import Vector, counted_axes, spread

_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@converter("Pad", since=2)
def pad(node: Node) -> Value:
    value = node.tensor(0)
    rank, mode = node.rank(value), node.attr("mode", "constant")
    if mode not in _MODES:
        raise Refusal(f"mode {mode} is not known")
    if node.opset >= 11 and (node.at_run_time(1) or node.at_run_time(3)):
        return _pad_at_run_time(node, value, mode)
    pads = node.ints(1) if node.opset >= 11 else node.attr("pads")
    if node.has(3):
        axes = [node.axis(axis, rank) for axis in node.ints(3)]
        full = [0] * (2 * rank)
        for position, axis in enumerate(axes):
            full[axis], full[axis + rank] = pads[position], pads[position + len(axes)]
        pads = full
    fill = 0.0 if node.opset >= 11 else node.attr("value", 0.0)
    if node.opset >= 11 and node.at_run_time(2):
        fill = 0.0
    elif node.opset >= 11 and node.has(2):
        fill = node.constant(2).reshape(()).item()
    if not any(pads):
        return value
    low, high = [max(-p, 0) for p in pads[:rank]], [max(-p, 0) for p in pads[rank:]]
    if any(low) or any(high):  # negative padding crops
        shape = node.shape(value)
        value = node.emit(
            relax.op.strided_slice(value, list(range(rank)), low, [size - cut for size, cut in zip(shape, high, strict=True)], assume_inbound=True)
        )
    widths = [max(p, 0) for pair in zip(pads[:rank], pads[rank:], strict=True) for p in pair]
    if not any(widths):
        return value
    padded = node.emit(relax.op.nn.pad(value, widths, _MODES[mode], float(fill)))
    if mode != "constant" or node.opset < 11 or not node.at_run_time(2):
        return padded
    low, shape = widths[::2], node.shape(value)
    inside = [_inside(node, axis, node.shape(padded), low[axis], shape[axis]) for axis in range(rank) if widths[2 * axis] or widths[2 * axis + 1]]
    return _filled(node, inside, padded)


def _pad_at_run_time(node: Node, value: relax.Expr, mode: str) -> Value:
    """The widths are computed: along every axis, the positions that the result reads are gathered; negative widths crop."""
    shape = node.shape(value)
    rank, pads = len(shape), Vector.of(node, 1)
    count = len(pads) // 2
    axes = counted_axes(node, 3, rank, distinct=True) if node.has(3) else Vector(node, node.array(np.arange(rank), "int64"))
    halves = [pads.take(Vector(node, node.array(np.arange(count) + start, "int64"))) for start in (0, count)]
    low, high = (spread(half, axes, 0, rank) for half in halves)
    result = (Vector.sizes(node, shape) + low + high).dims()
    inside = []
    for axis, size in enumerate(result):
        extent = Vector.sizes(node, [shape[axis]]).take(0)
        place = Vector(node, node.emit(relax.op.arange(0, size, 1, "int64"))) - low.take(axis)
        if mode == "constant":
            mark = (place >= 0) & (place < extent)
            inside.append(node.reshape(mark.expr, [size if position == axis else 1 for position in range(rank)]))
        elif mode == "wrap":
            place = place - (place // extent) * extent
        elif mode == "reflect":  # there and back again: a period of 2 * (extent - 1)
            period = (extent * 2 - 2).at_least(1)
            place = place - (place // period) * period
            place = (place < extent).where(place, period - place)
        if mode in ("constant", "edge"):
            place = place.clip(0, extent - 1)
        value = node.emit(relax.op.take(value, place.expr, axis, mode="fast"))
    return _filled(node, inside, value) if mode == "constant" else value


def _inside(node: Node, axis: int, shape: list[Dim], low: int, size: Dim) -> relax.Expr:
    """Which positions of an axis of the padded `shape` hold data, to broadcast over it."""
    place = Vector(node, node.emit(relax.op.arange(0, shape[axis], 1, "int64")))
    mark = (place >= low) & (place < Vector.sizes(node, [node.dims.simplify(size + low)]).take(0))
    return node.reshape(mark.expr, [shape[axis] if position == axis else 1 for position in range(len(shape))])


def _filled(node: Node, inside: list[relax.Expr], value: relax.Expr) -> relax.Expr:
    """`value` where all of `inside` hold, elsewhere the fill (input 2; 0 without one)."""
    fill = node.reshape(node.tensor(2), []) if node.has(2) else node.scalar(0, node.dtype(value))
    mark = inside[0]
    for other in inside[1:]:
        mark = node.emit(relax.op.logical_and(mark, other))
    return relax.op.where(mark, value, fill)
