"""TIR expressions as CUDA C++.

Positions (loop variables and arithmetic on them) are 32-bit `int`, whatever TIR calls them: no tensor has more elements than that. Values keep their types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ...compiler.tvm import TensorLoad, structural_map, structural_walk, tirx, tvm
from ..common.fused import variables_of
from .kernel import SHORT, Unsupported, ctype
from .sizes import is_count, is_size

_BINARY = {
    "Add": "+", "Sub": "-", "Mul": "*", "EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "And": "&&", "Or": "||",
    "BitwiseAnd": "&", "BitwiseOr": "|", "BitwiseXor": "^", "LShift": "<<", "RShift": ">>",
}  # fmt: skip
#: calls of C's mathematics library; the float version has an f behind its name
_MATH = {
    "tirx.exp": "exp", "tirx.exp2": "exp2", "tirx.exp10": "exp10", "tirx.erf": "erf", "tirx.tanh": "tanh", "tirx.sqrt": "sqrt", "tirx.log": "log",
    "prim.log2": "log2", "tirx.log10": "log10", "tirx.log1p": "log1p", "tirx.pow": "pow", "tirx.floor": "floor", "prim.ceil": "ceil", "tirx.trunc": "trunc",
    "tirx.round": "rint", "tirx.nearbyint": "rint", "tirx.fabs": "fabs", "tirx.cos": "cos", "tirx.sin": "sin", "tirx.tan": "tan", "tirx.acos": "acos",
    "tirx.asin": "asin", "tirx.atan": "atan", "tirx.atan2": "atan2", "tirx.cosh": "cosh", "tirx.sinh": "sinh", "tirx.acosh": "acosh", "tirx.asinh": "asinh",
    "tirx.atanh": "atanh", "tirx.fmod": "fmod", "tirx.copysign": "copysign", "tirx.hypot": "hypot",
}  # fmt: skip
#: stands for an index that data decides: (index, extent)
INDEX = "tcompile_index"


def check_indices(expr: Any) -> Any:
    """The expression with every index that reads memory (a gather's) marked for a check against its dim."""

    def load(access: Any) -> Any:
        indices = [
            tirx.call_pure_extern("int64", INDEX, index, _limit(dim)) if reads_memory(index) and not _is_checked(index) else index
            for index, dim in zip(access.indices, access.source.shape, strict=True)
        ]
        return tirx.BufferLoad(access.source, indices)

    return structural_map(expr, (TensorLoad, load))


def _limit(dim: Any) -> Any:
    return tirx.const(int(dim), "int64") if isinstance(dim, (int, tirx.IntImm)) else dim


def _is_checked(index: Any) -> bool:
    return isinstance(index, tvm.ir.Call) and getattr(index.op, "name", "") == "tirx.call_pure_extern" and str(index.args[0].value) == INDEX


def reads_memory(expr: Any) -> bool:
    found: list[Any] = []
    structural_walk(expr, (TensorLoad, found.append))
    return bool(found)


class Printer:
    """Prints expressions inside of one kernel.

    load(buffer, indices as C) -> C. names: variable -> C. ranges: variable -> extent (from 0), to see which divisions need no sign. size: C of an integer that is made of the function's
    symbols alone; without it there are none. indexed: a checked index was printed.
    """

    def __init__(
        self,
        load: Callable[[Any, Sequence[str]], str],
        names: dict[Any, str],
        ranges: dict[Any, Any] | None = None,
        size: Callable[[Any], str] | None = None,
    ):
        self.load, self.names, self.size = load, names, size
        self.analyzer = tvm.sym.Analyzer()
        for var, extent in (ranges or {}).items():
            extent = tirx.const(extent, var.ty.dtype) if isinstance(extent, int) else extent
            self.analyzer.bind(var, tvm.ir.Range.from_min_extent(tirx.const(0, var.ty.dtype), extent))
        self.indexed = False
        self._position = 0
        self._symbols: set[Any] = set()

    def __call__(self, expr: Any) -> str:
        kind = type(expr).__name__
        if self.size is not None and is_size(expr, self.names):
            return self.size(expr) if self._position else f"(int){self.size(expr)}"
        if kind in _BINARY:
            return f"({self(expr.a)} {_BINARY[kind]} {self(expr.b)})"
        method = getattr(self, f"_{kind.lower()}", None)
        if method is None:
            raise Unsupported(f"expression {kind}")
        return method(expr)

    def _is_count(self, expr: Any) -> bool:
        """A size that is not negative, made of symbols; where it is 0, nothing is computed with it."""
        return self.size is not None and is_size(expr, self.names) and is_count(expr)

    def index(self, expr: Any) -> str:
        """An expression that addresses memory."""
        self._position += 1
        try:
            return self(expr)
        finally:
            self._position -= 1

    def _intimm(self, expr: Any) -> str:
        value = int(expr.value)
        if str(expr.ty.dtype) == "bool":
            return "true" if value else "false"
        if -(2**31) < value < 2**31:
            return str(value)
        return f"{value}LL" if value > -(2**63) else "(-9223372036854775807LL - 1)"

    def _floatimm(self, expr: Any) -> str:
        return literal(float(expr.value), str(expr.ty.dtype))

    def _var(self, expr: Any) -> str:
        if expr not in self.names:
            raise Unsupported(f"the run-time size {expr.name}")
        return self.names[expr]

    def _cast(self, expr: Any) -> str:
        # positions stay int inside of addresses; outside, a cast to int64 is one of values
        value = self(expr.value)
        return (
            value if self._position and str(expr.ty.dtype) in ("int64", "int32") and not reads_memory(expr) else f"({ctype(expr.ty.dtype)})({value})"
        )

    def _bitwisenot(self, expr: Any) -> str:
        return f"{'!' if str(expr.ty.dtype) == 'bool' else '~'}({self(expr.a)})"

    def _not(self, expr: Any) -> str:
        return f"!{self(expr.a)}"

    def _select(self, expr: Any) -> str:
        return self._choice(expr.condition, expr.true_value, expr.false_value)

    def _choice(self, condition: Any, *values: Any) -> str:
        """Both values as one C type: arithmetic on numbers of two bytes gives float."""
        taken, other = (f"(float)({self(value)})" if str(value.ty.dtype) in SHORT else self(value) for value in values)
        return f"({self(condition)} ? {taken} : {other})"

    def _min(self, expr: Any) -> str:
        return f"tc::{type(expr).__name__.lower()}<{ctype(expr.ty.dtype)}>({self(expr.a)}, {self(expr.b)})"

    _max = _min

    def _div(self, expr: Any) -> str:
        if str(expr.ty.dtype).startswith(("float", "bfloat")):
            return f"({self(expr.a)} / {self(expr.b)})"
        return f"tc::truncdiv<{ctype(expr.ty.dtype)}>({self(expr.a)}, {self._divisor(expr.b)})"

    def _mod(self, expr: Any) -> str:
        return f"tc::truncmod<{ctype(expr.ty.dtype)}>({self(expr.a)}, {self._divisor(expr.b)})"

    def _divisor(self, expr: Any) -> str:
        """An integer divisor; one that data decides may be zero, which is reported like an index out of range."""
        if isinstance(expr, tirx.IntImm) or self._is_count(expr):
            return self(expr)
        self.indexed = True
        return f"tc::divisor<{ctype(expr.ty.dtype)}>({self(expr)}, error, site)"

    def _floordiv(self, expr: Any) -> str:
        return self._floor(expr, "/", "floordiv")

    def _floormod(self, expr: Any) -> str:
        return self._floor(expr, "%", "floormod")

    def _floor(self, expr: Any, sign: str, function: str) -> str:
        a, b = self(expr.a), self._divisor(expr.b)
        divisor = (isinstance(expr.b, tirx.IntImm) and int(expr.b.value) > 0) or self._is_count(expr.b)
        if self.size is not None:
            self._bind_symbols(expr.a)
        if divisor and (reads_memory(expr.a) is False) and self.analyzer.can_prove(expr.a >= 0):
            return f"({a} {sign} {b})"
        kind = "int" if self._position and not reads_memory(expr) else ctype(expr.ty.dtype)
        return f"tc::{function}<{kind}>({a}, {b})"

    def _bind_symbols(self, expr: Any) -> None:
        for var in variables_of(expr):
            if var not in self.names and var not in self._symbols and not hasattr(var, "shape") and str(var.ty.dtype) in ("int32", "int64"):
                self._symbols.add(var)
                self.analyzer.bind(var, tvm.ir.Range.from_min_extent(tirx.const(0, var.ty.dtype), tirx.const(2**31 - 1, var.ty.dtype)))

    def _let(self, expr: Any) -> str:
        self.names[expr.var] = f"({self(expr.value)})"
        return self(expr.body)

    def _tensorload(self, expr: Any) -> str:
        return self.load(expr.source, [self.index(index) for index in expr.indices])

    def _call(self, expr: Any) -> str:
        name, args, dtype = getattr(expr.op, "name", str(expr.op)), expr.args, str(expr.ty.dtype)
        if name == "prim.if_then_else":
            return self._choice(*args)
        single = dtype == "float32" or dtype in SHORT
        if single and name in ("tirx.sin", "tirx.cos", "tirx.tan"):
            sine, cosine = (f"tc::{function}({self(args[0])})" for function in ("sine", "cosine"))
            return {"tirx.sin": sine, "tirx.cos": cosine, "tirx.tan": f"({sine} / {cosine})"}[name]
        if name in _MATH:
            if not single and dtype != "float64":
                raise Unsupported(f"{name} of {dtype}")
            return f"{_MATH[name]}{'f' if single else ''}({', '.join(self(arg) for arg in args)})"
        if name == "tirx.reinterpret":
            return f"tc::bits<{ctype(dtype)}, {ctype(args[0].ty.dtype)}>({self(args[0])})"
        value = self(args[0]) if name not in ("tirx.call_pure_extern", "tirx.infinity") else ""
        if name == "tirx.call_pure_extern" and str(args[0].value) == INDEX:
            self.indexed = True
            self._position, outer = 0, self._position
            try:
                return f"tc::index({self(args[1])}, {self(args[2])}, error, site)"
            finally:
                self._position = outer
        simple = {
            "tirx.sigmoid": f"tc::sigmoid({value})",
            "tirx.rsqrt": f"(1.0f / sqrtf({value}))" if single else f"(1.0 / sqrt({value}))",
            "tirx.isnan": f"tc::is_nan({value})",
            "tirx.isinf": f"tc::is_infinite({value})",
            "tirx.isfinite": f"tc::is_finite({value})",
            "tirx.likely": value,
            "prim.likely": value,
            "tirx.abs": f"tc::absolute<{'float' if single else ctype(dtype)}>({value})",
            "tirx.infinity": "INFINITY",
        }
        if name not in simple:
            raise Unsupported(f"function {name}")
        return simple[name]


def literal(value: float, dtype: str) -> str:
    """A floating-point constant that reads back as the very same number."""
    single = dtype == "float32" or dtype in SHORT
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value:.9g}" if single else f"{value:.17g}"
    text = text if any(mark in text for mark in ".e") else text + ".0"
    return text + ("f" if single else "")
