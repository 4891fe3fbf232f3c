"""Element-wise operators and sums with torch's type promotion: operands are brought to torch's computation dtype first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ....tvm import relax, tvm
from .shape import argument

#: (translator, node) -> Relax expression
Converter = Callable[[Any, fx.Node], relax.Expr]


def operand(translator: Any, value: Any, dtype: str) -> relax.Expr:
    """A tensor, a number or a symbolic size as a tensor of `dtype`."""
    if isinstance(value, (bool, int, float)):
        return relax.const(value, dtype)
    if tvm.ir.is_prim_expr(value):
        value = translator.emit(relax.op.reshape(translator.emit(relax.op.arange(value, value + 1, 1, "int64")), []))
    return value if str(value.ty.dtype.dtype) == dtype else translator.emit(relax.op.astype(value, dtype))


def _metas(node: fx.Node, count: int) -> list[Any]:
    """torch's view of the first arguments: fake tensors and numbers; a symbolic size counts as an integer."""
    values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in node.args[:count]]
    return [1 if isinstance(value, torch.SymInt) else value for value in values]


def binary(op: Callable[[relax.Expr, relax.Expr], relax.Expr], compares: bool = False) -> Converter:
    """add, mul, ...: computed in the result's dtype; comparisons in the dtype that their operands promote to."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        dtype = translator._convert_data_type(torch.result_type(*_metas(node, 2))) if compares else translator.out_dtype(node)
        left, right = (operand(translator, value, dtype) for value in translator.value(node.args[:2]))
        if (alpha := argument(node, 2, "alpha", 1)) != 1:
            right = translator.emit(relax.op.multiply(right, relax.const(alpha, dtype)))
        return translator.emit(op(left, right))

    return convert


def unary(op: Callable[[relax.Expr], relax.Expr]) -> Converter:
    """sqrt, exp, ...: an integer operand is widened to the result's float dtype first."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        return translator.emit(op(operand(translator, translator.value(node.args[0]), translator.out_dtype(node))))

    return convert


def rsub(translator: Any, node: fx.Node) -> relax.Expr:
    left, right = (operand(translator, value, translator.out_dtype(node)) for value in translator.value(node.args[:2]))
    return translator.emit(relax.op.subtract(right, left))


def div_mode(translator: Any, node: fx.Node) -> relax.Expr:
    """div with rounding_mode None, "floor" or "trunc"; the integer forms divide as integers."""
    dtype, mode = translator.out_dtype(node), node.kwargs.get("rounding_mode")
    left, right = (operand(translator, value, dtype) for value in translator.value(node.args[:2]))
    if mode == "floor":
        return translator.emit(relax.op.floor_divide(left, right))
    quotient = translator.emit(relax.op.divide(left, right))
    return translator.emit(relax.op.trunc(quotient)) if mode == "trunc" and dtype.startswith(("float", "bfloat")) else quotient


def power(translator: Any, node: fx.Node) -> relax.Expr:
    """x ** number; small exponents as products and roots, which vectorise where a call of pow does not."""
    x, exponent, dtype = translator.value(node.args[0]), node.args[1], translator.out_dtype(node)
    x = operand(translator, x, dtype)
    if exponent == 0.5:
        return translator.emit(relax.op.sqrt(x))
    if exponent == -0.5:
        return translator.emit(relax.op.rsqrt(x))
    if exponent not in (1, 2, 3, 4):
        return translator.emit(relax.op.power(x, operand(translator, translator.value(exponent), dtype)))
    square = x if exponent == 1 else translator.emit(relax.op.multiply(x, x))
    return square if exponent < 3 else translator.emit(relax.op.multiply(square, x if exponent == 3 else square))


def where(translator: Any, node: fx.Node) -> relax.Expr:
    condition, left, right = translator.value(node.args[:3])
    dtype = translator.out_dtype(node)
    return translator.emit(relax.op.where(condition, operand(translator, left, dtype), operand(translator, right, dtype)))


def masked_fill(translator: Any, node: fx.Node) -> relax.Expr:
    x, mask, value = translator.value(node.args[:3])
    return translator.emit(relax.op.where(mask, operand(translator, value, translator.out_dtype(node)), x))


def reduction(op: Callable[..., relax.Expr]) -> Converter:
    """sum, mean, prod, max, min over some or all dims: in the result's dtype (a sum of booleans counts)."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x = operand(translator, translator.value(node.args[0]), translator.out_dtype(node))
        axes = argument(node, 1, "dim")
        axes = None if axes is None or axes == [] else axes
        return translator.emit(op(x, axes, bool(argument(node, 2, "keepdim", False))))

    return convert


def scan(op: Callable[..., relax.Expr]) -> Converter:
    """cumsum, cumprod along one dim, in the result's dtype."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x = operand(translator, translator.value(node.args[0]), translator.out_dtype(node))
        return translator.emit(op(x, axis=node.args[1]))

    return convert


def _both(name: str, convert: Converter) -> dict[str, Converter]:
    return {f"{name}.Tensor": convert, f"{name}.Scalar": convert}


_op = relax.op
_ARITHMETIC = {"add": _op.add, "sub": _op.subtract, "mul": _op.multiply, "div": _op.divide, "remainder": _op.floor_mod}
_COMPARISONS = {"eq": _op.equal, "ne": _op.not_equal, "lt": _op.less, "le": _op.less_equal, "gt": _op.greater, "ge": _op.greater_equal}
_LOGIC = {"logical_and": _op.logical_and, "logical_or": _op.logical_or, "logical_xor": _op.logical_xor}
_FLOAT_FUNCTIONS = ("exp", "log", "sqrt", "rsqrt", "sin", "cos", "tan", "tanh", "sigmoid", "erf", "asin", "acos", "atan", "sinh", "cosh")


def _logic(op: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        left, right = (operand(translator, value, "bool") for value in translator.value(node.args[:2]))
        return translator.emit(op(left, right))

    return convert


CONVERTERS: dict[str, Converter] = {
    **{name: convert for key, op in _ARITHMETIC.items() for name, convert in _both(key, binary(op)).items()},
    **{name: convert for key, op in _COMPARISONS.items() for name, convert in _both(key, binary(op, compares=True)).items()},
    **{f"{key}.default": _logic(op) for key, op in _LOGIC.items()},
    **{f"{key}.default": unary(getattr(_op, key)) for key in _FLOAT_FUNCTIONS},
    **_both("rsub", rsub),
    "div.Tensor_mode": div_mode,
    "div.Scalar_mode": div_mode,
    "pow.Tensor_Scalar": power,
    "pow.Tensor_Tensor": binary(_op.power),
    "pow.Scalar": binary(_op.power),
    "maximum.default": binary(_op.maximum),
    "minimum.default": binary(_op.minimum),
    "floor_divide.default": binary(_op.floor_divide),
    **{name: where for name in ("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")},
    **{name: masked_fill for name in ("masked_fill.Scalar", "masked_fill.Tensor")},
    **{name: reduction(_op.sum) for name in ("sum.default", "sum.dim_IntList")},
    **{name: reduction(_op.mean) for name in ("mean.default", "mean.dim")},
    **{name: reduction(_op.prod) for name in ("prod.default", "prod.dim_int")},
    **{name: reduction(_op.max) for name in ("amax.default", "max.default")},
    **{name: reduction(_op.min) for name in ("amin.default", "min.default")},
    "cumsum.default": scan(_op.cumsum),
    "cumprod.default": scan(_op.cumprod),
}
