"""Denormal numbers among the weights of products, which training with weight decay leaves in channels that do nothing: zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import is_constant, mutator, relax
from .base import Pass, PassContext
from .products import PRODUCTS, graph_of, of_products, operator
from .rewriting import emit_as

#: what adds and scales per channel behind a product
BEHIND = ("relax.add", "relax.subtract", "relax.multiply")


@dataclass(frozen=True)
class FlushDenormals(Pass):
    """Weights of products, and what is added to or multiplied with their results per channel, become zero where they are below the least normal float32 (1.2e-38): a multiply-add of a denormal number
    takes a hundred cycles instead of four, and a channel whose bias is one hands them on. Single numbers stay, as they may keep a logarithm or a division from zero; so do denormals that the model
    computes."""

    name: ClassVar[str] = "flush_denormals"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = graph_of(program)
        known: dict[Any, bool] = {}
        rewriter = _Rewriter(program)
        for var, call in graph.bindings.items():
            name = operator(call)
            if name in PRODUCTS or (name in BEHIND and any(of_products(graph, arg, known) for arg in call.args)):
                rewriter.offer(var, [arg for arg in call.args if is_constant(arg)])
        if not rewriter.wanted:
            return program
        context.matched(weights=rewriter.flushed)
        return rewriter.apply()


def flushed(values: np.ndarray) -> np.ndarray | None:
    """A float32 tensor with zeros for denormals; None where it has none, or is a single number."""
    if values.dtype != np.float32 or values.size < 2:
        return None
    bits = values.view(np.uint32) & 0x7FFFFFFF
    denormal = (bits - 1) < 0x7FFFFF  # what is 0 wraps around
    return np.where(denormal, np.float32(0), values) if denormal.any() else None


@mutator
class _Rewriter(relax.PyExprMutator):
    """Calls whose constants are replaced. A constant of several calls stays one."""

    def __init__(self, program: Program):
        super().__init__(program.module)
        self.program = program
        #: by constant, what takes its place; None where that is itself
        self.places: dict[Any, Any] = {}
        self.wanted: set[Any] = set()

    @property
    def flushed(self) -> int:
        """Constants with denormal numbers."""
        return sum(place is not None for place in self.places.values())

    def offer(self, var: Any, constants: list[Any]) -> None:
        """Look at the constants of the call that defines `var`."""
        for constant in constants:
            if constant not in self.places:
                values = flushed(constant.value.numpy())
                self.places[constant] = None if values is None else relax.const(values)
            if self.places[constant] is not None:
                self.wanted.add(var)

    def apply(self) -> Program:
        return self.program.with_main(self.visit_expr(self.program.main))

    def visit_var_binding_(self, binding: Any) -> None:
        if binding.var not in self.wanted:
            super().visit_var_binding_(binding)
            return
        call = binding.value
        args = [self.places.get(arg) or self.visit_expr(arg) for arg in call.args]
        self.set_var_remap(binding.var, emit_as(self.builder_, binding.var, relax.Call(call.op, args, call.attrs)))
