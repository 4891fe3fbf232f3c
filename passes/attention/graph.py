"""A program as the matcher sees it: what defines a value, and who uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...compiler.dialect.attention import SWAPPED
from ...compiler.tvm import is_constant, mutator, relax, tirx, tvm
from ..products import variables


class Graph:
    """Definitions and uses of the variables of one function; calls are seen through variables that only rename."""

    def __init__(self, function: relax.Function):
        self.bindings: list[relax.VarBinding] = []
        self.defined: dict[Any, Any] = {}
        self.users: dict[Any, list[relax.VarBinding]] = {}
        self.returned: set[Any] = set()
        for block in function.body.blocks:
            for binding in block.bindings:
                self.bindings.append(binding)
                if isinstance(binding, relax.VarBinding):
                    self.defined[binding.var] = binding.value
                    for var in variables(binding.value):
                        self.users.setdefault(var, []).append(binding)
        self.returned.update(variables(function.body.body))

    def root(self, expr: Any) -> Any:
        """The variable or constant behind renamings."""
        while isinstance(expr, relax.Var) and isinstance(self.defined.get(expr), relax.Var):
            expr = self.defined[expr]
        value = self.defined.get(expr) if isinstance(expr, relax.Var) else None
        return value if is_constant(value) else expr

    def call(self, expr: Any, *names: str) -> relax.Call | None:
        """The call that computes `expr`, if it is one of the named Relax operators (any, without names)."""
        expr = self.root(expr)
        value = self.defined.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, relax.Call) and (not names or self.name(value) in names):
            return value
        return None

    def fields(self, expr: Any) -> list[Any]:
        """The fields of a tuple, none of what is not known to be one."""
        while isinstance(expr, relax.Var) and expr in self.defined:
            expr = self.defined[expr]
        return list(expr.fields) if isinstance(expr, relax.Tuple) else []

    @staticmethod
    def name(call: relax.Call) -> str:
        return getattr(call.op, "name", "").removeprefix("relax.")

    def uses(self, var: Any) -> list[relax.VarBinding]:
        """Bindings that read a variable, those that only rename it replaced by the uses of the new name."""
        found: list[relax.VarBinding] = []
        for binding in self.users.get(var, []):
            found += self.uses(binding.var) if isinstance(binding.value, relax.Var) else [binding]
        return found

    def escapes(self, var: Any) -> bool:
        """The function returns it."""
        return var in self.returned or any(isinstance(binding.value, relax.Var) and self.escapes(binding.var) for binding in self.users.get(var, []))

    def equal(self, a: Any, b: Any) -> bool:
        return equal(a, b)

    def same_dims(self, a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(self.equal(x, y) for x, y in zip(a, b, strict=True))


def shape(expr: Any) -> list[Any] | None:
    """The dims of a tensor, None where they are not known."""
    known = getattr(expr.ty, "shape", None)
    return list(known) if isinstance(known, relax.ShapeExpr) else None


def scalar(expr: Any) -> float | None:
    """The value of a constant all of whose elements are one number."""
    if not is_constant(expr):
        return None
    values = expr.value.numpy().reshape(-1)
    return float(values[0]) if values.size and (values == values[0]).all() else None


def is_unit(dim: Any) -> bool:
    return isinstance(dim, tirx.IntImm) and int(dim) == 1


def swapped(emit: Callable[[Any], Any], value: Any) -> Any:
    """Four dims with the second and third in the other order; a view where one of them is 1."""
    own = shape(value) or []
    if is_unit(own[1]) or is_unit(own[2]):
        return emit(relax.op.reshape(value, [own[axis] for axis in SWAPPED]))
    return emit(relax.op.permute_dims(value, list(SWAPPED)))


def equal(a: Any, b: Any) -> bool:
    """Two dims are provably the same."""
    return _ANALYZER.can_prove_equal(a, b)


def less(a: Any, b: Any) -> bool:
    return _ANALYZER.can_prove(a < b)


_ANALYZER = tvm.sym.Analyzer()


def rebound(module: Any, made: Mapping[Any, Callable[[Any], relax.Expr]]) -> Any:
    """The module with some variables of main bound to other expressions, and without what is dead then. made: the expression, from the mutator, which emits and visits its parts."""
    return relax.transform.DeadCodeElimination()(_Rebinder(module, made).apply())


@mutator
class _Rebinder(relax.PyExprMutator):
    def __init__(self, module: Any, made: Mapping[Any, Callable[[Any], relax.Expr]]):
        super().__init__(module)
        self.module, self.made = module, made

    def apply(self) -> Any:
        main = self.module.get_global_var("main")
        self.builder_.update_func(main, self.visit_expr(self.module["main"]))
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        make = self.made.get(binding.var)
        if make is None:
            super().visit_var_binding_(binding)
            return
        self.builder_.emit_normalized(relax.VarBinding(binding.var, self.builder_.normalize(make(self))))
