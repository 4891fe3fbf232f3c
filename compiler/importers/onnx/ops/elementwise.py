"""Element-wise operators: arithmetic, comparison, logic, activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Refusal

_UNARY = {
    "Abs": relax.op.abs, "Acos": relax.op.acos, "Acosh": relax.op.acosh, "Asin": relax.op.asin, "Asinh": relax.op.asinh, "Atan": relax.op.atan,
    "Atanh": relax.op.atanh, "Ceil": relax.op.ceil, "Cos": relax.op.cos, "Cosh": relax.op.cosh, "Exp": relax.op.exp,
    "Floor": relax.op.floor, "IsNaN": relax.op.isnan, "Log": relax.op.log, "Neg": relax.op.negative, "Not": relax.op.logical_not,
    "Relu": relax.op.nn.relu, "Round": relax.op.round, "Sigmoid": relax.op.sigmoid, "Sin": relax.op.sin,
    "Sinh": relax.op.sinh, "Softplus": lambda x: relax.op.nn.softplus(x), "Sqrt": relax.op.sqrt, "Tan": relax.op.tan, "Tanh": relax.op.tanh,
    "BitwiseNot": relax.op.bitwise_not,
}  # fmt: skip

_BINARY = {
    "Add": relax.op.add, "Sub": relax.op.subtract, "Mul": relax.op.multiply, "Greater": relax.op.greater,
    "GreaterOrEqual": relax.op.greater_equal, "Less": relax.op.less, "LessOrEqual": relax.op.less_equal, "And": relax.op.logical_and,
    "Or": relax.op.logical_or, "Xor": relax.op.logical_xor, "BitwiseAnd": relax.op.bitwise_and, "BitwiseOr": relax.op.bitwise_or,
    "BitwiseXor": relax.op.bitwise_xor,
}  # fmt: skip


def _register_unary(operator: str, make: Callable[[relax.Expr], relax.Expr]) -> None:
    converter(operator)(lambda node: make(node.tensor(0)))


def _register_binary(operator: str, make: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> None:
    converter(operator, since=7)(lambda node: make(*node.align(node.tensor(0), node.tensor(1))))


for _operator, _make in _UNARY.items():
    _register_unary(_operator, _make)
for _operator, _make in _BINARY.items():
    _register_binary(_operator, _make)


@converter("Equal", since=7)
def equal(node: Node) -> relax.Expr:
    """A value compared with itself, which is how some exporters look for NaN, would be simplified away."""
    left, right = node.tensor(0), node.tensor(1)
    if left.same_as(right) and "float" in node.dtype(left):
        return relax.op.logical_not(node.emit(relax.op.isnan(left)))
    return relax.op.equal(*node.align(left, right))


@converter("Erf")
def error_function(node: Node) -> relax.Expr:
    return relax.op.erf(_single(node, node.tensor(0)))


def _single(node: Node, value: relax.Expr) -> relax.Expr:
    if node.dtype(value) == "float64":
        raise Refusal("there is no error function of float64")
    return value


@converter("Sign")
def sign(node: Node) -> relax.Expr:
    """The sign of NaN is NaN."""
    value = node.tensor(0)
    result = relax.op.sign(value)
    return relax.op.where(node.emit(relax.op.isnan(value)), value, node.emit(result)) if "float" in node.dtype(value) else result


@converter("Div", since=7)
def divide(node: Node) -> relax.Expr:
    """Integers are divided towards zero."""
    left, right = node.align(node.tensor(0), node.tensor(1))
    dtype = node.dtype(left)
    if "int" not in dtype:
        return relax.op.divide(left, right)
    quotient = relax.op.floor_divide(left, right)
    if dtype.startswith("uint"):
        return quotient
    up = node.emit(relax.op.astype(_rounded_down(node, left, right, node.emit(relax.op.floor_mod(left, right))), dtype))
    return relax.op.add(node.emit(quotient), up)


def _rounded_down(node: Node, left: relax.Expr, right: relax.Expr, remainder: relax.Expr) -> relax.Expr:
    """Whether the quotient of signed integers rounded down is less than the one rounded towards zero."""
    zero = node.scalar(0, node.dtype(left))
    opposite = node.emit(relax.op.less(node.emit(relax.op.bitwise_xor(left, right)), zero))
    return node.emit(relax.op.logical_and(opposite, node.emit(relax.op.not_equal(remainder, zero))))


@converter("Mod", since=10)
def modulo(node: Node) -> relax.Expr:
    """fmod=0: the sign of the divisor; fmod=1: the sign of the dividend."""
    left, right = node.align(node.tensor(0), node.tensor(1))
    dtype = node.dtype(left)
    if "float" in dtype:
        remainder = relax.op.mod(left, right)  # exact, with the sign of the dividend
        return remainder if node.attr("fmod", 0) else _to_sign_of(node, node.emit(remainder), right)
    remainder = relax.op.floor_mod(left, right)
    if not node.attr("fmod", 0) or dtype.startswith("uint"):
        return remainder
    bound = node.emit(remainder)
    return relax.op.where(_rounded_down(node, left, right, bound), node.emit(relax.op.subtract(bound, right)), bound)


def _to_sign_of(node: Node, remainder: relax.Expr, divisor: relax.Expr) -> relax.Expr:
    """The remainder that has the divisor's sign; zeros have it too."""
    dtype = node.dtype(remainder)
    zero = node.scalar(0, dtype)
    below, moved = node.emit(relax.op.less(divisor, zero)), node.emit(relax.op.add(remainder, divisor))
    signs = node.emit(relax.op.multiply(node.emit(relax.op.sign(remainder)), node.emit(relax.op.sign(divisor))))
    nonzero = node.emit(relax.op.where(node.emit(relax.op.less(signs, zero)), moved, remainder))
    signed = node.emit(relax.op.where(below, node.scalar(-0.0, dtype), zero))
    return relax.op.where(node.emit(relax.op.equal(remainder, zero)), signed, nonzero)


