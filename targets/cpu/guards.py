"""Run-time checks before operators that could read or write out of bounds, or trap, on bad data.

    take, gather_elements, gather_nd, scatter_elements, scatter_nd, index_tensor    an index outside of -size..size-1
    reverse_sequence, recurrent                                                     a length outside of 0..size
    tensor_to_shape                                                                 a size outside of 0..LARGEST_DIM
    divide, mod, floor_divide, floor_mod on integers                                a divisor of zero, and the lowest integer by -1

Each such operand goes through a small serial kernel of its own, which asserts and hands on what the operator may use unchecked: indices made
non-negative, divisors without -1. The assertion stands behind the loop, never inside a parallel region, and fails before the operator runs. Operands
known at compile time to be right are not checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...compiler.dialect import recurrent
from ...compiler.program import LARGEST_DIM, Program, node_of
from ...compiler.tvm import Constant, IRBuilder, T, mutator, relax, relax_functions, tirx
from ...passes.base import PassContext
from ..common.fused import product, static
from .emit import i64

DIVISIONS = ("relax.divide", "relax.mod", "relax.floor_divide", "relax.floor_mod")

#: op_pattern of a kernel that fusion leaves alone
_OPAQUE = 8
#: (element, its column) -> what the operator may use, and whether the element is wrong
Check = Callable[[Any, int], tuple[Any, Any]]


def guard(program: Program, context: PassContext) -> Program:
    """The program with a check before every operand that needs one; the very same program when none does."""
    guards = _Guards(program)
    module = guards.apply()
    context.matched(**guards.counts)
    return program.with_module(module)


@mutator
class _Guards(relax.PyExprMutator):
    def __init__(self, program: Program):
        super().__init__(program.module)
        self.module, self.origins = program.module, program.origins
        self.counts: dict[str, int] = {}
        self.node = ""
        #: operand and what it was checked against -> the checked operand, so that two readers share one check
        self.checked: dict[Any, Any] = {}

    def apply(self) -> Any:
        for variable, function in relax_functions(self.module):
            self.checked = {}
            self.builder_.update_func(variable, self.visit_expr(function))
        if not self.counts:
            return self.module
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        self.node = node_of(binding.var.name, self.origins)
        super().visit_var_binding_(binding)

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        name = getattr(call.op, "name", "")
        if name in DIVISIONS and str(call.args[1].ty.dtype).startswith(("int", "uint")):
            return self._division(call, name)
        operands = list(call.args)
        if name == "relax.take":
            shape = operands[0].ty.shape
            operands[1] = self._indices(operands[1], [shape[call.attrs.axis] if call.attrs.axis is not None else product(shape)], name)
        elif name in ("relax.gather_elements", "relax.scatter_elements"):
            operands[1] = self._indices(operands[1], [operands[0].ty.shape[call.attrs.axis]], name)
        elif name in ("relax.gather_nd", "relax.scatter_nd"):
            depth = static(operands[1].ty.shape[-1])
            first = int(call.attrs.batch_dims) if name == "relax.gather_nd" else 0
            operands[1] = self._indices(operands[1], list(operands[0].ty.shape)[first : first + depth], name)
        elif name == "relax.index_tensor":
            fields = [self.builder_.emit(relax.TupleGetItem(operands[1], at)) for at in range(len(operands[1].ty.fields))]
            operands[1] = relax.Tuple([self._indices(field, [size], name) for field, size in zip(fields, operands[0].ty.shape, strict=False)])
        elif name == "relax.tensor_to_shape":
            # the call into the VM itself: what TVM makes of the operator declares other symbols than the importer's
            return relax.op.call_pure_packed("vm.builtin.tensor_to_shape", self._sizes(operands[0], name), ty_args=call.ty)
        elif name == "relax.reverse_sequence":
            operands[1] = self._lengths(operands[1], operands[0].ty.shape[call.attrs.seq_axis], name)
        elif name == recurrent.NAME:
            attrs = recurrent.attrs_of(call)
            if "lengths" in attrs.operands.split():
                operands[-1] = self._lengths(operands[-1], operands[0].ty.shape[attrs.x_order.index("T")], name)
        if all(new.same_as(old) for new, old in zip(operands, call.args, strict=True)):
            return call
        return relax.Call(call.op, operands, call.attrs, call.ty_args)

    def _indices(self, indices: Any, sizes: Sequence[Any], name: str) -> Any:
        """Indices as int64 in 0..size-1; entry i of the last axis belongs to sizes[i] where there is more than one."""
        if not sizes:
            return indices
        known, fixed = self._constant(indices), [static(size) for size in sizes]
        if known is not None and None not in fixed and np.all((known >= 0) & (known < np.array(fixed))):
            return indices
        limits = ", ".join("its dim" if size is None else f"{-size}..{size - 1}" for size in dict.fromkeys(fixed))

        def check(sizes: Sequence[Any]) -> Check:
            def inspect(value: Any, column: int) -> tuple[Any, Any]:
                value = T.bind(tirx.Cast("int64", value))
                wrapped = T.bind(tirx.Select(value < T.int64(0), value + sizes[column], value))
                return wrapped, tirx.Or(wrapped < T.int64(0), wrapped >= sizes[column])

            return inspect

        return self._check(indices, "int64", list(sizes), check, f"an index lies outside of {limits}", name)

    def _sizes(self, sizes: Any, name: str) -> Any:
        def check(_: Sequence[Any]) -> Check:
            return lambda value, _: (value, tirx.Or(value < 0, value > LARGEST_DIM))

        return self._check(sizes, "int64", [], check, f"a size lies outside of 0..{LARGEST_DIM}", name)

    def _lengths(self, lengths: Any, size: Any, name: str) -> Any:
        def check(sizes: Sequence[Any]) -> Check:
            return lambda value, _: (value, tirx.Or(value < 0, tirx.Cast("int64", value) > sizes[0]))

        return self._check(lengths, str(lengths.ty.dtype), [size], check, "a length exceeds its axis", name)

    def _division(self, call: Any, name: str) -> Any:
        """The lowest integer divided by -1 traps on x86: -1 is divided by as 1, and the quotient negated; every remainder is 0 either way."""
        dividend, divisor = call.args
        dtype = str(divisor.ty.dtype)
        known = self._constant(divisor)
        if known is not None and np.all(known != 0) and (dtype.startswith("uint") or np.all(known != -1)):
            return call
        zero, one = (tirx.IntImm(dtype, value) for value in (0, 1))
        minus = tirx.IntImm(dtype, -1) if dtype.startswith("int") else None

        def check(_: Sequence[Any]) -> Check:
            return lambda value, _: (value if minus is None else tirx.Select(value == minus, one, value), value == zero)

        checked = self._check(divisor, dtype, [], check, "an integer is divided by zero", name)
        quotient = relax.Call(call.op, [dividend, checked], call.attrs, call.ty_args)
        if minus is None or name.endswith("mod"):
            return quotient
        emit = self.builder_.emit
        bound = emit(quotient)
        negated = emit(relax.op.multiply(bound, relax.const(-1, dtype)))
        return relax.op.where(emit(relax.op.equal(divisor, relax.const(-1, dtype))), negated, bound)

    def _check(self, operand: Any, dtype: str, sizes: list[Any], check: Callable[[Sequence[Any]], Check], what: str, name: str) -> Any:
        key = (operand, dtype, what, tuple(str(size) for size in sizes), name in DIVISIONS)
        if key not in self.checked:
            kind = name.split(".")[-1]
            message = f"node '{''.join(char if char.isprintable() else '?' for char in self.node)}' ({kind}): {what}"
            kernel = _kernel(operand.ty, dtype, sizes, check, message)
            variable = self.builder_.add_func(kernel, f"check_{kind}")
            symbolic = [size for size in sizes if static(size) is None]
            self.checked[key] = self.builder_.emit(relax.call_tir(variable, [operand, *symbolic], relax.TensorType(operand.ty.shape, dtype)))
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return self.checked[key]

    def _constant(self, expr: Any) -> np.ndarray | None:
        value = self.lookup_binding(expr) if isinstance(expr, relax.Var) else expr
        return value.value.numpy() if isinstance(value, Constant) else None


def _kernel(operand: Any, dtype: str, sizes: list[Any], check: Callable[[Sequence[Any]], Check], message: str) -> tirx.PrimFunc:
    """(operand, symbolic sizes..., result):  for row { for column { result[row, column], bad = check(operand[row, column]); wrong |= bad } }; assert !wrong

    Columns are unrolled, one per size.
    """
    columns = max(len(sizes), 1)
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True, "tcompile.scheduled": True, "op_pattern": _OPAQUE})
        shape = [static(dim) if static(dim) is not None else tirx.Var(f"d{axis}", "int64") for axis, dim in enumerate(operand.shape)]
        source = T.arg("operand", T.buffer(tuple(shape), str(operand.dtype)))
        limits = [i64(static(size)) if static(size) is not None else T.arg(f"size{at}", T.int64()) for at, size in enumerate(sizes)]
        target = T.arg("result", T.buffer(tuple(shape), dtype))
        with T.sblock("root"):
            count = product(shape)
            flat = [T.decl_buffer((count,), kind, data=buffer.data) for buffer, kind in ((source, str(operand.dtype)), (target, dtype))]
            wrong = T.alloc_buffer((1,), "int32")
            T.buffer_store(wrong, T.int32(0), [0])
            inspect = check(limits)
            with T.serial(T.floordiv(count, T.int64(columns))) as row:
                for column in range(columns):
                    place = row * T.int64(columns) + T.int64(column)
                    value, bad = inspect(flat[0][place], column)
                    T.buffer_store(flat[1], value, [place])
                    T.buffer_store(wrong, wrong[0] | tirx.Cast("int32", bad), [0])
            with T.Assert(wrong[0] == T.int32(0), message):
                pass
    return builder.get()  # pyright: ignore[reportReturnType]
