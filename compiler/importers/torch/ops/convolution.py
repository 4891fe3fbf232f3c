"""Convolutions, also transposed ones, over one to three axes, with or without a batch."""

from __future__ import annotations

from typing import Any

from torch import fx

from ....tvm import relax
from .pooling import batched, per_axis, unbatched
from .shape import argument

_op = relax.op.nn
_CONV = {1: _op.conv1d, 2: _op.conv2d, 3: _op.conv3d}
_TRANSPOSED = {1: _op.conv1d_transpose, 2: _op.conv2d_transpose, 3: _op.conv3d_transpose}


def _convolved(translator: Any, node: fx.Node, geometry: list[Any], groups: int, transposed: bool = False, extra: Any = 0) -> relax.Expr:
    """x: [N, C, *S] or [C, *S], weight: [O, C / groups, *K], or [C, O / groups, *K] where transposed. geometry: stride, padding, dilation."""
    x, weight = translator.value(node.args[:2])
    bias, emit = translator.value(argument(node, 2, "bias")), translator.emit
    axes = len(weight.ty.shape) - 2
    if axes not in _CONV:
        raise NotImplementedError(f"a convolution over {axes} axes")
    if any(isinstance(value, str) for value in geometry):
        raise NotImplementedError("padding that is named")
    stride, padding, dilation = (per_axis(value, axes) for value in geometry)
    data = batched(translator, x, axes)
    options = {"strides": stride, "dilation": dilation, "groups": groups}
    if transposed:
        result = _transposed(translator, data, weight, padding, per_axis(extra, axes), options)
    else:
        result = emit(_CONV[axes](data, weight, padding=padding * 2, **options))
    if bias is not None:
        result = emit(relax.op.add(result, emit(relax.op.reshape(bias, [1, -1, *[1] * axes]))))
    return unbatched(translator, result, x, axes)


def _transposed(translator: Any, data: relax.Expr, weight: relax.Expr, padding: list[int], extra: list[int], options: dict[str, Any]) -> relax.Expr:
    """extra: elements more at the end of every axis; as many as a stride or more take back what the padding cuts off there, and zeros follow."""
    ends, behind, extra = list(padding), [0] * len(padding), list(extra)
    for axis, stride in enumerate(options["strides"]):
        if extra[axis] >= stride:
            behind[axis], ends[axis], extra[axis] = max(extra[axis] - ends[axis], 0), max(ends[axis] - extra[axis], 0), 0
    result = translator.emit(_TRANSPOSED[len(padding)](data, weight, padding=padding + ends, output_padding=extra, **options))
    if not any(behind):
        return result
    return translator.emit(relax.op.nn.pad(result, [0, 0, 0, 0, *(width for more in behind for width in (0, more))], "constant", 0.0))


def conv(translator: Any, node: fx.Node) -> relax.Expr:
    """conv1d, conv2d (x, weight, bias, stride, padding, dilation, groups)."""
    return _convolved(translator, node, [argument(node, at, name, value) for at, name, value in _GEOMETRY], argument(node, 6, "groups", 1))


_GEOMETRY = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def convolution(translator: Any, node: fx.Node) -> relax.Expr:
    """convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    *geometry, transposed, extra, groups = node.args[3:9]
    return _convolved(translator, node, geometry, groups, bool(transposed), extra)


CONVERTERS = {**{f"conv{axes}d.default": conv for axes in _CONV}, "convolution.default": convolution}
