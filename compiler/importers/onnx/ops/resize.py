"""Resize and Upsample over the spatial axes of channels-first images."""

from __future__ import annotations

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim, Ratio
from ..values import Refusal, Value

_METHODS = {"nearest": "nearest_neighbor", "linear": "linear", "cubic": "cubic"}
_COORDINATES = {"half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "tf_half_pixel_for_nn"}


@converter("Resize", since=11)
def resize(node: Node) -> Value:
    x = node.tensor(0)
    shape = node.shape(x)
    coordinates, mode = node.attr("coordinate_transformation_mode", "half_pixel"), node.attr("mode", "nearest")
    if node.attr("antialias", 0) or coordinates not in _COORDINATES:
        raise Refusal("antialias is not supported" if node.attr("antialias", 0) else f"coordinate_transformation_mode {coordinates} is not supported")
    if node.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refusal(f"keep_aspect_ratio_policy {node.attr('keep_aspect_ratio_policy')} is not supported")
    axes = [node.axis(axis, len(shape)) for axis in node.attr("axes") or range(len(shape))]
    target = list(shape)
    if node.has(3) and node.sizes(3):
        for axis, size in zip(axes, node.sizes(3), strict=True):
            target[axis] = size
    else:
        for axis, scale in zip(axes, node.host(2).array.tolist(), strict=True):
            target[axis] = _scaled(node, shape[axis], scale)
    return _resize(node, x, target, mode, coordinates, node.attr("nearest_mode", "round_prefer_floor"))


@converter("Resize", since=10)
@converter("Upsample", since=9)
def resize_by_scales(node: Node) -> Value:
    """Before opset 11: asymmetric coordinates, rounded down."""
    x = node.tensor(0)
    target = [_scaled(node, size, scale) for size, scale in zip(node.shape(x), node.host(1).array.tolist(), strict=True)]
    return _resize(node, x, target, node.attr("mode", "nearest"), "asymmetric", "floor")


def _scaled(node: Node, size: Dim, scale: float | Ratio) -> Dim:
    """floor(size * scale). The scale must divide exactly, as the generated code takes it from the two sizes."""
    numerator, denominator = (scale.numerator, scale.denominator) if isinstance(scale, Ratio) else scale.as_integer_ratio()
    result = node.dims.floor_divide(node.dims.simplify(size * numerator), denominator)
    if not node.dims.equal(result * denominator, size * numerator):
        raise Refusal(f"scale {scale} does not give a whole size of {size}; export with `sizes` in place of `scales`")
    return result


def _resize(node: Node, x: relax.Expr, target: list[Dim], mode: str, coordinates: str, rounding: str) -> Value:
    shape = node.shape(x)
    if all(node.dims.equal(a, b) for a, b in zip(shape, target, strict=True)):
        return x
    if not all(node.dims.equal(a, b) for a, b in zip(shape[:2], target[:2], strict=True)) or not 3 <= len(shape) <= 5:
        raise Refusal(f"only spatial axes of rank 3 to 5 can be resized, not {shape} to {target}")
    options = {
        "method": _METHODS[mode],
        "coordinate_transformation_mode": coordinates,
        "rounding_method": rounding if mode == "nearest" else "",
        "cubic_alpha": node.attr("cubic_coeff_a", -0.75),
        "cubic_exclude": node.attr("exclude_outside", 0),
    }
    if len(shape) == 5:
        return relax.op.image.resize3d(x, target[2:], layout="NCDHW", **options)
    if len(shape) == 4:
        return relax.op.image.resize2d(x, target[2:], layout="NCHW", **options)
    flat = node.emit(relax.op.image.resize2d(node.reshape(x, [*shape[:2], 1, shape[2]]), [1, target[2]], layout="NCHW", **options))
    return node.reshape(flat, target)
