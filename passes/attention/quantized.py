"""The pass: attention over a dequantised cache becomes attention over its codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from ...compiler.dialect.attention import FEW_QUERIES, NAME, are_few, attrs_of, dims_of
from ...compiler.dialect.attention_quantized import attention_quantized
from ...compiler.program import Program
from ...compiler.tvm import is_constant, relax, tirx
from ..base import Pass, PassContext
from .codes import Codes, codes_of
from .graph import Graph, is_unit, rebound, scalar, shape, swapped
from .match import Miss


@dataclass(frozen=True)
class QuantizedAttention(Pass):
    """Keys and values that are dequantised for one attention stay codes, so that no float of them is ever in memory. Exact up to rounding.

    Scales that are the same for all tokens leave the sums over tokens: those of keys go to the queries, those of values to the result. Those of tokens are factors of the
    scores and of the probabilities.
    """

    name: ClassVar[str] = "quantized-attention"

    def run(self, program: Program, context: PassContext) -> Program:
        if context.target.kind not in ("cpu", "cuda"):
            return program
        graph = Graph(program.main)
        sites: dict[Any, tuple[relax.Call, Codes, Codes]] = {}
        for binding in graph.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or graph.name(call) != NAME:
                continue
            found = _site(graph, call, context.target.kind == "cpu")
            if isinstance(found, Miss):
                context.note(f"attention at '{program.node(binding.var.name)}' reads dequantised keys and values: {found.reason}")
            elif found is not None:
                sites[binding.var] = (call, *found)
        if not sites:
            return program
        context.matched(attention=len(sites))
        return program.with_module(rebound(program.module, {var: partial(_made, graph, site) for var, site in sites.items()}))


def _site(graph: Graph, call: relax.Call, few: bool) -> tuple[Codes, Codes] | Miss | None:
    attrs, (k, v) = attrs_of(call), (codes_of(graph, operand) for operand in call.args[1:3])
    if k is None and v is None:
        return None
    for side in (k, v):
        if isinstance(side, Miss):
            return side
    if not isinstance(k, Codes) or not isinstance(v, Codes):
        return Miss("only one of both is made of codes")
    if (
        attrs.received
        or attrs.logsum
        or max(attrs.before, attrs.after) >= 0
        or attrs.layouts[1:3] != ("BHSD", "BHSD")
        or attrs.dtype not in ("", "float32")
        or str(call.args[0].ty.dtype) != "float32"
    ):
        return Miss("further results, windows, other layouts than BHSD or other types than float32 are not taken from codes")
    dims = dims_of(*(shape(arg) or () for arg in call.args[:3]), attrs.layouts)
    if few and not are_few(dims.queries):  # with more of them every float that is made of a code serves many products
        return Miss(f"more than {FEW_QUERIES} queries, or a number known only at run time")
    return k, v


def _made(graph: Graph, site: tuple[relax.Call, Codes, Codes], rewriter: Any) -> relax.Expr:
    return _Maker(graph, rewriter).attention(*site)


class _Maker:
    """Attention over codes, in the place of that over floats. graph: of the source program; rewriter: as of `rebound`."""

    def __init__(self, graph: Graph, rewriter: Any):
        self.graph, self.emit, self.visit_expr = graph, rewriter.builder_.emit, rewriter.visit_expr

    def attention(self, call: relax.Call, k: Codes, v: Codes) -> relax.Expr:
        attrs, old = attrs_of(call), call.args
        dims = dims_of(*(shape(arg) or () for arg in old[:3]), attrs.layouts)
        q, scale = self._plain(self.visit_expr(old[0]), attrs.layouts[0]), attrs.scale
        for factor in k.channels:
            if is_constant(factor) and (number := scalar(factor)) is not None:
                scale *= number
            else:
                q = self._scaled(q, factor, dims)
        optional = {"mask": self.visit_expr(old[3])} if len(old) == 4 else {}
        for side, codes in (("k", k), ("v", v)):
            for token in codes.tokens:
                own = self._per_token(token, dims, "float32")
                optional[f"{side}_scales"] = self.emit(relax.op.multiply(optional[f"{side}_scales"], own)) if f"{side}_scales" in optional else own
            if codes.zeros is not None:
                optional[f"{side}_zeros"] = self._per_token(codes.zeros, dims, str(codes.zeros.ty.dtype))
        numbers = {"k_bits": k.bits, "v_bits": v.bits, "k_zero": k.zero, "v_zero": v.zero}
        kept = {"scale": scale, "causal": attrs.causal, "fill": attrs.fill, "safe": attrs.safe}
        out: Any = self.emit(attention_quantized(q, self.visit_expr(k.expr), self.visit_expr(v.expr), optional, **kept, **numbers))
        for factor in v.channels:
            out = self._scaled(out, factor, dims)
        return self._plain(out, attrs.layouts[3])

    def _plain(self, value: Any, layout: str) -> Any:
        """BHSD of a layout, and back."""
        return value if layout == "BHSD" else swapped(self.emit, value)

    def _scaled(self, value: Any, factor: Any, dims: Any) -> Any:
        """[B, H, S, N] times a factor that broadcasts to [B, Hk, 1, N]: those heads of q that share a head of keys are more rows of it."""
        factor = self._float(self.visit_expr(factor))
        own = list(shape(factor) or [])
        own = [tirx.const(1, "int64")] * (4 - len(own)) + own
        factor = self.emit(relax.op.reshape(factor, own)) if len(shape(factor) or []) != 4 else factor
        if is_unit(own[1]) or self.graph.equal(dims.heads, dims.kv_heads):
            return self.emit(relax.op.multiply(value, factor))
        whole = shape(value) or []
        rows = [dims.batch, dims.kv_heads, dims.queries * tirx.floordiv(dims.heads, dims.kv_heads), whole[3]]
        return self.emit(relax.op.reshape(self.emit(relax.op.multiply(self.emit(relax.op.reshape(value, rows)), factor)), whole))

    def _per_token(self, value: Any, dims: Any, dtype: str) -> Any:
        """[B | 1, Hk | 1, T | 1, 1] -> [B, Hk, T]"""
        value, wanted = self.visit_expr(value), [dims.batch, dims.kv_heads, dims.keys]
        value = self._float(value) if dtype == "float32" else value
        own = [*[tirx.const(1, "int64")] * (4 - len(shape(value) or [])), *(shape(value) or [])][:3]
        value = self.emit(relax.op.reshape(value, own))
        return value if self.graph.same_dims(own, wanted) else self.emit(relax.op.broadcast_to(value, wanted))

    def _float(self, value: Any) -> Any:
        return value if str(value.ty.dtype) == "float32" else self.emit(relax.op.astype(value, "float32"))
