"""Tensors of float8_e4m3fn where a target has no arithmetic for them: their numbers, rounded as they have to be, held in a type of 16 bits, in which all of them are exact.

A cast of float32 to float8_e4m3fn rounds to nearest, ties to even, and saturates at 448, infinities too; NaN stays NaN. It is this on every target.
"""

from __future__ import annotations

from typing import Any

from ...compiler.dialect.scaled_rows import NAME as ROWS
from ...compiler.dialect.scaled_rows import dtype_of, scaled_rows
from ...compiler.element_types import FLOAT8, numpy_dtype
from ...compiler.tvm import Constant, mutator, relax, te, tirx

#: bits of float32: the largest number, infinity, and what a number is added to so that its last bit of three behind the point is the sum's: the power of two 20 above its own,
#: which for subnormals is that of the least normal one, 2^-6
_LARGEST, _INFINITY, _APART, _LEAST = 0x43E00000, 0x7F800000, 20 << 23, (127 - 6) << 23


def held(module: Any, dtype: str) -> Any:
    """The module with every tensor of float8_e4m3fn as one of the same numbers in `dtype`, "bfloat16" or "float16"; a module without any as it is."""
    found: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr.ty, relax.TensorType) and str(expr.ty.dtype) == FLOAT8:
            found.append(expr)

    relax.analysis.post_order_visit(module["main"], visit)
    return _Held(module, dtype).apply() if found else module


@mutator
class _Held(relax.PyExprMutator):
    def __init__(self, module: Any, dtype: str):
        super().__init__(module)
        self.module, self.dtype = module, dtype

    def apply(self) -> Any:
        self.builder_.update_func(self.module.get_global_var("main"), self.visit_expr(self.module["main"]))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        name, to = getattr(call.op, "name", ""), str(getattr(call.ty, "dtype", ""))
        if name == "relax.astype" and to == FLOAT8:
            x, dtype = self.visit_expr(call.args[0]), self.dtype
            if str(x.ty.dtype) == dtype and str(call.args[0].ty.dtype) == FLOAT8:
                return x
            return self.builder_.call_te(
                lambda x: te.compute(x.shape, lambda *at: rounded(x[at].astype("float32"), dtype), name="float8"), x, primfunc_name_hint="cast"
            )
        if name == ROWS and dtype_of(call) == FLOAT8:
            return scaled_rows(self.visit_expr(call.args[0]), self.dtype)
        args = [self._constant(arg) if isinstance(arg, Constant) else self.visit_expr(arg) for arg in call.args]
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _constant(self, constant: Any) -> Any:
        held = str(constant.ty.dtype) == FLOAT8
        return relax.const(constant.value.numpy().astype(numpy_dtype(self.dtype)), self.dtype) if held else constant


def number(value: Any, dtype: str) -> Any:
    """A float32 as a number of float8_e4m3fn held in `dtype`."""
    return tirx.Cast(dtype, value) if dtype == FLOAT8 else rounded(value, dtype)


def rounded(value: Any, dtype: str) -> Any:
    """A float32 rounded to float8_e4m3fn, as `dtype`. In integers but for one sum, and without a branch, so that it vectorizes."""
    bits = tirx.reinterpret("uint32", value)
    magnitude = bits & _bits(0x7FFFFFFF)
    nan = tirx.min(tirx.max(magnitude, _bits(_INFINITY)) - _bits(_INFINITY), _bits(1))
    magnitude = tirx.min(magnitude, _bits(_LARGEST))
    power = tirx.reinterpret("float32", tirx.max(magnitude & _bits(_INFINITY), _bits(_LEAST)) + _bits(_APART))
    sum_bits = tirx.reinterpret("uint32", tirx.reinterpret("float32", magnitude) + power)
    nearest = tirx.reinterpret("uint32", tirx.reinterpret("float32", sum_bits) - power)
    result = nearest | (bits & _bits(0x80000000)) | nan * _bits(0x7FC00000)
    if dtype == "bfloat16":  # what it does not have of a float32 is zero
        return tirx.reinterpret(dtype, tirx.Cast("uint16", result >> _bits(16)))
    return tirx.Cast(dtype, tirx.reinterpret("float32", result))


def _bits(value: int) -> Any:
    return tirx.const(value, "uint32")
