"""Distances between rows: cdist and pdist."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from ....tvm import relax
from .creation import filled
from .shape import argument


def _norm(translator: Any, difference: relax.Expr, p: float) -> relax.Expr:
    """The p-norm along the last axis; for p = 0 the number of elements that are not 0."""
    emit, op, dtype = translator.emit, relax.op, str(difference.ty.dtype.dtype)
    if p == 2:
        return emit(op.sqrt(emit(op.sum(emit(op.multiply(difference, difference)), -1))))
    if p == 0:
        return emit(op.sum(emit(op.astype(emit(op.not_equal(difference, relax.const(0, dtype))), dtype)), -1))
    size = emit(op.abs(difference))
    if math.isinf(p):
        return emit(op.max(size, -1))
    if p == 1:
        return emit(op.sum(size, -1))
    total = emit(op.sum(emit(op.power(size, relax.const(p, dtype))), -1))
    return emit(op.power(total, relax.const(1 / p, dtype)))


def cdist(translator: Any, node: fx.Node) -> relax.Expr:
    """x: [..., P, M], y: [..., R, M] -> [..., P, R]: the distance of every row of x from every row of y."""
    x, y, p = *translator.value(node.args[:2]), float(node.args[2])  # pyright: ignore[reportArgumentType]
    if getattr(x.ty.shape[-1], "value", None) == 0:
        return filled(translator, node, 0)
    emit, op = translator.emit, relax.op
    return _norm(translator, emit(op.subtract(emit(op.expand_dims(x, -2)), emit(op.expand_dims(y, -3)))), p)


def pdist(translator: Any, node: fx.Node) -> relax.Expr:
    """x: [N, M] -> [N * (N - 1) / 2]: the distance of every row from those after it."""
    x, p = translator.value(node.args[0]), float(argument(node, 1, "p", 2.0))
    sizes = [getattr(size, "value", None) for size in x.ty.shape]
    if sizes[0] is None:
        raise NotImplementedError("distances between rows of a number that is known at run time only")
    if sizes[1] == 0:
        return filled(translator, node, 0)
    emit, op = translator.emit, relax.op
    left, right = (emit(op.take(x, relax.const(rows.astype("int64")), 0, mode="fast")) for rows in np.triu_indices(int(sizes[0]), 1))
    return _norm(translator, emit(op.subtract(left, right)), p)


CONVERTERS = {"_cdist_forward.default": cdist, "_pdist_forward.default": pdist}
