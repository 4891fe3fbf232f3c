"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear.

Constant scales make `relax.quantize` and `relax.dequantize`, which the pass `recognize-qdq` takes apart; scales known at run time only are spelled out.
"""

from __future__ import annotations

import numpy as np
import onnx

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Host, Refusal

_BOUNDS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


@converter("QuantizeLinear", since=10)
def quantize_linear(node: Node) -> relax.Expr:
    """saturate(round(x / scale) + zero_point), ties to even; scale: a scalar, or [C] along `axis`"""
    x, zero = node.tensor(0), node.maybe_host(2)
    dtype = node.dtype(node.tensor(2)) if node.has(2) else _output_type(node)
    if dtype not in _BOUNDS:
        raise Refusal(f"codes of type {dtype}; {', '.join(_BOUNDS)} are supported")
    axis, scale = _axis(node, x), node.maybe_host(1)
    known = scale is not None and not scale.symbolic and (zero is not None or not node.has(2))
    if known and dtype in ("int8", "uint8") and node.dtype(x) == "float32":
        assert scale is not None
        return relax.op.quantize(x, _parameter(node, scale), _zero(node, 2, scale, dtype), axis, dtype)
    low, high = _BOUNDS[dtype]
    value = node.emit(relax.op.round(node.emit(relax.op.divide(x, _along(node, 1, x, axis)))))
    if node.has(2):
        value = node.emit(relax.op.add(value, node.emit(relax.op.astype(_along(node, 2, x, axis), node.dtype(x)))))
    return relax.op.astype(node.emit(relax.op.clip(value, low, high)), dtype)


@converter("DequantizeLinear", since=10)
def dequantize_linear(node: Node) -> relax.Expr:
    """(x - zero_point) * scale"""
    codes = node.tensor(0)
    axis, scale, zero, dtype = _axis(node, codes), node.maybe_host(1), node.maybe_host(2), node.dtype(node.tensor(1))
    data, source = node.maybe_host(0), node.dtype(codes)
    if source not in (*_BOUNDS, "int32"):
        raise Refusal(f"codes of type {source}; {', '.join((*_BOUNDS, 'int32'))} are supported")
    known = scale is not None and not scale.symbolic and (zero is not None or not node.has(2))
    if known and scale is not None and data is not None and source not in ("int8", "uint8"):
        shape = [-1 if position == axis and scale.array.size > 1 else 1 for position in range(data.array.ndim)]
        shift = 0 if zero is None else zero.array.reshape(shape if zero.array.size > 1 else ()).astype(np.int64)
        factor = scale.array.reshape(shape) if scale.array.size > 1 else scale.array.reshape(())
        return node.array((data.array.astype(np.int64) - shift) * factor, dtype)
    if known and source in ("int8", "uint8") and dtype == "float32" and node.rank(codes):
        assert scale is not None
        return relax.op.dequantize(codes, _parameter(node, scale), _zero(node, 2, scale, source), axis, dtype)
    value = codes if source == "int32" else node.emit(relax.op.astype(codes, "int32"))
    if node.has(2):
        value = node.emit(relax.op.subtract(value, node.emit(relax.op.astype(_along(node, 2, codes, axis), "int32"))))
    return relax.op.multiply(node.emit(relax.op.astype(value, dtype)), _along(node, 1, codes, axis))


@converter("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(node: Node) -> tuple[relax.Expr, ...]:
    """(u8 codes, scale, zero point) over the range of x, widened to contain 0"""
    x, op, number = node.tensor(0), relax.op, lambda value: node.scalar(value, "float32")
    low = node.emit(op.minimum(node.emit(op.min(x)), number(0)))
    high = node.emit(op.maximum(node.emit(op.max(x)), number(0)))
    spread = node.emit(op.divide(node.emit(op.subtract(high, low)), number(255)))
    scale = node.emit(op.where(node.emit(op.equal(spread, number(0))), number(1), spread))
    zero = node.emit(op.clip(node.emit(op.round(node.emit(op.divide(node.emit(op.negative(low)), scale)))), 0, 255))
    value = node.emit(op.add(node.emit(op.round(node.emit(op.divide(x, scale)))), zero))
    return op.astype(node.emit(op.clip(value, 0, 255)), "uint8"), scale, op.astype(zero, "uint8")


def _output_type(node: Node) -> str:
    given = node.attr("output_dtype", 0)
    return str(onnx.helper.tensor_dtype_to_np_dtype(given)) if given else "uint8"


def _axis(node: Node, x: relax.Expr) -> int:
    if node.attr("block_size", 0):
        raise Refusal("block_size: scales per block are not supported")
    rank = node.rank(x)
    return node.axis(node.attr("axis", 1), rank) if rank > 1 or node.rank(node.tensor(1)) and node.attr("axis", 1) < rank else 0


def _parameter(node: Node, host: Host) -> relax.Expr:
    """A scale as a scalar or a vector."""
    return node.array(host.array.reshape(() if host.array.size == 1 else -1), host.dtype)


def _zero(node: Node, index: int, scale: Host, dtype: str) -> relax.Expr:
    zero = node.maybe_host(index)
    values = np.zeros(scale.array.shape, dtype) if zero is None else zero.array
    return node.array(values.reshape(() if values.size == 1 else -1), dtype)


def _along(node: Node, index: int, x: relax.Expr, axis: int) -> relax.Expr:
    """An input as it broadcasts over x: scalars as they are, vectors along the axis."""
    value = node.tensor(index)
    if node.rank(value) == 0:
        return value
    size = node.shape(value)[0]
    return node.reshape(value, [size if position == axis else 1 for position in range(node.rank(x))] if size != 1 else [])
