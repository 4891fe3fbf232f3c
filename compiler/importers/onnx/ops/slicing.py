"""Slice: bounds may be dynamic, steps may be negative (the axis is flipped first)."""

from __future__ import annotations

import numpy as np

from ....program import LARGEST_DIM
from ....tvm import relax, tirx
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Host, Refusal, Value, host
from ..vectors import Vector, counted_axes, spread
from .shape import is_int, known_shape


@converter("Slice", since=10)
def slice_inputs(node: Node) -> Value:
    if any(node.at_run_time(index) for index in (1, 2, 3, 4)):
        return _slice_at_run_time(node)
    starts, ends = node.sizes(1), node.sizes(2)
    axes = node.ints(3) if node.has(3) else list(range(len(starts)))
    steps = node.ints(4) if node.has(4) else [1] * len(starts)
    return _slice(node, starts, ends, axes, steps)


@converter("Slice")
def slice_attributes(node: Node) -> Value:
    starts, ends = node.attr("starts"), node.attr("ends")
    return _slice(node, starts, ends, node.attr("axes") or list(range(len(starts))), [1] * len(starts))


def _slice_at_run_time(node: Node) -> Value:
    """Bounds that the model computes. Positions are clamped while the model runs, so that they are sizes there."""
    if node.at_run_time(3) or node.at_run_time(4):
        return _gather_slice(node)
    tensor = node.tensor(0)
    shape, starts, ends = node.shape(tensor), Vector.of(node, 1), Vector.of(node, 2)
    axes = [node.axis(axis, len(shape)) for axis in (node.ints(3) if node.has(3) else range(len(starts)))]
    steps = node.ints(4) if node.has(4) else [1] * len(axes)
    if 0 in steps:
        raise Refusal("a step is zero")
    size = Vector.sizes(node, [shape[axis] for axis in axes])
    backward = np.array([step < 0 for step in steps])
    low, high = (np.where(backward, least, 0) for least in (0, -1)), np.where(backward, 1, 0)
    first, last = (
        (bound < 0).where(bound + size, bound).clip(Vector(node, node.array(least, "int64")), size - high)
        for bound, least in zip((starts, ends), low, strict=True)
    )
    if backward.any():  # position p of the axis is size-1-p of the flipped one
        marks = Vector(node, node.array(backward.astype(np.int64), "int64")) == 1
        first, last = (marks.where(size - bound - 1, bound) for bound in (first, last))
        tensor = _flip_all(node, tensor, [axis for axis, step in zip(axes, steps, strict=True) if step < 0])
    begins = first.clip(0, size).dims()
    stops = last.clip(Vector(node, first.expr).clip(0, size), size).dims()
    return relax.op.strided_slice(tensor, axes, begins, stops, [abs(step) for step in steps], assume_inbound=True)


def _gather_slice(node: Node) -> Value:
    """Even the axes or the steps are computed: the positions of every axis are gathered."""
    tensor = node.tensor(0)
    shape, starts, ends = node.shape(tensor), Vector.of(node, 1), Vector.of(node, 2)
    rank, size = len(shape), Vector.sizes(node, shape)
    axes = counted_axes(node, 3, rank, distinct=True) if node.has(3) else Vector(node, node.array(np.arange(len(starts)), "int64"))
    step = spread(Vector.of(node, 4), axes, 1, rank) if node.has(4) else Vector(node, node.array(np.ones(rank), "int64"))
    step = step.clip(-LARGEST_DIM, LARGEST_DIM)  # longer ones leave every axis, too, and their sums could overflow
    backward = step < 0
    last = size - backward.integers()
    begin, end = (
        (bound < 0).where(bound + size, bound).clip(least, last)
        for bound, least in ((spread(starts, axes, 0, rank), 0), (spread(ends, axes, size, rank), backward.integers() * -1))
    )
    counts = ((end - begin + step + backward.where(1, -1)) // step).at_least(0)
    for axis, count in enumerate(counts.dims()):
        places = Vector(node, node.emit(relax.op.arange(0, count, 1, "int64"))) * step.take(axis) + begin.take(axis)
        tensor = node.emit(relax.op.take(tensor, places.expr, axis, mode="fast"))
    return tensor


def _slice(node: Node, starts: list[Dim], ends: list[Dim], axes: list[int], steps: list[int]) -> Value:
    value = node.value(0)
    shape = known_shape(node, value)
    axes = [node.axis(axis, len(shape)) for axis in axes]
    if isinstance(value, Host) and all(isinstance(bound, int) for bound in [*starts, *ends]):
        index = [slice(None)] * len(shape)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index[axis] = slice(start, None if step < 0 and end < -shape[axis] else end, step)
        return host(value.array[tuple(index)], value.dtype)
    tensor = node.tensor(0)
    flipped = [axis for axis, step in zip(axes, steps, strict=True) if step < 0]
    if 0 in steps:
        raise Refusal("a step is zero")
    if flipped:
        tensor = node.emit(relax.op.flip(tensor, flipped[0])) if len(flipped) == 1 else _flip_all(node, tensor, flipped)
    begins, stops = [], []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        begin, stop = _bounds(node, start, end, step, shape[axis])
        begins.append(begin)
        stops.append(stop)
    kept = [i for i, axis in enumerate(axes) if not (is_int(begins[i], 0) and abs(steps[i]) == 1 and node.dims.equal(stops[i], shape[axis]))]
    if not kept:
        return tensor
    return relax.op.strided_slice(
        tensor, [axes[i] for i in kept], [begins[i] for i in kept], [stops[i] for i in kept], [abs(steps[i]) for i in kept], assume_inbound=True
    )


def _flip_all(node: Node, tensor: relax.Expr, axes: list[int]) -> relax.Expr:
    for axis in axes:
        tensor = node.emit(relax.op.flip(tensor, axis))
    return tensor


def _bounds(node: Node, start: Dim, end: Dim, step: int, size: Dim) -> tuple[Dim, Dim]:
    """First and last-plus-one position, inside of 0..size; of the flipped axis when the step is negative."""
    dims = node.dims
    if step > 0:
        low = _clamp(node, start, size, 0)
        return low, dims.maximum(_clamp(node, end, size, 0), low)
    # position p of the axis is size-1-p of the flipped one; an end of -size-1 or less means "beyond the front"
    first = dims.simplify(size - 1 - _clamp(node, start, size, 1))
    beyond = isinstance(end, int) and end <= -LARGEST_DIM
    last = dims.simplify(size - 1 - (-1 if beyond else _clamp(node, end, size, 1, lowest=-1)))
    return first, dims.maximum(last, first)


def _clamp(node: Node, position: Dim, size: Dim, margin: int, lowest: int = 0) -> Dim:
    """A position counted from the front, in lowest..size-margin."""
    dims = node.dims
    if isinstance(position, int):
        if position >= LARGEST_DIM:  # "to the end"
            return dims.simplify(size - margin)
        counted = position if position >= 0 else dims.simplify(size + position)
    elif dims.non_negative(position):
        counted = position
    elif dims.compare("<", position, 0):
        counted = dims.simplify(size + position)
    else:
        counted = dims.simplify(tirx.Select(position < 0, size + position, position))
    return dims.maximum(dims.minimum(counted, dims.simplify(size - margin)), lowest)
