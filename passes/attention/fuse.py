"""The pass: every attention that `match` proves, and every one that an importer made, in its leanest form."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, ClassVar

from ...compiler.dialect.attention import NAME, SWAPPED, AttentionAttrs, attention, attrs_of, dims_of
from ...compiler.program import Program
from ...compiler.tvm import mutator, relax, tirx
from ..base import Pass, PassContext
from .graph import Graph, is_unit, scalar, shape
from .masks import combine, conjuncts, narrow, window_of
from .match import Miss, Site, match


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Softmax attention becomes one operator, its scale, masks, shared key heads and transposes part of it. Exact up to rounding; float32 only.

    Reports `attention`, the operators after the pass, and names every softmax between two products that it leaves, with the reason.
    """

    name: ClassVar[str] = "fuse-attention"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = Graph(program.main)
        sites: dict[Any, Any] = {}
        missed: list[tuple[Any, str]] = []
        for binding in graph.bindings:
            value = binding.value if isinstance(binding, relax.VarBinding) else None
            if not isinstance(value, relax.Call):
                continue
            if getattr(value.op, "name", "") == NAME:
                sites[binding.var] = value
            elif graph.name(value) == "nn.softmax":
                found = match(graph, binding)
                if isinstance(found, Site):
                    sites[found.out] = found
                elif isinstance(found, Miss):
                    missed.append((binding.var, found.reason))
        rewriter = _Rewriter(program.module, graph, sites)
        module = rewriter.apply() if sites else program.module
        for var, reason in missed + rewriter.missed:
            context.note(f"attention at '{program.node(var.name)}' is not fused: {reason}")
        context.matched(attention=rewriter.count)
        return program.with_module(relax.transform.DeadCodeElimination()(module)) if rewriter.count else program


@dataclass(frozen=True)
class _Operand:
    """q, k or v behind what the operator does by itself. transposed: the last two dims are [width, rows]; scale: factor taken out; groups: heads of q per head."""

    expr: Any
    transposed: bool
    scale: float = 1.0
    groups: int = 1