@converter("Pow", since=7)
def power(node: Node) -> relax.Expr:
    """Small constant exponents become products and roots, which are exact and vectorise."""
    base, exponent = node.tensor(0), node.maybe_host(1)
    dtype = node.dtype(base)
    if exponent is not None and not exponent.symbolic and exponent.array.size == 1 and exponent.array.ndim <= node.rank(base):
        value = float(exponent.array.reshape(()))
        if value == 1:
            return base
        if value == 2:
            return relax.op.multiply(base, base)
        if value == 3:
            return relax.op.multiply(node.emit(relax.op.multiply(base, base)), base)
        if value == 0.5 and "float" in dtype:
            return relax.op.sqrt(base)
    right = node.tensor(1)
    if "int" not in dtype:
        right = right if node.dtype(right) == dtype else node.emit(relax.op.astype(right, dtype))
        return relax.op.power(*node.align(base, right))
    wide = [node.emit(relax.op.astype(value, "float64")) for value in node.align(base, right)]
    return relax.op.astype(node.emit(relax.op.power(*wide)), dtype)


@converter("Max", "Min", "Sum", "Mean")
def variadic(node: Node) -> relax.Expr:
    make = {"Max": relax.op.maximum, "Min": relax.op.minimum}.get(node.op, relax.op.add)
    total = reduce(lambda left, right: node.emit(make(*node.align(left, right))), node.tensors())
    return relax.op.divide(total, node.scalar(len(node.inputs), node.dtype(total))) if node.op == "Mean" else total


