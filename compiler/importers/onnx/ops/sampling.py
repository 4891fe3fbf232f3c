"""Images sampled at computed places: GridSample and AffineGrid."""

from __future__ import annotations

import numpy as np

from ....dialect.grid_sample import PADDINGS, TAPS, grid_sample
from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal
from ..vectors import Vector

_MODES = {"bilinear": "linear", "bicubic": "cubic"}


@converter("GridSample", since=16)
def grid_sampled(node: Node) -> relax.Expr:
    """x [N, C, *S], grid [N, *O, len(S)]"""
    x, grid = node.tensor(0), node.tensor(1)
    shape, places = node.shape(x), node.shape(grid)
    mode, padding = node.attr("mode"), node.attr("padding_mode", "zeros")
    mode = _MODES.get(mode, mode)
    if mode not in TAPS or padding not in PADDINGS:
        raise Refusal(f"mode {mode} with padding_mode {padding} is not known")
    if len(shape) != len(places) or len(shape) < 3:
        raise Refusal(f"x of shape {shape} with a grid of shape {places}")
    dtype = node.dtype(x)
    if dtype not in ("float32", "float64") and mode != "nearest":
        raise Refusal(f"mode {mode} of {dtype} is not supported")
    grid = node.with_dim(node.with_dim(grid, len(places) - 1, len(shape) - 2), 0, shape[0])
    return grid_sample(x, grid, mode, padding, bool(node.attr("align_corners", 0)))


@converter("AffineGrid", since=20)
def affine_grid(node: Node) -> relax.Expr:
    """theta [N, D, D + 1], size [N, C, *S] with D = len(S) -> [N, *S, D]: theta times (place along every axis, the last one first, 1)."""
    theta, sizes = node.tensor(0), node.sizes(1)
    spatial, dtype, emit = sizes[2:], node.dtype(theta), node.emit
    count = len(spatial)
    if count < 1 or node.static(node.shape(theta)[1:], "the shape of 'theta'") != [count, count + 1]:
        raise Refusal(f"theta of shape {node.shape(theta)} with {len(sizes)} sizes")
    theta = node.with_dim(theta, 0, sizes[0])

    def column(at: int) -> relax.Expr:
        picked = emit(relax.op.take(theta, node.array(np.array([at]), "int64"), 2))
        return node.reshape(picked, [sizes[0], *[1] * count, count])

    result = column(count)
    for axis, size in enumerate(spatial):
        places = node.reshape(_spread(node, size, dtype), [size if at == axis + 1 else 1 for at in range(count + 2)])
        result = emit(relax.op.add(result, emit(relax.op.multiply(places, column(count - 1 - axis)))))
    return result


def _spread(node: Node, size: Dim, dtype: str) -> relax.Expr:
    """[size] places from -1 to 1: of the outermost elements' middles with align_corners (0 for a single one, as in PyTorch), else of their outer edges."""
    emit, op = node.emit, relax.op
    index = emit(op.astype(emit(op.arange(0, size, 1, "int64")), dtype))
    extent = emit(op.astype(Vector.sizes(node, [size]).expr, dtype))
    one, two = node.scalar(1, dtype), node.scalar(2, dtype)
    doubled = emit(op.multiply(index, two))
    less = emit(op.subtract(extent, one))
    if node.attr("align_corners", 0):
        return emit(op.divide(emit(op.subtract(doubled, less)), emit(op.maximum(less, one))))
    return emit(op.divide(emit(op.subtract(doubled, less)), extent))
