"""Epilogue fusion: every GEMM, convolution or reduction takes the element-wise operations behind it into its own kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compiler.program import Program
from ..compiler.tvm import relax, tvm
from .base import Pass, PassContext


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
        module = transform.AnnotateTIROpPattern()(program.module)
        with tvm.transform.PassContext(config={"relax.FuseOps.max_depth": self.depth}):
            module = transform.FuseTIR()(transform.FuseOps()(module))
        fused = program.with_module(transform.DeadCodeElimination()(module))
        context.matched(kernels_before=before, kernels_after=_kernel_calls(fused))
        return fused


def _kernel_calls(program: Program) -> int:
    count = 0

    def visit(expr: object) -> None:
        nonlocal count
        count += isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir"

    relax.analysis.post_order_visit(program.main, visit)
    return count
