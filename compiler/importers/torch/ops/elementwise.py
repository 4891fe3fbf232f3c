"""Element-wise operators with torch's type promotion: operands are brought to torch's computation dtype first."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import fx

from ....tvm import relax, tvm
from ..symbols import UnsupportedSize
from .creation import filled
from .shape import argument

#: what arithmetic on truth values means
_OF_BOOLEANS = {
    relax.op.add: relax.op.logical_or,
    relax.op.multiply: relax.op.logical_and,
    relax.op.maximum: relax.op.logical_or,
    relax.op.minimum: relax.op.logical_and,
}
#: functions of sympy and torch on sizes whose result is no size
_ON_FRACTIONS = {"IntTrueDiv": relax.op.divide, "FloatTrueDiv": relax.op.divide, "Add": relax.op.add, "Mul": relax.op.multiply}
#: (translator, node) -> Relax expression
Converter = Callable[[Any, fx.Node], relax.Expr]


def operand(translator: Any, value: Any, dtype: str) -> relax.Expr:
    """A tensor, a number, a symbolic size or a fraction of such sizes as a tensor of `dtype`."""
    if isinstance(value, (bool, int, float)):
        return relax.const(value, dtype)
    if isinstance(value, torch.SymFloat):
        value = _fraction(translator, value.node.expr)
    if tvm.ir.is_prim_expr(value):
        value = translator.emit(relax.op.reshape(translator.emit(relax.op.arange(value, value + 1, 1, "int64")), []))
    return value if str(value.ty.dtype.dtype) == dtype else translator.emit(relax.op.astype(value, dtype))


def _fraction(translator: Any, expression: Any) -> relax.Expr:
    """A number that follows from sizes, like 4 / (height // 16), as a float64 tensor of no dims, calculated in the order that torch gives. expression: of sympy."""
    if expression.is_Float or expression.is_Rational:
        return relax.const(float(expression), "float64")
    if expression.is_integer:
        return operand(translator, translator.symbols.translate(expression), "float64")
    kind, parts = type(expression).__name__, [_fraction(translator, argument) for argument in expression.args]
    if kind == "ToFloat":
        return parts[0]
    if kind not in _ON_FRACTIONS:
        raise UnsupportedSize(f"'{expression}' is known only at run time")
    return reduce(lambda left, right: translator.emit(_ON_FRACTIONS[kind](left, right)), parts)


def _metas(node: fx.Node, count: int) -> list[Any]:
    """torch's view of the first arguments: fake tensors and numbers; a symbolic size counts as an integer."""
    values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in node.args[:count]]
    return [1 if isinstance(value, torch.SymInt) else 1.0 if isinstance(value, torch.SymFloat) else value for value in values]


def binary(op: Callable[[relax.Expr, relax.Expr], relax.Expr], compares: bool = False) -> Converter:
    """add, mul, ...: computed in the result's dtype (of booleans: "or" and "and"); comparisons in the dtype that their operands promote to."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        dtype = translator._convert_data_type(torch.result_type(*_metas(node, 2))) if compares else translator.out_dtype(node)
        make = _OF_BOOLEANS.get(op, op) if dtype == "bool" else op
        dtype = "uint8" if compares and dtype == "bool" else dtype  # LLVM compares truth values as numbers only
        left, right = (operand(translator, value, dtype) for value in translator.value(node.args[:2]))
        if (alpha := argument(node, 2, "alpha", 1)) != 1:
            right = translator.emit((relax.op.logical_and if dtype == "bool" else relax.op.multiply)(right, relax.const(alpha, dtype)))
        return translator.emit(make(left, right))

    return convert


def unary(op: Callable[[relax.Expr], relax.Expr]) -> Converter:
    """sqrt, exp, ...: an integer operand is widened to the result's float dtype first."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        return translator.emit(op(operand(translator, translator.value(node.args[0]), translator.out_dtype(node))))

    return convert


