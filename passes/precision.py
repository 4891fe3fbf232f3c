"""The pass `precision`: products by constant weights in a shorter floating-point type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from ..compiler.dialect.attention import NAME as ATTENTION
from ..compiler.dialect.attention import attrs_of
from ..compiler.errors import UsageError
from ..compiler.program import Program
from ..compiler.tvm import mutator, relax, tirx
from .base import Pass, PassContext
from .products import Graph, Site, analyze, operator
from .rewriting import emit_as

#: what --precision names for a CPU
FORMATS = ("fp32", "bf16")


@dataclass(frozen=True)
class Precision(Pass):
    """Matrix products and convolutions by constant weights, and attention, with operands rounded to bfloat16 and sums in float32; everything else stays in float32.

    format: "fp32" (nothing changes) or "bf16". skip: layers (node names) to leave in float32.
    """

    name: ClassVar[str] = "precision"
    lossy: ClassVar[bool] = True

    format: str = "bf16"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"precision: a CPU multiplies in {' or '.join(FORMATS)}, not in '{self.format}'")
        object.__setattr__(self, "skip", tuple(self.skip))

    def run(self, program: Program, context: PassContext) -> Program:
        if self.format == "fp32":
            return program
        if context.target.kind != "cpu":
            raise UsageError(f"precision: this pass is for CPUs; the compile option chooses the products of {context.target.text}")
        graph = analyze(program)
        # depthwise convolutions have one product per lane, and words of two numbers would only widen them
        graph.sites = [site for site in graph.sites if not site.depthwise]
        if unknown := set(self.skip) - {site.name for site in graph.sites}:
            raise UsageError(f"precision: skip names no layer {', '.join(sorted(unknown))}; there are {', '.join(site.name for site in graph.sites)}")
        sites = [site for site in graph.sites if site.name not in self.skip]
        attentions = [var for var, value in graph.bindings.items() if operator(value) == ATTENTION and _takes_bfloat16(value)]
        if not sites and not attentions:
            context.note("neither a product by constant weights nor attention was found")
            return program
        if "bfloat16" not in context.target.formats:
            context.note(
                f"target {context.target.text} has no instruction for bfloat16: weights take half of the memory, products are computed in float32"
            )
        context.matched(**{kind: sum(site.kind == kind for site in sites) for kind in ("matmul", "conv2d")}, attention=len(attentions))
        return _Rewriter(graph, sites, attentions).apply()


def _takes_bfloat16(call: Any) -> bool:
    """Words of two numbers along an even depth, and no second result, whose sums over all queries are of the exact probabilities."""
    q = call.args[0]
    depth = q.ty.shape[3]
    return str(q.ty.dtype) == "float32" and isinstance(depth, tirx.IntImm) and int(depth) % 2 == 0 and not attrs_of(call).received


@mutator
class _Rewriter(relax.PyExprMutator):
    """Products on rounded operands; an operand that several products read is rounded once."""

    def __init__(self, graph: Graph, sites: list[Site], attentions: list[Any]):
        super().__init__(graph.program.module)
        self.graph, self.attentions = graph, set(attentions)
        self.sites = {site.var: site for site in sites}
        self.rounded: dict[Any, Any] = {}

    def apply(self) -> Program:
        program = self.graph.program
        module = program.with_main(self.visit_expr(program.main)).module
        return program.with_module(relax.transform.DeadCodeElimination()(module))

    def visit_var_binding_(self, binding: Any) -> None:
        site = self.sites.get(binding.var)
        if site is not None:
            value = self._product(site, binding.var.name)
        elif binding.var in self.attentions:
            call = binding.value
            operands = [self._round(arg, binding.var.name) if place < 3 else self.visit_expr(arg) for place, arg in enumerate(call.args)]
            value = self.builder_.emit(relax.Call(call.op, operands, call.attrs), binding.var.name)
        else:
            super().visit_var_binding_(binding)
            return
        if not isinstance(binding.var, relax.DataflowVar):
            value = emit_as(self.builder_, binding.var, value)
        self.set_var_remap(binding.var, value)

    def _round(self, x: Any, name: str) -> Any:
        if x not in self.rounded:
            self.rounded[x] = self.builder_.emit(relax.op.astype(self.visit_expr(x), "bfloat16"), name)
        return self.rounded[x]

    def _product(self, site: Site, name: str) -> Any:
        x, weight = self._round(site.x, name), relax.const(np.ascontiguousarray(site.weight.astype(ml_dtypes.bfloat16)), "bfloat16")
        if site.kind == "matmul":
            return self.builder_.emit(relax.op.matmul(x, weight, out_dtype="float32"), name)
        attrs = site.call.attrs
        numbers = ([int(value) for value in values] for values in (attrs.strides, attrs.padding, attrs.dilation))
        return self.builder_.emit(relax.op.nn.conv2d(x, weight, *numbers, int(attrs.groups), "NCHW", "OIHW", "NCHW", "float32"), name)
