"""`tcompile.resize_axis`: one axis of a tensor at another size, by ONNX's Resize: every element is a weighted sum of a few of the old ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..tvm import operator_attrs, register_operator, relax, te, tirx

NAME = "tcompile.resize_axis"
#: taps on each side of a position, where the filter is not stretched
REACH = {"nearest": 0, "linear": 1, "cubic": 2}
COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)
#: `simple` is the rounding of Resize before opset 11: down where the axis grows, up where it shrinks
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple")


@dataclass(frozen=True)
class ResizeAttrs:
    """mode: a key of REACH. coordinates: one of COORDINATES. rounding: one of ROUNDINGS, for nearest. cubic: the coefficient a of the cubic filter. exclude: taps outside have
    no weight, and the others add up to 1. antialias: the filter is stretched by 1 / scale where the axis shrinks. extrapolation: what positions outside have with
    tf_crop_and_resize. fractional: align_corners takes scale times the old size for the new one, as ONNX's reference does.
    """

    axis: int
    mode: str = "nearest"
    coordinates: str = "half_pixel"
    rounding: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude: bool = False
    antialias: bool = False
    extrapolation: float = 0.0
    fractional: bool = False


def resize_axis(x: relax.Expr, size: Any, reach: Any, scale: relax.Expr, roi: relax.Expr, attrs: ResizeAttrs) -> relax.Call:
    """x: [..., n at `axis`, ...] (of floats, but for nearest), scale: [1] float32, roi: [2] float32, start and end as parts of the axis -> [..., size, ...].

    reach: taps on each side, an int or an expression: REACH, times 1 / scale rounded up with antialias. Coordinates are float32, as in onnxruntime; the
    filters are those of ONNX's Resize.
    """
    return relax.Call(OPERATOR, [x, relax.ShapeExpr([size, reach]), scale, roi], operator_attrs(**asdict(attrs)))


def attrs_of(call: Any) -> ResizeAttrs:
    """The attributes of a call."""
    return ResizeAttrs(**{name: type(default)(call.attrs[name]) for name, default in asdict(ResizeAttrs(0)).items()})


def _infer(builder: Any, call: Any) -> Any:
    x, axis = call.args[0].ty, int(call.attrs["axis"])
    return relax.TensorType([*list(x.shape)[:axis], call.args[1].values[0], *list(x.shape)[axis + 1 :]], x.dtype)


def _real(value: Any) -> Any:
    return tirx.const(value, "float32") if isinstance(value, (int, float)) else tirx.Cast("float32", value)


def _source(attrs: ResizeAttrs, i: Any, old: Any, new: Any, scale: Any, start: Any, end: Any) -> Any:
    """The place in the old axis, of `old` elements, of element i of the new one, of `new` elements; float32."""
    half = _real(0.5)
    middle = (i + half) / scale - half
    if attrs.coordinates == "half_pixel":
        return middle
    if attrs.coordinates == "half_pixel_symmetric":
        return old / _real(2) * (_real(1) - new / (scale * old)) + middle
    if attrs.coordinates == "pytorch_half_pixel":
        return tirx.Select(new > _real(1), middle, _real(0))
    if attrs.coordinates == "align_corners":
        new = scale * old if attrs.fractional else new
        return tirx.Select(new > _real(1), i * (old - _real(1)) / tirx.max(new - _real(1), _real(1)), _real(0))
    if attrs.coordinates == "asymmetric":
        return i / scale
    if attrs.coordinates == "tf_half_pixel_for_nn":
        return (i + half) / scale
    steps = start * (old - _real(1)) + i * (end - start) * (old - _real(1)) / tirx.max(new - _real(1), _real(1))
    return tirx.Select(new > _real(1), steps, half * (start + end) * (old - _real(1)))


def _rounded(attrs: ResizeAttrs, place: Any, scale: Any) -> Any:
    half = _real(0.5)
    if attrs.rounding == "round_prefer_floor":
        return tirx.ceil(place - half)
    if attrs.rounding == "round_prefer_ceil":
        return tirx.floor(place + half)
    if attrs.rounding == "simple":
        return tirx.Select(scale < _real(1), tirx.ceil(place), tirx.floor(place))
    return tirx.floor(place) if attrs.rounding == "floor" else tirx.ceil(place)


def filter_weight(mode: str, cubic: float, distance: Any, dtype: str = "float32") -> Any:
    """The weight at a distance, an expression of `dtype`: a triangle, or the cubic convolution of Keys (1981) with coefficient a = `cubic`."""
    zero, one, two, five, eight = (tirx.const(value, dtype) for value in (0, 1, 2, 5, 8))
    x = tirx.Select(distance < zero, -distance, distance)
    if mode == "linear":
        return tirx.max(one - x, zero)
    a = tirx.const(cubic, dtype)
    near = ((a + two) * x - (a + two + one)) * x * x + one
    far = ((a * x - five * a) * x + eight * a) * x - (two + two) * a
    return tirx.Select(x <= one, near, tirx.Select(x < two, far, zero))


def _within(place: Any, old: Any) -> Any:
    """A place that is sure to fit an integer: where nothing is read in any case, it is -1 or `old`."""
    return tirx.Select(place >= _real(-1), tirx.min(place, _real(old)), _real(-1))


def _places(scale: Any, roi: Any, old: Any, new: Any, attrs: ResizeAttrs) -> Any:
    """[new] float32"""
    return te.compute((new,), lambda i: _source(attrs, _real(i), _real(old), _real(new), scale[0], roi[0], roi[1]), name="places")


def _weights(places: Any, scale: Any, old: Any, reach: Any, attrs: ResizeAttrs) -> Any:
    """[new, 2 * reach] float32"""

    def weight(i: Any, t: Any) -> Any:
        place = _within(places[i], old)
        tap = tirx.floor(place) + _real(t + 1 - reach)
        distance = tap - place
        if attrs.antialias:
            distance = distance * tirx.min(scale[0], _real(1))
        value = filter_weight(attrs.mode, attrs.cubic, distance)
        return tirx.Select(tirx.And(tap >= _real(0), tap < _real(old)), value, _real(0)) if attrs.exclude else value

    return te.compute((places.shape[0], reach * 2), weight, name="weights")


def _totals(weights: Any) -> Any:
    t = te.reduce_axis((0, weights.shape[1]), "t")
    return te.compute((weights.shape[0],), lambda i: te.sum(weights[i, t], axis=t), name="totals")


def _shares(weights: Any, totals: Any) -> Any:
    return te.compute(weights.shape, lambda i, t: weights[i, t] / tirx.Select(totals[i] == _real(0), _real(1), totals[i]), name="shares")


def _first(places: Any, old: Any, reach: Any) -> Any:
    """[new] int64: the first tap, which may lie outside."""
    return te.compute(places.shape, lambda i: tirx.Cast("int64", tirx.floor(_within(places[i], old))) + 1 - reach, name="first")


def _nearest(places: Any, scale: Any, old: Any, attrs: ResizeAttrs) -> Any:
    return te.compute(places.shape, lambda i: tirx.Cast("int64", _rounded(attrs, _within(places[i], old), scale[0])), name="first")


def _read(x: Any, axes: tuple[Any, ...], axis: int, index: Any) -> Any:
    """An element of x, 0 where the axis is empty."""
    size = x.shape[axis]
    element = x[(*axes[:axis], tirx.max(tirx.min(index, size - 1), 0), *axes[axis + 1 :])]
    return element if isinstance(size, tirx.IntImm) and int(size) > 0 else tirx.if_then_else(size > 0, element, tirx.const(0, x.dtype))


def _extrapolated(value: Any, x: Any, place: Any, attrs: ResizeAttrs) -> Any:
    inside = tirx.And(place >= _real(0), place <= _real(x.shape[attrs.axis] - 1))
    return tirx.Select(inside, value, tirx.const(attrs.extrapolation, x.dtype))


def _picked(x: Any, first: Any, places: Any, attrs: ResizeAttrs) -> Any:
    def value(*axes: Any) -> Any:
        i = axes[attrs.axis]
        read = _read(x, axes, attrs.axis, first[i])
        return _extrapolated(read, x, places[i], attrs) if attrs.coordinates == "tf_crop_and_resize" else read

    return te.compute([*list(x.shape)[: attrs.axis], first.shape[0], *list(x.shape)[attrs.axis + 1 :]], value, name="resize_axis")


def _summed(x: Any, first: Any, weights: Any, attrs: ResizeAttrs) -> Any:
    t = te.reduce_axis((0, weights.shape[1]), "t")

    def value(*axes: Any) -> Any:
        i = axes[attrs.axis]
        return te.sum(_read(x, axes, attrs.axis, first[i] + t) * tirx.Cast(x.dtype, weights[i, t]), axis=t)

    return te.compute([*list(x.shape)[: attrs.axis], first.shape[0], *list(x.shape)[attrs.axis + 1 :]], value, name="resize_axis")


def _outside(sums: Any, x: Any, places: Any, attrs: ResizeAttrs) -> Any:
    return te.compute(sums.shape, lambda *axes: _extrapolated(sums[axes], x, places[axes[attrs.axis]], attrs), name="extrapolated")


def _legalize(builder: Any, call: Any) -> Any:
    x, (new, reach), scale, roi = call.args[0], call.args[1].values, call.args[2], call.args[3]
    attrs = attrs_of(call)
    old = x.ty.shape[attrs.axis]
    places = builder.emit_te(partial(_places, attrs=attrs), scale, roi, old, new, primfunc_name_hint="resize_places")
    if attrs.mode == "nearest":
        first = builder.emit_te(partial(_nearest, attrs=attrs), places, scale, old, primfunc_name_hint="resize_indices")
        return builder.call_te(partial(_picked, attrs=attrs), x, first, places, primfunc_name_hint="resize_axis")
    first = builder.emit_te(_first, places, old, reach, primfunc_name_hint="resize_indices")
    weights = builder.emit_te(partial(_weights, attrs=attrs), places, scale, old, reach, primfunc_name_hint="resize_weights")
    if attrs.exclude or attrs.antialias:
        totals = builder.emit_te(_totals, weights, primfunc_name_hint="resize_weights")
        weights = builder.emit_te(_shares, weights, totals, primfunc_name_hint="resize_weights")
    sums = builder.emit_te(partial(_summed, attrs=attrs), x, first, weights, primfunc_name_hint="resize_axis")
    if attrs.coordinates != "tf_crop_and_resize":
        return sums
    return builder.call_te(partial(_outside, attrs=attrs), sums, x, places, primfunc_name_hint="resize_outside")


OPERATOR = register_operator(NAME, ("x", "sizes", "scale", "roi"), _infer, _legalize)
