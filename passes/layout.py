"""Layout: convolutions and all that follows them run channels-last (NHWC), as the CPU kernels want it, with as few transposes as possible.

Every value has a form: the tensor really computed and the permutation that made it from the tensor of the source program. Convolutions produce channels-last
forms; operators that do not care (element-wise, concat, pooling, reductions, reshapes that keep the channels apart) take the form as it comes; a transpose in
the source program only changes the permutation. A real transpose appears where an operator without a rule needs the source order, and is shared by all that do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler.program import Program
from ..compiler.tvm import Constant, is_constant, relax, tirx
from .base import Pass, PassContext
from .layout_rules import RULES, Form, identity, inverse, reshaped
from .rewriting import emit_as


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Rewrite NCHW convolutions to NHWC (weights HWIO) and carry the layout through the graph."""

    name: ClassVar[str] = "channels_last"

    def run(self, program: Program, context: PassContext) -> Program:
        if not _has_convolution(program.main):
            return program
        rewriter = _Rewriter(program.module)
        module = rewriter.apply()
        module = relax.transform.DeadCodeElimination()(module)
        context.matched(convolutions=rewriter.convolutions, transposes=_count(module["main"], "relax.permute_dims"))
        return program.with_module(module)


def _has_convolution(function: Any) -> bool:
    return _count(function, "relax.nn.conv2d") > 0


def _count(function: Any, op: str) -> int:
    found = 0

    def visit(expr: Any) -> None:
        nonlocal found
        found += isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == op

    relax.analysis.post_order_visit(function, visit)
    return found


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    """Walks the bindings in order; what the rules of `layout_rules` use as their builder."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module
        self.forms: dict[Any, Form] = {}
        self.made: dict[tuple[Any, tuple[int, ...]], Any] = {}
        self.convolutions = 0
        self.name = ""

    def apply(self) -> Any:
        main = self.module.get_global_var("main")
        self.builder_.update_func(main, self.visit_expr(self.module["main"]))
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        value = binding.value
        rule: Callable[..., Any] | None = None
        if isinstance(value, relax.Var) and value in self.forms and isinstance(binding.var, relax.DataflowVar):
            self.forms[binding.var] = self.forms[value]
            return
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.forms:
            rule = _tuple_field
        elif isinstance(value, relax.Call):
            rule = RULES.get(getattr(value.op, "name", ""))
        if rule is None:
            super().visit_var_binding_(binding)
            return
        self.name = binding.var.name
        form = rule(self, value)
        if form is None:
            super().visit_var_binding_(binding)
            return
        form = Form(self.emit(form.expr), form.perm)
        if isinstance(binding.var, relax.DataflowVar):
            self.forms[binding.var] = form
        else:
            self.set_var_remap(binding.var, emit_as(self.builder_, binding.var, self.source_order(form)))

    def visit_match_cast_(self, binding: Any) -> None:
        form = self.forms.get(binding.value)
        if form is None or not isinstance(binding.var, relax.DataflowVar) or binding.ty.shape is None:
            super().visit_match_cast_(binding)
            return
        shape = [binding.ty.shape[axis] for axis in form.perm]
        cast = self.builder_.match_cast(form.expr, relax.TensorType(shape, binding.ty.dtype), binding.var.name)
        self.forms[binding.var] = Form(cast, form.perm)

    def visit_var_(self, var: Any) -> Any:
        form = self.forms.get(var)
        return super().visit_var_(var) if form is None else self.source_order(form)

    def visit_dataflow_var_(self, var: Any) -> Any:
        form = self.forms.get(var)
        return super().visit_dataflow_var_(var) if form is None else self.source_order(form)

    def emit(self, expr: Any) -> Any:
        return self.builder_.emit(expr, self.name)

    def form(self, expr: Any) -> Form:
        """The form in which a value of the source program exists."""
        if expr in self.forms:
            return self.forms[expr]
        new = self.visit_expr(expr)
        return Form(new, identity(len(new.ty.shape)))

    def source_order(self, form: Form) -> Any:
        return self.permuted(form.expr, inverse(form.perm)) if form.perm else form.expr

    def taken(self, expr: Any, perm: tuple[int, ...]) -> Any:
        """A value of the source program as permuted by `perm`."""
        form = self.form(expr)
        back = inverse(form.perm)
        return self.permuted(form.expr, tuple(back[axis] for axis in perm))

    def permuted(self, expr: Any, perm: tuple[int, ...]) -> Any:
        """`permute_dims(expr, perm)`: of a constant at once, of unit dims as a reshape, and once per value and permutation."""
        if perm == identity(len(perm)):
            return expr
        key = (expr, perm)
        if key not in self.made:
            if is_constant(expr):
                self.made[key] = constant(np.transpose(expr.value.numpy(), perm))
            elif _moves_units_only(expr.ty.shape, perm):
                self.made[key] = self.emit(reshaped(expr, [expr.ty.shape[axis] for axis in perm]))
            else:
                self.made[key] = self.emit(relax.op.permute_dims(expr, list(perm)))
        return self.made[key]


def constant(array: np.ndarray) -> Constant:
    return relax.const(np.ascontiguousarray(array), str(array.dtype))


def _moves_units_only(shape: Any, perm: tuple[int, ...]) -> bool:
    """True when the dims that are not one keep their order."""
    wide = [axis for axis in perm if not (isinstance(shape[axis], tirx.IntImm) and shape[axis].value == 1)]
    return wide == sorted(wide)


def _tuple_field(rewriter: _Rewriter, value: Any) -> Form:
    form = rewriter.forms[value.tuple_value]
    return Form(relax.TupleGetItem(form.expr, value.index), form.perm)
