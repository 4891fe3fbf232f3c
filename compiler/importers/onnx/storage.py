"""Conversions between storage types (`element_types.CARRIERS`) and types with arithmetic, exact or rounded once, ties to even.

Rules of out-of-range values are those of the ONNX operator Cast. Small floating-point types are read through a table of all their codes, and written by a binary
search among the values where the rounded result changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from ...dialect.bitcast import bitcast
from ...element_types import BOUNDS, CARRIERS, decode, encode, numpy_dtype
from ...tvm import relax
from .node import Node
from .values import Host, Refusal, Stored, Value

ROUND_MODES = ("up", "down", "nearest")


def dtype_of(node: Node, value: Value | None) -> str:
    """The ONNX element type of a tensor; "" for what is none."""
    return value.dtype if isinstance(value, (Host, Stored)) else node.dtype(value) if isinstance(value, relax.Expr) else ""


def to_carrier(value: Value) -> Value:
    """A tensor of a storage type as the tensor of integers that holds it."""
    if isinstance(value, Stored):
        return value.carrier
    assert isinstance(value, Host)
    if value.wide is None or value.wide.dtype != CARRIERS[value.dtype]:
        value.wide = Host(encode(value.array), CARRIERS[value.dtype], value.name)
    return value.wide


def from_carrier(node: Node, value: Value, dtype: str) -> Value:
    """The opposite of `to_carrier`."""
    if isinstance(value, Host):
        return Host(decode(value.array, dtype), dtype, value.name)
    assert isinstance(value, relax.Expr)
    return Stored(value if isinstance(value, relax.Var) else node.emit(value), dtype)


def numbers(node: Node, value: Value) -> relax.Expr:
    """The values of a tensor of a storage type: float32 for floating-point types, the carrier for integers."""
    dtype, carrier = dtype_of(node, value), node.to_tensor(to_carrier(value))
    op = relax.op
    if dtype in BOUNDS:
        return carrier
    if dtype == "bfloat16":
        return node.emit(bitcast(node.emit(op.left_shift(node.emit(op.astype(carrier, "uint32")), _bits(16))), "float32"))
    table = np.arange(16 if dtype == "float4_e2m1fn" else 256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    index = node.emit(op.astype(carrier, "int32"))
    return node.emit(op.take(node.array(table, "float32"), index, axis=0))


def stored(node: Node, value: relax.Expr, dtype: str, saturate: bool = True, round_mode: str = "up") -> Stored:
    """A tensor of numbers as the storage type `dtype`, by the rules of Cast. round_mode: of float8_e8m0fnu."""
    op, source = relax.op, node.dtype(value)
    if dtype in BOUNDS:
        return Stored(_wrapped(node, value, dtype), dtype)
    x = value if source == "float32" else node.emit(op.astype(value, "float32"))
    bits = node.emit(bitcast(x, "uint32"))
    # all in integers: comparisons of a value with itself are simplified away, and booleans between loops do not vectorize
    above = node.emit(op.maximum(node.emit(op.bitwise_and(bits, _bits(0x7FFFFFFF))), _bits(0x7F800000)))
    nan = node.emit(op.minimum(node.emit(op.subtract(above, _bits(0x7F800000))), _bits(1)))
    number = node.emit(op.subtract(_bits(1), nan))
    if dtype == "bfloat16":
        odd = node.emit(op.bitwise_and(node.emit(op.right_shift(bits, _bits(16))), _bits(1)))
        bias = node.emit(op.multiply(node.emit(op.add(odd, _bits(0x7FFF))), number))
        rounded = node.emit(op.bitwise_or(node.emit(op.add(bits, bias)), node.emit(op.left_shift(nan, _bits(22)))))
        return Stored(node.emit(op.astype(node.emit(op.right_shift(rounded, _bits(16))), "uint16")), dtype)
    edges, nan_code, sign_bit = _edges(dtype, saturate, round_mode)
    shape = node.shape(x)
    flat = node.emit(op.abs(x if len(shape) else node.reshape(x, [1])))
    codes = node.emit(op.bucketize(flat, node.array(edges, "float32"), True, True))
    codes = node.emit(op.astype(codes if len(shape) else node.reshape(codes, []), "uint32"))
    codes = node.emit(op.add(node.emit(op.multiply(codes, number)), node.emit(op.multiply(nan, _bits(nan_code)))))
    if sign_bit:
        negative = node.emit(op.right_shift(bits, _bits(31)))
        if dtype.endswith("fnuz"):  # one zero, and its negative is NaN
            negative = node.emit(op.multiply(negative, node.emit(op.minimum(codes, _bits(1)))))
        codes = node.emit(op.bitwise_or(codes, node.emit(op.left_shift(negative, _bits(sign_bit)))))
    return Stored(node.emit(op.astype(codes, "uint8")), dtype)


def cast(node: Node, value: Value, dtype: str, saturate: bool = True, round_mode: str = "up") -> Value:
    """Cast where one side is a storage type."""
    source = dtype_of(node, value)
    if source == dtype:
        return value
    if round_mode not in ROUND_MODES:
        raise Refusal(f"round_mode '{round_mode}'; {', '.join(ROUND_MODES)} are known")
    if isinstance(value, Host) and not value.symbolic:
        return Host(cast_array(value.array, dtype, saturate, round_mode), dtype)
    result = numbers(node, value) if source in CARRIERS else node.to_tensor(value)
    if dtype in CARRIERS:
        return stored(node, result, dtype, saturate, round_mode)
    if dtype == "bool":
        return relax.op.not_equal(result, node.scalar(0, node.dtype(result)))
    return result if node.dtype(result) == dtype else relax.op.astype(result, dtype)


def cast_array(array: np.ndarray, dtype: str, saturate: bool = True, round_mode: str = "up") -> np.ndarray:
    """The same in numpy."""
    with np.errstate(all="ignore"):
        if array.dtype.name in CARRIERS:
            array = array.astype(np.int8 if array.dtype.name in ("int4", "int2") else np.uint8 if array.dtype.name in BOUNDS else np.float32)
        if dtype not in CARRIERS or dtype == "bfloat16":
            return array.astype(numpy_dtype(dtype))
        if dtype in BOUNDS:
            whole = array.astype(np.int32)
            bits = BOUNDS[dtype][1] - BOUNDS[dtype][0]
            return (((whole - BOUNDS[dtype][0]) & bits) + BOUNDS[dtype][0]).astype(numpy_dtype(dtype))
        x = array.astype(np.float32)
        edges, nan_code, sign_bit = _edges(dtype, saturate, round_mode)
        codes = np.searchsorted(edges, np.abs(x), side="right").astype(np.uint8)
        codes = np.where(np.isnan(x), np.uint8(nan_code), codes)
        if sign_bit:
            negative = np.signbit(x) & (codes != 0) if dtype.endswith("fnuz") else np.signbit(x)
            codes = codes | (negative.astype(np.uint8) << np.uint8(sign_bit))
        return codes.astype(np.uint8).view(numpy_dtype(dtype))


@cache
def _edges(dtype: str, saturate: bool, round_mode: str) -> tuple[np.ndarray, int, int]:
    """(edges, code of NaN, position of the sign bit or 0): the code of a magnitude is the number of edges that are not above it."""
    if dtype == "float8_e8m0fnu":
        return _exponent_edges(saturate, round_mode), 255, 0
    finite = int(np.uint8(encode(np.asarray(ml_dtypes.finfo(numpy_dtype(dtype)).max, numpy_dtype(dtype)))))
    values = np.arange(finite + 1, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2  # exact: one more bit than the type has
    above = np.nextafter(middle, np.float32(np.inf))
    edges = np.where(np.arange(finite) % 2 == 0, above, middle)
    if dtype == "float4_e2m1fn":  # neither NaN, which becomes -0, nor infinity: it always saturates
        return edges.astype(np.float32), 8, 3
    nan_code = 0x80 if dtype.endswith("fnuz") else 0x7F
    if not saturate:
        top = values[-1] + (values[-1] - values[-2]) / 2
        top = np.nextafter(top, np.float32(np.inf)) if finite % 2 == 0 else top
        edges = np.append(edges, np.full((nan_code if dtype != "float8_e5m2" else finite + 1) - finite, top))
    return edges.astype(np.float32), nan_code, 7


def _exponent_edges(saturate: bool, round_mode: str) -> np.ndarray:
    """Of float8_e8m0fnu, whose codes are exponents: 2^(code - 127)."""
    powers = np.concatenate([[0.0], 2.0 ** np.arange(-126.0, 128.0)])  # where a float32's exponent becomes 1, 2, ..., 254
    inf = np.float32(np.inf)
    if round_mode == "up":
        low = np.nextafter(powers.astype(np.float32), inf)
        edges = np.append(low[:-1], inf) if saturate else low
    elif round_mode == "down":
        edges = np.append(powers[1:].astype(np.float32), inf)
    else:
        middle = (1.5 * powers[1:]).astype(np.float32)
        edges = np.concatenate([[np.nextafter(np.float32(2.0**-127), inf)], middle[:-1], [inf if saturate else middle[-1]]])
    return edges.astype(np.float32)


def _wrapped(node: Node, value: relax.Expr, dtype: str) -> relax.Expr:
    """The low bits of the integer part."""
    op, (low, high) = relax.op, BOUNDS[dtype]
    whole = value if node.dtype(value) == "int32" else node.emit(op.astype(value, "int32"))
    shifted = node.emit(op.subtract(whole, node.scalar(low, "int32"))) if low else whole
    masked = node.emit(op.bitwise_and(shifted, node.scalar(high - low, "int32")))
    return node.emit(op.astype(node.emit(op.add(masked, node.scalar(low, "int32"))) if low else masked, CARRIERS[dtype]))


def _bits(value: int) -> Any:
    return relax.const(np.uint32(value), "uint32")
