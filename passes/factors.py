"""Constant factors of what products give: divisions as multiplications, and one multiplication for several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax
from .base import Pass, PassContext
from .products import Graph, analyze, constant_value, of_products, operator
from .rewriting import emit_as

#: steps by which the last bit of a quotient may be seen
ROUNDING = ("relax.round", "relax.floor", "relax.ceil", "relax.trunc", "relax.astype")
LIMITS = np.finfo(np.float32)


@dataclass(frozen=True)
class MergeFactors(Pass):
    """x / c becomes x * (1 / c), and x * a * b becomes x * (a b), which may differ in the last bit, where x is made of sums of products, which are rounded already. A division of sixteen numbers takes
    as long as 32 multiply-adds; hard-swish, written out, has one (x * clip(x + 3, 0, 6) / 6). Between two layers in int8, the scale of the sums meets that of the next codes, behind a residual sum, too:
    (x * a + y * b) * c becomes x * (a c) + y * (b c). Other quotients may be
    indices or counts and stay exact, and so do those that are rounded to whole numbers."""

    name: ClassVar[str] = "merge_factors"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = analyze(program)
        known: dict[Any, bool] = {}
        factors: dict[Any, tuple[Any, np.ndarray]] = {}
        changed: dict[Any, list[tuple[Any, np.ndarray]]] = {}
        divisions = merged = 0
        for var, call in graph.bindings.items():
            found = _factor(graph, var, call)
            if found is None or not of_products(graph, found[0], known):
                continue
            x, factor = found
            divided = operator(call) == "relax.divide"
            terms = _terms(graph, x, var, factors)
            together = [(inner, both) for inner, own in terms if (both := _merged(own, factor)) is not None]
            if together and len(together) == len(terms):
                changed[var] = together
                merged += 1
            elif divided:
                changed[var] = [(x, factor)]
            divisions += divided
            products = changed.get(var, [(x, factor)])
            if len(products) == 1:
                factors[var] = products[0]
        if not changed:
            return program
        context.matched(divisions=divisions, merged=merged)
        return _Rewriter(program, changed).apply()


def _factor(graph: Graph, var: Any, call: Any) -> tuple[Any, np.ndarray] | None:
    """The variable and the constant of float32 whose product `call` is, or may be taken for."""
    name = operator(call)
    if name == "relax.multiply":
        for x, other in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
            value = constant_value(other)
            if value is not None and value.dtype == np.float32 and isinstance(x, relax.Var):
                return x, value
    if name == "relax.divide" and not any(operator(graph.bindings.get(reader)) in ROUNDING for reader in graph.all_readers(var)):
        reciprocal = _reciprocal(call.args[1])
        if reciprocal is not None and isinstance(call.args[0], relax.Var):
            return call.args[0], reciprocal
    return None


def _terms(graph: Graph, x: Any, reader: Any, factors: dict[Any, tuple[Any, np.ndarray]]) -> list[tuple[Any, np.ndarray]]:
    """The one or two products whose sum `x` is, which `reader` alone reads; none where it is something else."""
    if graph.single_reader(x) != reader:
        return []
    if x in factors:
        return [factors[x]]
    call = graph.defining(x, "relax.add")
    operands = list(call.args) if call is not None else []
    alone = all(isinstance(arg, relax.Var) and arg in factors and graph.single_reader(arg) == x for arg in operands)
    return [factors[arg] for arg in operands] if alone else []


def _reciprocal(divisor: Any) -> np.ndarray | None:
    """1 / a constant of float32, where neither of them is zero, infinite or denormal."""
    value = constant_value(divisor)
    if value is None or value.dtype != np.float32:
        return None
    with np.errstate(divide="ignore", over="ignore"):
        result = (1 / value.astype(np.float64)).astype(np.float32)
    return result if value.size and _normal(value) and _normal(result) else None


def _merged(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """The product of two factors, unless it has more elements than either of them or leaves the range of normal numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        both = np.asarray(one.astype(np.float64) * other).astype(np.float32)
    return both if both.size == max(one.size, other.size) and _normal(one) and _normal(other) and _normal(both) else None


def _normal(values: np.ndarray) -> bool:
    sizes = np.abs(values)
    return bool(np.all((sizes >= LIMITS.tiny) & (sizes <= LIMITS.max)))


@mutator
class _Rewriter(relax.PyExprMutator):
    """changed: by variable, the products whose sum it becomes."""

    def __init__(self, program: Program, changed: dict[Any, list[tuple[Any, np.ndarray]]]):
        super().__init__(program.module)
        self.program, self.changed = program, changed

    def apply(self) -> Program:
        module = self.program.with_main(self.visit_expr(self.program.main)).module
        return self.program.with_module(relax.transform.DeadCodeElimination()(module))

    def visit_var_binding_(self, binding: Any) -> None:
        if binding.var not in self.changed:
            super().visit_var_binding_(binding)
            return
        first, *others = (relax.op.multiply(self.visit_expr(x), relax.const(factor)) for x, factor in self.changed[binding.var])
        value = relax.op.add(self.builder_.emit(first), self.builder_.emit(others[0])) if others else first
        self.set_var_remap(binding.var, emit_as(self.builder_, binding.var, value))
