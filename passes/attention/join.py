"""Attention over keys in two parts, each by an attention of its own, joined by the logarithms l of their sums of exponentials:

attention(q, concat([k1, k2], tokens), concat([v1, v2], tokens))  =  out1 + (out2 - out1) w,   w = exp(l2) / (exp(l1) + exp(l2)) = sigmoid(l2 - l1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ...compiler.dialect.attention import NAME, AttentionAttrs, attention, attrs_of, dims_of
from ...compiler.program import Program
from ...compiler.tvm import relax, tirx
from ..base import PassContext
from .graph import Graph, is_unit, rebound, shape, swapped
from .match import Miss

#: bytes that need not be read or written for each byte that the join does, and in all: what three kernels more take
_GAIN, _LEAST = 2.0, 1 << 18


@dataclass(frozen=True)
class Parts:
    """An attention: keys and values of the first part [B or 1, Hk, P, D] and of the second, the masks of both (None: nothing is hidden), and the length P of the first.

    shared: the first part is one for all sequences of the batch.
    """

    call: Any
    first: tuple[Any, Any]
    second: tuple[Any, Any]
    masks: tuple[Any, Any]
    length: Any
    shared: bool


def rejoined(program: Program, context: PassContext, find: Callable[[Graph, Any, Any, Program], Parts | Miss | None], kept: str) -> Program:
    """The program with every attention in the parts that `find` (graph, variable, call, program) gives. kept: what one that is left does, for the notes."""
    graph, sites = Graph(program.main), {}
    for binding in graph.bindings:
        call = binding.value
        if not isinstance(call, relax.Call) or graph.name(call) != NAME:
            continue
        found = find(graph, binding.var, call, program)
        if isinstance(found, Miss):
            context.note(f"attention at '{program.node(binding.var.name)}' {kept}: {found.reason}")
        elif found is not None:
            sites[binding.var] = partial(joined, found)
    if not sites:
        return program
    context.matched(attention=len(sites))
    return program.with_module(rebound(program.module, sites))


def pays(saved: float, written: float) -> bool:
    """Whether so many bytes less are worth a join whose results have `written` bytes."""
    return saved > _GAIN * written + _LEAST


def bytes_of_join(batch: int, heads: int, queries: int, depth: int, width: int) -> float:
    """Queries that are read twice, two results that are written and read, and their join."""
    return 4.0 * batch * heads * queries * (2 * depth + 5 * width)


def joined(parts: Parts, rewriter: Any) -> relax.Expr:
    """The attention of both parts, for `rebound`."""
    op, emit, attrs = relax.op, rewriter.builder_.emit, attrs_of(parts.call)
    q = rewriter.visit_expr(parts.call.args[0])
    dims = dims_of(*(shape(arg) or () for arg in parts.call.args[:3]), attrs.layouts)
    masks = [None if mask is None else rewriter.visit_expr(mask) for mask in parts.masks]
    rows, layout = q, attrs.layouts[0]
    if parts.shared:  # all sequences are rows of one
        by_token = q if layout == "BSHD" else swapped(emit, q)  # with queries before heads, the sequences follow each other
        rows, layout = emit(op.reshape(by_token, [tirx.const(1, "int64"), dims.batch * dims.queries, dims.heads, dims.depth])), "BSHD"
    # where one part hides all its keys it gives 0, not NaN
    plain = {**asdict(replace(attrs, causal=False, before=-1, after=-1)), "logsum": True, "safe": True}
    first = emit(attention(rows, *map(rewriter.visit_expr, parts.first), masks[0], **{**plain, "layout": _layout(layout, attrs)}))
    ahead = attrs.window[1]
    window = {} if ahead is None else {"causal": ahead == parts.length, "after": ahead - parts.length or -1}
    second = emit(attention(q, *map(rewriter.visit_expr, parts.second), masks[1], **{**plain, **window, "layout": _layout(attrs.layouts[0], attrs)}))
    wanted = [dims.batch, dims.queries, dims.heads, dims.width]
    (before, before_log), (behind, behind_log) = ([emit(relax.TupleGetItem(pair, index)) for index in range(2)] for pair in (first, second))
    if parts.shared:
        before = emit(op.reshape(before, wanted))
    before_log, behind_log = (_by_token(emit, log, [*wanted[:3], tirx.const(1, "int64")]) for log in (before_log, behind_log))
    share: Any = emit(op.sigmoid(emit(op.subtract(behind_log, before_log))))
    if masks[0] is not None and attrs.safe:  # zeros where neither part shows a key, and not the NaN of the difference
        share = emit(op.where(emit(op.equal(behind_log, relax.const(-math.inf, "float32"))), relax.const(0.0, "float32"), share))
    out: Any = emit(op.add(before, emit(op.multiply(emit(op.subtract(behind, before)), share))))
    return out if attrs.layouts[3] == "BSHD" else swapped(emit, out)


def _layout(queries: str, attrs: AttentionAttrs) -> str:
    return ",".join((queries, *attrs.layouts[1:3], "BSHD"))


def _by_token(emit: Callable[[Any], Any], log: Any, wanted: list[Any]) -> Any:
    """[1, H, B S] or [B, H, S] -> [B, S, H, 1]; the same numbers in the same order where H or S is 1."""
    _, heads, queries = shape(log) or []
    by_token = log if is_unit(heads) or is_unit(queries) else emit(relax.op.permute_dims(log, [0, 2, 1]))
    return emit(relax.op.reshape(by_token, wanted))
