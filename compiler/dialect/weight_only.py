"""`tcompile.weight_only_matmul`: a matrix of floats or int8 times a weight of packed integer codes with a scale per group, without the weight in float32 in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, tirx

NAME = "tcompile.weight_only_matmul"
#: types of x. Sums are in float32, and those of int8 in integers over as many k of a group as a kernel takes at once
TYPES = ("float32", "bfloat16", "float16", "int8")


def weight_only_matmul(
    x: relax.Expr, packed: relax.Expr, scales: relax.Expr, zeros: relax.Expr | None = None, *, bits: int, group: int
) -> relax.Call:
    """x: [..., M, K] float32, bfloat16, float16 or int8, packed: [ceil(Kp * bits / 8), N] uint8, scales: [Kp / group, N] float32, zeros: [Kp / group, N] uint8 -> [..., M, N] float32.

    bits: 1..8; Kp is K padded to whole groups. A weight is (code - zero) * scale with codes and zeros 0..2^bits - 1; without `zeros` the zero is `middle(bits)`. A column of `packed` is a
    string of bits, the lowest of every byte first, padded to whole bytes: 8 bits are a code per byte, and of 4 bits row i holds k = 2i in the low half of its bytes and k = 2i + 1 in
    the high half.
    """
    operands = [x, packed, scales] if zeros is None else [x, packed, scales, zeros]
    return relax.Call(OPERATOR, operands, operator_attrs(bits=bits, group=group))


def middle(bits: int) -> float:
    """The zero of codes that have none of their own: 2^(bits - 1), and of one bit 1/2, so that its weights are a sign times half the scale."""
    return float(1 << (bits - 1)) if bits > 1 else 0.5


def rows_of(codes: int, bits: int) -> int:
    """Bytes that hold so many codes of a column."""
    return -(-codes * bits // 8)


def attrs_of(call: relax.Call) -> tuple[int, int]:
    """(bits, group) of a call."""
    return int(call.attrs["bits"]), int(call.attrs["group"])  # pyright: ignore[reportOptionalSubscript]


def _infer(builder: Any, call: Any) -> Any:
    if len(call.args) not in (3, 4):
        raise ValueError(f"{NAME}: expected x, packed weights, scales and at most zeros, got {len(call.args)} operands")
    bits, group = attrs_of(call)
    x, packed, scales = (arg.ty for arg in call.args[:3])
    if not 1 <= bits <= 8 or group < 1 or group % 2:
        raise ValueError(f"{NAME}: bits must be 1..8 and group even, not {bits} and {group}")
    if x.ndim < 2 or str(x.dtype) not in TYPES or str(packed.dtype) != "uint8" or str(scales.dtype) != "float32":
        raise ValueError(f"{NAME}: expected x of two dims or more in {', '.join(TYPES)}, uint8 weights, float32 scales, got {x}, {packed}, {scales}")
    groups, n = (int(dim) for dim in scales.shape)
    rows, columns = (int(dim) for dim in packed.shape)
    k = x.shape[-1]
    if rows != rows_of(groups * group, bits) or columns != n or isinstance(k, tirx.IntImm) and -(-int(k) // group) != groups:
        raise ValueError(f"{NAME}: {packed} and {scales} do not fit {k} weights per column, {bits} bits and groups of {group}")
    return relax.TensorType([*list(x.shape)[:-1], n], "float32")


def dequantized(emit: Any, call: Any) -> relax.Expr:
    """The weight [K, N] in float32, by Relax operators."""
    op, (bits, group) = relax.op, attrs_of(call)
    x, packed, scales = call.args[:3]
    groups, n = (int(dim) for dim in scales.ty.shape)
    # bytes fall into parts that codes are whole numbers of
    part = math.gcd(bits, 8)
    codes, count = packed, groups * group
    if part < 8:
        mask = relax.const(np.uint8((1 << part) - 1), "uint8")
        shifted = [emit(op.right_shift(packed, relax.const(np.uint8(place), "uint8"))) if place else packed for place in range(0, 8, part)]
        parts = [emit(op.bitwise_and(value, mask)) if place + part < 8 else value for place, value in zip(range(0, 8, part), shifted, strict=True)]
        codes = emit(op.stack(parts, axis=1))
    each, have = bits // part, rows_of(count, bits) * 8 // part
    if have > count * each:
        codes = emit(op.strided_slice(emit(op.reshape(codes, [have, n])), [0], [0], [count * each]))
    if each > 1:
        places = relax.const((1 << part * np.arange(each)).astype(np.uint8).reshape(1, each, 1), "uint8")
        codes = emit(op.sum(emit(op.multiply(emit(op.reshape(codes, [count, each, n])), places)), axis=1))
    codes = emit(op.astype(emit(op.reshape(codes, [groups, group, n])), "float32"))
    if len(call.args) == 4:
        zeros = emit(op.reshape(emit(op.astype(call.args[3], "float32")), [groups, 1, n]))
    else:
        zeros = relax.const(np.float32(middle(bits)), "float32")
    weight = emit(op.multiply(emit(op.subtract(codes, zeros)), emit(op.reshape(scales, [groups, 1, n]))))
    weight = emit(op.reshape(weight, [groups * group, n]))
    k = int(x.ty.shape[-1])
    return weight if k == groups * group else emit(op.strided_slice(weight, [0], [0], [k]))


def decompose(builder: Any, call: Any) -> relax.Expr:
    """The same by Relax operators; what a target without a kernel runs."""
    x = call.args[0]
    x = x if str(x.ty.dtype) == "float32" else builder.emit(relax.op.astype(x, "float32"))
    return relax.op.matmul(x, dequantized(builder.emit, call))


def packed_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes: [Kp, N] uint8, below 2^bits -> `packed` of the operator."""
    if bits == 8:
        return codes
    spread = codes[:, None, :] >> np.arange(bits, dtype=np.uint8)[None, :, None] & 1
    return np.packbits(spread.reshape(-1, codes.shape[1]), axis=0, bitorder="little")


def unpacked(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The first `count` codes of every column: uint8 [count, N]."""
    if 8 % bits == 0:
        mask = np.uint8((1 << bits) - 1)
        return np.stack([packed >> np.uint8(place) & mask for place in range(0, 8, bits)], axis=1).reshape(-1, packed.shape[1])[:count]
    spread = np.unpackbits(packed, axis=0, bitorder="little")[: count * bits].reshape(count, bits, -1)
    return (spread << np.arange(bits, dtype=np.uint8)[None, :, None]).sum(axis=1, dtype=np.uint8)


def reference(x: np.ndarray, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, bits: int, group: int) -> np.ndarray:
    """The operator in numpy, sums in float64."""
    codes = unpacked(packed, len(scales) * group, bits)
    zero = np.full(scales.shape, middle(bits)) if zeros is None else zeros
    weight = (codes.reshape(-1, group, codes.shape[1]).astype(np.float64) - zero[:, None]) * scales[:, None]
    return x.astype(np.float64) @ weight.reshape(-1, weight.shape[2])[: x.shape[-1]]


OPERATOR = register_operator(NAME, ("x", "packed", "scales", "zeros"), _infer, decompose)