@converter("BitShift", since=11)
def bit_shift(node: Node) -> relax.Expr:
    left = node.attr("direction") == "LEFT"
    make = relax.op.left_shift if left else relax.op.right_shift
    value, amount = node.align(node.tensor(0), node.tensor(1))
    dtype = node.dtype(value)
    bits = int(dtype.lstrip("uint"))
    known = node.maybe_host(1)
    if known is not None and not known.symbolic and known.array.size and 0 <= known.array.min() and known.array.max() < bits:
        return make(value, amount)
    # machines take the amount modulo some power of two: what is out of range leaves the fill alone
    low, high = node.scalar(0, dtype), node.scalar(bits - 1, dtype)
    outside = node.emit(relax.op.greater(amount, high))
    if dtype.startswith("int"):
        outside = node.emit(relax.op.logical_or(outside, node.emit(relax.op.less(amount, low))))
        if not left:
            return make(value, node.emit(relax.op.where(outside, high, amount)))
    inside = node.emit(make(value, node.emit(relax.op.where(outside, low, amount))))
    return relax.op.where(outside, low, inside)


@converter("IsInf", since=10)
def is_infinite(node: Node) -> relax.Expr:
    value = node.tensor(0)
    if node.attr("detect_negative", 1) and node.attr("detect_positive", 1):
        return relax.op.isinf(value)
    if not node.attr("detect_negative", 1) and not node.attr("detect_positive", 1):
        return relax.op.full_like(value, node.scalar(False, "bool"), "bool")
    return relax.op.equal(value, node.scalar(math.inf if node.attr("detect_positive", 1) else -math.inf, node.dtype(value)))


@converter("Where", since=9)
def where(node: Node) -> relax.Expr:
    return relax.op.where(*node.align(node.tensor(0), node.tensor(1), node.tensor(2)))


@converter("Clip", since=11)
def clip(node: Node) -> relax.Expr:
    bounds = [node.inputs[index] if node.has(index) else None for index in (1, 2)]
    value = node.tensor(0)
    hosts = [node.maybe_host(index) for index in (1, 2)]
    if any(bound is not None and (host is None or host.symbolic) for bound, host in zip(bounds, hosts, strict=True)):
        if bounds[0] is not None:
            value = node.emit(relax.op.maximum(value, node.tensor(1)))
        return relax.op.minimum(value, node.tensor(2)) if bounds[1] is not None else value
    return _clip(node, value, *(None if host is None else host.array.reshape(()).item() for host in hosts))


@converter("Clip")
def clip_attributes(node: Node) -> relax.Expr:
    return _clip(node, node.tensor(0), node.attr("min"), node.attr("max"))


def _clip(node: Node, value: relax.Expr, low: float | None, high: float | None) -> relax.Expr:
    dtype = node.dtype(value)
    low, high = (None if low == -math.inf else low), (None if high == math.inf else high)
    if low is None and high is None:
        return value
    if low == 0 and high is None and "float" in dtype:
        return relax.op.nn.relu(value)
    if low is None or high is None:
        make, bound = (relax.op.minimum, high) if low is None else (relax.op.maximum, low)
        return make(value, node.scalar(bound, dtype))
    return relax.op.clip(value, min(low, high), high)  # the upper bound wins where they cross


@converter("Reciprocal")
def reciprocal(node: Node) -> relax.Expr:
    value = node.tensor(0)
    return relax.op.divide(node.scalar(1, node.dtype(value)), value)


@converter("HardSigmoid")
def hard_sigmoid(node: Node) -> relax.Expr:
    """clip(alpha * x + beta, 0, 1)"""
    return _hard_sigmoid(node, node.tensor(0), node.attr("alpha"), node.attr("beta"))


@converter("HardSwish", since=14)
def hard_swish(node: Node) -> relax.Expr:
    """x * clip(x / 6 + 0.5, 0, 1)"""
    value = node.tensor(0)
    return relax.op.multiply(value, node.emit(_hard_sigmoid(node, value, 1 / 6, 0.5)))


def _hard_sigmoid(node: Node, value: relax.Expr, alpha: float, beta: float) -> relax.Expr:
    dtype = node.dtype(value)
    scaled = node.emit(relax.op.multiply(value, node.scalar(alpha, dtype)))
    return relax.op.clip(node.emit(relax.op.add(scaled, node.scalar(beta, dtype))), 0.0, 1.0)


