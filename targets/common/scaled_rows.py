"""Rows in few bits with a scale each, found while the model runs, as tensor expressions."""

from __future__ import annotations

import math
from typing import Any

from ...compiler.dialect.scaled_rows import LEAST, NAME, UINT8_ZERO, dtype_of, largest_of
from ...compiler.element_types import FLOAT8_MAX
from ...compiler.tvm import relax, te, tirx
from .float8 import number
from .legalize import legalizer


@legalizer(NAME)
def _rows(builder: Any, call: Any) -> relax.Expr:
    dtype, largest = dtype_of(call), largest_of(call)
    integer = dtype in ("int8", "uint8")
    definition = (lambda x: _integers(x, dtype, largest)) if integer else lambda x: _float8(x, dtype)
    return builder.call_te(definition, call.args[0], primfunc_name_hint=f"{dtype if integer else 'float8'}_rows")


def _float8(x: Any, dtype: str) -> list[Any]:
    *lead, width = x.shape
    k = te.reduce_axis((0, width), "k")
    top = te.compute(lead, lambda *at: te.max(te.abs(x[(*at, k)]), axis=k), name="top")
    whole, least = _float(1 / FLOAT8_MAX), _float(LEAST)
    scales = te.compute(lead, lambda *at: tirx.max(top[at] * whole, least), name="scales")
    return [te.compute(x.shape, lambda *at: number(x[at] / scales[at[:-1]], dtype), name="codes"), scales]


def _integers(x: Any, dtype: str, largest: int) -> list[Any]:
    *lead, width = x.shape
    k = te.reduce_axis((0, width), "k")
    infinity = _float(math.inf)

    def magnitude(value: Any) -> Any:
        return tirx.Select(value == value, te.abs(value), infinity)

    def code(value: Any) -> Any:
        """Of NaN, where the scale is, too, 0."""
        whole = tirx.Select(value == value, tirx.nearbyint(value), _float(0.0))
        return tirx.Cast(dtype, whole if dtype == "int8" else whole + _float(UINT8_ZERO))

    top = te.compute(lead, lambda *at: te.max(magnitude(x[(*at, k)]), axis=k), name="top")
    scales = te.compute(
        lead, lambda *at: tirx.Select(top[at] < infinity, tirx.max(top[at] * _float(1 / largest), _float(LEAST)), _float(math.nan)), name="scales"
    )
    return [te.compute(x.shape, lambda *at: code(x[at] / scales[at[:-1]]), name="codes"), scales]


def _float(value: float) -> Any:
    return tirx.const(value, "float32")
