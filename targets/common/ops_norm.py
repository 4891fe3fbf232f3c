"""Row-wise operators as chains of stages that the generic scheduler runs in one nest: softmax, normalisations, argmax.

Variances are two-pass (mean first), as in onnxruntime; TVM's own definitions subtract squares, which loses digits when the mean is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...compiler.tvm import T, relax, te, tirx, topi
from .legalize import default_legalization, legalizer

#: fusion may append element-wise operators (relax's OpPatternKind kOutEWiseFusable), or nothing (kOpaque)
_ROWS = {"op_pattern": 4}
_OPAQUE = {"op_pattern": 8}


def _fold(x: Any, axes: Sequence[int], reducer: Any, value: Callable[..., Any], name: str) -> Any:
    """Reduce value(index) over some axes of x's domain; the result has the other dims."""
    reduced = {axis: te.reduce_axis((0, x.shape[axis]), f"k{axis}") for axis in axes}
    kept = [dim for position, dim in enumerate(x.shape) if position not in reduced]

    def element(*index: Any) -> Any:
        rest = iter(index)
        full = [reduced[position] if position in reduced else next(rest) for position in range(len(x.shape))]
        return reducer(value(*full), axis=list(reduced.values()))

    return te.compute(kept, element, name=name)


def _rows(index: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    """The coordinates that are not reduced."""
    return [position for axis, position in enumerate(index) if axis not in axes]


def _axes(axes: Any, rank: int) -> list[int]:
    return sorted(int(axis) % rank for axis in axes)


#: maximum that may lose a NaN: the sum of a softmax brings it back
_plain_max = te.comm_reducer(lambda a, b: tirx.Select(a > b, a, b), te.min_value, name="plain_max")


def softmax(x: Any, axis: int, log: bool = False) -> Any:
    """x: any shape, float. exp(x - max) / sum, or its logarithm."""
    axes = _axes([axis], len(x.shape))
    top = _fold(x, axes, _plain_max, lambda *i: x(*i), "top")
    shifted = te.compute(x.shape, lambda *i: x(*i) - top(*_rows(i, axes)), name="shifted")
    power = te.compute(x.shape, lambda *i: te.exp(shifted(*i)), name="power")
    total = _fold(x, axes, te.sum, lambda *i: power(*i), "total")
    if log:
        logarithm = te.compute(total.shape, lambda *i: te.log(total(*i)), name="logarithm")
        return te.compute(x.shape, lambda *i: shifted(*i) - logarithm(*_rows(i, axes)), name="log_softmax")
    scale = te.compute(total.shape, lambda *i: tirx.const(1, x.dtype) / total(*i), name="scale")
    return te.compute(x.shape, lambda *i: power(*i) * scale(*_rows(i, axes)), name="softmax")


def normalize(x: Any, axes: Sequence[int], epsilon: float, center: bool, finish: Callable[[Any, Sequence[Any]], Any], name: str) -> Any:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) over `axes` (mean taken as 0 unless `center`), then finish(value, index)."""
    count: Any = tirx.const(1, "int64")
    for axis in axes:
        count = count * x.shape[axis]
    # divide by the count in the type of x: a static count folds into a constant
    inverse = tirx.const(1.0 / int(count), x.dtype) if isinstance(count, tirx.IntImm) else tirx.const(1, x.dtype) / tirx.Cast(x.dtype, count)
    centered = x
    if center:
        total = _fold(x, axes, te.sum, lambda *i: x(*i), f"{name}_sum")
        mean = te.compute(total.shape, lambda *i: total(*i) * inverse, name=f"{name}_mean")
        centered = te.compute(x.shape, lambda *i: x(*i) - mean(*_rows(i, axes)), name=f"{name}_centered")
    squares = _fold(x, axes, te.sum, lambda *i: centered(*i) * centered(*i), f"{name}_squares")
    one = tirx.const(1, x.dtype)
    scale = te.compute(squares.shape, lambda *i: one / te.sqrt(squares(*i) * inverse + tirx.const(epsilon, x.dtype)), name=f"{name}_scale")
    return te.compute(x.shape, lambda *i: finish(centered(*i) * scale(*_rows(i, axes)), i), name=name)


def arg_extremum(x: Any, axis: int, keepdims: bool, greatest: bool) -> Any:
    """Index of the first greatest (least) element along an axis as int64; the first NaN counts as both, as in numpy."""
    axes = _axes([axis], len(x.shape))
    is_float = str(x.dtype).startswith(("float", "bfloat"))
    best = _fold(x, axes, te.max if greatest else te.min, lambda *i: x(*i), "best")

    def candidate(*index: Any) -> Any:
        hit = tirx.EQ(x(*index), best(*_rows(index, axes)))
        hit = tirx.Or(hit, T.isnan(x(*index))) if is_float else hit
        return tirx.Select(hit, tirx.Cast("int32", index[axes[0]]), tirx.max_value("int32"))

    first = _fold(x, axes, te.min, candidate, "first")
    shape = [tirx.const(1, "int64") if position in axes else dim for position, dim in enumerate(x.shape)] if keepdims else first.shape
    return te.compute(shape, lambda *i: tirx.Cast("int64", first(*(_rows(i, axes) if keepdims else i))), name="index")


def _is_float(call: Any) -> bool:
    return call.args[0].ty.dtype in ("float32", "float64")


@legalizer("relax.nn.softmax", "relax.nn.log_softmax")
def _softmax(builder: Any, call: Any) -> Any:
    if not _is_float(call):
        return default_legalization(builder, call)
    log = call.op.name == "relax.nn.log_softmax"
    return builder.call_te(softmax, call.args[0], int(call.attrs.axis), log, primfunc_name_hint="softmax", primfunc_attrs=_ROWS)


@legalizer("relax.nn.layer_norm")
def _layer_norm(builder: Any, call: Any) -> Any:
    attrs = call.attrs
    if not _is_float(call):
        return default_legalization(builder, call)
    axes = _axes(attrs.axes, len(call.args[0].ty.shape))

    def definition(x: Any, gamma: Any, beta: Any) -> Any:
        def finish(value: Any, index: Sequence[Any]) -> Any:
            place = [index[axis] for axis in axes]
            value = value * gamma(*place) if attrs.scale else value
            return value + beta(*place) if attrs.center else value

        return normalize(x, axes, float(attrs.epsilon), True, finish, "layer_norm")

    return builder.call_te(definition, *call.args, primfunc_name_hint="layer_norm", primfunc_attrs=_ROWS)


@legalizer("relax.nn.rms_norm")
def _rms_norm(builder: Any, call: Any) -> Any:
    if not _is_float(call):
        return default_legalization(builder, call)
    axes = _axes(call.attrs.axes, len(call.args[0].ty.shape))

    def definition(x: Any, weight: Any) -> Any:
        return normalize(x, axes, float(call.attrs.epsilon), False, lambda v, i: v * weight(*(i[axis] for axis in axes)), "rms_norm")

    return builder.call_te(definition, *call.args, primfunc_name_hint="rms_norm", primfunc_attrs=_ROWS)


@legalizer("relax.nn.instance_norm")
def _instance_norm(builder: Any, call: Any) -> Any:
    if not _is_float(call):
        return default_legalization(builder, call)
    rank = len(call.args[0].ty.shape)
    return _channel_norm(builder, call, call.args[0], int(call.attrs.channel_axis) % rank, _axes(call.attrs.axes, rank))


@legalizer("relax.nn.group_norm")
def _group_norm(builder: Any, call: Any) -> Any:
    """Groups become an axis of their own by a reshape, which costs nothing as long as it stays out of the kernel."""
    data = call.args[0]
    rank, groups = len(data.ty.shape), int(call.attrs.num_groups)
    channel, axes = int(call.attrs.channel_axis) % rank, _axes(call.attrs.axes, rank)
    if not _is_float(call):
        return default_legalization(builder, call)
    dims = list(data.ty.shape)
    grouped = [*dims[:channel], tirx.const(groups, "int64"), tirx.floordiv(dims[channel], tirx.const(groups, "int64")), *dims[channel + 1 :]]
    split = builder.emit(builder.call_te(topi.reshape, data, grouped, primfunc_name_hint="reshape", primfunc_attrs=_OPAQUE))
    axes = [axis if axis < channel else axis + 1 for axis in axes if axis != channel] + [channel + 1]
    result = builder.emit(_channel_norm(builder, call, split, channel, sorted(axes), grouped=True))
    return builder.call_te(topi.reshape, result, dims, primfunc_name_hint="reshape", primfunc_attrs=_OPAQUE)


def _channel_norm(builder: Any, call: Any, data: relax.Expr, channel: int, axes: list[int], grouped: bool = False) -> Any:
    """Normalise over `axes` and scale by channel; with `grouped` the channel is spread over two axes."""
    attrs = call.attrs

    def definition(x: Any, gamma: Any, beta: Any) -> Any:
        def finish(value: Any, index: Sequence[Any]) -> Any:
            place = index[channel] * x.shape[channel + 1] + index[channel + 1] if grouped else index[channel]
            value = value * gamma(place) if attrs.scale else value
            return value + beta(place) if attrs.center else value

        return normalize(x, axes, float(attrs.epsilon), True, finish, "norm")

    return builder.call_te(definition, data, *call.args[1:], primfunc_name_hint="channel_norm", primfunc_attrs=_ROWS)


@legalizer("relax.argmax", "relax.argmin")
def _arg_extremum(builder: Any, call: Any) -> Any:
    extent = None if call.attrs.axis is None else call.args[0].ty.shape[int(call.attrs.axis)]
    if extent is None or (isinstance(extent, tirx.IntImm) and int(extent) > 2**31 - 1):
        return default_legalization(builder, call)
    greatest = call.op.name == "relax.argmax"
    axis, keepdims = int(call.attrs.axis), bool(call.attrs.keepdims)
    return builder.call_te(arg_extremum, call.args[0], axis, keepdims, greatest, primfunc_name_hint="argmax", primfunc_attrs=_ROWS)
