"""Reductions over axes, the places of extremes, and running sums, with torch's type promotion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from ....tvm import relax
from .creation import filled
from .elementwise import Converter, operand
from .shape import argument


def _axes(node: fx.Node) -> list[int] | None:
    """The axes that are named; None for all of them."""
    axes = argument(node, 1, "dim")
    return None if axes is None or axes == [] else [axes] if isinstance(axes, int) else list(axes)


def _vector(translator: Any, x: relax.Expr) -> relax.Expr:
    """A scalar as a vector of one element, along whose axis it can be reduced."""
    return x if len(x.ty.shape) else translator.emit(relax.op.reshape(x, [1]))


def _reduced(translator: Any, node: fx.Node, op: Callable[..., relax.Expr], x: relax.Expr) -> relax.Expr:
    if not len(x.ty.shape):
        return x
    return translator.emit(op(x, _axes(node), bool(argument(node, 2, "keepdim", False))))


def reduction(op: Callable[..., relax.Expr]) -> Converter:
    """sum, mean, prod, amax, amin, max, min over some or all dims: in the result's dtype (a sum of booleans counts)."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        dtype = translator.out_dtype(node)
        if dtype != "bool":
            return _reduced(translator, node, op, operand(translator, translator.value(node.args[0]), dtype))
        result = _reduced(translator, node, op, operand(translator, translator.value(node.args[0]), "uint8"))
        return translator.emit(relax.op.astype(result, "bool"))

    return convert


def any_(translator: Any, node: fx.Node) -> relax.Expr:
    """Whether any element, of all or along some dims, is not zero (NaN is not)."""
    x = translator.value(node.args[0])
    dtype = str(x.ty.dtype.dtype)
    mask = x if dtype == "bool" else translator.emit(relax.op.not_equal(x, relax.const(0, dtype)))
    largest = _reduced(translator, node, relax.op.max, operand(translator, mask, "uint8"))
    return operand(translator, largest, "bool")


def variance(translator: Any, node: fx.Node) -> relax.Expr:
    """var.correction: the squared distances from the mean, summed and divided by their number less `correction` (1 by default), but never below 0."""
    x, axes = translator.value(node.args[0]), _axes(node)
    correction, dtype = node.kwargs.get("correction"), str(x.ty.dtype.dtype)
    correction = 1 if correction is None else correction
    emit, op, shape = translator.emit, relax.op, list(x.ty.shape)
    along = range(len(shape)) if axes is None or not shape else axes
    sizes = [getattr(shape[axis], "value", None) for axis in along]
    if 0 in sizes:
        return filled(translator, node, math.nan)
    x = _vector(translator, x)
    mean_of_squares = emit(op.variance(x, axes if shape else None, bool(node.kwargs.get("keepdim", False)) and bool(shape)))
    if correction == 0:
        return mean_of_squares
    if None in sizes:
        raise NotImplementedError("a correction of a count that is known at run time only")
    count = math.prod(sizes)
    with np.errstate(divide="ignore"):
        return emit(op.multiply(mean_of_squares, relax.const(np.float64(count) / max(0.0, count - correction), dtype)))


def place(op: Callable[..., relax.Expr]) -> Converter:
    """argmax, argmin along one dim, or of all elements in their order."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x, dim = _vector(translator, translator.value(node.args[0])), argument(node, 1, "dim")
        if dim is None:
            x, dim = translator.emit(relax.op.reshape(x, [-1])), 0
        found = translator.emit(op(x, dim, True))
        return translator.emit(relax.op.reshape(found, translator.out_shape(node)))

    return convert


def scan(op: Callable[..., relax.Expr]) -> Converter:
    """cumsum, cumprod along one dim, in the result's dtype."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x = operand(translator, translator.value(node.args[0]), translator.out_dtype(node))
        return translator.emit(op(x, axis=node.args[1])) if len(x.ty.shape) else x

    return convert


_op = relax.op
CONVERTERS: dict[str, Converter] = {
    **{name: reduction(_op.sum) for name in ("sum.default", "sum.dim_IntList")},
    **{name: reduction(_op.mean) for name in ("mean.default", "mean.dim")},
    **{name: reduction(_op.prod) for name in ("prod.default", "prod.dim_int")},
    **{name: reduction(_op.max) for name in ("amax.default", "max.default")},
    **{name: reduction(_op.min) for name in ("amin.default", "min.default")},
    **{name: any_ for name in ("any.default", "any.dim", "any.dims")},
    "var.correction": variance,
    "argmax.default": place(_op.argmax),
    "argmin.default": place(_op.argmin),
    "cumsum.default": scan(_op.cumsum),
    "cumprod.default": scan(_op.cumprod),
}
