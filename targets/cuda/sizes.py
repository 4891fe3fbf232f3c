"""Sizes that are known while a model runs: what is known of them at compile time, and how the host computes them.

A size is an int, or an expression of TIR over the symbols of a function (`batch * seq`). Kernels take each one that they need as a parameter of type `tc::Size`; the host evaluates it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.program import DimRange
from ...compiler.tvm import tirx, tvm
from ..common.fused import loads, product, static, variables_of
from ..common.stages import substitute

#: sizes for which nothing better is known: of a first dim (a batch), of any other
FIRST, OTHER = 4, 128
_BINARY = {"Add": "+", "Sub": "-", "Mul": "*", "EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "And": "&&", "Or": "||"}
_CALLS = {"FloorDiv": "floor_quotient", "FloorMod": "floor_remainder", "Min": "lesser", "Max": "greater"}


class Unsupported(Exception):
    """Something that no kernel of this target computes; says what."""


def simplified(size: Any) -> Any:
    """An int where the size is known, else the expression, simplified."""
    if isinstance(size, int):
        return size
    size = tvm.sym.Analyzer().simplify(size)
    known = static(size)
    return size if known is None else known


def require_fixed(*kinds: Any) -> None:
    """Raise Unsupported unless every dim of these tensor types is a number."""
    if any(static(dim) is None for kind in kinds for dim in kind.shape):
        raise Unsupported("sizes known only at run time")


def times(dims: Sequence[Any]) -> Any:
    """Product of sizes."""
    numbers = [static(dim) for dim in dims]
    known = math.prod(number for number in numbers if number is not None)
    open_dims = [dim for dim, number in zip(dims, numbers, strict=True) if number is None]
    return known if not open_dims else simplified(product([*open_dims, known]))


def shown(size: Any) -> str:
    """A size in a report."""
    return str(size) if isinstance(size, int) else f"({str(size).replace('T.int64', '')})"


def blocks(size: Any, per_block: int) -> Any:
    """How many blocks of so many elements hold `size`."""
    if isinstance(size, int):
        return -(-size // per_block)
    return simplified(tirx.floordiv(size + (per_block - 1), tirx.const(per_block, "int64")))


def same(a: Any, b: Any) -> bool:
    """Two sizes are equal, whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(tvm.sym.Analyzer().can_prove_equal(a, b))


def divides(number: int, size: Any) -> bool:
    """The size is a multiple of a number, whatever the symbols are."""
    if isinstance(size, int):
        return size % number == 0
    return same(tirx.floormod(size, tirx.const(number, "int64")), 0)


@dataclass(frozen=True)
class Known:
    """What is known of the symbols of a function: variable -> range of its values, whose `opt` is the size to be expected; `asked`: those for which the user has said it."""

    ranges: Mapping[Any, DimRange]
    asked: frozenset[Any] = frozenset()

    def typical(self, size: Any) -> int:
        """The size that is to be expected."""
        return self._at(size, lambda bounds: bounds.opt)

    def least(self, size: Any) -> int:
        return self._at(size, lambda bounds: bounds.min)

    def most(self, size: Any, unbounded: int) -> int:
        """The largest size; `unbounded` stands for symbols without a bound."""
        return self._at(size, lambda bounds: unbounded if bounds.max is None else bounds.max)

    def wanted(self, size: Any) -> list[int]:
        """The size that schedules have to be best for, where the user has said it."""
        return [self.typical(size)] if not isinstance(size, int) and variables_of(size) <= self.asked else []

    def samples(self, size: Any) -> Iterator[int]:
        """The size for small, usual and large values of its symbols."""
        variables = [] if isinstance(size, int) else sorted(variables_of(size), key=str)
        tried = [
            sorted({bounds.min, bounds.opt, min(16 * (bounds.opt or 1), bounds.max or 2**31)}) for bounds in map(self.ranges.__getitem__, variables)
        ]
        for values in itertools.product(*tried):
            yield evaluated(size, dict(zip(variables, values, strict=True)))

    def _at(self, size: Any, value: Callable[[DimRange], Any]) -> int:
        return size if isinstance(size, int) else evaluated(size, {var: value(self.ranges[var]) for var in variables_of(size) if var in self.ranges})

    def with_symbol(self, var: Any, bounds: DimRange, typical: int) -> Known:
        """The same and one more; typical: what is to be expected where `bounds` does not say it."""
        inside = min(max(typical, bounds.min), typical if bounds.max is None else bounds.max)
        found = replace(bounds, opt=inside if bounds.opt is None else bounds.opt)
        return Known({**self.ranges, var: found}, self.asked if bounds.opt is None else self.asked | {var})

    def bound(self, values: Mapping[Any, Any]) -> Known:
        """What is known of symbols that have these values in terms of mine."""
        found = {}
        for var, size in values.items():
            bounded = isinstance(size, int) or all(self.ranges[other].max is not None for other in variables_of(size))
            least, typical = self.least(size), self.typical(size)
            found[var] = DimRange(min(least, typical), typical, max(least, typical, self.most(size, 0)) if bounded else None)
        return Known(found, frozenset(var for var, size in values.items() if self.wanted(size)))


