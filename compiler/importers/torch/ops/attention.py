"""scaled_dot_product_attention: one `tcompile.attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from ....dialect.attention import attention as make_attention
from ....tvm import relax, tirx, tvm
from .shape import argument


def attention(translator: Any, node: fx.Node) -> relax.Expr:
    """query: [..., H, S, D], key: [..., Hk, T, D], value: [..., Hk, T, E] -> [..., H, S, E]; mask: bool or float, broadcast to [..., H, S, T].

    A row without a visible column gives zeros, as in torch.
    """
    query, key, value = translator.value(node.args[:3])
    mask = translator.value(argument(node, 3, "attn_mask"))
    if argument(node, 4, "dropout_p", 0.0):
        raise NotImplementedError("attention with dropout: call .eval() before the export")
    scale, shared = node.kwargs.get("scale"), bool(node.kwargs.get("enable_gqa", False))
    if scale is None:
        scale = 1 / math.sqrt(int(query.ty.shape[-1]))
    lead, rows, columns = list(query.ty.shape)[:-2], query.ty.shape[-2], key.ty.shape[-2]
    four = _four(lead)
    query = _reshaped(translator, query, [*four, *list(query.ty.shape)[-2:]])
    key, value = (
        _reshaped(translator, _spread(translator, x, lead[:-1] if shared else lead, 3 if shared else 2), _kv_shape(x, four, shared))
        for x in (key, value)
    )
    if mask is not None and len(mask.ty.shape) != 4:
        mask = _four_mask(translator, mask, lead, four, rows, columns)
    call = make_attention(query, key, value, mask, scale=float(scale), causal=bool(argument(node, 5, "is_causal", False)), safe=True)
    return _reshaped(translator, translator.emit(call), [*lead, rows, list(value.ty.shape)[-1]])


def _four(lead: Sequence[Any]) -> list[Any]:
    """(batch, heads) of any number of leading dims; all are batch where the last of them is not a fixed number of heads."""
    one = tirx.const(1, "int64")
    if lead and isinstance(lead[-1], tirx.IntImm):
        return [math.prod(lead[:-1], start=one), lead[-1]]
    return [math.prod(lead, start=one), one]


def _kv_shape(x: relax.Expr, four: Sequence[Any], shared: bool) -> list[Any]:
    dims = list(x.ty.shape)
    return [four[0], dims[-3] if shared else four[1], *dims[-2:]]


def _spread(translator: Any, x: relax.Expr, lead: Sequence[Any], kept: int) -> relax.Expr:
    """x broadcast to the leading dims of the query; its last `kept` dims stay."""
    wanted = [*lead, *list(x.ty.shape)[-kept:]]
    return x if _same(x.ty.shape, wanted) else translator.emit(relax.op.broadcast_to(x, wanted))


def _four_mask(translator: Any, mask: relax.Expr, lead: Sequence[Any], four: Sequence[Any], rows: Any, columns: Any) -> relax.Expr:
    """A mask over any number of leading dims as one of four dims; up to three of its own need no copy."""
    dims = list(mask.ty.shape)
    if len(dims) <= 2 or (len(lead) <= 2 and len(dims) <= 4 and _same(lead[-1:], four[1:])):
        return _reshaped(translator, mask, [tirx.const(1, "int64")] * (4 - len(dims)) + dims)
    wide = translator.emit(relax.op.broadcast_to(mask, [*lead, rows, columns]))
    return _reshaped(translator, wide, [*four, rows, columns])


def _reshaped(translator: Any, x: relax.Expr, dims: Sequence[Any]) -> relax.Expr:
    return x if _same(x.ty.shape, dims) else translator.emit(relax.op.reshape(x, list(dims)))


def _same(a: Any, b: Sequence[Any]) -> bool:
    analyzer = tvm.sym.Analyzer()
    return len(a) == len(b) and all(analyzer.can_prove_equal(x, y) for x, y in zip(a, b, strict=True))


CONVERTERS = {"scaled_dot_product_attention.default": attention}
