"""Inner graphs as Relax functions of their own, called by a driver while the model runs (`compiler/tvm_control.py`).

A function takes the sizes it needs as one shape, its own inputs, and every tensor that it uses from around it; it returns a tuple of tensors. The call is one pure
packed call inside of the outer dataflow block, so that no pass has to know of control flow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...tvm import relax, tvm
from .node import Node
from .symbolic import Dim


@dataclass(frozen=True)
class Outlined:
    """name: of the function. results: what it returns, as seen inside. context: the sizes and the captured tensors, its leading arguments. inner: symbols known only inside."""

    name: str
    results: list[relax.Expr]
    context: list[relax.Expr]
    inner: frozenset[str]


def outline(node: Node, inputs: Sequence[relax.Var], compute: Callable[[], list[relax.Expr]]) -> tuple[list[relax.Expr], Callable[[], Outlined]]:
    """The results of `compute`, which uses `inputs`, and what makes a function of it once the results are as wanted."""
    builder, dims = node.builder, node.dims
    first = len(dims.made)
    builder._begin_dataflow_block()
    try:
        results = [value if isinstance(value, relax.Var) else node.emit(value) for value in compute()]
        output = builder.emit_output(relax.Tuple(results))
    finally:
        block = builder._end_block()

    def finish() -> Outlined:
        draft = relax.Function(list(inputs), relax.SeqExpr([block], output), output.ty, True)
        captured = [
            variable for variable in relax.analysis.free_vars(draft) if isinstance(variable.ty, (relax.TensorType, relax.TupleType, relax.ShapeType))
        ]
        params = [relax.Var(f"outer_{variable.name}", variable.ty) for variable in captured]
        bindings = [relax.VarBinding(variable, param) for variable, param in zip(captured, params, strict=True)]
        body = relax.SeqExpr([relax.DataflowBlock([*bindings, *block.bindings])], output)
        open_draft = relax.Function([*inputs, *params], body, output.ty, True)
        made = {str(symbol) for symbol in dims.made[first:]}
        symbols = [symbol for symbol in relax.analysis.free_symbolic_vars(open_draft) if symbol.name not in made]
        sizes = relax.Var("sizes", relax.ShapeType(symbols))
        arguments = [sizes, *params, *inputs]
        builder.begin_scope(arguments)
        body = builder.normalize(body)
        builder.end_scope()
        name = builder.add_driven(relax.utils.copy_with_new_vars(relax.Function(arguments, body, is_pure=True)))
        return Outlined(name, results, [relax.ShapeExpr(symbols), *captured], frozenset(made))

    return results, finish


def call(node: Node, driver: str, spec: dict[str, Any], arguments: Sequence[relax.Expr], types: Sequence[tuple[list[Dim], str]]) -> list[relax.Expr]:
    """The results of a driver, a tensor of each of `types` (dims, dtype)."""
    text = json.dumps({"node": node.label, **spec}, separators=(",", ":"))
    kinds = relax.TupleType([relax.TensorType(dtype=dtype, ndim=len(dims)) for dims, dtype in types])
    result = node.emit(relax.op.call_pure_packed(driver, tvm.ir.StringImm(text), *arguments, ty_args=[kinds]))
    fields = [node.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]
    return [
        node.builder.match_cast(field, relax.TensorType(dims, dtype), name_hint=node.hint) for field, (dims, dtype) in zip(fields, types, strict=True)
    ]
