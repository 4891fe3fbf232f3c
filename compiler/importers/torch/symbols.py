"""torch's symbolic sizes (sympy expressions) as TIR expressions and as the Program's dims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch.utils._sympy.value_ranges import bound_sympy

from ...program import DimRange
from ...tvm import tirx, tvm

#: torch's integer functions by class name; each takes the translated arguments
_FUNCTIONS = {
    "FloorDiv": tirx.floordiv,
    "CleanDiv": tirx.floordiv,
    "PythonMod": tirx.floormod,
    "Mod": tirx.floormod,
    "Max": lambda *values: reduce(tirx.max, values),
    "Min": lambda *values: reduce(tirx.min, values),
}


class UnsupportedSize(Exception):
    """A size that depends on data, or on a function that TIR index arithmetic does not have."""


def equal(left: int | tvm.ir.Expr, right: int | tvm.ir.Expr) -> bool:
    """True when two sizes are provably the same."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if isinstance(left, tvm.ir.Expr) and left.same_as(right):
        return True
    return bool(tvm.sym.Analyzer().can_prove_equal(left, right))


def same_shape(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """True when two shapes are provably the same."""
    return len(left) == len(right) and all(map(equal, left, right))


def _depends_on_data(symbol: sympy.Symbol) -> bool:
    return str(symbol).startswith("u")


class Symbols:
    """TIR variable of every symbol of one exported program. names: symbol -> name to use for it ({"s77": "batch"})."""

    def __init__(self, exported: torch.export.ExportedProgram, names: Mapping[str, str]):
        self.names = dict(names)
        self.variables: dict[str, tirx.Var] = {}
        self.ranges = dict(exported.range_constraints)
        self.hints: dict[str, int] = {}
        #: sizes that depend on data, and that the program finds while it runs
        self.found: dict[str, tirx.Var] = {}

    def size(self, value: int | torch.SymInt) -> int | tvm.ir.Expr:
        """A size as an int or a TIR int64 expression."""
        if isinstance(value, int):
            return value
        hint = value.node.hint
        if isinstance(value.node.expr, sympy.Symbol) and isinstance(hint, int):
            self.hints[self.name(value.node.expr)] = hint
        return self.translate(value.node.expr)

    def counted(self, value: int | torch.SymInt) -> int | tvm.ir.Expr:
        """As `size`, of a value that the program counts while it runs: its symbol is known from now on."""
        if self.depends_on_data(value):
            name = str(value.node.expr)  # pyright: ignore[reportAttributeAccessIssue]
            self.found[name] = tirx.Var(name, "int64")
        return self.size(value)

    def depends_on_data(self, value: int | torch.SymInt) -> bool:
        """Whether a size is a symbol of its own that nothing has defined yet."""
        if isinstance(value, int) or not isinstance(value.node.expr, sympy.Symbol):
            return False
        return _depends_on_data(value.node.expr) and str(value.node.expr) not in self.found

    def may_be_size(self, value: torch.SymInt) -> bool:
        """Whether a number that depends on data is known not to be negative."""
        return self.depends_on_data(value) and value.node.expr in self.ranges and bool(self.ranges[value.node.expr].lower >= 0)

    def shape(self, sizes: Any) -> list[int | tvm.ir.Expr]:
        return [self.size(size) for size in sizes]

    def name(self, symbol: sympy.Symbol) -> str:
        return self.names.get(str(symbol), str(symbol))

    def dims(self) -> dict[str, DimRange]:
        """Range of every symbol met; opt is the size of the example inputs. torch's 0 as a lower bound means no more than "not negative"."""
        result: dict[str, DimRange] = {}
        for symbol, bounds in self.ranges.items():
            name = self.name(symbol) if isinstance(symbol, sympy.Symbol) else ""
            if name in self.variables:
                upper = None if bounds.upper in (sympy.oo,) or math.isinf(float(bounds.upper)) or int(bounds.upper) >= 2**62 else int(bounds.upper)
                result[name] = DimRange(max(1, int(bounds.lower)), self.hints.get(name), upper)
        return {name: result.get(name, DimRange()) for name in self.variables}

    def translate(self, expression: Any) -> Any:
        """An expression of sympy as an int or a TIR int64 expression; UnsupportedSize where there is none."""
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            if _depends_on_data(expression):
                if str(expression) in self.found:
                    return self.found[str(expression)]
                raise UnsupportedSize(f"size {expression} depends on the data")
            name = self.name(expression)
            return self.variables.setdefault(name, tirx.Var(name, "int64"))
        arguments = [self.translate(argument) for argument in self._arguments(expression)]
        arguments = [tirx.IntImm("int64", value) if isinstance(value, int) else value for value in arguments]
        if isinstance(expression, sympy.Add):
            return reduce(lambda left, right: left + right, arguments)
        if isinstance(expression, sympy.Mul):
            return reduce(lambda left, right: left * right, arguments)
        if isinstance(expression, sympy.Pow) and isinstance(expression.exp, sympy.Integer) and int(expression.exp) > 0:
            return reduce(lambda left, right: left * right, [arguments[0]] * int(expression.exp))
        if len(arguments) == 1 and type(expression).__name__ in ("Max", "Min"):
            return arguments[0]
        function = _FUNCTIONS.get(type(expression).__name__)
        if function is None:
            raise UnsupportedSize(f"size {expression} has no integer expression in TIR")
        return function(*arguments)

    def _arguments(self, expression: Any) -> list[Any]:
        """Arguments of a function; of a maximum or minimum only those that the ranges of the symbols do not rule out: max(0, 64 - s) is 64 - s for s <= 64."""
        found = list(getattr(expression, "args", ()))
        sign = {"Max": 1, "Min": -1}.get(type(expression).__name__, 0)
        for argument in list(found) if sign else ():
            if any(other is not argument and bound_sympy(sign * (other - argument), self.ranges).lower >= 0 for other in found):
                found.remove(argument)
        return found
