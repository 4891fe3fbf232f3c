"""What mixtures of experts are made of: products by group, and the histogram that counts the tokens of each."""

from __future__ import annotations

from typing import Any

from torch import fx

from ....dialect.grouped import grouped_matmul
from ....tvm import relax
from .shape import argument


def grouped_mm(translator: Any, node: fx.Node) -> relax.Expr:
    """x: [S, K], weight: [E, K, N], ends: [E] -> [S, N]: rows ends[e - 1] .. ends[e] - 1 by weight[e]; rows behind the last end, which torch leaves open, are zeros."""
    x, weight = translator.value(node.args[:2])
    ends = translator.value(argument(node, 2, "offs"))
    if x.ty.ndim != 2 or weight.ty.ndim != 3 or ends is None:
        raise NotImplementedError("a grouped product is computed for rows of one matrix only")
    if argument(node, 3, "bias") is not None:
        raise NotImplementedError("a grouped product with a bias")
    product, dtype = translator.emit(grouped_matmul(x, weight, ends)), translator.out_dtype(node)
    return product if str(product.ty.dtype) == dtype else translator.emit(relax.op.astype(product, dtype))


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
