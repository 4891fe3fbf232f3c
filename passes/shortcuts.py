"""The shortcut of a residual block in 16 bits where both branches are convolutions of short numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax
from .base import Pass, PassContext
from .products import Graph, graph_of, operator

#: what may stand between a convolution and the sum, element by element
BETWEEN = ("relax.add", "relax.subtract", "relax.multiply", "relax.astype", "relax.nn.relu")
#: operands of convolutions that are less exact than a rounded sum of them
SHORT = ("uint8", "int8", "bfloat16")


@dataclass(frozen=True)
class ShortShortcuts(Pass):
    """Where two convolutions of bytes or bfloat16 are added, the first one's result is written, and read by the kernel of the second, in bfloat16: half of the bytes of the largest tensors of a
    residual network. Where a branch is no convolution, the sum reads what the next layer reads, which `quantize` and `precision` see to. Nothing changes without an instruction that rounds."""

    name: ClassVar[str] = "short_shortcuts"

    def run(self, program: Program, context: PassContext) -> Program:
        if "bfloat16" not in context.target.formats:
            return program
        graph = graph_of(program)
        places = {var: place for place, var in enumerate(graph.bindings)}
        first: dict[Any, Any] = {}
        for var, value in graph.bindings.items():
            if (
                operator(value) == "relax.add"
                and all(_short_convolution(graph, arg) for arg in value.args)
                and not value.args[0].same_as(value.args[1])
            ):
                first[var] = min(value.args, key=places.__getitem__)
        if not first:
            return program
        context.matched(shortcuts=len(first))
        return _Rewriter(program, first).apply()


def _short_convolution(graph: Graph, var: Any) -> bool:
    """Whether a variable that one sum alone reads is made by a convolution of short numbers and what goes on its result element by element."""
    while graph.single_reader(var) is not None:
        call = graph.bindings[var] if var in graph.bindings else None
        if operator(call) == "relax.nn.conv2d":
            return str(call.args[0].ty.dtype) in SHORT
        inner = [arg for arg in call.args if arg in graph.bindings] if operator(call) in BETWEEN else []
        if len(inner) != 1:
            return False
        var = inner[0]
    return False


@mutator
class _Rewriter(relax.PyExprMutator):
    """first: by sum, the operand that goes by bfloat16."""

    def __init__(self, program: Program, first: dict[Any, Any]):
        super().__init__(program.module)
        self.program, self.first = program, first

    def apply(self) -> Program:
        return self.program.with_main(self.visit_expr(self.program.main))

    def visit_var_binding_(self, binding: Any) -> None:
        shortcut = self.first.get(binding.var)
        if shortcut is None:
            super().visit_var_binding_(binding)
            return
        short = self.builder_.emit(relax.op.astype(self.visit_expr(shortcut), "bfloat16"), shortcut.name)
        # the sum is its only reader
        self.set_var_remap(shortcut, self.builder_.emit(relax.op.astype(short, "float32"), shortcut.name))
        super().visit_var_binding_(binding)
