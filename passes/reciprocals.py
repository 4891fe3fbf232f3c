"""Divisions of what products give by constants: multiplications by their reciprocals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax
from .base import Pass, PassContext
from .products import analyze, constant_value, of_products, operator
from .rewriting import emit_as

#: steps by which the last bit of a quotient may be seen
ROUNDING = ("relax.round", "relax.floor", "relax.ceil", "relax.trunc", "relax.astype")


@dataclass(frozen=True)
class Reciprocals(Pass):
    """x / c becomes x * (1 / c), which may differ in the last bit, where x is made of sums of products, which are rounded already, and the quotient is not rounded to a whole number. A division of
    sixteen numbers takes as long as 32 multiply-adds; hard-swish, written out, has one (x * clip(x + 3, 0, 6) / 6). Other quotients may be indices or counts and stay exact."""

    name: ClassVar[str] = "reciprocals"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = analyze(program)
        known: dict[Any, bool] = {}
        found = {
            var: reciprocal
            for var, value in graph.bindings.items()
            if operator(value) == "relax.divide"
            and (reciprocal := _reciprocal(value.args[1])) is not None
            and of_products(graph, value.args[0], known)
            and not any(operator(graph.bindings.get(reader)) in ROUNDING for reader in graph.all_readers(var))
        }
        if not found:
            return program
        context.matched(divisions=len(found))
        return _Rewriter(program, found).apply()


def _reciprocal(divisor: Any) -> np.ndarray | None:
    """1 / a constant of float32, where neither of them is zero, infinite or denormal."""
    value = constant_value(divisor)
    if value is None or value.dtype != np.float32:
        return None
    limits = np.finfo(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        result = (1 / value.astype(np.float64)).astype(np.float32)
    sizes = np.abs(np.stack([value, result]))
    return result if value.size and np.all((sizes >= limits.tiny) & (sizes <= limits.max)) else None


@mutator
class _Rewriter(relax.PyExprMutator):
    """found: by quotient, the reciprocal of its divisor."""

    def __init__(self, program: Program, found: dict[Any, np.ndarray]):
        super().__init__(program.module)
        self.program, self.found = program, found

    def apply(self) -> Program:
        return self.program.with_main(self.visit_expr(self.program.main))

    def visit_var_binding_(self, binding: Any) -> None:
        reciprocal = self.found.get(binding.var)
        if reciprocal is None:
            super().visit_var_binding_(binding)
            return
        value = relax.op.multiply(self.visit_expr(binding.value.args[0]), relax.const(reciprocal))
        self.set_var_remap(binding.var, emit_as(self.builder_, binding.var, value))
