"""Resize and Upsample: images at whole multiples of their size, or by usual filters, as one operator; all else one axis after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from ....dialect.resample import COORDINATES, REACH, ROUNDINGS, ResizeAttrs, resize_axis
from ....tvm import is_constant, relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim, Ratio
from ..values import Host, Refusal, Value
from ..vectors import Vector

_METHODS = {"nearest": "nearest_neighbor", "linear": "linear", "cubic": "cubic"}


@dataclass(frozen=True)
class _Axis:
    """An axis and its new size. scale: new over old size as given, a number or a [1] float32 tensor; None where it is that of the two sizes."""

    axis: int
    size: Dim
    scale: float | relax.Expr | None = None


@converter("Resize", since=11)
def resize(node: Node) -> Value:
    x = node.tensor(0)
    shape = node.shape(x)
    axes = [node.axis(axis, len(shape)) for axis in node.attr("axes") or range(len(shape))]
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    coordinates = node.attr("coordinate_transformation_mode", "half_pixel")
    if node.has(3) and (node.at_run_time(3) or node.host(3).array.size):
        changes = _sized(node, shape, axes) if policy == "stretch" else _proportional(node, shape, axes, policy)
    else:
        changes = _scaled(node, 2, shape, axes)
        if coordinates == "align_corners" and not node.at_run_time(2) and not all(_whole(node, shape[change.axis], change) for change in changes):
            raise Refusal(
                "align_corners with a scale that gives no whole size: ONNX and ONNX Runtime disagree on it; export with `sizes` in place of `scales`"
            )
    attrs = ResizeAttrs(
        0,
        node.attr("mode", "nearest"),
        coordinates,
        node.attr("nearest_mode", "round_prefer_floor"),
        node.attr("cubic_coeff_a", -0.75),
        bool(node.attr("exclude_outside", 0)),
        bool(node.attr("antialias", 0)),
        node.attr("extrapolation_value", 0.0),
    )
    return _resize(node, x, changes, attrs)


@converter("Resize", since=10)
@converter("Upsample", since=9)
def resize_by_scales(node: Node) -> Value:
    """Before opset 11: asymmetric coordinates, rounded down; a nearest Resize that shrinks rounds up, as in ONNX Runtime."""
    x = node.tensor(0)
    shape = node.shape(x)
    mode = node.attr("mode", "nearest")
    return _resize(
        node, x, _scaled(node, 1, shape, list(range(len(shape)))), ResizeAttrs(0, "linear" if mode == "bilinear" else mode, "asymmetric", "simple")
    )


def _sized(node: Node, shape: list[Dim], axes: list[int]) -> list[_Axis]:
    sizes = node.runtime_sizes(node.with_dim(node.tensor(3), 0, len(axes))) if node.at_run_time(3) else node.sizes(3)
    if len(sizes) != len(axes):
        raise Refusal(f"{len(sizes)} sizes for {len(axes)} axes")
    return [_Axis(axis, size) for axis, size in zip(axes, sizes, strict=True)]


def _proportional(node: Node, shape: list[Dim], axes: list[int], policy: str) -> list[_Axis]:
    """One scale for all axes: the least or the greatest that a size asks for; sizes are rounded, halves up."""
    if policy not in ("not_larger", "not_smaller"):
        raise Refusal(f"keep_aspect_ratio_policy {policy} is not known")
    smaller, old = policy == "not_larger", [shape[axis] for axis in axes]
    sizes = None if node.at_run_time(3) else node.sizes(3)
    if sizes is not None and all(isinstance(dim, int) and dim > 0 for dim in (*sizes, *old)):
        ratios = [Fraction(int(size), int(dim)) for size, dim in zip(sizes, old, strict=True)]  # pyright: ignore[reportArgumentType]
        scale = min(ratios) if smaller else max(ratios)
        return [_Axis(axis, math.floor(scale * int(dim) + Fraction(1, 2)), float(scale)) for axis, dim in zip(axes, old, strict=True)]  # pyright: ignore[reportArgumentType]
    emit, op = node.emit, relax.op
    have = emit(op.astype(Vector.sizes(node, old).expr, "float64"))
    ratios = emit(op.divide(emit(op.astype(node.with_dim(node.tensor(3), 0, len(axes)), "float64")), have))
    scale = emit((op.min if smaller else op.max)(ratios, [0], keepdims=True))
    new = emit(op.floor(emit(op.add(emit(op.multiply(have, scale)), node.scalar(0.5, "float64")))))
    narrow = emit(op.astype(scale, "float32"))
    return [_Axis(axis, size, narrow) for axis, size in zip(axes, node.runtime_sizes(emit(op.astype(new, "int64"))), strict=True)]


def _scaled(node: Node, index: int, shape: list[Dim], axes: list[int]) -> list[_Axis]:
    """New sizes are old ones times the scales of input `index`, rounded down."""
    if node.at_run_time(index):
        scales = node.with_dim(node.tensor(index), 0, len(axes))
        sizes = _sizes_at_run_time(node, [shape[axis] for axis in axes], scales)
        picked = [node.emit(relax.op.take(scales, node.array(np.array([at]), "int64"), 0)) for at in range(len(axes))]
        return [_Axis(*change) for change in zip(axes, sizes, picked, strict=True)]
    scales = node.host(index).array.reshape(-1).tolist()
    if len(scales) != len(axes):
        raise Refusal(f"{len(scales)} scales for {len(axes)} axes")
    return [_scaled_axis(node, axis, shape[axis], scale) for axis, scale in zip(axes, scales, strict=True)]


def _scaled_axis(node: Node, axis: int, size: Dim, scale: float | Dim | Ratio) -> _Axis:
    if not isinstance(scale, (int, float)):
        ratio = scale if isinstance(scale, Ratio) else Ratio(scale, 1)
        new = node.dims.floor_divide(node.dims.simplify(size * ratio.numerator), ratio.denominator)
        exact = node.dims.equal(node.dims.simplify(new * ratio.denominator), node.dims.simplify(size * ratio.numerator))
        return _Axis(axis, new, None if exact else node.to_tensor(Host(np.array([ratio], object), "float32")))
    if not 0 < scale < math.inf:
        raise Refusal(f"scale {scale} is not positive")
    if isinstance(size, int):
        return _Axis(axis, math.floor(np.float32(size) * np.float32(scale)), float(scale))
    numerator, denominator = float(scale).as_integer_ratio()
    if denominator <= 256:
        return _Axis(axis, node.dims.floor_divide(node.dims.simplify(size * numerator), denominator), float(scale))
    return _Axis(axis, _sizes_at_run_time(node, [size], node.array(np.array([scale]), "float32"))[0], float(scale))


def _sizes_at_run_time(node: Node, old: list[Dim], scales: relax.Expr) -> list[Dim]:
    """Sizes are rounded down in float32, as in ONNX Runtime."""
    have = node.emit(relax.op.astype(Vector.sizes(node, old).expr, "float32"))
    return node.runtime_sizes(node.emit(relax.op.astype(node.emit(relax.op.floor(node.emit(relax.op.multiply(have, scales)))), "int64")))


def _resize(node: Node, x: relax.Expr, changes: list[_Axis], attrs: ResizeAttrs) -> Value:
    if attrs.mode not in REACH or attrs.coordinates not in COORDINATES or attrs.rounding not in ROUNDINGS:
        raise Refusal(f"mode {attrs.mode} with {attrs.coordinates} and {attrs.rounding} is not known")
    shape, crop, dtype = node.shape(x), attrs.coordinates == "tf_crop_and_resize", node.dtype(x)
    if crop and not node.has(1):
        raise Refusal("tf_crop_and_resize needs the input 'roi'")
    changes = [change for change in changes if crop or not _unchanged(node, shape[change.axis], change)]
    if any(shape[change.axis] == 0 and change.size != 0 for change in changes):
        raise Refusal("an empty axis cannot be resized")
    if not changes:
        return x
    if _usual(node, shape, changes, attrs, dtype):
        return _image(node, x, changes, attrs)
    if attrs.mode == "nearest" or dtype in ("float32", "float64"):
        return _along_axes(node, x, changes, attrs)
    if attrs.antialias:
        raise Refusal(f"antialias of {dtype} is not supported")
    wide = "float32" if dtype in ("int8", "uint8", "int16", "uint16") else "float64"
    result = _along_axes(node, node.emit(relax.op.astype(x, wide)), changes, attrs)
    low, high = (float(bound) for bound in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    return relax.op.astype(node.emit(relax.op.clip(result, low, high)), dtype)


def _unchanged(node: Node, old: Dim, change: _Axis) -> bool:
    return node.dims.equal(old, change.size) and (change.scale is None or change.scale == 1.0 if not isinstance(change.scale, relax.Expr) else False)


def _whole(node: Node, old: Dim, change: _Axis) -> bool:
    """Whether the scale is exactly new over old size."""
    if isinstance(change.scale, relax.Expr):
        return False
    if change.scale is None:
        return True
    numerator, denominator = change.scale.as_integer_ratio()
    return node.dims.equal(node.dims.simplify(change.size * denominator), node.dims.simplify(old * numerator))


def _usual(node: Node, shape: list[Dim], changes: list[_Axis], attrs: ResizeAttrs, dtype: str) -> bool:
    """What Relax's resize2d does the same: float32 images by a linear or cubic filter, and nearest at whole multiples."""
    if len(shape) != 4 or any(change.axis < 2 for change in changes) or attrs.exclude or attrs.antialias or dtype != "float32":
        return False
    if not all(
        _whole(node, shape[change.axis], change) and (isinstance(change.size, int) == isinstance(shape[change.axis], int)) for change in changes
    ):
        return False
    if attrs.mode != "nearest":
        return attrs.coordinates in ("half_pixel", "align_corners", "asymmetric") and not any(change.size == 0 for change in changes)
    usual = attrs.coordinates == "half_pixel" or attrs.coordinates == "asymmetric" and attrs.rounding in ("floor", "simple")
    return usual and all(_multiple(node, shape[change.axis], change.size) for change in changes)


