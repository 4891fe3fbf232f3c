"""Operations on constants that TVM's own definitions fail on: division by zero, and filling with what is not finite."""

from __future__ import annotations

import math
from typing import Any

from ...compiler.tvm import is_constant, te, tirx
from .legalize import default_legalization, legalizer


@legalizer("relax.divide")
def _divide(builder: Any, call: Any) -> Any:
    """x / 0 of floats is x * inf, also for the sign of the zero, and for an x of 0 or NaN."""
    divisor = call.args[1]
    dtype = str(divisor.ty.dtype)
    if not is_constant(divisor) or len(divisor.ty.shape) or "float" not in dtype or (zero := float(divisor.value.numpy())) != 0:
        return default_legalization(builder, call)

    def divide(x: Any) -> Any:
        infinite = tirx.const(math.copysign(math.inf, zero), dtype)
        return te.compute(x.shape, lambda *axes: x[axes] * infinite, name="divide")

    return builder.call_te(divide, call.args[0], primfunc_name_hint="divide")


@legalizer("relax.full")
def _full(builder: Any, call: Any) -> Any:
    shape, value = call.args
    if not is_constant(value) or "float" not in str(value.ty.dtype) or math.isfinite(number := float(value.value.numpy())):
        return default_legalization(builder, call)
    dtype = str(call.ty.dtype)

    def full() -> Any:
        return te.compute(list(shape), lambda *axes: tirx.const(number, dtype), name="full")

    return builder.call_te(full, primfunc_name_hint="full")