def remainder(translator: Any, node: fx.Node) -> relax.Expr:
    """The remainder with the divisor's sign; of floats exact, as the remainder of a division towards zero, moved by one divisor where the signs differ."""
    dtype, emit, op = translator.out_dtype(node), translator.emit, relax.op
    left, right = (operand(translator, value, dtype) for value in translator.value(node.args[:2]))
    if not dtype.startswith(("float", "bfloat")):
        return emit(op.floor_mod(left, right))
    rest, zero = emit(op.mod(left, right)), relax.const(0, dtype)
    opposite = emit(op.not_equal(emit(op.astype(emit(op.less(rest, zero)), "uint8")), emit(op.astype(emit(op.less(right, zero)), "uint8"))))
    moves = emit(op.logical_and(emit(op.not_equal(rest, zero)), opposite))
    return emit(op.where(moves, emit(op.add(rest, right)), rest))


def fmod(translator: Any, node: fx.Node) -> relax.Expr:
    """The remainder with the dividend's sign."""
    left, right = (operand(translator, value, translator.out_dtype(node)) for value in translator.value(node.args[:2]))
    return translator.emit(relax.op.mod(left, right))


def expm1(translator: Any, x: relax.Expr, dtype: str) -> relax.Expr:
    """exp(x) - 1 as tanh(x / 2) * (exp(x) + 1), which cancels nothing near 0."""
    emit, op = translator.emit, relax.op
    half = emit(op.tanh(emit(op.multiply(x, relax.const(0.5, dtype)))))
    return emit(op.multiply(half, emit(op.add(emit(op.exp(x)), relax.const(1, dtype)))))


def log1p(translator: Any, x: relax.Expr, dtype: str) -> relax.Expr:
    """log(1 + x): the error of u = 1 + x is made good by the factor x / (u - 1) (Kahan), but where u is 1 or has no bound."""
    emit, op, one = translator.emit, relax.op, relax.const(1, dtype)
    u = emit(op.add(x, one))
    logarithm, error = emit(op.log(u)), emit(op.divide(x, emit(op.subtract(u, one))))
    corrected = emit(op.where(emit(op.isinf(u)), logarithm, emit(op.multiply(logarithm, error))))
    return emit(op.where(emit(op.equal(u, one)), x, corrected))


def _logarithm(base: float) -> Callable[[Any, relax.Expr, str], relax.Expr]:
    return lambda translator, x, dtype: translator.emit(relax.op.multiply(translator.emit(relax.op.log(x)), relax.const(1 / math.log(base), dtype)))


def composed(make: Callable[[Any, relax.Expr, str], relax.Expr]) -> Converter:
    """A function of several operators, of an operand in the result's float dtype."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        dtype = translator.out_dtype(node)
        return make(translator, operand(translator, translator.value(node.args[0]), dtype), dtype)

    return convert


def sign(translator: Any, node: fx.Node) -> relax.Expr:
    """-1, 0 or 1 (NaN for NaN); of a truth value itself."""
    x = translator.value(node.args[0])
    return x if str(x.ty.dtype.dtype) == "bool" else translator.emit(relax.op.sign(x))


def reciprocal(translator: Any, node: fx.Node) -> relax.Expr:
    dtype = translator.out_dtype(node)
    return translator.emit(relax.op.divide(relax.const(1, dtype), operand(translator, translator.value(node.args[0]), dtype)))


def of_floats(op: Callable[[relax.Expr], relax.Expr]) -> Converter:
    """isnan, isinf: no integer is."""

    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        x = translator.value(node.args[0])
        if str(x.ty.dtype.dtype).startswith(("float", "bfloat")):
            return translator.emit(op(x))
        shape, false = translator.out_shape(node), relax.const(False, "bool")
        return translator.emit(relax.op.full(shape, false, "bool")) if shape else false

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


def raised(base: relax.Expr, exponent: relax.Expr) -> relax.Expr:
    """base ** exponent of floats."""
    if not str(base.ty.dtype.dtype).startswith(("float", "bfloat")):
        raise NotImplementedError("a power of integers whose exponent is computed")
    return relax.op.power(base, exponent)


def power(translator: Any, node: fx.Node) -> relax.Expr:
    """x ** number; small exponents as products and roots, which vectorise where a call of pow does not."""
    x, exponent, dtype = translator.value(node.args[0]), node.args[1], translator.out_dtype(node)
    x = operand(translator, x, dtype)
    if exponent == 0.5:
        return translator.emit(relax.op.sqrt(x))
    if exponent == -0.5:
        return translator.emit(relax.op.rsqrt(x))
    if dtype.startswith(("int", "uint")) and isinstance(exponent, int):  # x ** exponent by squares, which wraps around as torch's does
        if exponent < 0:
            raise NotImplementedError("a negative power of integers")
        result = None
        for bit in bin(exponent)[:1:-1]:
            result = (x if result is None else translator.emit(relax.op.multiply(result, x))) if bit == "1" else result
            x = translator.emit(relax.op.multiply(x, x))
        return filled(translator, node, 1) if result is None else result
    if exponent not in (1, 2, 3, 4):
        return translator.emit(raised(x, operand(translator, translator.value(exponent), dtype)))
    square = x if exponent == 1 else translator.emit(relax.op.multiply(x, x))
    return square if exponent < 3 else translator.emit(relax.op.multiply(square, x if exponent == 3 else square))


def clamp(translator: Any, node: fx.Node) -> relax.Expr:
    """min(max(x, low), high) in the result's dtype; a bound is a number, a tensor or left out. Between numbers it is one clip, for floats."""
    low, high = translator.value(argument(node, 1, "min")), translator.value(argument(node, 2, "max"))
    dtype = translator.out_dtype(node)
    x = operand(translator, translator.value(node.args[0]), dtype)
    if dtype.startswith(("float", "bfloat")) and not any(isinstance(bound, relax.Expr) for bound in (low, high)):
        return translator.emit(relax.op.clip(x, -math.inf if low is None else low, math.inf if high is None else high))
    if low is not None:
        x = translator.emit(relax.op.maximum(x, operand(translator, low, dtype)))
    return x if high is None else translator.emit(relax.op.minimum(x, operand(translator, high, dtype)))