def _multiple(node: Node, old: Dim, new: Dim) -> bool:
    if isinstance(old, int) and isinstance(new, int):
        return old > 0 and new % old == 0
    return any(node.dims.equal(new, node.dims.simplify(old * factor)) for factor in (1, 2, 4, 8))


def _image(node: Node, x: relax.Expr, changes: list[_Axis], attrs: ResizeAttrs) -> Value:
    size = node.shape(x)[2:]
    for change in changes:
        size[change.axis - 2] = change.size
    return relax.op.image.resize2d(
        x,
        size,
        layout="NCHW",
        method=_METHODS[attrs.mode],
        coordinate_transformation_mode=attrs.coordinates,
        rounding_method="" if attrs.mode != "nearest" else "floor" if attrs.rounding == "simple" else attrs.rounding,
        cubic_alpha=attrs.cubic,
        cubic_exclude=0,
    )


def _along_axes(node: Node, x: relax.Expr, changes: list[_Axis], attrs: ResizeAttrs) -> relax.Expr:
    """Axes that shrink come first, those that grow most last."""
    shape = node.shape(x)
    ordered = changes
    if all(isinstance(dim, int) for change in changes for dim in (change.size, shape[change.axis])):
        ordered = sorted(changes, key=lambda change: float(change.size) / max(float(shape[change.axis]), 1.0))  # pyright: ignore[reportArgumentType]
    for change in ordered:
        scale = _scale_tensor(node, shape[change.axis], change)
        roi = _region(node, change.axis, len(shape), attrs)
        reach = _reach(node, change, scale, attrs)
        options = replace(attrs, axis=change.axis, fractional=isinstance(change.scale, relax.Expr))
        x = node.emit(resize_axis(x, change.size, reach, scale, roi, options))
    return x


