"""Element-wise operators: functions of one number become tables, constants by channel go into the weights before them, sums of two streams a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .graph import Refused, Walk, linear, per_channel, rule
from .nodes import Function, Node, View, affine, applied, clamp, in_order

_erf = np.vectorize(math.erf, otypes=[np.float64])
_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nn.gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "nn.gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "nn.silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "erf": _erf,
    "exp": np.exp,
    "abs": np.abs,
    "negative": np.negative,
    "square": np.square,
    "sin": np.sin,
    "cos": np.cos,
    "floor": np.floor,
    "ceil": np.ceil,
}
_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "power": np.power,
}


def _one(value: Any) -> View:
    if not isinstance(value, View):
        raise Refused("its operand must depend on the input")
    return value


@rule(*_UNARY)
def _unary(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    return _one(operands[0]).mapped(Function(_UNARY[call.op.name.removeprefix("relax.")]))


@rule("nn.relu")
def _relu(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    return _one(operands[0]).mapped(clamp(0.0, np.inf))


@rule("clip")
def _clip_rule(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    bounds = [_number(arg, operand) for arg, operand in zip(call.args[1:], operands[1:], strict=True)]
    return _one(operands[0]).mapped(clamp(*bounds))


def _number(arg: Any, operand: Any) -> float:
    if isinstance(operand, np.ndarray) and operand.size == 1:
        return float(operand.ravel()[0])
    value = arg.value
    return float(value.value if hasattr(value, "value") else value)


@rule("nn.dropout", "stop_lift_params")
def _identity(walk: Walk, call: Any, operands: list[Any], source: str) -> Any:
    return (operands[0], None) if call.op.name.endswith("dropout") else operands[0]


@rule("nn.batch_norm")
def _batch_norm(walk: Walk, call: Any, operands: list[Any], source: str) -> Any:
    attrs, view = call.attrs, _one(operands[0])
    if not all(isinstance(operand, np.ndarray) for operand in operands[1:5]):
        raise Refused("batch norm with computed statistics")
    gamma, beta, mean, variance = (operand.astype(np.float64) for operand in operands[1:5])
    scale = (gamma if attrs.scale else 1.0) / np.sqrt(variance + float(attrs.epsilon))
    shift = (beta if attrs.center else 0.0) - mean * scale
    shape = [1] * len(view.shape)
    shape[int(attrs.axis)] = -1
    result = _by_channel(_by_channel(view, scale.reshape(shape), np.multiply, source), shift.reshape(shape), np.add, source)
    return (result, None, None)


@rule(*_BINARY)
def _binary(walk: Walk, call: Any, operands: list[Any], source: str) -> View:
    name = call.op.name.removeprefix("relax.")
    operation = _BINARY[name]
    a, b = operands
    shape = [int(dim) for dim in call.ty.shape]
    if isinstance(a, View) and isinstance(b, View):
        return _two(a, b, name, operation, shape, source)
    view, constant = (a, b) if isinstance(a, View) else (b, a)
    if not isinstance(view, View) or not isinstance(constant, np.ndarray):
        raise Refused("its operands must depend on the input")
    if list(view.shape) != shape:
        view = view.rearranged(lambda x: np.broadcast_to(x, shape))
    constant = constant.astype(np.float64)
    if constant.size and (constant == constant.flat[0]).all():
        return view.mapped(_with_scalar(name, operation, float(constant.flat[0]), view_first=view is a))
    if name not in ("add", "subtract", "multiply", "divide") or (name in ("subtract", "divide") and view is b):
        raise Refused(f"{name} with a constant tensor {list(constant.shape)}; FPGA stages take single numbers there")
    if name == "subtract":
        operation, constant = np.add, -constant
    if name == "divide":
        operation, constant = np.multiply, 1 / constant
    return _by_channel(view, constant, operation, source)


def _with_scalar(name: str, operation: Callable[..., np.ndarray], c: float, view_first: bool) -> Function:
    if name in ("add", "subtract") and (view_first or name == "add"):
        return affine(1.0, c if name == "add" else -c)
    if name == "multiply" and c > 0:
        return affine(c, 0.0)
    if name == "divide" and c > 0 and view_first:
        return affine(1 / c, 0.0)
    if name in ("maximum", "minimum"):
        return clamp(c, np.inf) if name == "maximum" else clamp(-np.inf, c)
    return Function(lambda x: operation(x, c) if view_first else operation(c, x))


def _by_channel(view: View, constant: np.ndarray, operation: Callable[..., np.ndarray], source: str) -> View:
    """A constant by channel added to, or multiplied with, the result of a matrix or convolution: part of its weights."""
    by_channel = per_channel(constant, view)
    if by_channel is None:
        raise Refused(f"a constant tensor {list(constant.shape)} that is not one number per channel of the product before it")
    params = view.node.params
    weights, bias = params["weights"], params["bias"]
    if operation is np.add:
        node = linear(view.node.inputs[0], weights, bias + by_channel, params["rows"], view.node.source, params["exact"])
    else:
        exact = params["exact"]
        if exact is not None:
            exact = (exact[0], exact[1] * by_channel) if (by_channel > 0).all() else None
        node = linear(view.node.inputs[0], weights * by_channel[:, None], bias * by_channel, params["rows"], view.node.source, exact)
    return View(node, view.index)


def _two(a: View, b: View, name: str, operation: Callable[..., np.ndarray], shape: list[int], source: str) -> View:
    if a.same_elements(b):  # x * sigmoid(x) and the like: a function of x
        f, g = a.functions, b.functions
        return View(a.node, a.index, (Function(lambda x: operation(applied(f, x), applied(g, x))),))
    if name not in ("add", "subtract"):
        raise Refused(f"{name} of two tensors; FPGA stages add them, or multiply matrices")
    if name == "subtract":
        b = b.mapped(Function(np.negative))
    if list(a.shape) != shape or a.index.size != a.node.size:
        a, b = b, a
    if list(a.shape) != shape or a.index.size != a.node.size:
        raise Refused("a sum in which both operands are broadcast or cut")
    first = a.settled()
    order = np.empty(first.size, np.int64)
    order[a.index.ravel()] = np.broadcast_to(b.index, shape).ravel()
    second = in_order(View(b.settled(), order))
    node = Node("add", [first, second], first.size, lambda x, y: x + y, source)
    return View(node, a.index)
