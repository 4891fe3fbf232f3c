"""Constant factors of what products give: quotients as products, and one factor for several where short numbers are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax
from .base import Pass, PassContext
from .products import FOLLOWING, Graph, constant_value, graph_of, of_products, operator
from .rewriting import emit_as

#: steps by which the last bit of a quotient may be seen
ROUNDING = ("relax.round", "relax.floor", "relax.ceil", "relax.trunc", "relax.astype")
SHORT = ("bfloat16", "uint8", "int8")
#: what a factor may be, so that its parts are normal numbers of float32
LEAST, MOST = 2.0**-100, 2.0**126


@dataclass(frozen=True, eq=False)
class Factor:
    """x * value. value: float64; divided: the model divides."""

    x: Any
    value: np.ndarray
    divided: bool = False

    def times(self, other: Factor) -> Factor:
        return Factor(self.x, self.value * other.value, self.divided or other.divided)

    @property
    def fits(self) -> bool:
        sizes = np.abs(self.value)
        return bool(np.all((sizes >= LEAST) & (sizes <= MOST)))


@dataclass(frozen=True)
class MergeFactors(Pass):
    """x / c becomes x * h + x * l, where h and l are the upper and the lower half of 1 / c, and so does x / c * a: a multiplication and a multiply-add, as exact as the quotient. A division of sixteen
    numbers takes as long as 32 multiply-adds; hard-swish, written out, has one (x * clip(x + 3, 0, 6) / 6). What only numbers of 16 or 8 bits are made of has one factor for several, in one half: the scale of int8's
    sums and that of the next codes, behind a residual sum, too. (With one half everywhere, PP-OCR's detector was off by three times as much.) Only where x is made of sums of products, which are
    rounded already: other quotients may be indices or counts, and stay, as do those that are rounded to whole numbers."""

    name: ClassVar[str] = "merge_factors"

    def run(self, program: Program, context: PassContext) -> Program:
        graph = graph_of(program)
        known: dict[Any, bool] = {}
        ends: dict[Any, bool] = {}
        factors: dict[Any, Factor] = {}
        changed: dict[Any, list[tuple[Any, np.ndarray]]] = {}
        divisions = merged = 0
        for var, call in graph.bindings.items():
            own = _factor(graph, var, call)
            if own is None or not of_products(graph, own.x, known):
                continue
            short = _becomes_short(graph, var, ends)
            terms = _merged(_terms(graph, var, own, factors), own, short)
            merged += bool(terms)
            divisions += own.divided
            products = terms or [own]
            if len(products) == 1:
                factors[var] = products[0]
            if terms or own.divided:
                changed[var] = [(product.x, part) for product in products for part in _parts(product.value, short)]
        if not changed:
            return program
        context.matched(divisions=divisions, merged=merged)
        return _Rewriter(program, changed).apply()


def _factor(graph: Graph, var: Any, call: Any) -> Factor | None:
    """What `call` is, or may be taken for, if it is a variable of float32 by a constant."""
    name = operator(call)
    if name == "relax.multiply":
        for x, other in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
            value = constant_value(other)
            if value is not None and value.dtype == np.float32 and isinstance(x, relax.Var):
                return Factor(x, value.astype(np.float64))
    if name == "relax.divide" and isinstance(call.args[0], relax.Var):
        value = constant_value(call.args[1])
        if value is None or value.dtype != np.float32 or any(operator(graph.bindings.get(reader)) in ROUNDING for reader in graph.all_readers(var)):
            return None
        with np.errstate(divide="ignore"):
            quotient = Factor(call.args[0], 1 / value.astype(np.float64), divided=True)
        return quotient if quotient.fits else None
    return None


def _becomes_short(graph: Graph, var: Any, ends: dict[Any, bool]) -> bool:
    """Whether a value goes on, element by element, to numbers of 16 or 8 bits alone. ends: answers so far."""
    if var not in ends:
        ends[var] = False
        readers = list(graph.all_readers(var))
        ends[var] = bool(readers) and all(_short_reader(graph, reader, ends) for reader in readers)
    return ends[var]


def _short_reader(graph: Graph, reader: Any, ends: dict[Any, bool]) -> bool:
    call = graph.bindings.get(reader)
    name = operator(call)
    if name == "relax.round" or (name == "relax.astype" and str(call.attrs.dtype) in SHORT):
        return True
    return name in FOLLOWING and _becomes_short(graph, reader, ends)


def _terms(graph: Graph, reader: Any, own: Factor, factors: dict[Any, Factor]) -> list[Factor]:
    """The one or two products whose sum `own` multiplies, if `reader`, which it defines, alone reads them; none where it multiplies something else."""
    x = own.x
    if graph.single_reader(x) != reader:
        return []
    if x in factors:
        return [factors[x]]
    call = graph.defining(x, "relax.add")
    operands = list(call.args) if call is not None else []
    alone = all(isinstance(arg, relax.Var) and arg in factors and graph.single_reader(arg) == x for arg in operands)
    return [factors[arg] for arg in operands] if alone else []


def _merged(terms: list[Factor], own: Factor, short: bool) -> list[Factor]:
    """The terms with a factor of their sum put in, where that saves an operation; none otherwise."""
    if not short and (len(terms) != 1 or not (own.divided or terms[0].divided)):
        return []
    products = [term.times(own) for term in terms]
    smaller = all(product.value.size == max(term.value.size, own.value.size) for product, term in zip(products, terms, strict=True))
    return products if smaller and all(product.fits for product in products) else []


def _parts(value: np.ndarray, short: bool) -> list[np.ndarray]:
    """The factor in float32: for short numbers the nearest, otherwise the lower and the upper half, of one sign, so that an infinite number stays one."""
    nearest = value.astype(np.float32)
    if short:
        return [nearest]
    upper = np.where(np.abs(nearest) > np.abs(value), np.nextafter(nearest, np.float32(0)), nearest)
    lower = (value - upper).astype(np.float32)
    return [lower, upper] if lower.any() else [upper]


@mutator
class _Rewriter(relax.PyExprMutator):
    """changed: by variable, the products whose sum it becomes; the last one is that of a multiply-add."""

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
