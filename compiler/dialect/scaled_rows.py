"""`tcompile.scaled_rows`: rows in float8_e4m3fn or 8-bit integers with a scale each that is found while the model runs; both by one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..element_types import FLOAT8, FLOAT8_MAX
from ..tvm import operator_attrs, register_operator, relax

NAME = "tcompile.scaled_rows"
#: the least scale: that of a row of zeros
LEAST = 1e-37
#: the largest code of integers, on either side of zero
INT8_MAX = 127
#: the code of uint8 that stands for 0
UINT8_ZERO = 128


def scaled_rows(x: relax.Expr, dtype: str = FLOAT8, largest: int = INT8_MAX) -> relax.Call:
    """x: [..., K] float32 -> (codes: [..., K], scales: [...] float32): a row's scale is its largest magnitude over 448, or over `largest` for integers, its codes are the row over the
    scale, rounded to nearest, ties to even.

    dtype: what the codes are held in: float8_e4m3fn, a type of 16 bits with the same numbers, int8, or uint8 (128 more). A row of integers with a number that is not finite has the scale NaN.
    """
    return relax.Call(OPERATOR, [x], operator_attrs(dtype=dtype, largest=largest))


def dtype_of(call: relax.Call) -> str:
    """The type of the codes."""
    return str(call.attrs["dtype"])  # pyright: ignore[reportOptionalSubscript]


def largest_of(call: relax.Call) -> int:
    """The largest code of integers."""
    return int(call.attrs["largest"])  # pyright: ignore[reportOptionalSubscript]


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
    if (dtype := dtype_of(call)) in ("int8", "uint8"):
        finite = emit(op.isfinite(x))
        top = emit(op.max(emit(op.where(finite, emit(op.abs(x)), scalar(np.inf))), [-1], keepdims=True))
        scales = emit(op.maximum(emit(op.multiply(top, scalar(1 / largest_of(call)))), scalar(LEAST)))
        scales = emit(op.where(emit(op.isfinite(scales)), scales, scalar(np.nan)))
        whole = emit(op.round(emit(op.divide(x, scales))))
        whole = emit(op.where(emit(op.isfinite(whole)), whole, scalar(0)))
        codes = emit(op.astype(whole if dtype == "int8" else emit(op.add(whole, scalar(UINT8_ZERO))), dtype))
    else:
        scales = row_scales(emit, x, [-1])
        codes = emit(op.astype(emit(op.divide(x, scales)), dtype))
    return relax.Tuple([codes, emit(op.reshape(scales, list(x.ty.shape)[:-1]))])


OPERATOR = register_operator(NAME, ("x",), _infer, decompose)
