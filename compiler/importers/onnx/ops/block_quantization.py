"""QuantizeLinear and DequantizeLinear on every type, with scales per tensor, per axis and per block."""

from __future__ import annotations

from ....element_types import BOUNDS, CARRIERS
from ....tvm import relax
from ..load import element_name
from ..node import Node
from ..registry import storage_converter
from ..storage import dtype_of, from_carrier, numbers, stored
from ..values import Refusal, Value

_BOUNDS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535), **BOUNDS}


@storage_converter("QuantizeLinear")
def quantize(node: Node) -> Value | None:
    """saturate(round(x / scale) + zero_point), ties to even; floating-point codes are rounded as Cast rounds. precision: the type that divides."""
    target = _code_type(node)
    types = {
        dtype_of(node, node.value(0)),
        dtype_of(node, node.value(1)),
        element_name(node.attr("precision", 0)) if node.attr("precision", 0) else "",
    }
    if target not in CARRIERS and types <= {"float32", ""} and not node.attr("block_size", 0):
        return None
    dtype = "float64" if "float64" in types else "float32"
    narrow = _precision(node)
    x = _rounded_to(node, _wide(node, 0, dtype), narrow)
    quotient = node.emit(relax.op.divide(x, _rounded_to(node, _along(node, 1, x, dtype), narrow)))
    quotient = _rounded_to(node, quotient, narrow)
    if target in CARRIERS and target not in BOUNDS:
        return stored(node, quotient, target, bool(node.attr("saturate", 1)))
    low, high = _BOUNDS[target]
    value = node.emit(relax.op.round(quotient))
    if node.has(2):
        value = node.emit(relax.op.add(value, _along(node, 2, x, dtype)))
    codes = node.emit(relax.op.astype(node.emit(relax.op.clip(value, low, high)), CARRIERS.get(target, target)))
    return from_carrier(node, codes, target) if target in CARRIERS else codes


@storage_converter("DequantizeLinear")
def dequantize(node: Node) -> Value | None:
    """(x - zero_point) * scale, rounded once to the type of the scale, or output_dtype"""
    source, scale_type = dtype_of(node, node.value(0)), dtype_of(node, node.value(1))
    given = node.attr("output_dtype", 0)
    target = element_name(given) if given else scale_type
    if source not in CARRIERS and {target, scale_type} == {"float32"} and not node.attr("block_size", 0):
        return None
    if target not in ("float64", "float32", "float16", "bfloat16"):
        raise Refusal(f"results of type {target}; floating-point types are supported")
    if source not in (*_BOUNDS, *CARRIERS, "int32"):
        raise Refusal(f"codes of type {source} are not supported")
    dtype = "float64" if "float64" in (target, scale_type) else "float32"
    exact = "int32" if source in _BOUNDS or source == "int32" else dtype
    value = _wide(node, 0, exact)
    if node.has(2) and exact == "int32":
        value = node.emit(relax.op.subtract(value, _along(node, 2, value, exact)))
    value = value if exact == dtype else node.emit(relax.op.astype(value, dtype))
    result = node.emit(relax.op.multiply(value, _along(node, 1, value, dtype)))
    if target in CARRIERS:
        return stored(node, result, target)
    return result if target == dtype else relax.op.astype(result, target)


def _code_type(node: Node) -> str:
    given = node.attr("output_dtype", 0)
    target = element_name(given) if given else "uint8"
    if node.has(2):
        zero = dtype_of(node, node.value(2))
        if given and zero != target:
            raise Refusal(f"output_dtype is {target}, the zero point is of type {zero}")
        target = zero
    if target not in _BOUNDS and target not in CARRIERS or target in ("bfloat16", "float8_e8m0fnu"):
        raise Refusal(f"codes of type {target} are not supported")
    return target


def _precision(node: Node) -> str:
    """The type in which x / scale is rounded: `precision`, else that of the scale."""
    given = node.attr("precision", 0)
    dtype = element_name(given) if given else dtype_of(node, node.value(1))
    if dtype not in ("float64", "float32", "float16", "bfloat16", "int32"):
        raise Refusal(f"precision {dtype} is not supported")
    return dtype


def _rounded_to(node: Node, value: relax.Expr, dtype: str) -> relax.Expr:
    """A value in its own type, rounded to a narrower one."""
    if dtype == "bfloat16":
        return numbers(node, stored(node, value, dtype))
    if dtype != "float16":
        return value
    return node.emit(relax.op.astype(node.emit(relax.op.astype(value, dtype)), node.dtype(value)))


def _wide(node: Node, index: int, dtype: str) -> relax.Expr:
    value = node.value(index)
    wide = numbers(node, value) if dtype_of(node, value) in CARRIERS else node.to_tensor(value)
    return wide if node.dtype(wide) == dtype else node.emit(relax.op.astype(wide, dtype))


def _along(node: Node, index: int, x: relax.Expr, dtype: str) -> relax.Expr:
    """A scale or zero point as it broadcasts over x: scalars as they are, vectors along the axis, blocks repeated."""
    value = _wide(node, index, dtype)
    shape, sizes = node.shape(value), node.shape(x)
    block = node.attr("block_size", 0)
    if not shape or len(shape) == 1 and shape[0] == 1 and not block:
        return node.reshape(value, [])
    axis = node.axis(node.attr("axis", 1), len(sizes))
    if not block:
        if len(shape) != 1:
            raise Refusal(f"input {index} of rank {len(shape)} needs block_size")
        return node.reshape(value, [shape[0] if position == axis else 1 for position in range(len(sizes))])
    if block < 0 or len(shape) != len(sizes):
        raise Refusal(f"block_size {block} with an input {index} of rank {len(shape)} on {len(sizes)} dims")
    count, size = (node.static([dims[axis]], "a dim that is cut into blocks")[0] for dims in (shape, sizes))
    if -(-size // block) != count:
        raise Refusal(f"blocks of {block} in a dim of {size} need {-(-size // block)} scales, not {count}")
    repeated = node.emit(relax.op.repeat(value, block, axis))
    return repeated if count * block == size else node.emit(relax.op.strided_slice(repeated, [axis], [0], [size]))
