"""Definition of attention as tensor expressions, and the form in which a mask reaches the kernel."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from ...compiler.dialect.attention import NAME, attrs_of, decompose, dims_of
from ...compiler.tvm import Constant, relax, te, tirx, tvm
from ..common.fused import WHOLE

#: the queries of a prepared mask are padded to a multiple of this, the widest vector
PAD = 16
#: Relax's pattern kind "opaque": nothing joins it
_OPAQUE = 8


def prepare_mask(mask: Any, queries: Any, fill: float) -> Any:
    """mask: [B|1, H|1, S|1, T|1] float or bool -> [B|1, H|1, T|1, S padded|1] float32: queries side by side, as the kernel's vectors hold them.

    A boolean mask becomes 0 where a key is seen and `fill` where it is not.
    """
    batch, heads, rows, columns = mask.shape
    padded = rows if _is_unit(rows) else (rows + (PAD - 1)) // PAD * PAD

    def element(b: Any, h: Any, t: Any, s: Any) -> Any:
        value = mask[b, h, s, t]
        if mask.dtype == "bool":
            value = tirx.Select(value, tirx.const(0, "float32"), tirx.const(fill, "float32"))
        return value if _is_unit(rows) else tirx.if_then_else(s < rows, value, tirx.const(0, "float32"))

    return te.compute((batch, heads, columns, padded), element, name="mask")


def _is_unit(dim: Any) -> bool:
    return isinstance(dim, tirx.IntImm) and int(dim) == 1


def attention(q: Any, k: Any, v: Any, mask: Any, kind: str, attrs: Any) -> Any:
    """The operator's meaning, one stage after the other; mask: as `prepare_mask` makes it, None or added ("add") or put in place of scores where not 0 ("select")."""
    dims = dims_of(q.shape, k.shape, v.shape, attrs.layouts)
    groups = dims.heads // dims.kv_heads
    of_q, of_k, of_v, of_out = attrs.layouts

    def at(x: Any, layout: str, b: Any, h: Any, s: Any, d: Any) -> Any:
        return x[b, h, s, d] if layout == "BHSD" else x[b, s, h, d]

    def score(b: Any, h: Any, s: Any, t: Any) -> Any:
        value = products(b, h, s, t) * tirx.const(attrs.scale, "float32")
        fill = tirx.const(attrs.fill, "float32")
        value = tirx.Select(t <= s, value, fill) if attrs.causal else value
        if kind == "none":
            return value
        extra = mask(*(0 if _is_unit(dim) else index for dim, index in zip(mask.shape, (b, h, t, s), strict=True)))
        return value + extra if kind == "add" else tirx.Select(extra == tirx.const(0, "float32"), value, extra)

    shape = (dims.batch, dims.heads, dims.queries, dims.keys)
    low, zero = tirx.const(-math.inf, "float32"), tirx.const(0, "float32")
    greatest = te.comm_reducer(lambda a, b: tirx.Select(a > b, a, b), lambda dtype: tirx.const(-math.inf, dtype), name="greatest")
    d, t, u, w = (te.reduce_axis((0, size), name) for size, name in ((dims.depth, "d"), (dims.keys, "t"), (dims.keys, "u"), (dims.keys, "w")))
    products = te.compute(shape, lambda b, h, s, t: te.sum(at(q, of_q, b, h, s, d) * at(k, of_k, b, h // groups, t, d), axis=d), name="products")
    scores = te.compute(shape, score, name="scores")
    top = te.compute(shape[:3], lambda b, h, s: greatest(scores(b, h, s, t), axis=t), name="top")
    base = te.compute(shape[:3], lambda b, h, s: tirx.Select(top(b, h, s) == low, zero, top(b, h, s)), name="base")
    power = te.compute(shape, lambda b, h, s, t: te.exp(scores(b, h, s, t) - base(b, h, s)), name="power")
    total = te.compute(shape[:3], lambda b, h, s: te.sum(power(b, h, s, u), axis=u), name="total")
    one = tirx.const(1, "float32")

    def inverse(b: Any, h: Any, s: Any) -> Any:
        value = one / total(b, h, s)
        return tirx.Select(total(b, h, s) == zero, zero, value) if attrs.safe else value

    inverses = te.compute(shape[:3], inverse, name="inverse")
    weights = te.compute(shape, lambda b, h, s, t: power(b, h, s, t) * inverses(b, h, s), name="weights")

    def element(b: Any, h: Any, s: Any, e: Any) -> Any:
        return te.sum(weights(b, h, s, w) * at(v, of_v, b, h // groups, w, e), axis=w)

    if of_out == "BHSD":
        out = te.compute((*shape[:3], dims.width), element, name="attention")
    else:
        out = te.compute((dims.batch, dims.queries, dims.heads, dims.width), lambda b, s, h, e: element(b, h, s, e), name="attention")
    if not attrs.received:
        return out
    h, s = te.reduce_axis((0, dims.heads), "h"), te.reduce_axis((0, dims.queries), "s")
    sums = te.compute((dims.batch, dims.keys), lambda b, t: te.sum(weights(b, h, s, t), axis=[h, s]), name="sums")
    count = tirx.Cast("float32", dims.heads * dims.queries)
    return [out, te.compute((dims.batch, dims.keys), lambda b, t: sums(b, t) / count, name="received")]


def legalize_attention(builder: Any, call: Any) -> Any:
    """One function for float32 with known heads and widths and a mask that broadcasts in a known way; Relax operators for anything else."""
    attrs = attrs_of(call)
    q, k, v = call.args[:3]
    dims = dims_of(list(q.ty.shape), list(k.ty.shape), list(v.ty.shape), attrs.layouts)
    known = all(isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width))
    if not known or any(arg.ty.dtype != "float32" for arg in (q, k, v)):
        return decompose(builder, call)
    kind, mask = "none", None
    if len(call.args) == 4:
        mask = call.args[3]
        kind = "select" if str(mask.ty.dtype) == "bool" else "add"
        if str(mask.ty.dtype) not in ("bool", "float32") or (kind == "select" and attrs.fill == 0) or not _broadcasts(mask, dims):
            return decompose(builder, call)
        mask = _prepared(builder, mask, dims.queries, attrs.fill)
    about = json.dumps(
        {"op": "attention", "mask": kind, "outputs": 2 if attrs.received else 1, **asdict(attrs), "layouts": attrs.layouts}, sort_keys=True
    )

    def define(*operands: Any) -> Any:
        return attention(*operands[:3], operands[3] if len(operands) == 4 else None, kind, attrs)

    operands = [q, k, v] if mask is None else [q, k, v, mask]
    return builder.call_te(define, *operands, primfunc_name_hint="attention", primfunc_attrs={WHOLE: about, "op_pattern": _OPAQUE})


def _broadcasts(mask: relax.Expr, dims: Any) -> bool:
    """Every dim is 1 or provably the one it goes with."""
    analyzer = tvm.sym.Analyzer()
    own = [tirx.const(1, "int64")] * (4 - len(mask.ty.shape)) + list(mask.ty.shape)
    wanted = (dims.batch, dims.heads, dims.queries, dims.keys)
    return len(own) == 4 and all(_is_unit(dim) or analyzer.can_prove_equal(dim, size) for dim, size in zip(own, wanted, strict=True))


def _prepared(builder: Any, mask: relax.Expr, queries: Any, fill: float) -> relax.Expr:
    """A constant mask is prepared here, another by a small kernel of its own, one for all layers that share it."""
    shape = [tirx.const(1, "int64")] * (4 - len(mask.ty.shape)) + list(mask.ty.shape)
    if isinstance(mask, Constant):
        array = mask.value.numpy().reshape([int(dim) for dim in shape])
        values = np.where(array, 0.0, fill).astype("float32") if array.dtype == bool else array
        values = values.transpose(0, 1, 3, 2)
        if values.shape[3] > 1:
            values = np.pad(values, ((0, 0), (0, 0), (0, 0), (0, -values.shape[3] % PAD)))
        return relax.const(np.ascontiguousarray(values))
    whole = mask if len(mask.ty.shape) == 4 else builder.emit(relax.op.reshape(mask, shape))
    return builder.emit(builder.call_te(prepare_mask, whole, queries, fill, primfunc_name_hint="mask"))


#: for `targets.common.legalize`
OWN = {NAME: legalize_attention}
