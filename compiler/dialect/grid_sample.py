"""`tcompile.grid_sample`: images sampled at places that a tensor gives, as in ONNX's GridSample, over any number of spatial axes."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..tvm import operator_attrs, register_operator, relax, te, tirx
from .resample import filter_weight

NAME = "tcompile.grid_sample"
#: taps per axis
TAPS = {"nearest": 1, "linear": 2, "cubic": 4}
PADDINGS = ("zeros", "border", "reflection")
#: places beyond this are as far outside as those at it
_FAR = float(1 << 30)


def grid_sample(x: relax.Expr, grid: relax.Expr, mode: str, padding: str, align_corners: bool, elements: bool = False) -> relax.Call:
    """x: [N, C, *S], grid: [N, *O, D] with D places in -1..1 per element, the last axis of S first -> [N, C, *O]; floats, D = len(S).

    mode: a key of TAPS (nearest rounds halves to even, cubic is the convolution of Keys with a = -0.75). padding: one of PADDINGS. align_corners: -1 and 1 are the middles of
    the outermost elements, else their outer edges. elements: places are counted in elements, from 0. Computed in the type of `grid`. Where references differ, PyTorch is followed: cubic with border clamps taps, not places.
    """
    return relax.Call(OPERATOR, [x, grid], operator_attrs(mode=mode, padding=padding, align_corners=align_corners, elements=elements))


def _infer(builder: Any, call: Any) -> Any:
    x, grid = (argument.ty for argument in call.args)
    shape, places = list(x.shape), list(grid.shape)
    if len(shape) != len(places) or str(call.attrs["mode"]) not in TAPS or str(call.attrs["padding"]) not in PADDINGS:
        raise ValueError(f"{NAME}: ranks {len(shape)} and {len(places)}, mode {call.attrs['mode']}, padding {call.attrs['padding']}")
    return relax.TensorType([*shape[:2], *places[1:-1]], x.dtype)


def _reflected(place: Any, low: Any, high: Any, dtype: str) -> Any:
    """`place` mirrored at both ends until it lies within."""
    zero, one, two = (tirx.const(value, dtype) for value in (0, 1, 2))
    width = tirx.Select(high > low, high - low, one)
    over = tirx.Select(place < low, low - place, place - high)
    times = tirx.floor(over / width)
    rest = over - times * width
    odd = times - two * tirx.floor(times / two) > zero
    inside = tirx.And(place >= low, place <= high)
    folded = tirx.Select(tirx.NE(tirx.Cast("int32", place < low), tirx.Cast("int32", odd)), low + rest, high - rest)
    return tirx.Select(inside, place, tirx.Select(high > low, folded, low))


def _bounds(size: Any, align_corners: bool, dtype: str) -> tuple[Any, Any]:
    extent, half = tirx.Cast(dtype, size), tirx.const(0.5, dtype)
    return (tirx.const(0, dtype), extent - tirx.const(1, dtype)) if align_corners else (-half, extent - half)


def _places(grid: Any, size: Any, at: int, mode: str, padding: str, align_corners: bool, elements: bool) -> Any:
    """[N, *O]: where along one spatial axis every element lies."""
    dtype = str(grid.dtype)
    one, two, extent = tirx.const(1, dtype), tirx.const(2, dtype), tirx.Cast(dtype, size)
    low, high = _bounds(size, align_corners, dtype)

    def place(*axes: Any) -> Any:
        value = grid[(*axes, at)]
        if not elements:
            value = (value + one) / two * (extent - one) if align_corners else ((value + one) * extent - one) / two
        value = tirx.nearbyint(value) if mode == "nearest" else value
        if padding == "border" and mode != "cubic":
            return tirx.Select(tirx.Or(value < low, value > high), tirx.max(tirx.min(value, extent - one), tirx.const(0, dtype)), value)
        return _reflected(value, low, high, dtype) if padding == "reflection" else value

    return te.compute(list(grid.shape)[:-1], place, name="places")


def _indices(places: Any, size: Any, taps: int, padding: str, align_corners: bool) -> Any:
    """[N, *O, taps] int64: which elements are read, -1 for none."""
    dtype = str(places.dtype)
    low, high = _bounds(size, align_corners, dtype)
    far = tirx.const(_FAR, dtype)

    def index(*axes: Any) -> Any:
        place = places[axes[:-1]]
        place = tirx.Select(place > -far, tirx.min(place, far), -far)
        tap = tirx.floor(place) + tirx.Cast(dtype, axes[-1] - (taps - 1) // 2)
        if padding == "reflection":
            tap = _reflected(tap, low, high, dtype)
        tap = tirx.Cast("int64", tap)
        if padding == "zeros":
            return tirx.Select(tirx.And(tap >= 0, tap < size), tap, tirx.IntImm("int64", -1))
        return tirx.min(tirx.max(tap, 0), size - 1)

    return te.compute([*places.shape, taps], index, name="taps")


def _weights(places: Any, taps: int, mode: str) -> Any:
    """[N, *O, taps]"""
    dtype = str(places.dtype)

    def weight(*axes: Any) -> Any:
        place = places[axes[:-1]]
        return filter_weight(mode, -0.75, tirx.Cast(dtype, axes[-1] - (taps - 1) // 2) - (place - tirx.floor(place)), dtype)

    return te.compute([*places.shape, taps], weight, name="weights")


def _sampled(x: Any, *tables: Any, taps: int) -> Any:
    spatial = len(x.shape) - 2
    indices, weights = tables[:spatial], tables[spatial:]
    steps = [te.reduce_axis((0, taps), f"t{axis}") for axis in range(spatial)] if weights else []

    def element(*axes: Any) -> Any:
        here = (axes[0], *axes[2:])
        found = [table[(*here, steps[axis] if steps else 0)] for axis, table in enumerate(indices)]
        value = tirx.if_then_else(tirx.all(*(index >= 0 for index in found)), x[(*axes[:2], *found)], tirx.const(0, x.dtype))
        for axis, table in enumerate(weights):
            value = value * tirx.Cast(x.dtype, table[(*here, steps[axis])])
        return te.sum(value, axis=steps) if steps else value

    return te.compute([*list(x.shape)[:2], *list(tables[0].shape)[1:-1]], element, name="grid_sample")


def _legalize(builder: Any, call: Any) -> Any:
    x, grid = call.args
    mode, padding, align_corners = str(call.attrs["mode"]), str(call.attrs["padding"]), bool(call.attrs["align_corners"])
    spatial, taps, elements = len(x.ty.shape) - 2, TAPS[mode], bool(call.attrs["elements"])
    indices, weights = [], []
    for axis in range(spatial):
        size = x.ty.shape[axis + 2]
        options = {"padding": padding, "align_corners": align_corners}
        places = builder.emit_te(
            partial(_places, at=spatial - 1 - axis, mode=mode, elements=elements, **options), grid, size, primfunc_name_hint="grid_places"
        )
        indices.append(builder.emit_te(partial(_indices, taps=taps, **options), places, size, primfunc_name_hint="grid_taps"))
        if taps > 1:
            weights.append(builder.emit_te(partial(_weights, taps=taps, mode=mode), places, primfunc_name_hint="grid_weights"))
    return builder.call_te(partial(_sampled, taps=taps), x, *indices, *weights, primfunc_name_hint="grid_sample")


OPERATOR = register_operator(NAME, ("x", "grid"), _infer, _legalize)
