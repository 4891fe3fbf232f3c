"""`tcompile.scaled_rows`: rows in float8_e4m3fn or int8 with a scale each that is found while the model runs; both by one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..element_types import FLOAT8, FLOAT8_MAX
from ..tvm import operator_attrs, register_operator, relax

NAME = "tcompile.scaled_rows"
#: the least scale: that of a row of zeros
LEAST = 1e-37
#: the largest code of int8, on either side of zero
INT8_MAX = 127.0


def scaled_rows(x: relax.Expr, dtype: str = FLOAT8) -> relax.Call:
    """x: [..., K] float32 -> (codes: [..., K], scales: [...] float32): a row's scale is its largest magnitude over 448, or over 127 for int8, its codes are the row over the scale,
    rounded to nearest, ties to even.

    dtype: what the codes are held in: float8_e4m3fn, a type of 16 bits with the same numbers, or int8. A row of int8 with a number that is not finite has the scale NaN.
    """
    return relax.Call(OPERATOR, [x], operator_attrs(dtype=dtype))


def dtype_of(call: relax.Call) -> str:
    """The type of the codes."""
    return str(call.attrs["dtype"])  # pyright: ignore[reportOptionalSubscript]


def row_scales(emit: Any, x: relax.Expr, axes: list[int]) -> relax.Expr:
    """The scales of slices of float8_e4m3fn that have these axes whole, by Relax operators."""
    op = relax.op
    top = emit(op.max(emit(op.abs(x)), axes, keepdims=True))
    return emit(op.maximum(emit(op.multiply(top, relax.const(np.float32(1 / FLOAT8_MAX)))), relax.const(np.float32(LEAST))))


def _infer(builder: Any, call: Any) -> Any:
    x = call.args[0].ty
    if x.ndim < 1 or str(x.dtype) != "float32":
        raise ValueError(f"{NAME}: expected rows in float32, got {x}")
    return relax.TupleType([relax.TensorType(x.shape, dtype_of(call)), relax.TensorType(list(x.shape)[:-1], "float32")])


def decompose(builder: Any, call: Any) -> relax.Expr:
    """The same by Relax operators."""
    x, emit, op, scalar = call.args[0], builder.emit, relax.op, lambda value: relax.const(np.float32(value))
    if dtype_of(call) == "int8":
        finite = emit(op.isfinite(x))
        top = emit(op.max(emit(op.where(finite, emit(op.abs(x)), scalar(np.inf))), [-1], keepdims=True))
        scales = emit(op.maximum(emit(op.multiply(top, scalar(1 / INT8_MAX))), scalar(LEAST)))
        scales = emit(op.where(emit(op.isfinite(scales)), scales, scalar(np.nan)))
        whole = emit(op.round(emit(op.divide(x, scales))))
        codes = emit(op.astype(emit(op.where(emit(op.isfinite(whole)), whole, scalar(0))), "int8"))
    else:
        scales = row_scales(emit, x, [-1])
        codes = emit(op.astype(emit(op.divide(x, scales)), dtype_of(call)))
    return relax.Tuple([codes, emit(op.reshape(scales, list(x.ty.shape)[:-1]))])


OPERATOR = register_operator(NAME, ("x",), _infer, decompose)