@mutator
class _Rewriter(relax.PyExprMutator):
    """Puts the operator where the second product was; what fed the first one and the softmax is dead after that."""

    def __init__(self, module: Any, graph: Graph, sites: dict[Any, Any]):
        super().__init__(module)
        self.module, self.graph, self.sites = module, graph, sites
        self.missed: list[tuple[Any, str]] = []
        self.count = 0
        self.name = ""
        self._swapped_after = False

    def apply(self) -> Any:
        main = self.module.get_global_var("main")
        self.builder_.update_func(main, self.visit_expr(self.module["main"]))
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        site = self.sites.get(binding.var)
        self.name, self._swapped_after = binding.var.name, self._only_swapped(binding.var)
        if site is None:
            super().visit_var_binding_(binding)
            return
        made = self._matched(site) if isinstance(site, Site) else self._imported(site)
        if isinstance(made, Miss):
            self.missed.append((binding.var, made.reason))
            super().visit_var_binding_(binding)
            return
        self.count += 1
        wanted = shape(binding.var)
        if wanted is not None and not self.graph.same_dims(shape(made) or (), wanted):
            made = relax.op.reshape(made, wanted)
        self.builder_.emit_normalized(relax.VarBinding(binding.var, self.builder_.normalize(made)))

    def _only_swapped(self, var: Any) -> bool:
        """All that is done with a variable is to change its second and third dim."""
        uses = self.graph.uses(var)
        swaps = (
            self.graph.name(use.value) == "permute_dims" and _axes(use.value) == list(SWAPPED) for use in uses if isinstance(use.value, relax.Call)
        )
        return bool(uses) and not self.graph.escapes(var) and sum(swaps) == len(uses)

    def emit(self, expr: Any) -> Any:
        """Bind an expression over variables of the source program or of the new one."""
        return self.builder_.emit(self.visit_expr(expr))

    def _matched(self, site: Site) -> relax.Expr | Miss:
        q, k, v, out = (shape(expr) for expr in (site.q, site.k, site.v, site.out))
        if q is None or k is None or v is None or out is None:
            return Miss("operands of unknown shape")
        if not (self.graph.same_dims(q[:-2], k[:-2]) and self.graph.same_dims(v[:-2], out[:-2])):
            return Miss("the products broadcast their leading dims")
        lead = _lead(site)
        combined = combine(self.graph, self.emit, site.terms, (*lead, *site.dims[-2:]))
        if isinstance(combined, Miss):
            return combined
        scale, mask, fill = combined
        attrs = AttentionAttrs(scale=scale, fill=fill, safe=site.safe)
        return self._call((site.q, site.k, site.v), (False, True, False), mask, attrs, lead)

    def _imported(self, call: relax.Call) -> relax.Expr:
        attrs = attrs_of(call)
        if attrs.received or attrs.logsum or attrs.layout != "BHSD":
            return self.visit_expr(call)
        dims = dims_of(*(shape(arg) or () for arg in call.args[:3]), attrs.layouts)
        mask = narrow(self.graph, self.emit, call.args[3]) if len(call.args) == 4 else None
        if int(dims.heads) != int(dims.kv_heads):
            mask, attrs = self._windowed(mask, attrs)
            return attention(*(self.visit_expr(arg) for arg in call.args[:3]), None if mask is None else self.visit_expr(mask), **asdict(attrs))
        return self._call(tuple(call.args[:3]), (False, False, False), mask, attrs, (dims.batch, dims.heads))

    def _call(self, exprs: Sequence[Any], transposed: Sequence[bool], mask: Any, attrs: AttentionAttrs, lead: Sequence[Any]) -> relax.Expr:
        """The operator over operands of which the scale, the shared heads and the transposes have been taken."""
        q, k, v = (self._operand(*given, position) for position, given in enumerate(zip(exprs, transposed, strict=True)))
        if k.groups != v.groups or (k.groups > 1 and int(lead[1]) % k.groups):
            k, v = (self._operand(exprs[position], transposed[position], position, share=False) for position in (1, 2))
        mask, attrs = self._windowed(mask, attrs)
        values, layouts = [], []
        for operand in (q, k, v):
            heads = lead[1] if operand.groups == 1 else tirx.const(int(lead[1]) // operand.groups, "int64")
            source = self._before_transpose(operand, (lead[0], heads))
            values.append(self._value(operand, (lead[0], heads)) if source is None else self.visit_expr(source))
            layouts.append("BHSD" if source is None else "BSHD")
        layouts.append("BSHD" if "BSHD" in layouts or self._swapped_after else "BHSD")
        attrs = replace(attrs, scale=attrs.scale * q.scale * k.scale, layout=layouts[0] if len(set(layouts)) == 1 else ",".join(layouts))
        out = self.builder_.emit(attention(*values, None if mask is None else self.visit_expr(mask), **asdict(attrs)), self.name)
        # canonicalisation removes it together with its inverse, which almost every attention is followed by
        return self.emit(relax.op.permute_dims(out, list(SWAPPED))) if layouts[3] == "BSHD" else out

    def _windowed(self, mask: Any, attrs: AttentionAttrs) -> tuple[Any, AttentionAttrs]:
        """A constant mask that is a window, or causal, is an attribute instead; so is one that others are joined to, of padding."""
        if mask is None or (attrs.window != (None, None) and attrs.fill != -math.inf):
            return mask, attrs
        several = attrs.fill == -math.inf and str(mask.ty.dtype) == "bool"
        parts = [narrow(self.graph, self.emit, part) for part in (conjuncts(self.graph, mask) if several else [self.graph.root(mask)])]
        found = [(part, window) for part in parts if (window := window_of(part, attrs.fill)) is not None]
        if not found:
            return mask, attrs
        for part, window in found:
            sizes = [int(dim) for dim in (shape(part) or ())[-2:]]
            attrs = attrs.within(*(distance if distance < size - 1 else None for distance, size in zip(window, sizes, strict=True)))
        rest = [part for part in parts if all(part is not other for other, _ in found)]
        return functools.reduce(lambda a, b: self.emit(relax.op.logical_and(a, b)), rest) if rest else None, replace(attrs, fill=-math.inf)

    def _operand(self, expr: Any, transposed: bool, position: int, share: bool = True) -> _Operand:
        """Walk back over scales (not of v), changes of leading dims, transposes of the last two dims, and heads repeated in place."""
        graph, found = self.graph, _Operand(self.graph.root(expr), transposed)
        while (call := graph.call(found.expr)) is not None:
            name, dims = graph.name(call), shape(found.expr)
            source = graph.root(call.args[0])
            before = shape(source) if isinstance(getattr(source, "ty", None), relax.TensorType) else None
            if dims is None or before is None:
                break
            if name in ("multiply", "divide") and position < 2:
                factor = scalar(graph.root(call.args[1]))
                if not factor or not graph.same_dims(before, dims):
                    break
                found = replace(found, expr=source, scale=found.scale * factor if name == "multiply" else found.scale / factor)
            elif name == "permute_dims" and _axes(call) == [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]:
                found = replace(found, expr=source, transposed=not found.transposed)
            elif name == "reshape" and graph.same_dims(before[-2:], dims[-2:]):
                found = replace(found, expr=source)
            elif name == "broadcast_to" and position > 0 and share and found.groups == 1:
                groups = _repeated(graph, before, dims)
                if groups == 0:
                    break
                found = replace(found, expr=source, groups=groups)
            else:
                break
        return found

    def _value(self, operand: _Operand, lead: Sequence[Any]) -> Any:
        """The operand as [B, H, rows, width]."""
        value = self.visit_expr(operand.expr)
        dims = list(shape(value) or ())
        if operand.transposed:
            value = self.emit(relax.op.permute_dims(value, [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]))
            dims = [*dims[:-2], dims[-1], dims[-2]]
        wanted = [*lead, *dims[-2:]]
        return value if self.graph.same_dims(dims, wanted) else self.emit(relax.op.reshape(value, wanted))

    def _before_transpose(self, operand: _Operand, lead: Sequence[Any]) -> Any:
        """What is transposed from [B, rows, H, width] to make the operand; None if it is not."""
        call = self.graph.call(operand.expr, "permute_dims")
        axes = _axes(call) if call is not None else []
        if call is None or len(axes) != 4:
            return None
        axes = [axes[0], axes[1], axes[3], axes[2]] if operand.transposed else axes
        dims = shape(call.args[0])
        if axes != list(SWAPPED) or dims is None or not self.graph.same_dims((dims[0], dims[2]), lead):
            return None
        return call.args[0]


def _axes(call: relax.Call) -> list[int]:
    rank = len(call.args[0].ty.shape)
    return [int(axis) for axis in call.attrs.axes] if call.attrs.axes is not None else list(range(rank))[::-1]


def _repeated(graph: Graph, before: Sequence[Any], after: Sequence[Any]) -> int:
    """How often a broadcast repeats each head in place: it widens the unit dim next to the last two, and no other. 0: it does something else."""
    if len(before) != len(after) or len(before) < 3 or not is_unit(before[-3]) or not isinstance(after[-3], tirx.IntImm):
        return 0
    others = [axis for axis in range(len(before)) if axis != len(before) - 3]
    return int(after[-3]) if all(graph.equal(before[axis], after[axis]) for axis in others) else 0


def _lead(site: Site) -> tuple[Any, Any]:
    """(batch, heads): those of the first form of the scores that has both, else the leading dims of the product merged."""
    for dims in site.shapes:
        if len(dims) == 4:
            return dims[0], dims[1]
    *rest, heads = site.dims[:-2] or (tirx.const(1, "int64"),)
    return prod(rest, start=tirx.const(1, "int64")), heads
