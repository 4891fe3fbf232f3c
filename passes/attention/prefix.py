"""The pass: keys that all sequences of a batch begin with are attended to once.

Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes" (2024). With the queries of all sequences as rows of one, a prefix is read once:

    k = concat([broadcast(kp [1, Hk, P, D]), ks [B, Hk, T, D]], tokens), v likewise          attention(q [B, H, S, D], k, v)
    = join(attention(q as [1, H, B S, D], kp, vp), attention(q, ks, vs))                     with the logarithms l of their sums of exponentials:
    out = out_p + (out_s - out_p) w,   w = exp(l_s) / (exp(l_p) + exp(l_s)) = sigmoid(l_s - l_p)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ...compiler.dialect.attention import NAME, AttentionAttrs, AttentionDims, attention, attrs_of, dims_of
from ...compiler.program import DimRange, Program
from ...compiler.tvm import is_constant, relax, tirx
from ..base import Pass, PassContext
from .graph import Graph, is_unit, rebound, scalar, shape, swapped
from .match import Miss

#: bytes of keys and values that have to be saved for each byte that the join reads and writes, and in all: what three kernels more take
_GAIN, _LEAST = 2.0, 1 << 18


@dataclass(frozen=True)
class _Site:
    """An attention: keys and values of the prefix [1, Hk, P, D], those behind it, the mask of the latter, and the length of the prefix."""

    call: Any
    prefix: tuple[Any, Any]
    suffix: tuple[Any, Any]
    mask: Any
    length: int


@dataclass(frozen=True)
class SharedPrefix(Pass):
    """Attention over keys and values that begin with one prefix for all sequences of a batch becomes one over the prefix and one over the rest. Exact up to rounding."""

    name: ClassVar[str] = "shared-prefix"

    def run(self, program: Program, context: PassContext) -> Program:
        if context.target.kind not in ("cpu", "cuda"):
            return program
        graph, sites = Graph(program.main), {}
        for binding in graph.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or graph.name(call) != NAME:
                continue
            found = _site(graph, call, program)
            if isinstance(found, Miss):
                context.note(f"attention at '{program.node(binding.var.name)}' copies its shared prefix: {found.reason}")
            elif found is not None:
                sites[binding.var] = found
        if not sites:
            return program
        context.matched(attention=len(sites))
        return program.with_module(rebound(program.module, {var: partial(_joined, site) for var, site in sites.items()}))


def _site(graph: Graph, call: Any, program: Program) -> _Site | Miss | None:
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
    return _Site(call, (kp, vp), (ks, vs), mask, int(length))


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
    """Keys and values of the prefix that are no longer read again and again, against results and sums that are written, read and joined."""
    batch, heads, kv_heads, queries, depth, width = (
        _expected(program, dim) for dim in (dims.batch, dims.heads, dims.kv_heads, dims.queries, dims.depth, dims.width)
    )
    saved = 4 * (batch - 1) * kv_heads * length * (depth + width)
    joined = 4 * batch * heads * queries * (2 * depth + 5 * width)
    return saved > _GAIN * joined + _LEAST


def _expected(program: Program, dim: Any) -> int:
    """A size, of one that is open that which schedules are chosen for."""
    if isinstance(dim, tirx.IntImm):
        return int(dim)
    bounds = program.dims.get(getattr(dim, "name", ""), DimRange())
    return bounds.min if bounds.opt is None else bounds.opt


def _joined(site: _Site, rewriter: Any) -> relax.Expr:
    op, emit, attrs = relax.op, rewriter.builder_.emit, attrs_of(site.call)
    q = rewriter.visit_expr(site.call.args[0])
    dims = dims_of(*(shape(arg) or () for arg in site.call.args[:3]), attrs.layouts)
    one, rows = tirx.const(1, "int64"), dims.batch * dims.queries
    # with queries before heads, the sequences follow each other
    by_token = q if attrs.layouts[0] == "BSHD" else swapped(emit, q)
    folded = emit(op.reshape(by_token, [one, rows, dims.heads, dims.depth]))
    plain = {**asdict(replace(attrs, causal=False, before=-1, after=-1)), "logsum": True}
    layouts = attrs.layouts
    first = emit(
        attention(
            folded, *map(rewriter.visit_expr, site.prefix), **{**plain, "fill": -float("inf"), "layout": ",".join(("BSHD", *layouts[1:3], "BSHD"))}
        )
    )
    # the prefix is seen by all: nothing to see behind it is 0, not NaN
    mask = None if site.mask is None else rewriter.visit_expr(site.mask)
    ahead = attrs.window[1]
    window = {} if ahead is None else {"causal": ahead == site.length, "after": ahead - site.length or -1}
    own = {**plain, **window, "safe": True, "layout": ",".join((*layouts[:3], "BSHD"))}
    second = emit(attention(q, *map(rewriter.visit_expr, site.suffix), mask, **own))
    parts = [[emit(relax.TupleGetItem(pair, index)) for index in range(2)] for pair in (first, second)]
    wanted = [dims.batch, dims.queries, dims.heads, dims.width]
    before, behind = emit(op.reshape(parts[0][0], wanted)), parts[1][0]
    # [1, H, B S] and [B, H, S] -> [B, S, H, 1]
    log_before = emit(op.reshape(emit(op.permute_dims(parts[0][1], [0, 2, 1])), [*wanted[:3], one]))
    log_behind = emit(op.expand_dims(emit(op.permute_dims(parts[1][1], [0, 2, 1])), -1))
    share = emit(op.sigmoid(emit(op.subtract(log_behind, log_before))))
    out: Any = emit(op.add(before, emit(op.multiply(emit(op.subtract(behind, before)), share))))
    return out if layouts[3] == "BSHD" else swapped(emit, out)