def where(translator: Any, node: fx.Node) -> relax.Expr:
    condition, left, right = translator.value(node.args[:3])
    dtype = translator.out_dtype(node)
    return translator.emit(relax.op.where(condition, operand(translator, left, dtype), operand(translator, right, dtype)))


def masked_fill(translator: Any, node: fx.Node) -> relax.Expr:
    x, mask, value = translator.value(node.args[:3])
    return translator.emit(relax.op.where(mask, operand(translator, value, translator.out_dtype(node)), x))


def _both(name: str, convert: Converter) -> dict[str, Converter]:
    return {f"{name}.Tensor": convert, f"{name}.Scalar": convert}


_op = relax.op
_ARITHMETIC = {"add": _op.add, "sub": _op.subtract, "mul": _op.multiply, "div": _op.divide}
_COMPARISONS = {"eq": _op.equal, "ne": _op.not_equal, "lt": _op.less, "le": _op.less_equal, "gt": _op.greater, "ge": _op.greater_equal}
_LOGIC = {"logical_and": _op.logical_and, "logical_or": _op.logical_or, "logical_xor": _op.logical_xor}
_FLOAT_FUNCTIONS = (
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "tanh",
    "sigmoid",
    "erf",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
)
_COMPOSED = {"expm1": expm1, "log1p": log1p, "log2": _logarithm(2), "log10": _logarithm(10)}


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
    **{f"{key}.default": composed(make) for key, make in _COMPOSED.items()},
    "sign.default": sign,
    "reciprocal.default": reciprocal,
    **_both("rsub", rsub),
    **_both("remainder", remainder),
    **_both("fmod", fmod),
    "atan2.default": binary(_op.atan2),
    "isnan.default": of_floats(_op.isnan),
    "isinf.default": of_floats(_op.isinf),
    "div.Tensor_mode": div_mode,
    "div.Scalar_mode": div_mode,
    "pow.Tensor_Scalar": power,
    "pow.Tensor_Tensor": binary(raised),
    "pow.Scalar": binary(raised),
    "maximum.default": binary(_op.maximum),
    "minimum.default": binary(_op.minimum),
    "clamp.default": clamp,
    "clamp.Tensor": clamp,
    "floor_divide.default": binary(_op.floor_divide),
    **{name: where for name in ("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")},
    **{name: masked_fill for name in ("masked_fill.Scalar", "masked_fill.Tensor")},
}
