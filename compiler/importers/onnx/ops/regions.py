"""Regions of images that data choose: RoiAlign, MaxRoiPool and deformable convolution."""

from __future__ import annotations

import numpy as np

from ....dialect.grid_sample import grid_sample
from ....dialect.regions import roi_align, roi_max
from ....program import LARGEST_DIM
from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal
from ..vectors import Vector

#: a region reads at most so many places along an axis for each element of the image there, which counts for at least `_SMALL`: the work is bounded by the sizes then
_DENSEST, _SMALL = 16, 64
#: of the attribute sampling_ratio
_MOST_SAMPLES = 256


@converter("RoiAlign", since=10)
def region_align(node: Node) -> relax.Expr:
    """x [N, C, H, W], regions [R, 4] as x1, y1, x2, y2, and the image of each [R]"""
    x, regions, emit, op = node.tensor(0), node.tensor(1), node.emit, relax.op
    regions = node.with_dim(regions, 1, 4 if node.op == "RoiAlign" else 5)
    dtype = _checked_types(node, x, regions)
    count = node.shape(regions)[0]
    mode, ratio = node.attr("mode", "avg"), node.attr("sampling_ratio", 0)
    if mode not in ("avg", "max") or not 0 <= ratio <= _MOST_SAMPLES:
        raise Refusal(f"mode {mode} with sampling_ratio {ratio} is not supported (avg and max, 0..{_MOST_SAMPLES})")
    size = (node.attr("output_height", 1), node.attr("output_width", 1))
    if min(size) < 1:
        raise Refusal(f"an output of {size[0]} by {size[1]} bins")
    half_pixel = node.opset >= 16 and node.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    scaled = emit(op.multiply(regions, node.scalar(node.attr("spatial_scale", 1.0), dtype)))
    if half_pixel:
        scaled = emit(op.subtract(scaled, node.scalar(0.5, dtype)))
    starts, ends = _columns(node, scaled, [1, 0]), _columns(node, scaled, [3, 2])
    extents = emit(op.subtract(ends, starts))
    if not half_pixel:
        extents = emit(op.maximum(extents, node.scalar(1, dtype)))
    bins = emit(op.divide(extents, node.array(np.array(size), dtype)))
    most: tuple[Dim, Dim] = (ratio, ratio)
    if ratio:
        counts = emit(op.full([count, 2], node.scalar(ratio, "int64"), "int64"))
    else:
        counts = emit(op.astype(emit(op.clip(emit(op.ceil(bins)), 0.0, float(LARGEST_DIM))), "int64"))
        found = Vector(node, emit(op.max(counts, [0]))).at_least(0)
        limit = Vector.sizes(node, node.shape(x)[2:]).at_least(_SMALL) * _DENSEST // np.array(size) + 1
        rows, columns = (limit < found).where(-1, found).dims()  # -1 raises
        most = (rows, columns)
    images = _images(node, node.tensor(2), node.shape(x)[0], count)
    return roi_align(x, starts, bins, counts, images, size, most, mode == "max")


@converter("MaxRoiPool")
def max_region_pool(node: Node) -> relax.Expr:
    """x [N, C, H, W], regions [R, 5] as image, x1, y1, x2, y2. Bins are rounded outwards; 0 for those without elements."""
    x, regions, emit, op = node.tensor(0), node.tensor(1), node.emit, relax.op
    regions = node.with_dim(regions, 1, 4 if node.op == "RoiAlign" else 5)
    dtype = _checked_types(node, x, regions)
    shape, count, size = node.shape(x), node.shape(regions)[0], node.attr("pooled_shape")
    corners = emit(op.multiply(_columns(node, regions, [2, 1, 4, 3]), node.scalar(node.attr("spatial_scale", 1.0), dtype)))
    half, one = node.scalar(0.5, dtype), node.scalar(1, dtype)
    magnitude = emit(op.floor(emit(op.add(emit(op.abs(corners)), half))))  # halves away from zero
    corners = emit(op.multiply(emit(op.sign(corners)), magnitude))
    starts, ends = _columns(node, corners, [0, 1]), _columns(node, corners, [2, 3])
    extents = emit(op.maximum(emit(op.add(emit(op.subtract(ends, starts)), one)), one))
    bins = node.reshape(emit(op.divide(extents, node.array(np.array(size), dtype))), [count, 2, 1])
    starts = node.reshape(starts, [count, 2, 1])
    sides = node.reshape(emit(op.astype(emit(op.shape_to_tensor(relax.ShapeExpr(shape[2:]))), dtype)), [1, 2, 1])

    def edge(offset: int, rounded: object) -> relax.Expr:
        place = node.array(np.arange(max(size))[None, None] + offset, dtype)
        at = emit(op.add(emit(rounded(emit(op.multiply(place, bins)))), starts))  # type: ignore[operator]
        inside = emit(op.minimum(emit(op.maximum(at, node.scalar(0, dtype))), sides))
        return emit(op.astype(inside, "int64"))

    firsts, lasts = edge(0, op.floor), edge(1, op.ceil)
    spans = emit(op.max(emit(op.subtract(lasts, firsts)), [0, 2]))
    most = node.runtime_sizes(emit(op.maximum(spans, node.scalar(0, "int64"))))
    images = emit(op.astype(_columns(node, regions, [0]), "int64"))
    return roi_max(x, firsts, lasts, _images(node, images, shape[0], count), (size[0], size[1]), (most[0], most[1]))


