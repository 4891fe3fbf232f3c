"""Definition of attention by 8-bit scores as tensor expressions: of the floats that the codes stand for."""

from __future__ import annotations

import json
from typing import Any

from ...compiler.dialect.attention import attrs_of, dims_of
from ...compiler.dialect.attention_int8 import NAME, SHORT, dequantize, largest_of
from ...compiler.dialect.scaled_rows import UINT8_ZERO
from ...compiler.tvm import te, tirx
from ..common.fused import WHOLE
from .attention_views import operand
from .dot import PAIRS
from .ops_attention import attention, described, legalize_attention, masked


def legalize_int8(builder: Any, call: Any) -> Any:
    """One function where heads and widths are known, depths whole words, and a mask broadcasts in a known way; the attention of floats for others."""
    attrs, largest = attrs_of(call), largest_of(call)
    q, k, v, *scales = call.args[:5]
    dims = dims_of(*(list(x.ty.shape) for x in (q, k, v)), attrs.layouts)
    known = all(isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width))
    prepared = masked(builder, call.args[5] if len(call.args) == 6 else None, dims, attrs.fill) if known and int(dims.depth) % 4 == 0 else None
    if prepared is None:
        return legalize_attention(builder, dequantize(builder, call))
    kind, mask = prepared
    about = described(attrs, q, [operand(x, layout) for x, layout in zip((q, k, v), attrs.layouts, strict=False)], kind)
    about["scores"] = PAIRS.kind if largest <= SHORT else "u8s8"

    def floats(codes: Any, scales: Any, zero: int, name: str) -> Any:
        return te.compute(codes.shape, lambda *at: (codes[at].astype("int32") - zero).astype("float32") * scales[at[:-1]], name=name)

    def define(q: Any, k: Any, v: Any, q_scales: Any, k_scales: Any, *mask: Any) -> Any:
        return attention([floats(q, q_scales, 0, "q_floats"), floats(k, k_scales, UINT8_ZERO, "k_floats"), v], mask[0] if mask else None, about)

    attributes = {WHOLE: json.dumps(about, sort_keys=True), "op_pattern": 8}
    return builder.call_te(define, q, k, v, *scales, *([] if mask is None else [mask]), primfunc_name_hint="attention", primfunc_attrs=attributes)


#: for `targets.common.legalize`
OWN = {NAME: legalize_int8}
