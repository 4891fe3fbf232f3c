"""Embedding bags: rows of a table summed, averaged or maximised over runs of ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from ....tvm import relax
from .elementwise import operand
from .indexing import from_the_front
from .shape import argument

_SUM, _MEAN, _MAX = range(3)


def embedding_bag(translator: Any, node: fx.Node) -> relax.Expr:
    """weight: [V, C], ids: [L], offsets: [B], where every bag starts (with one more, its end, if include_last_offset) -> [B, C].

    An id that is padding_idx counts for nothing; a bag without ids gives zeros. Only the first of torch's four results is computed.
    """
    weight, ids, offsets = translator.value(node.args[:3])
    mode, factors = argument(node, 4, "mode", _SUM), translator.value(argument(node, 6, "per_sample_weights"))
    emit, op, dtype = translator.emit, relax.op, str(weight.ty.dtype.dtype)
    (count, width), (bags,) = list(ids.ty.shape) + [weight.ty.shape[1]], list(offsets.ty.shape)
    bags = bags - 1 if argument(node, 7, "include_last_offset", False) else bags
    ids, offsets = operand(translator, ids, "int64"), operand(translator, offsets, "int64")
    starts = emit(op.strided_slice(offsets, [0], [0], [bags], assume_inbound=True))
    places = emit(op.arange(0, count, 1, "int64"))
    # the bag of a place: how many start at it or before, less one
    started = emit(op.astype(emit(op.greater_equal(emit(op.expand_dims(places, 1)), emit(op.expand_dims(starts, 0)))), "int64"))
    bag = emit(op.subtract(emit(op.sum(started, 1)), relax.const(1, "int64")))
    rows = emit(op.take(weight, from_the_front(translator, ids), axis=0))
    if factors is not None:
        rows = emit(op.multiply(rows, emit(op.expand_dims(operand(translator, factors, dtype), 1))))
    neutral = -np.inf if mode == _MAX else 0.0
    counted = emit(op.full([count], relax.const(1, dtype), dtype))
    padding = argument(node, 8, "padding_idx", -1)
    if padding >= 0:
        kept = emit(op.not_equal(ids, relax.const(padding, "int64")))
        rows = emit(op.where(emit(op.expand_dims(kept, 1)), rows, relax.const(neutral, dtype)))
        counted = operand(translator, kept, dtype)
    column = emit(op.expand_dims(bag, 1))
    result = emit(op.scatter_nd(emit(op.full([bags, width], relax.const(neutral, dtype), dtype)), column, rows, "max" if mode == _MAX else "add"))
    if mode == _SUM:
        return result
    totals = emit(op.scatter_nd(emit(op.full([bags], relax.const(0, dtype), dtype)), column, counted, "add"))
    totals = emit(op.expand_dims(totals, 1))
    if mode == _MEAN:
        return emit(op.divide(result, emit(op.maximum(totals, relax.const(1, dtype)))))
    return emit(op.where(emit(op.equal(totals, relax.const(0, dtype))), relax.const(0, dtype), result))


CONVERTERS = {"_embedding_bag_forward_only.default": embedding_bag, "_embedding_bag.default": embedding_bag}
