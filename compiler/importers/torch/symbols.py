"""torch's symbolic sizes (sympy expressions) as TIR expressions and as the Program's dims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import sympy
import torch

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


class Symbols:
    """TIR variable of every symbol of one exported program. names: symbol -> name to use for it ({"s77": "batch"})."""

    def __init__(self, exported: torch.export.ExportedProgram, names: Mapping[str, str]):
        self.names = dict(names)
        self.variables: dict[str, tirx.Var] = {}
        self.ranges = dict(exported.range_constraints)
        self.hints: dict[str, int] = {}

    def size(self, value: int | torch.SymInt) -> int | tvm.ir.Expr:
        """A size as an int or a TIR int64 expression."""
        if isinstance(value, int):
            return value
        hint = value.node.hint
        if isinstance(value.node.expr, sympy.Symbol) and isinstance(hint, int):
            self.hints[self.name(value.node.expr)] = hint
        return self._translate(value.node.expr)

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

    def _translate(self, expression: Any) -> Any:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            if str(expression).startswith("u"):
                raise UnsupportedSize(f"size {expression} depends on the data")
            name = self.name(expression)
            return self.variables.setdefault(name, tirx.Var(name, "int64"))
        arguments = [self._translate(argument) for argument in getattr(expression, "args", ())]
        arguments = [tirx.IntImm("int64", value) if isinstance(value, int) else value for value in arguments]
        if isinstance(expression, sympy.Add):
            return reduce(lambda left, right: left + right, arguments)
        if isinstance(expression, sympy.Mul):
            return reduce(lambda left, right: left * right, arguments)
        if isinstance(expression, sympy.Pow) and isinstance(expression.exp, sympy.Integer) and int(expression.exp) > 0:
            return reduce(lambda left, right: left * right, [arguments[0]] * int(expression.exp))
        function = _FUNCTIONS.get(type(expression).__name__)
        if function is None:
            raise UnsupportedSize(f"size {expression} has no integer expression in TIR")
        return function(*arguments)
