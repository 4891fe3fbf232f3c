"""The pass: keys that all sequences of a batch begin with are attended to once.

Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (2024). With the queries of all sequences as rows of one, a prefix is read once:

    k = concat([broadcast(kp [1, Hk, P, D]), ks [B, Hk, T, D]], tokens), v likewise          attention(q [B, H, S, D], k, v)
    = join(attention(q as [1, H, B S, D], kp, vp), attention(q, ks, vs))                     see `join`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...compiler.dialect.attention import AttentionAttrs, AttentionDims, attrs_of, dims_of
from ...compiler.program import DimRange, Program
from ...compiler.tvm import is_constant, relax, tirx
from ..base import Pass, PassContext
from .graph import Graph, is_unit, scalar, shape
from .join import Parts, bytes_of_join, pays, rejoined
from .match import Miss


@dataclass(frozen=True)
class SharedPrefix(Pass):
    """Attention over keys and values that begin with one prefix for all sequences of a batch becomes one over the prefix and one over the rest. Exact up to rounding."""

    name: ClassVar[str] = "shared-prefix"

    def run(self, program: Program, context: PassContext) -> Program:
        if context.target.kind not in ("cpu", "cuda"):
            return program
        return rejoined(program, context, _site, "copies its shared prefix")


def _site(graph: Graph, var: Any, call: Any, program: Program) -> Parts | Miss | None:
    attrs, parts = attrs_of(call), []
    for operand, layout in zip(call.args[1:3], attrs.layouts[1:3], strict=True):
        found = _parts(graph, operand, layout)
        if found is None:
            return None
        parts.append(found)
    (kp, ks), (vp, vs) = parts
    dims = dims_of(*(shape(arg) or () for arg in call.args[:3]), attrs.layouts)
    length = (shape(kp) or [])[2 if attrs.layouts[1] == "BHSD" else 1]
    if not isinstance(length, tirx.IntImm):
        return Miss("its length is known only at run time")
    if attrs.received or attrs.logsum or attrs.dtype not in ("", "float32") or str(call.args[0].ty.dtype) != "float32":
        return Miss("further results, or other types than float32")
    before, after = attrs.window
    if before is not None or (after is not None and after < int(length)):
        return Miss("a causal mask, or a window, that hides some of it")
    mask = _behind(graph, call.args[3], int(length), attrs) if len(call.args) == 4 else None
    if isinstance(mask, Miss):
        return mask
    if not _pays(dims, int(length), program):
        return Miss("too short, or too few sequences, to be worth a join")
    return Parts(call, (kp, vp), (ks, vs), (None, mask), int(length), shared=True)


def _parts(graph: Graph, operand: Any, layout: str) -> tuple[Any, Any] | None:
    """(what all sequences begin with [1, ..], what follows) of keys or values, in their layout; None when they are not made like that."""
    concat = graph.call(operand, "concat")
    if concat is None or int(concat.attrs.axis) % 4 != layout.index("S"):
        return None
    fields = graph.fields(concat.args[0])
    spread = graph.call(fields[0], "broadcast_to") if len(fields) == 2 else None
    if spread is None:
        return None
    before, after = shape(graph.root(spread.args[0])), shape(fields[0])
    if before is None or after is None or len(before) != 4 or not is_unit(before[0]) or not graph.same_dims(before[1:], after[1:]):
        return None
    return graph.root(spread.args[0]), graph.root(fields[1])


def _behind(graph: Graph, mask: Any, length: int, attrs: AttentionAttrs) -> Any:
    """The mask of what is behind the prefix, None where it hides nothing; a Miss unless it is known to leave the prefix as it is."""
    mask = graph.root(mask)
    own = shape(mask) or []
    nothing = 1.0 if str(mask.ty.dtype) == "bool" else 0.0
    if is_constant(mask) and own and not is_unit(own[-1]):
        array = mask.value.numpy()
        if not (array[..., :length] == nothing).all():
            return Miss("a mask that changes its scores")
        rest = np.ascontiguousarray(array[..., length:])
        return None if (rest == nothing).all() else relax.const(rest, str(mask.ty.dtype))
    concat = graph.call(mask, "concat")
    if concat is not None and int(concat.attrs.axis) % len(own) == len(own) - 1:
        first, *rest = graph.fields(concat.args[0])
        if len(rest) == 1 and _number(graph, first) == nothing and graph.equal((shape(first) or [0])[-1], tirx.const(length, "int64")):
            return rest[0]
    return Miss("a mask of which it is not known at compile time that it leaves the prefix as it is")


def _number(graph: Graph, expr: Any) -> float | None:
    """What all elements of a tensor are."""
    expr = graph.root(expr)
    call = graph.call(expr, "full", "zeros", "ones", "broadcast_to", "expand_dims", "reshape", "astype")
    if call is None:
        return scalar(expr)
    name = graph.name(call)
    if name in ("zeros", "ones"):
        return float(name == "ones")
    return _number(graph, call.args[1 if name == "full" else 0])


def _pays(dims: AttentionDims, length: int, program: Program) -> bool:
    """Keys and values of the prefix that are no longer read again and again, against the join."""
    batch, heads, kv_heads, queries, depth, width = (
        expected(program, dim) for dim in (dims.batch, dims.heads, dims.kv_heads, dims.queries, dims.depth, dims.width)
    )
    return pays(4.0 * (batch - 1) * kv_heads * length * (depth + width), bytes_of_join(batch, heads, queries, depth, width))


def expected(program: Program, dim: Any) -> int:
    """A size, of one that is open that which schedules are chosen for."""
    if isinstance(dim, tirx.IntImm):
        return int(dim)
    bounds = program.dims.get(getattr(dim, "name", ""), DimRange())
    return bounds.min if bounds.opt is None else bounds.opt
