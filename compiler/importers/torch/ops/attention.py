"""scaled_dot_product_attention as matmul, scale, mask, softmax, matmul: the one form in which later passes look for attention."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ....tvm import relax, tvm
from .shape import argument


def attention(translator: Any, node: fx.Node) -> relax.Expr:
    """query: [..., H, S, D], key: [..., Hk, T, D], value: [..., Hk, T, E] -> [..., H, S, E]; mask: bool or float, broadcast to [..., H, S, T].

    A row whose boolean mask is all False gives zeros, as in torch.
    """
    emit = translator.emit
    query, key, value = translator.value(node.args[:3])
    mask = translator.value(argument(node, 3, "attn_mask"))
    if argument(node, 4, "dropout_p", 0.0):
        raise NotImplementedError("attention with dropout: call .eval() before the export")
    if argument(node, 6, "enable_gqa", False):
        key, value = (_repeat_heads(translator, tensor, query.ty.shape[-3]) for tensor in (key, value))
    dtype, ndim = str(query.ty.dtype.dtype), len(query.ty.shape)
    axes = [*range(ndim - 2), ndim - 1, ndim - 2]
    scores = emit(relax.op.matmul(query, emit(relax.op.permute_dims(key, axes))))
    scale = argument(node, 6, "scale") if len(node.args) > 7 else node.kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(int(query.ty.shape[-1]))
    scores = emit(relax.op.multiply(scores, relax.const(scale, dtype)))
    if argument(node, 5, "is_causal", False):
        # every row keeps its first column, so none is empty
        visible = _causal(translator, query.ty.shape[-2], key.ty.shape[-2])
        scores = emit(relax.op.where(visible, scores, relax.const(-math.inf, dtype)))
    if mask is None:
        return emit(relax.op.matmul(emit(relax.op.nn.softmax(scores, axis=-1)), value))
    if str(mask.ty.dtype.dtype) != "bool":
        scores = emit(relax.op.add(scores, mask))
        return emit(relax.op.matmul(emit(relax.op.nn.softmax(scores, axis=-1)), value))
    # a finite fill: a row without a visible column must not become NaN before it is set to zero
    scores = emit(relax.op.where(mask, scores, relax.const(_LOWEST[dtype], dtype)))
    result = emit(relax.op.matmul(emit(relax.op.nn.softmax(scores, axis=-1)), value))
    seen = emit(relax.op.max(emit(relax.op.astype(mask, dtype)), axis=-1, keepdims=True))
    return emit(relax.op.multiply(result, seen))


#: smallest finite value of each dtype that attention runs in
_LOWEST = {"float16": -65504.0, "bfloat16": -3.3895313892515355e38, "float32": -3.4028234663852886e38, "float64": -1.7976931348623157e308}


def _causal(translator: Any, rows: Any, columns: Any) -> relax.Expr:
    """[rows, columns] bool: column <= row."""
    positions = [translator.emit(relax.op.arange(0, size, 1, "int64")) for size in (rows, columns)]
    row = translator.emit(relax.op.reshape(positions[0], [rows, 1]))
    column = translator.emit(relax.op.reshape(positions[1], [1, columns]))
    return translator.emit(relax.op.less_equal(column, row))


def _repeat_heads(translator: Any, x: relax.Expr, heads: tvm.ir.Expr) -> relax.Expr:
    """[..., Hk, T, D] -> [..., H, T, D], each head repeated H / Hk times in place."""
    *lead, own, length, width = x.ty.shape
    groups = int(heads) // int(own)
    if groups == 1:
        return x
    apart = translator.emit(relax.op.reshape(x, [*lead, own, 1, length, width]))
    spread = translator.emit(relax.op.broadcast_to(apart, [*lead, own, groups, length, width]))
    return translator.emit(relax.op.reshape(spread, [*lead, heads, length, width]))


CONVERTERS = {"scaled_dot_product_attention.default": attention}
