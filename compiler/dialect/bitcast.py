"""`tcompile.bitcast`: the bits of every element, read as another type of the same width."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, te, tirx

NAME = "tcompile.bitcast"


def bitcast(x: relax.Expr, dtype: str) -> relax.Call:
    """x: [...] of a type as wide as `dtype` -> [...] of `dtype`."""
    return relax.Call(OPERATOR, [x], operator_attrs(dtype=dtype))


def reference(x: np.ndarray, dtype: str) -> np.ndarray:
    """The operator in numpy."""
    return x.view(dtype)


def _infer(builder: Any, call: Any) -> Any:
    x, dtype = call.args[0].ty, str(call.attrs["dtype"])
    if np.dtype(str(x.dtype)).itemsize != np.dtype(dtype).itemsize:
        raise ValueError(f"{NAME}: {x.dtype} and {dtype} differ in width")
    return relax.TensorType(x.shape, dtype)


def _legalize(builder: Any, call: Any) -> relax.Expr:
    dtype = str(call.attrs["dtype"])

    def reinterpreted(x: Any) -> Any:
        return te.compute(x.shape, lambda *axes: tirx.reinterpret(dtype, x[axes]), name="bitcast")

    return builder.call_te(reinterpreted, call.args[0], primfunc_name_hint="bitcast")


OPERATOR = register_operator(NAME, ("x",), _infer, _legalize)
