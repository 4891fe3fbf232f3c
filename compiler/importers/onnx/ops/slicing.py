"""Slice: bounds may be dynamic, steps may be negative (the axis is flipped first)."""

from __future__ import annotations

from ....tvm import relax, tirx
from ..node import Node
from ..registry import converter
from ..symbolic import LARGEST_DIM, Dim
from ..values import Host, Refusal, Value, host
from .shape import is_int, known_shape


@converter("Slice", since=10)
def slice_inputs(node: Node) -> Value:
    starts, ends = node.sizes(1), node.sizes(2)
    axes = node.ints(3) if node.has(3) else list(range(len(starts)))
    steps = node.ints(4) if node.has(4) else [1] * len(starts)
    return _slice(node, starts, ends, axes, steps)


@converter("Slice")
def slice_attributes(node: Node) -> Value:
    starts, ends = node.attr("starts"), node.attr("ends")
    return _slice(node, starts, ends, node.attr("axes") or list(range(len(starts))), [1] * len(starts))


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
