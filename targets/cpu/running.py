"""The kernel of running sums and products along an axis of a tensor with open sizes: three loops, over what is before the axis, the axis, and what is behind it.

TVM's own divides places by every size of the tensor; the simplifier of its code generator, which puts the quotients of open sizes into each other, takes seconds for three and
does not end for four. Tensors of known sizes keep that one.
"""

from __future__ import annotations

from math import prod
from typing import Any

from ...compiler.tvm import T, mutator, relax, relax_functions, tirx
from .emit import tasks
from .selection import dims_of, function

_OPERATORS = ("relax.cumsum", "relax.cumprod")


@mutator
class Running(relax.PyExprMutator):
    """Puts the kernel in place of `relax.cumsum` and `relax.cumprod` with open sizes, before TVM's dispatch of sorts and scans puts its own there."""

    def __init__(self, module: Any):
        super().__init__(module)
        self.module = module

    def apply(self) -> Any:
        for variable, body in relax_functions(self.module):
            self.builder_.update_func(variable, self.visit_expr(body))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") not in _OPERATORS or call.attrs.axis is None:
            return call
        return call if all(isinstance(dim, tirx.IntImm) for dim in call.args[0].ty.shape) else _running(self.builder_, call)


def _running(builder: Any, call: Any) -> Any:
    x, axis, dtype = call.args[0], int(call.attrs.axis), str(call.ty.dtype)
    shape = list(x.ty.shape)
    place = axis % len(shape)
    one = tirx.const(1, "int64")
    flat = [prod(shape[:place], start=one), shape[place], prod(shape[place + 1 :], start=one)]
    given = builder.emit(relax.op.reshape(x, flat))
    multiplied, exclusive = call.op.name == "relax.cumprod", bool(call.attrs.exclusive)
    start = tirx.const(int(multiplied), dtype)
    before, length, behind = dims_of(given.ty, "b", "n", "m")
    with function() as made:
        x, result = T.arg("x", T.buffer((before, length, behind), str(given.ty.dtype))), T.arg("result", T.buffer((before, length, behind), dtype))
        with T.sblock("root"), tasks(before, None) as row:
            with T.serial(tirx.min(length, one)) as k, T.serial(behind) as j:
                T.buffer_store(result, start if exclusive else x[row, k, j].astype(dtype), [row, k, j])
            with T.serial(length - 1) as k, T.serial(behind) as j:
                sofar, value = result[row, k, j], x[row, k if exclusive else k + 1, j].astype(dtype)
                T.buffer_store(result, sofar * value if multiplied else sofar + value, [row, k + 1, j])
    name = "running_product" if multiplied else "running_sum"
    out = builder.emit(relax.call_tir(builder.add_func(made.get(), name), [given], relax.TensorType(flat, dtype)))
    return relax.op.reshape(out, shape)
