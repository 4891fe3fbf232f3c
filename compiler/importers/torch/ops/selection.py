"""Operators whose results are as long as the data say: positions of what is not zero, and elements under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ....dialect.selection import positions
from ....tvm import relax, tirx
from ..symbols import equal
from .elementwise import operand


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def places(translator: Any, mask: relax.Expr, size: Any) -> relax.Expr:
    """mask: bool [...] -> [size] int64: places in the flattened mask where it holds. That there are as many as `size` says, if it is not for them to say, is checked."""
    emit, op = translator.emit, relax.op
    both = emit(positions(emit(op.reshape(mask, relax.ShapeExpr([_product(mask.ty.shape)])))))
    found, count = (emit(relax.TupleGetItem(both, part)) for part in range(2))
    translator.block_builder.match_cast(emit(op.tensor_to_shape(count)), relax.ShapeType([size]))
    return emit(op.strided_slice(found, [0], [0], [size], assume_inbound=True))


def _counted(translator: Any, node: fx.Node, axis: int) -> Any:
    return translator.symbols.counted(node.meta["val"].shape[axis])


def nonzero(translator: Any, node: fx.Node) -> relax.Expr:
    """Coordinates [N, rank] of the elements that are not zero (NaN is not), in row-major order; [N, 0] of a scalar."""
    x, emit, op = translator.value(node.args[0]), translator.emit, relax.op
    dtype, shape = str(x.ty.dtype.dtype), list(x.ty.shape)
    mask = x if dtype == "bool" else emit(op.not_equal(x, relax.const(0, dtype)))
    size = _counted(translator, node, 0)
    place = places(translator, mask, size)
    if not shape:
        return emit(op.full([size, 0], relax.const(0, "int64"), "int64"))
    columns = []
    for axis in range(len(shape)):
        stride = operand(translator, _at_least_one(_product(shape[axis + 1 :])), "int64")  # nothing is found in a tensor without elements
        column = emit(op.floor_divide(place, stride))
        place = emit(op.subtract(place, emit(op.multiply(column, stride))))
        columns.append(emit(op.expand_dims(column, 1)))
    return emit(op.concat(columns, 1)) if len(columns) > 1 else columns[0]


def _at_least_one(size: Any) -> Any:
    return max(1, int(getattr(size, "value", size))) if isinstance(size, (int, tirx.IntImm)) else tirx.max(size, 1)


def masked(translator: Any, node: fx.Node, x: relax.Expr, mask: relax.Expr, axis: int) -> relax.Expr:
    """x[..., mask]: the elements, or slices, of x under a mask whose dims are those of x from `axis` on; they stand along that axis."""
    emit, op, shape = translator.emit, relax.op, list(x.ty.shape)
    lead, rest = shape[:axis], shape[axis + len(mask.ty.shape) :]
    flat = emit(op.reshape(x, relax.ShapeExpr([*lead, _product(mask.ty.shape), *rest])))
    return emit(op.take(flat, places(translator, mask, _counted(translator, node, axis)), axis, mode="fast"))


def masked_select(translator: Any, node: fx.Node) -> relax.Expr:
    """The elements of x under a mask, both broadcast to one shape."""
    x, mask = translator.value(node.args[:2])
    rank = max(len(x.ty.shape), len(mask.ty.shape))
    sides = [[*[1] * (rank - len(value.ty.shape)), *value.ty.shape] for value in (x, mask)]
    shape = [right if equal(left, 1) else left for left, right in zip(*sides, strict=True)]
    x, mask = (translator.emit(relax.op.broadcast_to(value, shape)) for value in (x, mask))
    return masked(translator, node, x, mask, 0)


CONVERTERS = {"nonzero.default": nonzero, "masked_select.default": masked_select}