def _checked_types(node: Node, x: relax.Expr, regions: relax.Expr) -> str:
    dtype = node.dtype(x)
    if dtype not in ("float32", "float64") or node.dtype(regions) != dtype:
        raise Refusal(f"images of {dtype} with regions of {node.dtype(regions)} are not supported")
    if node.rank(x) != 4 or node.rank(regions) != 2:
        raise Refusal(f"images of shape {node.shape(x)} with regions of shape {node.shape(regions)}")
    return dtype


def _columns(node: Node, rows: relax.Expr, which: list[int]) -> relax.Expr:
    return node.emit(relax.op.take(rows, node.array(np.array(which), "int64"), 1))


def _images(node: Node, images: relax.Expr, batch: Dim, count: Dim) -> relax.Expr:
    """[count] int64 in 0..batch-1; others raise at run time."""
    images = node.with_dim(node.reshape(images, [node.dims.product(node.shape(images))]), 0, count)
    return node.emit(relax.op.take(node.emit(relax.op.arange(0, batch, 1, "int64")), images, 0, mode="fast"))


@converter("DeformConv", since=19)
def deformable_convolution(node: Node) -> relax.Expr:
    """x [N, C, H, W], weight [O, C / groups, kh, kw], offsets [N, G * kh * kw * 2, oh, ow], bias [O], mask [N, G * kh * kw, oh, ow].

    All taps are sampled (bilinear, 0 outside) into columns, which meet the weight in one product.
    """
    x, weight, offsets, emit, op = node.tensor(0), node.tensor(1), node.tensor(2), node.emit, relax.op
    shape, dtype = node.shape(x), node.dtype(x)
    if len(shape) != 4:
        raise Refusal(f"{len(shape) - 2} spatial axes; 2 are supported")
    for axis, width in enumerate(node.attr("kernel_shape") or [], 2):
        weight = node.with_dim(weight, axis, width)
    features, depth, kh, kw = node.static(node.shape(weight), "the weight")
    groups, offset_groups = node.attr("group", 1), node.attr("offset_group", 1)
    if shape[1] != depth * groups or depth * groups % offset_groups or features % groups:
        raise Refusal(f"x of shape {shape} and a weight of shape {[features, depth, kh, kw]} with {groups} groups and {offset_groups} of offsets")
    strides, dilations, pads = node.attr("strides") or [1, 1], node.attr("dilations") or [1, 1], node.attr("pads") or [0] * 4
    taps = kh * kw
    rows, columns = (
        node.dims.simplify((shape[2 + axis] + pads[axis] + pads[axis + 2] - dilations[axis] * ((kh, kw)[axis] - 1) - 1) // strides[axis] + 1)
        for axis in (0, 1)
    )
    places = [shape[0], offset_groups * taps * 2, rows, columns]
    for axis, dim in enumerate(places):
        offsets = node.with_dim(offsets, axis, dim)
    batch = node.dims.simplify(shape[0] * offset_groups)
    # offsets come as (row, column); the grid has the last axis first
    offsets = emit(op.take(node.reshape(offsets, [batch, taps, 2, rows, columns]), node.array(np.array([1, 0]), "int64"), 2))
    offsets = emit(op.permute_dims(offsets, [0, 1, 3, 4, 2]))
    grid = emit(op.add(offsets, _tap_places(node, (kh, kw), rows, columns, strides, dilations, pads, dtype)))
    images = node.reshape(x, [batch, depth * groups // offset_groups, *shape[2:]])
    grid = node.reshape(grid, [batch, node.dims.simplify(taps * rows), columns, 2])
    sampled = emit(grid_sample(images, grid, "linear", "zeros", False, elements=True))
    area = node.dims.simplify(rows * columns)
    if node.has(4):
        mask = node.tensor(4)
        for axis, dim in enumerate([shape[0], offset_groups * taps, rows, columns]):
            mask = node.with_dim(mask, axis, dim)
        parts = node.reshape(sampled, [batch, depth * groups // offset_groups, taps, area])
        sampled = emit(op.multiply(parts, node.reshape(mask, [batch, 1, taps, area])))
    factors = node.reshape(sampled, [shape[0], groups, depth * taps, area])
    product = emit(op.matmul(node.reshape(weight, [1, groups, features // groups, depth * taps]), factors))
    result = node.reshape(product, [shape[0], features, rows, columns])
    return op.add(result, node.per_channel(3, 4)) if node.has(3) else result


def _tap_places(
    node: Node, kernel: tuple[int, int], rows: Dim, columns: Dim, strides: list[int], dilations: list[int], pads: list[int], dtype: str
) -> relax.Expr:
    """[taps, rows, columns, 2] (to broadcast): where a tap lies without its offset, as column and row."""
    emit, op = node.emit, relax.op
    taps = [[column * dilations[1] - pads[1], row * dilations[0] - pads[0]] for row in range(kernel[0]) for column in range(kernel[1])]
    places = node.array(np.array(taps).reshape(-1, 1, 1, 2), dtype)
    for size, shape, step in ((rows, [1, rows, 1, 1], [0, strides[0]]), (columns, [1, 1, columns, 1], [strides[1], 0])):
        index = node.reshape(emit(op.astype(emit(op.arange(0, size, 1, "int64")), dtype)), shape)
        places = emit(op.add(places, emit(op.multiply(index, node.array(np.array(step), dtype)))))
    return places
