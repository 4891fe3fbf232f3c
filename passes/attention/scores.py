"""The pass `attention-scores`: scores of attention as products of 8-bit codes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from ...compiler.dialect.attention import NAME, AttentionAttrs, attrs_of, dims_of
from ...compiler.dialect.attention_int8 import SHORT, attention_int8
from ...compiler.dialect.scaled_rows import INT8_MAX, scaled_rows
from ...compiler.errors import UsageError
from ...compiler.program import Program
from ...compiler.tvm import relax, tirx
from ..base import Pass, PassContext
from .graph import Graph, rebound, shape

FORMATS = ("none", "int8")
#: fewest queries for which keys are worth rounding first
FEWEST = 16


@dataclass(frozen=True)
class Int8Scores(Pass):
    """Queries and keys of attention become 8-bit codes with a scale to every row, found while the model runs; their products are exact, the softmax and the values stay in float32.

    format: "int8", or "none": nothing is done. smooth: whether the mean key is taken from all keys first where that leaves the softmax as it is (every score of a query changes by the same
    number): large components that all keys share would take the codes from what tells keys apart. Without VNNI queries have 7 bits. Attentions of fewer than 16 queries are left as they are.
    The method is that of Zhang et al., "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration" (2024).
    """

    name: ClassVar[str] = "attention-scores"
    lossy: ClassVar[bool] = True
    flag: ClassVar[str] = "attention_scores"

    format: str = "int8"
    smooth: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"attention_scores: unknown format '{self.format}', expected one of {', '.join(FORMATS)}")

    def run(self, program: Program, context: PassContext) -> Program:
        if self.format == "none":
            return program
        target = context.target
        if target.kind != "cpu":
            raise UsageError(f"attention_scores: target {target.text} has no kernel for scores of int8")
        graph = Graph(program.main)
        sites: dict[Any, relax.Call] = {}
        for binding in graph.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or graph.name(call) != NAME:
                continue
            if reason := _refused(call):
                context.note(f"attention at '{program.node(binding.var.name)}' stays in float32: {reason}")
            else:
                sites[binding.var] = call
        if not sites:
            return program
        context.matched(attention=len(sites))
        largest = INT8_MAX if "int8" in target.formats else SHORT
        return program.with_module(rebound(program.module, {var: partial(self._made, call, largest) for var, call in sites.items()}))

    def _made(self, call: relax.Call, largest: int, rewriter: Any) -> relax.Expr:
        emit, attrs = rewriter.builder_.emit, attrs_of(call)
        q, k, v, *mask = (rewriter.visit_expr(arg) for arg in call.args)
        if self.smooth and _shifts_cancel(call, attrs):
            k = emit(relax.op.subtract(k, emit(relax.op.mean(k, [2 if attrs.layouts[1] == "BHSD" else 1], keepdims=True))))
        (q, q_scales), (k, k_scales) = (
            [emit(relax.TupleGetItem(both, place)) for place in range(2)]
            for both in (emit(scaled_rows(q, "int8", largest)), emit(scaled_rows(k, "uint8")))
        )
        return attention_int8(q, k, v, q_scales, k_scales, mask[0] if mask else None, largest, replace(attrs, dtype=""))


def _refused(call: relax.Call) -> str:
    attrs = attrs_of(call)
    dims = dims_of(*(shape(arg) or () for arg in call.args[:3]), attrs.layouts)
    if {str(arg.ty.dtype) for arg in call.args[:3]} != {"float32"} or attrs.dtype not in ("", "float32"):
        return "operands are not float32"
    if not all(isinstance(dim, tirx.IntImm) for dim in (dims.heads, dims.kv_heads, dims.depth, dims.width)) or int(dims.depth) % 4:
        return f"heads of {dims.depth}, not of a known multiple of four"
    if isinstance(dims.queries, tirx.IntImm) and int(dims.queries) < FEWEST:
        return f"fewer than {FEWEST} queries"
    return ""


def _shifts_cancel(call: relax.Call, attrs: AttentionAttrs) -> bool:
    """Whether a number added to all scores of a query changes nothing: none of those is filled in by a finite one, and no sum of exponentials is asked for."""
    filled = attrs.window != (None, None) or (len(call.args) == 4 and str(call.args[3].ty.dtype) == "bool")
    return not attrs.logsum and (not filled or attrs.fill == -math.inf)
