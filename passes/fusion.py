"""Epilogue fusion: every GEMM, convolution or reduction takes the element-wise operations behind it into its own kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.program import Program
from ..compiler.tvm import relax, tirx, tvm
from .base import Pass, PassContext
from .origins import kernel_origins

#: attribute of a kernel: names of the source nodes it computes
NODES = "tcompile.nodes"


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Runs on a legalized module (every operator a `call_tir`): groups kernels by Relax's dominator-based fusion and merges each group into one PrimFunc.

    depth: most operators in one group.
    """

    name: ClassVar[str] = "fuse_epilogues"
    depth: int = 256

    def run(self, program: Program, context: PassContext) -> Program:
        transform = relax.transform
        before = _kernel_calls(program)
        annotated = transform.AnnotateTIROpPattern()(program.module)
        with tvm.transform.PassContext(config={"relax.FuseOps.max_depth": self.depth}):
            grouped = transform.FuseOps()(annotated)
        nodes = kernel_origins(annotated, grouped, program.origins)
        module = transform.DeadCodeElimination()(transform.FuseTIR()(grouped))
        fused = program.with_module(_with_nodes(module, nodes))
        context.matched(kernels_before=before, kernels_after=_kernel_calls(fused))
        return fused


def _with_nodes(module: Any, nodes: Mapping[str, list[str]]) -> Any:
    """The module with the attribute `NODES` on every kernel."""
    named = {
        variable: func.with_attr(NODES, nodes[variable.name_hint]) for variable, func in module.functions_items() if nodes.get(variable.name_hint)
    }
    module = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for variable, func in named.items():
        if isinstance(func, tirx.PrimFunc):
            module.update_func(variable, func)
    return module


def _kernel_calls(program: Program) -> int:
    count = 0

    def visit(expr: object) -> None:
        nonlocal count
        count += isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir"

    relax.analysis.post_order_visit(program.main, visit)
    return count
