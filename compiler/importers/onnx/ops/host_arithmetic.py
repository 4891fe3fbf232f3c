"""Evaluators: element-wise arithmetic on values known at import, shapes above all. Elements may be symbolic Dims or Ratios."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ..load import STORAGE, dtype_name
from ..node import Node
from ..registry import evaluator
from ..symbolic import DimArithmetic, Ratio
from ..values import Host, concrete, host

#: results with more elements than this are left to the generated code, unless an input is as large
FOLD_LIMIT = 1 << 16

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Max": np.maximum,
    "Min": np.minimum,
}
_COMPARISON = {"Equal": "==", "Less": "<", "LessOrEqual": "<=", "Greater": ">", "GreaterOrEqual": ">="}
_LOGIC = {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}


def fits(node: Node, size: int) -> bool:
    """Whether a result of `size` elements may be computed at import."""
    largest = max((value.array.size for value in node.inputs if isinstance(value, Host)), default=0)
    return size <= max(FOLD_LIMIT, largest)


@evaluator("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", *_COMPARISON, *_LOGIC, since=7)
def binary(node: Node) -> Host | None:
    values = [node.host(index) for index in range(len(node.inputs))]
    if not fits(node, math.prod(np.broadcast_shapes(*(value.array.shape for value in values)))):
        return None
    dtype = "bool" if node.op in _COMPARISON or node.op in _LOGIC else values[0].dtype
    if any(value.symbolic for value in values):
        result = values[0]
        for other in values[1:]:
            folded = _symbolic(node, result.array, other.array, dtype)
            if folded is None:
                return None
            result = folded
        return result
    return _concrete(node, [value.array for value in values], dtype)


def _concrete(node: Node, arrays: list[np.ndarray], dtype: str) -> Host | None:
    if node.op in _LOGIC:
        return concrete(_LOGIC[node.op](*arrays), dtype)
    if node.op in _COMPARISON:
        return concrete(
            {"==": np.equal, "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}[_COMPARISON[node.op]](*arrays), dtype
        )
    if node.op in ("Div", "Mod"):
        integer = arrays[0].dtype.kind in "iu"
        if integer and not np.all(arrays[1]):
            return None  # a division by zero is the program's to report, at run time
        if node.op == "Mod":
            return concrete((np.fmod if node.attr("fmod", 0) else np.mod)(*arrays), dtype)
        if integer:
            return concrete(np.sign(arrays[0]) * np.sign(arrays[1]) * (np.abs(arrays[0]) // np.abs(arrays[1])), dtype)
        with np.errstate(all="ignore"):
            return concrete(np.divide(*arrays), dtype)
    result = arrays[0]
    with np.errstate(all="ignore"):
        for other in arrays[1:]:
            result = _ARITHMETIC[node.op](result, other)
    return concrete(result, dtype)


def _symbolic(node: Node, left: np.ndarray, right: np.ndarray, dtype: str) -> Host | None:
    shape = np.broadcast_shapes(left.shape, right.shape)
    pairs = zip(np.broadcast_to(left, shape).reshape(-1).tolist(), np.broadcast_to(right, shape).reshape(-1).tolist(), strict=True)
    return _collect([_combine(node, a, b) for a, b in pairs], shape, dtype)


def _collect(items: list[Any], shape: tuple[int, ...], dtype: str) -> Host | None:
    if any(item is None for item in items):
        return None
    result = np.empty(len(items), object)
    result[:] = items
    return host(result.reshape(shape), dtype)


def _combine(node: Node, left: Any, right: Any) -> Any:
    """One element; None when it cannot be told at import."""
    dims = node.dims
    if isinstance(left, (float, Ratio)) or isinstance(right, (float, Ratio)):
        return _combine_ratio(node.op, dims, left, right)
    if node.op in _COMPARISON:
        return dims.compare(_COMPARISON[node.op], left, right)
    if node.op in ("Add", "Sub", "Mul"):
        return dims.simplify(_ARITHMETIC[node.op](left, right))
    if node.op in ("Max", "Min"):
        return (dims.maximum if node.op == "Max" else dims.minimum)(left, right)
    if node.op in ("Div", "Mod") and dims.non_negative(left) and dims.compare(">", right, 0):
        quotient = dims.floor_divide(left, right)
        return quotient if node.op == "Div" else dims.simplify(left - quotient * right)
    return None


def _combine_ratio(op: str, dims: DimArithmetic, left: Any, right: Any) -> Any:
    if op not in ("Mul", "Div"):
        return None
    (a, b), (c, d) = _fraction(left), _fraction(right)
    if op == "Div":
        c, d = d, c
    return Ratio(dims.simplify(a * c), dims.simplify(b * d))


def _fraction(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Ratio):
        return value.numerator, value.denominator
    return value.as_integer_ratio() if isinstance(value, float) else (value, 1)


@evaluator("Where")
def where(node: Node) -> Host | None:
    condition, left, right = (node.host(index) for index in range(3))
    shape = np.broadcast_shapes(condition.array.shape, left.array.shape, right.array.shape)
    if condition.symbolic or not fits(node, math.prod(shape)):
        return None
    return host(np.where(condition.array.astype(bool), left.array, right.array), left.dtype)


@evaluator("Cast", since=6)
def cast(node: Node) -> Host | None:
    if node.attr("to") in STORAGE:
        return None
    value, dtype = node.host(0), dtype_name(node.attr("to"))
    if value.dtype == dtype:
        return value
    if not value.symbolic:
        with np.errstate(all="ignore"):
            return concrete(value.array, dtype)
    if dtype == "bool":
        return None
    if "float" in dtype:
        return _collect([item if isinstance(item, Ratio) else Ratio(item, 1) for item in value.array.reshape(-1).tolist()], value.array.shape, dtype)
    return _collect([_whole(node.dims, item) for item in value.array.reshape(-1).tolist()], value.array.shape, dtype)


def _whole(dims: DimArithmetic, item: Any) -> Any:
    return dims.floor_divide(item.numerator, item.denominator) if isinstance(item, Ratio) else int(item) if isinstance(item, float) else item


@evaluator("Floor", "Ceil")
def round_down_or_up(node: Node) -> Host | None:
    value = node.host(0)
    if not value.symbolic:
        return concrete((np.floor if node.op == "Floor" else np.ceil)(value.array), value.dtype)
    divide = node.dims.floor_divide if node.op == "Floor" else node.dims.ceil_divide
    items = [Ratio(divide(*_fraction(item)), 1) for item in value.array.reshape(-1).tolist()]
    return _collect(items, value.array.shape, value.dtype)


@evaluator("Neg", "Sqrt", "Not", "Abs", "Reciprocal", "Exp", "Log")
def unary(node: Node) -> Host | None:
    value = node.host(0)
    if value.symbolic:
        return (
            None
            if node.op != "Neg"
            else _collect([node.dims.simplify(0 - item) for item in value.array.reshape(-1).tolist()], value.array.shape, value.dtype)
        )
    functions = {"Neg": np.negative, "Sqrt": np.sqrt, "Not": np.logical_not, "Abs": np.abs, "Reciprocal": np.reciprocal, "Exp": np.exp, "Log": np.log}
    with np.errstate(all="ignore"):
        return concrete(functions[node.op](value.array), value.dtype)


@evaluator("Pow", since=7)
def power(node: Node) -> Host | None:
    base, exponent = node.host(0), node.host(1)
    if base.symbolic or exponent.symbolic or base.array.dtype.kind != "f":
        return None
    with np.errstate(all="ignore"):
        return concrete(np.power(base.array, exponent.array.astype(base.array.dtype)), base.dtype)


@evaluator("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def reduce_sizes(node: Node) -> Host | None:
    """Of a vector of sizes: the product and the like of all its elements."""
    value = node.host(0)
    if value.array.ndim != 1 or not fits(node, value.array.size) or "float" in value.dtype or value.array.size == 0:
        return None
    if node.has(1) and not node.ints(1) and node.attr("noop_with_empty_axes", 0):
        return value
    operator_of = {"ReduceProd": "Mul", "ReduceSum": "Add", "ReduceMax": "Max", "ReduceMin": "Min"}[node.op]
    dims, items = node.dims, value.array.tolist()
    result = items[0]
    for item in items[1:]:
        if operator_of in ("Mul", "Add"):
            result = dims.simplify(_ARITHMETIC[operator_of](result, item))
        else:
            result = (dims.maximum if operator_of == "Max" else dims.minimum)(result, item)
    return _collect([result], (1,) if node.attr("keepdims", 1) else (), value.dtype)
