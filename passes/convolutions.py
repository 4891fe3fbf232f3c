"""Convolutions over one or three axes, and transposed ones, become conv2d: one set of kernels, and one kind of convolution for the passes that compress.

A convolution's result then exists *folded*, as the [N', C', H', W'] that the conv2d gives. Element-wise operators behind it work on the folded value, so that they still
fuse with the convolution. What the source program has is made of it, by views and at most one movement, where an operator needs that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax
from .base import Pass, PassContext
from .convolution_rules import RULES, Folded
from .layout_rules import BINARY, UNARY
from .products import constant_value, operator
from .rewriting import emit_as, same_dims

_UNARY, _BINARY = ({f"relax.{name}" for name in names} for names in (UNARY, BINARY))
_CODES = ("relax.quantize", "relax.dequantize")


@dataclass(frozen=True)
class Convolutions(Pass):
    """conv1d, conv3d, and transposed convolutions over one and two axes, by weights that are constant, become conv2d."""

    name: ClassVar[str] = "convolutions"

    def run(self, program: Program, context: PassContext) -> Program:
        if not any(operator(binding.value) in RULES for block in program.main.body.blocks for binding in block.bindings):
            return program
        rewriter = _Rewriter(program.module)
        after = rewriter.apply(program)
        context.matched(**rewriter.counts)
        return after if rewriter.counts else program


@mutator
class _Rewriter(relax.PyExprMutator):
    """Walks the bindings in order; what the rules use as their builder. folded: variables of the source program that exist folded, too."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.folded: dict[Any, Folded] = {}
        self.counts: dict[str, int] = {}
        self.name = ""

    def apply(self, program: Program) -> Program:
        main = self.visit_expr(program.main)
        return program.with_module(relax.transform.DeadCodeElimination()(program.with_main(main).module))

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr, self.name)

    def visit_var_binding_(self, binding: Any) -> None:
        self.name = binding.var.name
        found = self._folded(binding.value)
        if found is None:
            super().visit_var_binding_(binding)
            return
        self.folded[binding.var] = found
        if not isinstance(binding.var, relax.DataflowVar):
            self.set_var_remap(binding.var, emit_as(self.builder_, binding.var, found.unfolded(self.emit)))

    def visit_dataflow_var_(self, var: Any) -> Any:
        found = self.folded.get(var)
        return super().visit_dataflow_var_(var) if found is None else found.unfolded(self.emit)

    def _folded(self, call: Any) -> Folded | None:
        """The folded result of a convolution or of an element-wise operator on folded values."""
        name = operator(call)
        if name in RULES:
            found = RULES[name](self, call)
            if found is not None:
                kind = name.removeprefix("relax.nn.")
                self.counts[kind] = self.counts.get(kind, 0) + 1
                found = found.shaped(call)
            return found
        codes = name in _CODES and all(value is not None and value.size == 1 for value in map(constant_value, call.args[1:]))
        if name in _BINARY:
            return self._element_wise(call, len(call.args))
        return self._element_wise(call, 1) if name in _UNARY or codes else None

    def _element_wise(self, call: Any, count: int) -> Folded | None:
        """call: its first `count` arguments are tensors that broadcast."""
        known = next((self.folded[arg] for arg in call.args[:count] if arg in self.folded), None)
        if known is None or not same_dims(known.shape, call.ty.shape):
            return None
        operands = [self._operand(arg, known) for arg in call.args[:count]]
        if any(operand is None for operand in operands):
            return None
        return Folded(self.emit(relax.Call(call.op, [*operands, *call.args[count:]], call.attrs)), known.folding, call.ty.shape)

    def _operand(self, arg: Any, known: Folded) -> Any:
        if arg in self.folded:
            mine = self.folded[arg]
            return mine.expr if mine.folding == known.folding and same_dims(mine.shape, known.shape) else None
        array = constant_value(arg)
        if array is not None:
            wide = known.folding.constant(array.reshape((1,) * (len(known.shape) - array.ndim) + array.shape))
            return None if wide is None else relax.const(wide, str(array.dtype))
        return known.folding.fold(self.emit, self.visit_expr(arg)) if isinstance(arg, relax.Var) and same_dims(arg.ty.shape, known.shape) else None
