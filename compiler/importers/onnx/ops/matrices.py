"""Operators on square matrices: EyeLike and Det."""

from __future__ import annotations

import numpy as np

from ....dialect.determinant import determinant
from ....tvm import relax
from ..load import dtype_name
from ..node import Node
from ..registry import converter
from ..values import Refusal, Value
from .shape import known_shape


@converter("EyeLike", since=9)
def eye_like(node: Node) -> Value:
    """Ones on the diagonal `k` of a matrix as large as the input, of the type `dtype`, by default the input's."""
    shape = known_shape(node, node.value(0))
    if len(shape) != 2:
        raise Refusal(f"the input has {len(shape)} dims instead of 2")
    wanted = node.attr("dtype")
    dtype = dtype_name(wanted) if wanted else node.dtype(node.tensor(0))
    rows, columns = (node.emit(relax.op.arange(0, size, 1, "int64")) for size in shape)
    diagonal = node.emit(relax.op.add(node.reshape(rows, [shape[0], 1]), node.scalar(node.attr("k", 0), "int64")))
    same = node.emit(relax.op.equal(diagonal, columns))
    return same if dtype == "bool" else relax.op.astype(same, dtype)


@converter("Det", since=11)
def det(node: Node) -> relax.Expr:
    x = node.tensor(0)
    shape = node.shape(x)
    if len(shape) < 2:
        raise Refusal(f"a tensor of rank {len(shape)} is no matrix")
    size = node.static(shape[-2:], "the size of the matrices")
    if size[0] != size[1]:
        raise Refusal(f"matrices of {size[0]} rows and {size[1]} columns are not square")
    if size[0] == 0:
        return relax.op.full(shape[:-2], node.array(np.ones(()), node.dtype(x)), node.dtype(x))
    batch = node.dims.product(shape[:-2])
    return node.reshape(node.emit(determinant(node.reshape(x, [batch, *size]))), shape[:-2])