#: of functions whose sizes are all known
FIXED = Known({})


def evaluated(size: Any, values: Mapping[Any, int]) -> int:
    """The size where the symbols have these values; raises Unsupported when it is of others."""
    found = simplified(substitute(size, {var: tirx.const(value, var.ty.dtype) for var, value in values.items()}))
    if not isinstance(found, int):
        raise Unsupported(f"the size {size}, which no input gives")
    return found


def bind(shapes: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> tuple[dict[Any, Any], list[tuple[Any, Any]]]:
    """Symbols of a function from pairs (shape of a parameter, shape of the tensor that it is called with): (symbol -> size, pairs of sizes that have to be equal)."""
    values: dict[Any, Any] = {}
    rest: list[tuple[Any, Any]] = []
    for own, given in shapes:
        for dim, size in zip(own, given, strict=True):
            if isinstance(dim, tirx.Var) and dim not in values:
                values[dim] = simplified(size)
            else:
                rest.append((dim, size))
    checks = []
    for dim, size in rest:
        own = simplified(substitute(dim, {var: _expression(value) for var, value in values.items()}) if static(dim) is None else dim)
        given = simplified(size)
        if not same(own, given):
            checks.append((own, given))
    return values, checks


def _expression(size: Any) -> Any:
    return tirx.const(size, "int64") if isinstance(size, int) else size


def resolved(size: Any, values: Mapping[Any, Any]) -> Any:
    """A size of a function in terms of its caller's symbols."""
    if isinstance(size, int):
        return size
    return simplified(substitute(size, {var: _expression(value) for var, value in values.items()}))


def is_size(expr: Any, local: Mapping[Any, Any]) -> bool:
    """An integer that is made of symbols alone, of none of the `local` variables."""
    if isinstance(expr, (int, tirx.IntImm)) or not str(getattr(getattr(expr, "ty", None), "dtype", "")).startswith("int"):
        return False
    variables = variables_of(expr)
    return bool(variables) and not any(var in local for var in variables) and not loads(expr)


def is_count(size: Any) -> bool:
    """A size that is a sum of products of symbols and positive numbers, and so positive where no symbol is 0."""
    if isinstance(size, tirx.IntImm):
        return int(size.value) > 0
    return isinstance(size, tirx.Var) or (isinstance(size, (tirx.Add, tirx.Mul)) and is_count(size.a) and is_count(size.b))


def host_text(size: Any, name: Callable[[Any], str], kind: str = "int64_t") -> str:
    """A size as C++ of the host. name: C of a symbol, of type `kind`. Raises Unsupported for what no size is made of."""
    if isinstance(size, int):
        return str(size)
    node = type(size).__name__
    if node == "IntImm":
        return str(int(size.value))
    if node == "Var":
        return name(size)
    if node == "Cast":
        return host_text(size.value, name, kind)
    if node in _BINARY:
        return f"({host_text(size.a, name, kind)} {_BINARY[node]} {host_text(size.b, name, kind)})"
    if node in _CALLS:
        return f"tc::{_CALLS[node]}({host_text(size.a, name, kind)}, {host_text(size.b, name, kind)})"
    if node == "Not":
        return f"!{host_text(size.a, name, kind)}"
    if node == "Select":
        parts = size.condition, size.true_value, size.false_value
    elif node == "Call" and getattr(size.op, "name", "") == "prim.if_then_else":
        parts = tuple(size.args)
    else:
        raise Unsupported(f"a size made by {node}")
    condition, taken, other = (host_text(part, name, kind) for part in parts)
    return f"({condition} ? {kind}({taken}) : {kind}({other}))"
