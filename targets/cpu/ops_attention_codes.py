"""Definition of attention over codes as tensor expressions: of float keys and values that are made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...compiler.dialect.attention_quantized import NAME, attrs_of, dequantize, dims_of, optional_of
from ...compiler.tvm import te, tirx
from ..common.fused import WHOLE
from .attention_views import operand
from .ops_attention import attention, legalize_attention, masked

#: most queries that are taken from codes, and most rows of a task; the least vector
QUERIES, ROWS, LANES = 8, 64, 4


def legalize_codes(builder: Any, call: Any) -> Any:
    """One function for few queries of heads that are whole vectors; the attention of dequantised keys and values for others."""
    attrs, optional = attrs_of(call), optional_of(call)
    shapes = [list(arg.ty.shape) for arg in call.args]
    dims = dims_of(*shapes[:3], attrs)
    known = all(isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.queries, dims.depth, dims.width))
    fits = known and not attrs.causal and int(dims.queries) <= QUERIES and int(dims.heads) // int(dims.kv_heads) * int(dims.queries) <= ROWS
    if not fits or int(dims.depth) % (LANES * 8 // attrs.k_bits) or int(dims.width) % (LANES * 8 // attrs.v_bits):
        return legalize_attention(builder, dequantize(builder, call))
    mask = masked(builder, optional.get("mask"), dims, attrs.fill)
    if mask is None:
        return legalize_attention(builder, dequantize(builder, call))
    kind, prepared = mask
    about: dict[str, Any] = {
        "op": "attention_codes",
        "mask": kind,
        "outputs": 1,
        "received": False,
        "logsum": False,
        "before": -1,
        "after": -1,
        **asdict(attrs),
        "layouts": ["BHSD"] * 4,
    }
    open_sizes = {"batch": (0, 0), "keys": (1, 2)}
    about["sizes"] = {name: int(dim) if isinstance(dim, tirx.IntImm) else list(open_sizes[name]) for name, dim in vars(dims).items()}
    about["rows"] = [operand(call.args[0], "BHSD").rows] * 4
    names = [name for name in attrs.names if name != "mask"]

    def define(*given: Any) -> Any:
        floats = [_floats(given["qkv".index(side)], dict(zip(names, given[3:], strict=False)), about, side) for side in "kv"]
        return attention([given[0], *floats], given[3 + len(names)] if prepared is not None else None, about)

    operands: Sequence[Any] = [*call.args[:3], *(optional[name] for name in names), *([] if prepared is None else [prepared])]
    attributes = {WHOLE: json.dumps(about, sort_keys=True), "op_pattern": 8}
    return builder.call_te(define, *operands, primfunc_name_hint="attention_codes", primfunc_attrs=attributes)


def _floats(codes: Any, optional: Mapping[str, Any], about: Mapping[str, Any], side: str) -> Any:
    """[B, Hk, T, N] float32 from codes; optional: scales and zeros by name."""
    zeros, scales = optional.get(f"{side}_zeros"), optional.get(f"{side}_scales")
    share = 8 // about[f"{side}_bits"]

    def element(b: Any, h: Any, t: Any, n: Any) -> Any:
        code = codes[b, h, t, n if share == 1 else tirx.floordiv(n, 2)].astype("int32")
        code = code if share == 1 else tirx.bitwise_and(code >> (tirx.floormod(n, 2).astype("int32") * 4), tirx.const(15, "int32"))
        zero = tirx.const(about[f"{side}_zero"], "int32") if zeros is None else zeros[b, h, t].astype("int32")
        value = (code - zero).astype("float32")
        return value if scales is None else value * scales[b, h, t]

    return te.compute((*codes.shape[:3], codes.shape[3] * share), element, name=f"{side}_floats")


#: for `targets.common.legalize`
OWN = {NAME: legalize_codes}
