"""`tcompile.hide_shape`: a tensor whose shape nobody knows until the program is lowered.

TVM takes a `match_cast` from a known shape to a symbol that exists already for the definition of that symbol, and so loses the check. A cast of a hidden shape
stays a check.
"""

from __future__ import annotations

from typing import Any

from ..tvm import mutator, register_operator, relax

NAME = "tcompile.hide_shape"


def hide_shape(x: relax.Expr) -> relax.Call:
    """x: [...] -> the same, with a type that gives its rank and dtype alone."""
    return relax.Call(OPERATOR, [x])


def _infer(builder: Any, call: Any) -> Any:
    x = call.args[0].ty
    return relax.TensorType(dtype=x.dtype, ndim=x.ndim)


OPERATOR = register_operator(NAME, ("x",), _infer, lambda builder, call: call.args[0])


@mutator
class _Reveal(relax.PyExprMutator):
    def __init__(self, module: Any):
        super().__init__(module)
        self.found = False

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if call.op != OPERATOR:
            return call
        self.found = True
        return self.builder_.match_cast(call.args[0], call.ty)


def reveal_shapes(module: Any) -> Any:
    """The module with casts in the operator's place: the last step before code generation, as several passes join a cast with the next."""
    reveal = _Reveal(module)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            reveal.builder_.update_func(variable, reveal.visit_expr(function))
    return reveal.builder_.get() if reveal.found else module
