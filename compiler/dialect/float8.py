"""`tcompile.float8_rows`: rows in float8_e4m3fn with a scale each that is found while the model runs; both by one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..element_types import FLOAT8, FLOAT8_MAX
from ..tvm import operator_attrs, register_operator, relax

NAME = "tcompile.float8_rows"
#: the least scale: that of a row of zeros
LEAST = 1e-37


def float8_rows(x: relax.Expr, dtype: str = FLOAT8) -> relax.Call:
    """x: [..., K] float32 -> (codes: [..., K], scales: [...] float32): a row's scale is its largest magnitude over 448, its codes are the row over the scale.

    dtype: what the codes are held in: float8_e4m3fn, or a type of 16 bits.
    """
    return relax.Call(OPERATOR, [x], operator_attrs(dtype=dtype))


def dtype_of(call: relax.Call) -> str:
    """The type of the codes."""
    return str(call.attrs["dtype"])  # pyright: ignore[reportOptionalSubscript]


def row_scales(emit: Any, x: relax.Expr, axes: list[int]) -> relax.Expr:
    """The scales of slices that have these axes whole, by Relax operators."""
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
    x = call.args[0]
    scales = row_scales(builder.emit, x, [-1])
    codes = builder.emit(relax.op.astype(builder.emit(relax.op.divide(x, scales)), dtype_of(call)))
    return relax.Tuple([codes, builder.emit(relax.op.reshape(scales, list(x.ty.shape)[:-1]))])


OPERATOR = register_operator(NAME, ("x",), _infer, decompose)
