"""What mixtures of experts are made of: products by group, and the histogram that counts the tokens of each."""

from __future__ import annotations

from typing import Any

from torch import fx

from ....tvm import relax
from .shape import argument


def grouped_mm(translator: Any, node: fx.Node) -> relax.Expr:
    """x: [S, K], weight: [E, K, N], ends: [E] -> [S, N]: rows ends[e - 1] .. ends[e] - 1 by weight[e]; rows behind the last end are zeros.

    Computed by every expert for every row and selected, so that no size depends on the data.
    """
    x, weight, ends = translator.value(node.args[:3])
    if x.ty.ndim != 2 or weight.ty.ndim != 3 or ends is None:
        raise NotImplementedError("a grouped product is computed for rows of one matrix only")
    emit, op = translator.emit, relax.op
    (count,), rows = ends.ty.shape, x.ty.shape[0]
    ends = emit(op.reshape(emit(op.astype(ends, "int64")), [count, 1]))
    starts = emit(op.concat([relax.const([[0]], "int64"), emit(op.strided_slice(ends, [0], [0], [count - 1]))], axis=0))
    numbers = emit(op.reshape(emit(op.arange(0, rows, 1, "int64")), [1, rows]))
    inside = emit(op.logical_and(emit(op.greater_equal(numbers, starts)), emit(op.less(numbers, ends))))
    products = emit(op.matmul(emit(op.expand_dims(x, [0])), weight))
    chosen = emit(op.where(emit(op.expand_dims(inside, [2])), products, relax.const(0, str(products.ty.dtype.dtype))))
    return emit(op.sum(chosen, axis=[0]))


def histc(translator: Any, node: fx.Node) -> relax.Expr:
    """x: any shape -> [bins], how many elements lie in each of `bins` equal parts of low .. high, the last of which holds high."""
    bins, low, high = argument(node, 1, "bins", 100), argument(node, 2, "min", 0), argument(node, 3, "max", 0)
    if low == high:
        raise NotImplementedError("a histogram over the range of the data itself")
    x, dtype = translator.value(node.args[0]), translator.out_dtype(node)
    emit, op = translator.emit, relax.op
    x = emit(op.reshape(x, [-1]))
    offset = emit(op.subtract(x, relax.const(low, dtype)))
    place = emit(op.floor(emit(op.divide(emit(op.multiply(offset, relax.const(bins, dtype))), relax.const(high - low, dtype)))))
    place = emit(op.minimum(place, relax.const(bins - 1, dtype)))
    inside = emit(op.logical_and(emit(op.greater_equal(x, relax.const(low, dtype))), emit(op.less_equal(x, relax.const(high, dtype)))))
    place = emit(op.where(inside, place, relax.const(-1, dtype)))
    hits = emit(op.equal(emit(op.expand_dims(place, [1])), relax.const(list(range(bins)), dtype)))
    return emit(op.sum(emit(op.astype(hits, dtype)), axis=[0]))


CONVERTERS = {
    **{name: grouped_mm for name in ("grouped_mm_fallback.default", "_grouped_mm.default")},
    "histc.default": histc,
}
