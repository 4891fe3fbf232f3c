"""`tcompile.grouped_matmul`: rows in groups that follow each other, each group times a matrix of its own; what a mixture of experts computes for rows sorted by expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..tvm import register_operator, relax, tirx, tvm

NAME = "tcompile.grouped_matmul"


def grouped_matmul(x: relax.Expr, weight: relax.Expr, ends: relax.Expr) -> relax.Call:
    """x: [S, K], weight: [E, K, N] of x's float type (or of bfloat16 for float32), ends: [E] int32 or int64 -> [S, N].

    Row s is multiplied by weight[e] of the first e with s < ends[e]: where ends ascend, rows ends[e - 1] .. ends[e] - 1. Rows behind all ends are zeros. Ends may be any
    numbers, in any order: nothing is read or written out of bounds.
    """
    return relax.Call(OPERATOR, [x, weight, ends])


def _infer(builder: Any, call: Any) -> Any:
    x, weight, ends = (arg.ty for arg in call.args)
    alike = x.dtype == weight.dtype or (str(x.dtype), str(weight.dtype)) == ("float32", "bfloat16")
    if (x.ndim, weight.ndim, ends.ndim) != (2, 3, 1) or not alike or not str(x.dtype).startswith(("float", "bfloat")):
        raise ValueError(
            f"{NAME}: expected x [S, K] and weight [E, K, N] of one float type, or float32 and bfloat16, and ends [E], got {x}, {weight}, {ends}"
        )
    if str(ends.dtype) not in ("int32", "int64"):
        raise ValueError(f"{NAME}: expected ends in int32 or int64, got {ends}")
    prove = tvm.sym.Analyzer().can_prove_equal
    fit = prove(x.shape[1], weight.shape[1]) and prove(ends.shape[0], weight.shape[0])
    if not fit or (isinstance(weight.shape[0], tirx.IntImm) and int(weight.shape[0]) < 1):
        raise ValueError(f"{NAME}: {x}, {weight} and {ends} do not fit each other")
    return relax.TensorType([x.shape[0], weight.shape[2]], result_dtype(str(x.dtype)))


def result_dtype(dtype: str) -> str:
    """Products of numbers of two bytes are added up in float32, and stay so."""
    return dtype if dtype in ("float32", "float64") else "float32"


def reference(x: np.ndarray, weight: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The operator in numpy, sums in float64."""
    found = np.zeros((len(x), weight.shape[2]))
    for row, values in enumerate(x.astype(np.float64)):
        behind = np.flatnonzero(ends > row)
        if len(behind):
            found[row] = values @ weight[behind[0]].astype(np.float64)
    return found


#: picking rows of weights is no chain of Relax operators that a target should run: `targets/common/ops_linear.py` defines it
OPERATOR = register_operator(NAME, ("x", "weight", "ends"), _infer, lambda builder, call: call)
