"""The pass: keys and values of a cache are read where they are, not copied in front of a token's own.

    k = concat([cache [B, Hk, P, D], own [B, Hk, S, D]], tokens), v likewise        attention(q [B, H, S, D], k, v)
    = join(attention(q, cache), attention(q, own))                                  see `join`

Decoding reads every key once a token, so a copy costs more than the attention: it reads the cache, too, and writes as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...compiler.dialect.attention import are_few, attrs_of, dims_of
from ...compiler.program import Program
from ...compiler.tvm import is_constant, relax, tirx
from ..base import Pass, PassContext
from .graph import Graph, is_unit, shape
from .join import Parts, bytes_of_join, pays, rejoined
from .match import Miss
from .prefix import expected


@dataclass(frozen=True)
class CachedKeys(Pass):
    """Attention of few queries over keys and values that are a cache and those of the queries' own tokens becomes one over the cache, in place, and one over the rest. Exact up to rounding."""

    name: ClassVar[str] = "cached-keys"

    def run(self, program: Program, context: PassContext) -> Program:
        if context.target.kind != "cpu":  # elsewhere attention does not read parts of larger tensors in place
            return program
        return rejoined(program, context, _site, "copies its cache")


def _site(graph: Graph, var: Any, call: Any, program: Program) -> Parts | Miss | None:
    attrs = attrs_of(call)
    dims = dims_of(*(shape(arg) or () for arg in call.args[:3]), attrs.layouts)
    if not are_few(dims.queries):
        return None
    halves = [_halves(graph, var, operand, layout) for operand, layout in zip(call.args[1:3], attrs.layouts[1:3], strict=True)]
    if None in halves:
        return None
    (keys, own_keys), (values, own_values) = halves  # pyright: ignore[reportGeneralTypeIssues]
    lengths = [(shape(part) or ())[layout.index("S")] for part, layout in zip((keys, values), attrs.layouts[1:3], strict=True)]
    if not graph.equal(*lengths):
        return Miss("keys and values are not cut at the same place")
    if attrs.received or attrs.logsum or attrs.dtype not in ("", "float32") or str(call.args[0].ty.dtype) != "float32":
        return Miss("further results, or other types than float32")
    before, after = attrs.window
    if before is not None or (after is not None and not (isinstance(lengths[0], tirx.IntImm) and after >= int(lengths[0]))):
        return Miss("a causal mask, or a window, that hides some of it")
    batch, heads, kv_heads, queries, length, depth, width = (
        expected(program, dim) for dim in (dims.batch, dims.heads, dims.kv_heads, dims.queries, lengths[0], dims.depth, dims.width)
    )
    if not pays(2 * 4.0 * batch * kv_heads * length * (depth + width), bytes_of_join(batch, heads, queries, depth, width)):
        return Miss("too short to be worth a join")
    mask = graph.root(call.args[3]) if len(call.args) == 4 else None
    start, end = tirx.const(0, "int64"), (shape(call.args[1]) or ())[attrs.layouts[1].index("S")]
    masks = (None, None) if mask is None else (_columns(mask, start, lengths[0]), _columns(mask, lengths[0], end))
    return Parts(call, (keys, values), (own_keys, own_values), masks, lengths[0], shared=False)


def _halves(graph: Graph, reader: Any, operand: Any, layout: str) -> tuple[Any, Any] | None:
    """(cache, what follows) of keys or values that nobody else needs in one piece; None when they are not made like that."""
    whole = graph.root(operand)
    concat = graph.call(whole, "concat")
    if concat is None or int(concat.attrs.axis) % 4 != layout.index("S") or graph.escapes(whole):
        return None
    if any(use.var != reader for use in graph.uses(whole)):
        return None
    fields = graph.fields(concat.args[0])
    return (graph.root(fields[0]), graph.root(fields[1])) if len(fields) == 2 else None


def _columns(mask: Any, begin: Any, end: Any) -> Any:
    """Columns of a mask; of a constant one that hides nothing there, None."""
    own = shape(mask) or []
    if not own or is_unit(own[-1]):
        return mask
    if is_constant(mask) and isinstance(begin, tirx.IntImm) and isinstance(end, tirx.IntImm):
        array = np.ascontiguousarray(mask.value.numpy()[..., int(begin) : int(end)])
        return None if (array == (1 if array.dtype == bool else 0)).all() else relax.const(array, str(mask.ty.dtype))
    return relax.op.strided_slice(mask, [len(own) - 1], [begin], [end])
