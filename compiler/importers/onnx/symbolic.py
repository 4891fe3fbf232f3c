"""Integer arithmetic on tensor dims at import time: an element is an int, or a symbolic expression over the dims of the inputs.

Every result is simplified under the known range of each dim, so that two ways to compute the same size end as the same expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from ...program import LARGEST_DIM, DimRange
from ...tvm import structural_walk, tirx, tvm
from .values import Refusal

#: symbols and products in one size: the time to simplify and to compare grows with their square
MOST_TERMS, MOST_FACTORS = 256, 64
#: a dim, or any other integer of the shape arithmetic: int64
Dim = int | tvm.ir.Expr


def symbols(value: Dim) -> set[str]:
    """The names of the symbols in a dim."""
    found: set[str] = set()
    if not isinstance(value, int):
        structural_walk(value, (tirx.Var, lambda symbol: found.add(symbol.name)))
    return found


@dataclass(frozen=True)
class Ratio:
    """A positive rational size that passes through floating point on its way (a Resize scale): numerator / denominator, both Dims."""

    numerator: Dim
    denominator: Dim


def _check_length(value: tvm.ir.Expr) -> None:
    counts = [0, 0]

    def count(place: int) -> None:
        counts[place] += 1

    structural_walk(value, [(tirx.Var, lambda _: count(0)), (tirx.Mul, lambda _: count(1))])
    if counts[0] > MOST_TERMS or counts[1] > MOST_FACTORS:
        raise Refusal(
            f"a size is an expression of {counts[0]} symbols and {counts[1]} products; at most {MOST_TERMS} and {MOST_FACTORS} are supported"
        )


class DimArithmetic:
    """Simplifies and compares Dims, knowing the range of every symbolic dim."""

    def __init__(self) -> None:
        self.analyzer = tvm.sym.Analyzer()
        #: the symbols made by `fresh`
        self.made: list[tirx.Var] = []

    def declare(self, name: str, bounds: DimRange) -> tirx.Var:
        """A new symbolic dim within `bounds`."""
        symbol = tirx.Var(name, "int64")
        self.analyzer.update(symbol, tvm.sym.ConstIntBound(bounds.min, LARGEST_DIM if bounds.max is None else bounds.max))
        return symbol

    def fresh(self, name: str) -> tirx.Var:
        """A size of its own that is only known while the model runs; checked there to be 0..LARGEST_DIM."""
        symbol = self.declare(f"{name}_s{len(self.made)}", DimRange(0))
        self.made.append(symbol)
        return symbol

    def simplify(self, value: Dim) -> Dim:
        """The simplest form; an int when the value is known. Raises Refusal for expressions that are too long."""
        if isinstance(value, int):
            return value
        if not isinstance(value, tirx.IntImm):
            value = self.analyzer.simplify(value)
        if isinstance(value, tirx.IntImm):
            return int(value)
        if not isinstance(value, tirx.Var):
            _check_length(value)
        return value

    def shape(self, dims: Iterable[Dim]) -> list[Dim]:
        return [self.simplify(dim) for dim in dims]

    def equal(self, left: Dim, right: Dim) -> bool:
        """True only when provably equal for every admitted size."""
        if isinstance(left, int) and isinstance(right, int):
            return left == right
        return self.analyzer.can_prove_equal(left, right)

    def compare(self, relation: str, left: Dim, right: Dim) -> bool | None:
        """`left relation right` for "==", "<", "<=", ">", ">="; None when it depends on the sizes."""
        left, right = tirx.const(left, "int64") if isinstance(left, int) else left, tirx.const(right, "int64") if isinstance(right, int) else right
        holds = {
            "==": (lambda: left.same_as(right) or self.analyzer.can_prove_equal(left, right), lambda: self.analyzer.can_prove(tirx.NE(left, right))),
            "<": (lambda: self.analyzer.can_prove(left < right), lambda: self.analyzer.can_prove(left >= right)),
            "<=": (lambda: self.analyzer.can_prove(left <= right), lambda: self.analyzer.can_prove(left > right)),
            ">": (lambda: self.analyzer.can_prove(left > right), lambda: self.analyzer.can_prove(left <= right)),
            ">=": (lambda: self.analyzer.can_prove(left >= right), lambda: self.analyzer.can_prove(left < right)),
        }
        surely, surely_not = holds[relation]
        return True if surely() else False if surely_not() else None

    def non_negative(self, value: Dim) -> bool:
        return value >= 0 if isinstance(value, int) else self.analyzer.can_prove(value >= 0)

    def minimum(self, left: Dim, right: Dim) -> Dim:
        return min(left, right) if isinstance(left, int) and isinstance(right, int) else self.simplify(tirx.min(left, right))

    def maximum(self, left: Dim, right: Dim) -> Dim:
        return max(left, right) if isinstance(left, int) and isinstance(right, int) else self.simplify(tirx.max(left, right))

    def floor_divide(self, numerator: Dim, denominator: Dim) -> Dim:
        if isinstance(numerator, int) and isinstance(denominator, int):
            return numerator // denominator
        return self.simplify(tirx.floordiv(numerator, denominator))

    def ceil_divide(self, numerator: Dim, denominator: Dim) -> Dim:
        return self.floor_divide(self.simplify(numerator + denominator - 1), denominator)

    def product(self, dims: Sequence[Dim]) -> Dim:
        return self.simplify(prod(dims, start=1))

    def quotient(self, dims: Sequence[Dim], divisors: Sequence[Dim]) -> Dim:
        """product(dims) / product(divisors), cancelling equal factors first: simplifiers do not see through products of sums."""
        left, remaining = list(dims), []
        for divisor in divisors:
            match = next((i for i, dim in enumerate(left) if self.equal(dim, divisor)), None)
            if match is None:
                remaining.append(divisor)
            else:
                del left[match]
        return self.floor_divide(self.product(left), self.product(remaining)) if remaining else self.product(left)
