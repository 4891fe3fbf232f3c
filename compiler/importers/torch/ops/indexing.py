"""Indexing by tensors of positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from ....tvm import Constant, relax
from .elementwise import operand
from .selection import masked


def index(translator: Any, node: fx.Node) -> relax.Expr:
    """x[i, j, :, ...]: the tensors among the indices are broadcast to one shape and taken together, element by element.

    Their dims replace the axes that they index where those are neighbours, and else come first. Positions are checked while the model runs.
    """
    x, given = translator.value(node.args[0]), translator.value(node.args[1])
    axes = [axis for axis, tensor in enumerate(given) if tensor is not None]
    tensors = [given[axis] for axis in axes]
    if any(str(tensor.ty.dtype.dtype) in ("bool", "uint8") for tensor in tensors):
        if len(tensors) > 1:
            raise NotImplementedError("a mask among several indices")
        return masked(translator, node, x, operand(translator, tensors[0], "bool"), axes[0])
    emit, op = translator.emit, relax.op
    if len(axes) == 1:
        return emit(op.take(x, tensors[0], axes[0], mode="fast"))
    rest = [axis for axis in range(len(x.ty.shape)) if axis not in axes]
    neighbours = axes == list(range(axes[0], axes[0] + len(axes)))
    shape, before = translator.out_shape(node), axes[0] if neighbours else 0
    common = shape[before : before + len(shape) - len(rest)]
    columns = [emit(op.reshape(emit(op.broadcast_to(emit(op.astype(tensor, "int64")), common)), [*common, 1])) for tensor in tensors]
    front = x if axes == list(range(len(axes))) else emit(op.permute_dims(x, [*axes, *rest]))
    result = emit(op.gather_nd(front, emit(op.concat(columns, axis=-1))))
    if not before:
        return result
    moved = [*range(len(common), len(common) + before), *range(len(common)), *range(len(common) + before, len(shape))]
    return emit(op.permute_dims(result, moved))


def from_the_front(translator: Any, ids: relax.Expr) -> relax.Expr:
    """Positions that must not count from the end: negative ones become the lowest integer, which raises in the operator that reads them."""
    if isinstance(ids, Constant) and (ids.value.numpy() >= 0).all():
        return ids
    emit, op, dtype = translator.emit, relax.op, str(ids.ty.dtype.dtype)
    negative = emit(op.less(ids, relax.const(0, dtype)))
    return emit(op.where(negative, relax.const(np.iinfo(dtype).min, dtype), ids))


def index_select(translator: Any, node: fx.Node) -> relax.Expr:
    """x[..., ids, ...] along one axis; ids: [N], or one id."""
    x, axis, ids = translator.value(node.args[:3])
    emit, op = translator.emit, relax.op
    if not len(x.ty.shape):
        x, axis = emit(op.reshape(x, [1])), 0
    taken = emit(op.take(x, emit(op.reshape(from_the_front(translator, ids), [-1])), axis, mode="fast"))
    return emit(op.reshape(taken, translator.out_shape(node)))


def gather(translator: Any, node: fx.Node) -> relax.Expr:
    """x: [.., n, ..], ids: of the same rank, no larger along the other axes -> the shape of ids: elements along one axis, each by an id of its own."""
    x, axis, ids = translator.value(node.args[:3])
    emit, op = translator.emit, relax.op
    ids = from_the_front(translator, emit(op.astype(ids, "int64")) if str(ids.ty.dtype.dtype) != "int64" else ids)
    if len(x.ty.shape) and len(x.ty.shape) == len(ids.ty.shape):
        return emit(op.gather_elements(x, ids, axis))
    x, ids = (emit(op.reshape(value, [-1])) for value in (x, ids))  # a scalar counts as a vector of one
    return emit(op.reshape(emit(op.gather_elements(x, ids, 0)), translator.out_shape(node)))


CONVERTERS = {"index.Tensor": index, "index_select.default": index_select, "gather.default": gather}
