"""A program that also returns what a pass wants to see of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..compiler.program import Program
from ..compiler.tvm import mutator, relax


@mutator
class _Exporter(relax.PyExprMutator):
    """Makes outputs of the dataflow blocks out of some of their variables."""

    def __init__(self, module: Any, wanted: Sequence[Any]):
        super().__init__(module)
        self.wanted = {var for var in wanted if isinstance(var, relax.DataflowVar)}
        self.exported: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        super().visit_var_binding_(binding)
        if binding.var in self.wanted:
            self.exported[binding.var] = self.builder_.emit_output(self.visit_expr(binding.var), f"{binding.var.name}_seen")


def returning(program: Program, wanted: Sequence[Any]) -> Program:
    """The program that returns its outputs and then the values of the variables `wanted` of `main`."""
    exporter = _Exporter(program.module, wanted)
    main = exporter.visit_expr(program.main)
    result = main.body.body
    kind = result.ty
    count = len(kind.fields) if isinstance(kind, relax.TupleType) else 0
    blocks = list(main.body.blocks)
    if count and not isinstance(result, relax.Tuple):
        fields = [relax.Var(f"field{index}", kind.fields[index]) for index in range(count)]
        blocks.append(relax.BindingBlock([relax.VarBinding(var, relax.TupleGetItem(result, index)) for index, var in enumerate(fields)]))
        outputs: list[Any] = list(fields)
    else:
        outputs = list(result.fields) if count else [result]
    seen = [exporter.exported[var] if var in exporter.exported else exporter.visit_expr(var) for var in wanted]
    values = [*outputs, *seen]
    everything = relax.Var("observed", relax.TupleType([value.ty for value in values]))
    blocks.append(relax.BindingBlock([relax.VarBinding(everything, relax.Tuple(values))]))
    observed = relax.Function(main.params, relax.SeqExpr(blocks, everything), everything.ty, attrs=main.attrs)
    return program.with_main(observed)
