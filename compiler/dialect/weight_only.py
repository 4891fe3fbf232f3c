"""`tcompile.weight_only_matmul`: a matrix of floats times a weight of packed integer codes with a scale per group, without the weight in float32 in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, tirx

NAME = "tcompile.weight_only_matmul"
#: types of x; products and sums are in float32
FLOATS = ("float32", "bfloat16", "float16")


def weight_only_matmul(
    x: relax.Expr, packed: relax.Expr, scales: relax.Expr, zeros: relax.Expr | None = None, *, bits: int, group: int
) -> relax.Call:
    """x: [..., M, K] float32, bfloat16 or float16, packed: [Kp * bits / 8, N] uint8, scales: [Kp / group, N] float32, zeros: [Kp / group, N] uint8 -> [..., M, N] float32.

    Kp is K padded to whole groups. A weight is (code - zero) * scale with codes 0..2^bits - 1; without `zeros` the zero is 2^(bits - 1). bits 8: a code per byte; 4: row i
    of `packed` holds k = 2i in the low half of its bytes and k = 2i + 1 in the high half.
    """
    operands = [x, packed, scales] if zeros is None else [x, packed, scales, zeros]
    return relax.Call(OPERATOR, operands, operator_attrs(bits=bits, group=group))


def attrs_of(call: relax.Call) -> tuple[int, int]:
    """(bits, group) of a call."""
    return int(call.attrs["bits"]), int(call.attrs["group"])  # pyright: ignore[reportOptionalSubscript]


def _infer(builder: Any, call: Any) -> Any:
    if len(call.args) not in (3, 4):
        raise ValueError(f"{NAME}: expected x, packed weights, scales and at most zeros, got {len(call.args)} operands")
    bits, group = attrs_of(call)
    x, packed, scales = (arg.ty for arg in call.args[:3])
    if bits not in (4, 8) or group < 1 or group % 2:
        raise ValueError(f"{NAME}: bits must be 4 or 8 and group even, not {bits} and {group}")
    if x.ndim < 2 or str(x.dtype) not in FLOATS or str(packed.dtype) != "uint8" or str(scales.dtype) != "float32":
        raise ValueError(
            f"{NAME}: expected x of two dims or more in float32, bfloat16 or float16, uint8 weights, float32 scales, got {x}, {packed}, {scales}"
        )
    groups, n = (int(dim) for dim in scales.shape)
    rows, columns = (int(dim) for dim in packed.shape)
    k = x.shape[-1]
    if rows != groups * group * bits // 8 or columns != n or isinstance(k, tirx.IntImm) and -(-int(k) // group) != groups:
        raise ValueError(f"{NAME}: {packed} and {scales} do not fit {k} weights per column, {bits} bits and groups of {group}")
    return relax.TensorType([*list(x.shape)[:-1], n], "float32")


def dequantized(emit: Any, call: Any) -> relax.Expr:
    """The weight [K, N] in float32, by Relax operators."""
    op, (bits, group) = relax.op, attrs_of(call)
    x, packed, scales = call.args[:3]
    groups, n = (int(dim) for dim in scales.ty.shape)
    codes = packed
    if bits == 4:
        low = emit(op.bitwise_and(packed, relax.const(np.uint8(15), "uint8")))
        high = emit(op.right_shift(packed, relax.const(np.uint8(4), "uint8")))
        codes = emit(op.stack([low, high], axis=1))
    codes = emit(op.astype(emit(op.reshape(codes, [groups, group, n])), "float32"))
    if len(call.args) == 4:
        zeros = emit(op.reshape(emit(op.astype(call.args[3], "float32")), [groups, 1, n]))
    else:
        zeros = relax.const(np.float32(1 << (bits - 1)), "float32")
    weight = emit(op.multiply(emit(op.subtract(codes, zeros)), emit(op.reshape(scales, [groups, 1, n]))))
    weight = emit(op.reshape(weight, [groups * group, n]))
    k = int(x.ty.shape[-1])
    return weight if k == groups * group else emit(op.strided_slice(weight, [0], [0], [k]))


def decompose(builder: Any, call: Any) -> relax.Expr:
    """The same by Relax operators; what a target without a kernel runs."""
    x = call.args[0]
    x = x if str(x.ty.dtype) == "float32" else builder.emit(relax.op.astype(x, "float32"))
    return relax.op.matmul(x, dequantized(builder.emit, call))


def reference(x: np.ndarray, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, bits: int, group: int) -> np.ndarray:
    """The operator in numpy, sums in float64."""
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])
    zero = np.full(scales.shape, 1 << (bits - 1)) if zeros is None else zeros
    weight = (codes.reshape(-1, group, codes.shape[1]).astype(np.float64) - zero[:, None]) * scales[:, None]
    return x.astype(np.float64) @ weight.reshape(-1, weight.shape[2])[: x.shape[-1]]


OPERATOR = register_operator(NAME, ("x", "packed", "scales", "zeros"), _infer, decompose)
