"""Tensors made from nothing: filled ones and ranges, of torch's shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from ....tvm import relax, tvm
from .shape import argument


def filled(translator: Any, node: fx.Node, value: Any) -> relax.Expr:
    """The node's result where all of it is one value: a number or a scalar tensor."""
    shape, dtype = translator.out_shape(node), translator.out_dtype(node)
    scalar = relax.const(value, dtype) if isinstance(value, (bool, int, float)) else translator.emit(relax.op.astype(value, dtype))
    return scalar if not shape else translator.emit(relax.op.full(shape, scalar, dtype))


def full(translator: Any, node: fx.Node) -> relax.Expr:
    return filled(translator, node, translator.value(node.args[1]))


def new_full(translator: Any, node: fx.Node) -> relax.Expr:
    return filled(translator, node, translator.value(node.args[2]))


def zeros(translator: Any, node: fx.Node) -> relax.Expr:
    return filled(translator, node, 0)


def ones(translator: Any, node: fx.Node) -> relax.Expr:
    return filled(translator, node, 1)


def scalar(translator: Any, node: fx.Node) -> relax.Expr:
    return filled(translator, node, translator.value(node.args[0]))


def arange(translator: Any, node: fx.Node) -> relax.Expr:
    """arange(end), arange(start, end), arange(start, end, step): [N]; a constant where everything is known."""
    dtype, (length,) = translator.out_dtype(node), translator.out_shape(node)
    values = translator.value(node.args)
    start = values[0] if len(values) > 1 else 0
    step = argument(node, 2, "step", 1)
    if "int" in dtype:  # torch cuts both to integers, after it has counted the steps
        start, step = (int(value) if isinstance(value, float) else value for value in (start, step))
    if isinstance(length, int) and isinstance(start, (int, float)):
        return relax.const((start + step * np.arange(length)).astype(dtype), dtype)
    end = start + step * length  # exact where torch's own end may lie inside of a step
    if dtype == "int64" and not any(isinstance(value, float) for value in (start, step)):
        return translator.emit(relax.op.arange(start, end, step, dtype))
    counts = translator.emit(relax.op.arange(0, length, 1, "int64"))
    scaled = translator.emit(relax.op.multiply(translator.emit(relax.op.astype(counts, dtype)), relax.const(step, dtype)))
    if tvm.ir.is_prim_expr(start):
        raise NotImplementedError("a range of this dtype cannot start at a symbolic size")
    return translator.emit(relax.op.add(scaled, relax.const(start, dtype)))


#: what an empty tensor holds may be anything: zeros
_EMPTY = ("empty.default", "empty.memory_format", "empty_like.default", "empty_permuted.default", "empty_strided.default", "new_empty.default")
CONVERTERS = {
    **{name: zeros for name in _EMPTY},
    **{name: full for name in ("full.default", "full_like.default", "fill.Scalar")},
    **{name: zeros for name in ("zeros.default", "zeros_like.default", "new_zeros.default")},
    **{name: ones for name in ("ones.default", "ones_like.default", "new_ones.default")},
    **{name: arange for name in ("arange.default", "arange.start", "arange.start_step")},
    "new_full.default": new_full,
    "scalar_tensor.default": scalar,
}
