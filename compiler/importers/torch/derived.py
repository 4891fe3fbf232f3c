"""Inputs whose dims are multiples of a symbol: `32 * Dim("h")`."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.value_ranges import bound_sympy

from ...dialect.opaque import hide_shape
from ...errors import Blocker
from ...program import DimRange
from ...tvm import relax, tirx


class DerivedDims:
    """Dims a * s + b of inputs, which TVM cannot solve for s.

    Such a dim becomes a variable of its own, whose range runtime checks know; s is computed from it, and the input cast to what torch has, so that a size that is no
    such multiple raises.
    """

    def __init__(self, translator: Any):
        self.translator = translator
        self.found: dict[str, tuple[tirx.Var, Any]] = {}
        self.ranges: dict[str, DimRange] = {}

    def type_of(self, node: fx.Node) -> Any:
        """The type of the parameter for a placeholder."""
        shape = [self._dim(size) for size in node.meta["val"].shape]
        return relax.TensorType(shape, self.translator.out_dtype(node))

    def _dim(self, size: Any) -> Any:
        symbols = self.translator.symbols
        if isinstance(size, int) or isinstance(size.node.expr, sympy.Symbol):
            return symbols.size(size)
        expression = size.node.expr
        name = symbols.names.get(str(expression), str(expression))
        if name not in self.found:
            self.found[name] = (tirx.Var(name, "int64"), expression)
            bounds, hint = bound_sympy(expression, symbols.ranges), size.node.hint
            upper = None if bounds.upper in (sympy.oo, torch.utils._sympy.numbers.int_oo) else int(bounds.upper)
            self.ranges[name] = DimRange(max(1, int(bounds.lower)), hint if isinstance(hint, int) else None, upper)
        return self.found[name][0]

    def solve(self, inputs: dict[fx.Node, relax.Var]) -> list[Blocker]:
        """Compute the symbols and cast the inputs, at the start of the program; gives what cannot be solved."""
        if not self.found:
            return []
        translator, blockers = self.translator, []
        given = {dim.name for value in inputs.values() for dim in value.ty.shape if isinstance(dim, tirx.Var)}
        for name, (variable, expression) in self.found.items():
            for symbol in expression.free_symbols:
                if translator.symbols.name(symbol) in given:
                    continue
                polynomial = sympy.Poly(expression, symbol) if expression.is_polynomial(symbol) and len(expression.free_symbols) == 1 else None
                if polynomial is None or polynomial.degree() != 1:
                    blockers.append(Blocker(name, "", f"a dim that is {expression} cannot be solved for {symbol}: give {symbol} as a dim of its own"))
                    continue
                factor, rest = map(int, polynomial.all_coeffs())
                number = translator.emit(relax.op.shape_to_tensor(relax.ShapeExpr([(variable - rest) // factor])))
                unknown = translator.symbols.translate(symbol)
                translator.block_builder.match_cast(translator.emit(relax.op.tensor_to_shape(number)), relax.ShapeType([unknown]), name)
                given.add(unknown.name)
        for node, value in inputs.items():
            wanted = translator.out_shape(node)
            if any(isinstance(dim, tirx.Var) and dim.name in self.found for dim in value.ty.shape):
                hidden = translator.emit(hide_shape(value))
                translator.env[node] = translator.block_builder.match_cast(hidden, relax.TensorType(wanted, translator.out_dtype(node)), node.name)
        return blockers