@converter("LeakyRelu")
def leaky_relu(node: Node) -> relax.Expr:
    return relax.op.nn.leakyrelu(node.tensor(0), node.attr("alpha"))


@converter("Elu", "Celu", "Selu", "ThresholdedRelu", "Shrink")
def piecewise(node: Node) -> relax.Expr:
    """Activations that choose between two formulas by the sign or size of x."""
    x = node.tensor(0)
    dtype = node.dtype(x)

    def number(value: float) -> relax.Expr:
        return node.scalar(value, dtype)

    if node.op == "ThresholdedRelu":
        return relax.op.where(node.emit(relax.op.greater(x, number(node.attr("alpha")))), x, number(0))
    if node.op == "Shrink":
        bias, lambd = node.attr("bias"), node.attr("lambd")
        low = node.emit(relax.op.where(node.emit(relax.op.less(x, number(-lambd))), node.emit(relax.op.add(x, number(bias))), number(0)))
        return relax.op.where(node.emit(relax.op.greater(x, number(lambd))), node.emit(relax.op.subtract(x, number(bias))), low)
    alpha = node.attr("alpha")
    inner = node.emit(relax.op.divide(x, number(alpha))) if node.op == "Celu" else x
    grown = node.emit(relax.op.subtract(node.emit(relax.op.exp(inner)), number(1)))
    bent = node.emit(relax.op.where(node.emit(relax.op.greater(x, number(0))), x, node.emit(relax.op.multiply(grown, number(alpha)))))
    return relax.op.multiply(bent, number(node.attr("gamma"))) if node.op == "Selu" else bent


@converter("PRelu", since=7)
def prelu(node: Node) -> relax.Expr:
    x, slope = node.align(node.tensor(0), node.tensor(1))
    negative = node.emit(relax.op.less(x, node.scalar(0, node.dtype(x))))
    return relax.op.where(negative, node.emit(relax.op.multiply(x, slope)), x)


@converter("Gelu", since=20)
@converter("Gelu", domain="com.microsoft")
def gelu(node: Node) -> relax.Expr:
    return relax.op.nn.gelu_tanh(node.tensor(0)) if node.attr("approximate", "none") == "tanh" else relax.op.nn.gelu(_single(node, node.tensor(0)))


@converter("Softsign")
def softsign(node: Node) -> relax.Expr:
    x = node.tensor(0)
    return relax.op.divide(x, node.emit(relax.op.add(node.emit(relax.op.abs(x)), node.scalar(1, node.dtype(x)))))


@converter("Swish", since=24)
@converter("QuickGelu", domain="com.microsoft")
def swish(node: Node) -> relax.Expr:
    """x * sigmoid(alpha * x)"""
    x, alpha = node.tensor(0), node.attr("alpha", 1.702)
    scaled = x if alpha == 1 else node.emit(relax.op.multiply(x, node.scalar(alpha, node.dtype(x))))
    return relax.op.multiply(x, node.emit(relax.op.sigmoid(scaled)))


@converter("Mish", since=18)
def mish(node: Node) -> relax.Expr:
    return relax.op.multiply(node.tensor(0), node.emit(relax.op.tanh(node.emit(relax.op.nn.softplus(node.tensor(0))))))


@converter("Dropout", since=7)
def dropout(node: Node) -> tuple[relax.Expr, ...]:
    """The identity: programs are compiled for inference, or drop nothing."""
    training, ratio = node.maybe_host(2), node.maybe_host(1)
    nothing = node.opset >= 12 and ratio is not None and not np.any(ratio.array)
    if node.has(2) and not nothing and (training is None or bool(np.any(training.array))):
        raise Refusal("training mode draws random numbers, which is not supported")
    value = node.tensor(0)
    kept = any(node.proto.output[1:])
    dtype = "bool" if node.opset >= 10 else node.dtype(value)
    return (value, node.emit(relax.op.full_like(value, node.scalar(True, dtype), dtype))) if kept else (value,)
