"""Writing at computed positions: index_put, the scatter family and masked_scatter."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from torch import fx

from ....tvm import relax
from ..symbols import equal
from .elementwise import operand
from .indexing import from_the_front
from .selection import places
from .shape import argument


def _dtype(x: relax.Expr) -> str:
    return str(x.ty.dtype.dtype)


def index_put(translator: Any, node: fx.Node) -> relax.Expr:
    """x with x[i, :, j, ...] replaced by values, or added to them (accumulate), where the values are broadcast to what x[i, :, j, ...] gives."""
    x, given, values = translator.value(node.args[:3])
    accumulate, dtype = bool(argument(node, 3, "accumulate", False)), _dtype(x)
    values = operand(translator, values, dtype)
    axes = [axis for axis, tensor in enumerate(given) if tensor is not None]
    if any(_dtype(given[axis]) in ("bool", "uint8") for axis in axes):
        return _put_masked(translator, x, [given[axis] for axis in axes], axes, values, accumulate)
    emit, op = translator.emit, relax.op
    rest = [axis for axis in range(len(x.ty.shape)) if axis not in axes]
    common = _common([list(given[axis].ty.shape) for axis in axes])
    columns = [emit(op.reshape(emit(op.broadcast_to(operand(translator, given[axis], "int64"), common)), [*common, 1])) for axis in axes]
    neighbours = axes == list(range(axes[0], axes[0] + len(axes)))
    before = axes[0] if neighbours else 0
    kept = [x.ty.shape[axis] for axis in rest]
    values = emit(op.broadcast_to(values, [*kept[:before], *common, *kept[before:]]))
    if before:  # the common dims to the front
        ends = before + len(common)
        values = emit(op.permute_dims(values, [*range(before, ends), *range(before), *range(ends, len(values.ty.shape))]))
    order = [*axes, *rest]
    moved = order != sorted(order)
    data = emit(op.permute_dims(x, order)) if moved else x
    places = emit(op.concat(columns, axis=-1)) if len(columns) > 1 else columns[0]
    if dtype == "bool":
        data, values = operand(translator, data, "uint8"), operand(translator, values, "uint8")
    result = emit(op.scatter_nd(data, places, values, ("max" if dtype == "bool" else "add") if accumulate else "update"))
    result = operand(translator, result, dtype)
    return emit(op.permute_dims(result, [int(place) for place in np.argsort(order)])) if moved else result


def _common(shapes: Sequence[Sequence[Any]]) -> list[Any]:
    """The shape that all broadcast to; symbolic sizes have to be provably equal."""
    common: list[Any] = []
    for place in range(-max(map(len, shapes)), 0):
        sizes = [getattr(shape[place], "value", shape[place]) for shape in shapes if len(shape) >= -place]
        sizes = [size for size in sizes if not (isinstance(size, int) and size == 1)] or [1]
        if not all(equal(sizes[0], size) for size in sizes[1:]):
            raise NotImplementedError("positions whose numbers may differ")
        common.append(sizes[0])
    return common


def _put_masked(translator: Any, x: relax.Expr, tensors: Sequence[relax.Expr], axes: Sequence[int], values: relax.Expr, add: bool) -> relax.Expr:
    """x[mask] = values: chosen element by element, of the same values for all elements under the mask, or of one after the other."""
    emit, op, shape = translator.emit, relax.op, list(x.ty.shape)
    if len(tensors) > 1:
        raise NotImplementedError("a mask among several indices")
    mask, first = operand(translator, tensors[0], "bool"), axes[0]
    rank = len(shape) - first - len(mask.ty.shape)
    sizes = [int(getattr(size, "value", 0)) for size in values.ty.shape]
    if len(sizes) > rank and any(size != 1 for size in sizes[: len(sizes) - rank]):
        return _put_in_order(translator, x, mask, first, values, add)
    trailing = list(values.ty.shape)[max(0, len(sizes) - rank) :]
    values = emit(op.broadcast_to(emit(op.reshape(values, trailing)), shape))
    mask = emit(op.broadcast_to(emit(op.reshape(mask, [*mask.ty.shape, *[1] * rank])), shape))
    if add:
        values = emit((op.logical_or if _dtype(x) == "bool" else op.add)(x, values))
    return emit(op.where(mask, values, x))


def _put_in_order(translator: Any, x: relax.Expr, mask: relax.Expr, first: int, values: relax.Expr, add: bool) -> relax.Expr:
    """x[mask] = values [N, *rest], for the N elements under the mask; that there are N is checked while the model runs."""
    emit, op, shape, dtype = translator.emit, relax.op, list(x.ty.shape), _dtype(x)
    rest = shape[len(mask.ty.shape) :]
    if first or len(values.ty.shape) != 1 + len(rest):
        raise NotImplementedError("values one by one under a mask of other axes than the first")
    count = values.ty.shape[0]
    work = "uint8" if dtype == "bool" else dtype
    data = emit(op.reshape(operand(translator, x, work), relax.ShapeExpr([reduce(operator.mul, mask.ty.shape), *rest])))
    values = emit(op.broadcast_to(operand(translator, values, work), [count, *rest]))
    column = emit(op.expand_dims(places(translator, mask, count), 1))
    result = emit(op.scatter_nd(data, column, values, ("max" if dtype == "bool" else "add") if add else "update"))
    return operand(translator, emit(op.reshape(result, relax.ShapeExpr(shape))), dtype)


def scatter(reduction: str | None = None) -> Any:
    """x: [..], ids and source: of its rank (source may be a number) -> x with x[.., ids, ..] along one axis replaced by the source, or combined with it.

    reduction: "sum", or None for the one that the node names, or for replacing.
    """

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x, axis, ids, source = translator.value(node.args[:4])
        kind = reduction or {"add": "sum", "multiply": "prod"}.get(argument(node, 4, "reduce"), argument(node, 4, "reduce"))
        return _scattered(translator, node, x, axis, ids, source, kind, bool(node.kwargs.get("include_self", True)))

    return convert


#: reductions of scatter_reduce as those of Relax, and on truth values as numbers 0 and 1
_REDUCTIONS = {None: "update", "sum": "add", "mean": "add", "prod": "mul", "amax": "max", "amin": "min"}
_OF_BOOLEANS = {None: "update", "sum": "max", "prod": "min", "amax": "max", "amin": "min"}


def _neutral(kind: str, dtype: str) -> Any:
    """What changes nothing in a reduction."""
    if kind in ("sum", "mean", "prod"):
        return int(kind == "prod")
    if dtype == "bool":
        return kind == "amin"
    if dtype.startswith("float"):
        return np.inf if kind == "amin" else -np.inf
    limits = np.iinfo(dtype)
    return limits.max if kind == "amin" else limits.min


def _scattered(translator: Any, node: fx.Node, x: relax.Expr, axis: int, ids: relax.Expr, source: Any, kind: str | None, include: bool) -> relax.Expr:
    emit, op, dtype, shape = translator.emit, relax.op, _dtype(x), translator.out_shape(node)
    if any(getattr(size, "value", size) == 0 for size in ids.ty.shape):
        return x
    scalar = not isinstance(source, relax.Expr)
    if not len(x.ty.shape) or not len(ids.ty.shape):  # a scalar counts as a vector of one
        x, ids, axis = emit(op.reshape(x, [-1])), emit(op.reshape(ids, [-1])), 0
        source = source if scalar else emit(op.reshape(source, [-1]))
    ids, extent = from_the_front(translator, operand(translator, ids, "int64")), list(ids.ty.shape)
    if scalar:
        source = emit(op.full(extent, relax.const(source, dtype), dtype))
    else:
        axes = list(range(len(extent)))
        source = emit(op.strided_slice(source, axes, [0] * len(axes), extent, assume_inbound=True))
    work = "uint8" if dtype == "bool" else dtype
    data, source = operand(translator, x, work), operand(translator, source, work)

    def put(onto: relax.Expr, what: relax.Expr, how: str) -> relax.Expr:
        return emit(op.scatter_elements(onto, ids, what, axis, how))

    if not include and kind is not None:
        data = put(data, emit(op.broadcast_to(relax.const(_neutral(kind, dtype), work), extent)), "update")
    result = put(data, source, (_OF_BOOLEANS if dtype == "bool" else _REDUCTIONS)[kind])
    if kind == "mean":
        counts = emit(op.full(list(data.ty.shape), relax.const(int(include), work), work))
        counts = put(counts, emit(op.full(extent, relax.const(1, work), work)), "add")
        counts = counts if include else emit(op.maximum(counts, relax.const(1, work)))
        result = emit((op.divide if dtype.startswith("float") else op.floor_divide)(result, counts))
    return emit(op.reshape(operand(translator, result, dtype), shape))


def masked_scatter(translator: Any, node: fx.Node) -> relax.Expr:
    """x with the elements under the mask replaced by those of the source, one after the other."""
    x, mask, source = translator.value(node.args[:3])
    emit, op, shape = translator.emit, relax.op, translator.out_shape(node)
    if any(getattr(size, "value", size) == 0 for size in source.ty.shape):
        raise NotImplementedError("a source without elements")
    x, mask = (value if not shape else emit(op.broadcast_to(value, shape)) for value in (x, mask))
    counts = emit(op.cumsum(emit(op.reshape(operand(translator, mask, "int64"), [-1])), 0))
    places = emit(op.maximum(emit(op.subtract(counts, relax.const(1, "int64"))), relax.const(0, "int64")))
    taken = emit(op.take(emit(op.reshape(source, [-1])), places, 0, mode="fast"))
    return emit(op.where(mask, emit(op.reshape(taken, shape)), x))


CONVERTERS = {
    "index_put.default": index_put,
    **{name: scatter() for name in ("scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce", "scatter_reduce.two")},
    "scatter_add.default": scatter("sum"),
    "masked_scatter.default": masked_scatter,
}