def _scale_tensor(node: Node, old: Dim, change: _Axis) -> relax.Expr:
    if isinstance(change.scale, relax.Expr):
        return change.scale
    if change.scale is not None:
        return node.array(np.array([change.scale]), "float32")
    if isinstance(old, int) and isinstance(change.size, int):
        return node.array(np.array([np.float32(change.size) / np.float32(old)]), "float32")
    new, had = (node.emit(relax.op.astype(Vector.sizes(node, [dim]).expr, "float32")) for dim in (change.size, old))
    return node.emit(relax.op.divide(new, had))


def _region(node: Node, axis: int, rank: int, attrs: ResizeAttrs) -> relax.Expr:
    """[start, end] of the axis from the input 'roi', which lists those of `axes`, or of all axes."""
    if attrs.coordinates != "tf_crop_and_resize":
        return node.array(np.array([0, 1]), "float32")
    roi = node.tensor(1)
    if node.rank(roi) != 1:
        raise Refusal(f"roi has {node.rank(roi)} dims, expected one")
    roi = roi if node.dtype(roi) == "float32" else node.emit(relax.op.astype(roi, "float32"))
    listed = node.attr("axes")
    count = len(listed) if listed else rank
    roi = node.with_dim(roi, 0, 2 * count)
    at = [node.axis(value, rank) for value in listed].index(axis) if listed else axis
    return node.emit(relax.op.take(roi, node.array(np.array([at, at + count]), "int64"), 0))


def _reach(node: Node, change: _Axis, scale: relax.Expr, attrs: ResizeAttrs) -> Dim:
    """Taps on each side: with antialias, the filter's reach over the scale, rounded up."""
    reach = REACH[attrs.mode]
    if not attrs.antialias or not reach:
        return reach
    if is_constant(scale):
        return math.ceil(reach / min(float(scale.value.numpy()[0]), 1.0))
    narrow = node.emit(relax.op.minimum(scale, node.scalar(1, "float32")))
    wide = node.emit(relax.op.ceil(node.emit(relax.op.divide(node.scalar(reach, "float32"), narrow))))
    return node.runtime_sizes(node.emit(relax.op.astype(wide, "int64")))[0]
