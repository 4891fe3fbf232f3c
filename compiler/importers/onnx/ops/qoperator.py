"""Operators that read and write 8-bit codes: QLinearConv and QLinearMatMul of the standard, and ONNX Runtime's (domain com.microsoft).

Products are exact in int32; their sums, and the values that other operators compute in float32, become codes as in ONNX Runtime: round(value / scale), ties to even,
plus the zero point, saturated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....tvm import relax
from ..compose import apply, contributed, given
from ..node import Node
from ..registry import converter
from ..values import Host, Refusal, Value
from .integer_products import WINDOW, Codes, codes, convolution, matrix_product

_BOUNDS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


@converter("QLinearMatMul", since=10)
def qlinear_matmul(node: Node) -> relax.Expr:
    """a, its scale and zero point, b and its, scale and zero point of y; vectors of scales lie along the rows of a, the columns of b."""
    a, b = codes(node, 0, 2), codes(node, 3, 5)
    total = matrix_product(node, a, b)
    ranks = [node.rank(node.to_tensor(operand.value)) for operand in (a, b)]
    left = parameter(node, 1, -2 if min(ranks) > 1 else None, node.rank(total))
    right = parameter(node, 4, -1, node.rank(total))
    return _requantized(node, total, [left, right], 6, 7)


@converter("QLinearConv", since=10)
@contributed("QLinearConv", attributes="auto_pad channels_last dilations group kernel_shape pads strides")
def qlinear_conv(node: Node) -> relax.Expr:
    """x [N, C, *spatial], channels last with channels_last=1, w [O, C / groups, *kernel]; scale and zero point of w are scalars or one per output channel."""
    x, w, last = codes(node, 0, 2), codes(node, 3, 5), bool(node.attr("channels_last", 0))
    rank = node.rank(node.to_tensor(x.value))
    if last:
        x = Codes(node.emit(relax.op.permute_dims(node.to_tensor(x.value), channels_first(rank))), x.zero)
    total = convolution(node, x, w, **given(node, *WINDOW))
    if node.has(8):
        total = node.emit(relax.op.add(total, node.per_channel(8, rank)))
    result = _requantized(node, total, [parameter(node, 1, None, rank), parameter(node, 4, 1, rank)], 6, 7)
    return relax.op.permute_dims(node.emit(result), channels_last(rank)) if last else result


@contributed("QGemm", attributes="alpha transA transB")
def qgemm(node: Node) -> relax.Expr:
    """alpha * sa * sb * (op(A) @ op(B) + C) as codes, or in float32 where y has no scale. C: int32 codes of scale alpha * sa * sb."""
    sides = []
    for index, name in ((0, "transA"), (3, "transB")):
        operand = codes(node, index, index + 2)
        sides.append(
            Codes(apply(node, "Transpose", operand.value, perm=[1, 0]) if operand.array() is None else _transposed(operand), operand.zero)
            if node.attr(name, 0)
            else operand
        )
    total = matrix_product(node, *sides)
    if node.has(6):
        total = node.emit(relax.op.add(*node.align(total, node.tensor(6))))
    scales = [parameter(node, 1, -2, 2), parameter(node, 4, -1, 2)]
    if node.attr("alpha", 1.0) != 1:
        scales.append(node.scalar(node.attr("alpha"), "float32"))
    return _requantized(node, total, scales, 7, 8) if node.has(7) else _scaled(node, total, scales)


@contributed("MatMulIntegerToFloat")
def matmul_integer_to_float(node: Node) -> relax.Expr:
    """sa * sb * ((A - a_zero) @ (B - b_zero)) + bias; a_scale is a scalar, b_scale and b_zero scalars or one per column."""
    total = matrix_product(node, codes(node, 0, 4), codes(node, 1, 5))
    rank = node.rank(total)
    return _plus(node, _scaled(node, total, [parameter(node, 2, None, rank), parameter(node, 3, -1, rank)]), 6)


@contributed("DynamicQuantizeMatMul")
def dynamic_quantize_matmul(node: Node) -> relax.Expr:
    """A, quantized over its range, times B (codes with scale and zero point, scalars or one per column), plus a bias."""
    a, scale, zero = dynamically_quantized(node, node.tensor(0))
    total = matrix_product(node, Codes(a, zero), codes(node, 1, 3))
    scale = node.reshape(scale, [1])
    return _plus(node, _scaled(node, total, [scale, parameter(node, 2, -1, node.rank(total))]), 4)


def dynamically_quantized(node: Node, x: relax.Expr) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
    """u8 codes of x over its range widened to contain 0, their scale and zero point, as DynamicQuantizeLinear makes them."""
    from .quantization import dynamic_quantize_linear

    inner = Node(node.proto, node.opset, [x], node.builder, node.dims, node.subgraph)
    a, scale, zero = (node.emit(value) for value in dynamic_quantize_linear(inner))
    return a, scale, zero


@contributed("QLinearAdd", "QLinearMul")
def qlinear_binary(node: Node) -> relax.Expr:
    left, right = _values(node, 0), _values(node, 3)
    return _coded(node, apply(node, node.op.removeprefix("QLinear"), left, right), 6)


@contributed("QLinearSigmoid", "QLinearLeakyRelu", attributes="alpha")
def qlinear_unary(node: Node) -> relax.Expr:
    attributes = {"alpha": node.attr("alpha", 0.01)} if node.op == "QLinearLeakyRelu" else {}
    return _coded(node, apply(node, node.op.removeprefix("QLinear"), _values(node, 0), **attributes), 3)


@contributed("QLinearSoftmax", attributes="axis opset")
def qlinear_softmax(node: Node) -> relax.Expr:
    """`opset` says which Softmax is meant: before 13 it runs over all axes from `axis` on."""
    x, opset = _values(node, 0), node.attr("opset")
    if opset is None:
        raise Refusal("attribute 'opset' is missing")
    axis = node.axis(node.attr("axis", -1), node.rank(x))
    if opset >= 13:
        return _coded(node, apply(node, "Softmax", x, axis=axis), 3)
    shape = node.shape(x)
    flat = node.reshape(x, [node.dims.product(shape[:axis]), node.dims.product(shape[axis:])])
    return _coded(node, node.reshape(apply(node, "Softmax", flat, axis=1), shape), 3)


@contributed(
    "QLinearAveragePool", "QLinearGlobalAveragePool", attributes="auto_pad ceil_mode channels_last count_include_pad kernel_shape pads strides"
)
def qlinear_pool(node: Node) -> relax.Expr:
    x, last = _values(node, 0), bool(node.attr("channels_last", 0))
    rank = node.rank(x)
    x = node.emit(relax.op.permute_dims(x, channels_first(rank))) if last else x
    attributes = given(node, "auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
    result = apply(node, node.op.removeprefix("QLinear"), x, **(attributes if node.op == "QLinearAveragePool" else {}))
    return _coded(node, node.emit(relax.op.permute_dims(result, channels_last(rank))) if last else result, 3)


@contributed("QLinearReduceMean", attributes="axes keepdims")
def qlinear_reduce_mean(node: Node) -> relax.Expr:
    x = _values(node, 0)
    axes = node.attr("axes") or list(range(node.rank(x)))
    mean = node.emit(relax.op.mean(x, [node.axis(axis, node.rank(x)) for axis in axes], keepdims=bool(node.attr("keepdims", 1))))
    return _coded(node, mean, 3)


@contributed("QLinearWhere")
def qlinear_where(node: Node) -> relax.Expr:
    return _coded(node, apply(node, "Where", node.value(0), _values(node, 1), _values(node, 4)), 7)


@contributed("QLinearConcat", attributes="axis")
def qlinear_concat(node: Node) -> relax.Expr:
    """Scale and zero point of y, then a tensor, its scale and zero point for each part."""
    parts = [_values(node, index) for index in range(2, len(node.inputs), 3)]
    if not parts or node.attr("axis") is None:
        raise Refusal("attribute 'axis' or all parts are missing")
    return _coded(node, apply(node, "Concat", *parts, axis=node.attr("axis")), 0)


def channels_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


def parameter(node: Node, index: int, axis: int | None, rank: int) -> relax.Expr:
    """A scale in float32, as it broadcasts over a tensor of `rank`; a vector lies along `axis` (None: there can be only one scale)."""
    return _along(node, index, axis, rank, "float32")


def _along(node: Node, index: int, axis: int | None, rank: int, dtype: str) -> relax.Expr:
    value = node.tensor(index)
    value = value if node.dtype(value) == dtype else node.emit(relax.op.astype(value, dtype))
    shape = node.shape(value)
    if all(isinstance(size, int) and size == 1 for size in shape):
        return node.reshape(value, [1] if rank else [])
    if axis is None or len(shape) > 1 and len(shape) != rank:
        raise Refusal(f"input {index} ('{node.proto.input[index]}') of shape {shape}, where one for all elements is supported")
    place = rank + axis if axis < 0 else axis
    return value if len(shape) > 1 else node.reshape(value, [shape[0] if position == place else 1 for position in range(rank)])


def _transposed(operand: Codes) -> Value:
    array = operand.array()
    assert array is not None and isinstance(operand.value, Host)
    return Host(np.ascontiguousarray(array.T), operand.value.dtype)


def _values(node: Node, index: int) -> relax.Expr:
    """(codes - zero point) * scale in float32; scale and zero point follow in the next inputs."""
    value = node.tensor(index)
    rank, real = node.rank(value), node.emit(relax.op.astype(value, "float32"))
    if node.has(index + 2) and not _is_zero(node, index + 2):
        real = node.emit(relax.op.subtract(real, _along(node, index + 2, None, rank, "float32")))
    return node.emit(relax.op.multiply(real, parameter(node, index + 1, None, rank)))


def _is_zero(node: Node, index: int) -> bool:
    host = node.maybe_host(index)
    return host is not None and not host.symbolic and not np.any(host.array)


def _scaled(node: Node, total: relax.Expr, scales: list[relax.Expr]) -> relax.Expr:
    """int32 sums in float32, times the product of the scales."""
    factor = scales[0]
    for scale in scales[1:]:
        factor = node.emit(relax.op.multiply(factor, scale))
    return node.emit(relax.op.multiply(node.emit(relax.op.astype(total, "float32")), factor))


def _requantized(node: Node, total: relax.Expr, scales: list[relax.Expr], scale: int, zero: int) -> relax.Expr:
    """int32 sums as codes; `scale` and `zero` are the inputs with the parameters of the result."""
    factor = scales[0]
    for other in scales[1:]:
        factor = node.emit(relax.op.multiply(factor, other))
    factor = node.emit(relax.op.divide(factor, parameter(node, scale, None, node.rank(total))))
    return _saturated(node, node.emit(relax.op.multiply(node.emit(relax.op.astype(total, "float32")), factor)), zero)


def _coded(node: Node, value: relax.Expr, scale: int) -> relax.Expr:
    """float32 values as codes; scale and zero point of the result are the inputs `scale` and the next."""
    return _saturated(node, node.emit(relax.op.divide(value, parameter(node, scale, None, node.rank(value)))), scale + 1)


def _saturated(node: Node, steps: relax.Expr, zero: int) -> relax.Expr:
    """round(steps) + zero point within the type of the zero point; without one the type is that of the first codes."""
    dtype: Any = node.dtype(node.tensor(zero)) if node.has(zero) else node.dtype(node.tensor(0))
    if dtype not in _BOUNDS:
        raise Refusal(f"codes of type {dtype}; {', '.join(_BOUNDS)} are supported")
    value = node.emit(relax.op.round(steps))
    if node.has(zero) and not _is_zero(node, zero):
        value = node.emit(relax.op.add(value, _along(node, zero, None, node.rank(steps), "float32")))
    return relax.op.astype(node.emit(relax.op.clip(value, *_BOUNDS[dtype])), dtype)


def _plus(node: Node, value: relax.Expr, bias: int) -> relax.Expr:
    return relax.op.add(*node.align(value, node.tensor(bias))) if node.has(bias) else value
