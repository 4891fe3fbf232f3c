"""Products of 8-bit codes with zero points, exact in int32: MatMulInteger, ConvInteger, and what the QLinear operators are made of.

    sum((a - za) (b - zb)) = sum(a b) - za sum(b) - zb sum(a) + K za zb

With a constant b the first sum is a product of u8 by s8, for which there are kernels; the others are vectors. All wrap around as int32 does, so the identity is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ....tvm import relax
from ..compose import apply, given
from ..node import Node
from ..registry import converter
from ..values import Host, Refusal, Value

WINDOW = ("auto_pad", "dilations", "group", "pads", "strides")


@dataclass(frozen=True)
class Codes:
    """8-bit codes and their zero point: one for all, or a vector (for rows of a left operand, columns of a right one, output channels of a convolution's weight)."""

    value: Value
    zero: Value | None = None

    def array(self) -> np.ndarray | None:
        return self.value.array if isinstance(self.value, Host) and not self.value.symbolic else None

    def zero_array(self) -> np.ndarray | None:
        """The zero point in int32 where it is known at import."""
        if self.zero is None:
            return np.zeros((), np.int32)
        return self.zero.array.astype(np.int32) if isinstance(self.zero, Host) and not self.zero.symbolic else None


def codes(node: Node, index: int, zero: int) -> Codes:
    """The operand in input `index`, its zero point in input `zero`."""
    return Codes(node.value(index), node.value(zero) if node.has(zero) else None)


@converter("MatMulInteger", since=10)
def matmul_integer(node: Node) -> relax.Expr:
    """(a - a_zero) @ (b - b_zero) in int32; zero points are scalars, or one per row of a, per column of b"""
    return matrix_product(node, codes(node, 0, 2), codes(node, 1, 3))


@converter("ConvInteger", since=10)
def conv_integer(node: Node) -> relax.Expr:
    """The convolution of x - x_zero by w - w_zero in int32; padding is 0 in these, w_zero a scalar or one per output channel"""
    return convolution(node, codes(node, 0, 2), codes(node, 1, 3), **given(node, *WINDOW))


def matrix_product(node: Node, a: Codes, b: Codes) -> relax.Expr:
    """(a - za) @ (b - zb) in int32, bound. a: [..., M, K], b: [..., K, N], both int8 or uint8."""
    left, weight, zero_b = node.to_tensor(a.value), b.array(), b.zero_array()
    if weight is None or zero_b is None or weight.ndim != 2 or node.rank(left) < 2 or zero_b.size not in (1, weight.shape[1]):
        return apply(node, "MatMul", _centred(node, a, -2), _centred(node, b, -1))
    weight, zero_b = _signed(weight, zero_b.reshape(-1))
    left, shift = _unsigned(node, left)
    shape = node.shape(left)
    if not isinstance(shape[-1], int):
        left = node.cast_shape(left, [*shape[:-1], weight.shape[0]])
    total = node.emit(relax.op.matmul(left, node.array(weight, "int8"), out_dtype="int32"))
    sums = weight.astype(np.int64).sum(0) - weight.shape[0] * zero_b.astype(np.int64)
    total = _minus_zeros(node, total, a, shift, sums, -2)
    if np.any(zero_b):
        rows = node.emit(relax.op.sum(node.emit(relax.op.astype(left, "int32")), -1, keepdims=True))
        total = node.emit(relax.op.subtract(total, node.emit(relax.op.multiply(rows, node.array(zero_b, "int32")))))
    return total


def convolution(node: Node, x: Codes, w: Codes, **window: Any) -> relax.Expr:
    """The int32 convolution of x - zx by w - zw, bound. x: [N, C, *spatial], w: [O, C / groups, *kernel]; window: attributes of Conv."""
    weight, zero_w, data = w.array(), w.zero_array(), node.to_tensor(x.value)
    if weight is not None and zero_w is not None and weight.ndim == 4:
        weight, zero_w = _signed(weight, zero_w)
    padded = window.get("auto_pad", "NOTSET") == "NOTSET"
    if (
        weight is None
        or zero_w is None
        or weight.ndim != 4
        or np.any(zero_w)
        or not padded
        or x.zero is not None
        and node.rank(node.to_tensor(x.zero)) > 1
    ):
        return apply(node, "Conv", _centred(node, x, None), _centred(node, w, 0), **window)
    data, shift = _unsigned(node, data)
    pads, zero_x = window.get("pads") or [0] * 4, x.zero_array()
    if any(pads) and not (zero_x is not None and zero_x.size == 1 and int(zero_x.reshape(())) + shift == 0):
        data = _padded(node, data, x, shift, pads)
        pads = [0] * 4
    shape, channels = node.shape(data), weight.shape[1] * window.get("group", 1)
    if not isinstance(shape[1], int):
        data = node.cast_shape(data, [shape[0], channels, *shape[2:]])
    numbers = (window.get("strides") or [1, 1], pads, window.get("dilations") or [1, 1], window.get("group", 1))
    total = node.emit(relax.op.nn.conv2d(data, node.array(weight, "int8"), *numbers, "NCHW", "OIHW", "NCHW", "int32"))
    return _minus_zeros(node, total, x, shift, weight.astype(np.int64).sum((1, 2, 3)).reshape(-1, 1, 1), None)


def _centred(node: Node, operand: Codes, axis: int | None) -> relax.Expr:
    """codes - zero point in int32; a vector of zero points lies along `axis`."""
    value = node.emit(relax.op.astype(node.to_tensor(operand.value), "int32"))
    return value if operand.zero is None else node.emit(relax.op.subtract(value, _zero(node, operand.zero, axis, node.rank(value))))


def _zero(node: Node, zero: Value, axis: int | None, rank: int) -> relax.Expr:
    """A zero point in int32, as it broadcasts over its operand."""
    value = node.to_tensor(zero)
    shape = node.shape(value)
    if len(shape) > max(rank, 1):
        raise Refusal(f"a zero point of shape {shape}")
    if len(shape) == 1:
        if axis is None and shape[0] != 1:
            raise Refusal(f"a zero point of shape {shape}; the operand has one zero point for all elements")
        place = rank + axis if axis is not None and axis < 0 else axis
        value = node.reshape(value, [] if axis is None or rank < 2 else [shape[0] if position == place else 1 for position in range(rank)])
    return node.emit(relax.op.astype(value, "int32"))


def _signed(weight: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight codes as int8."""
    return ((weight.astype(np.int32) - 128).astype(np.int8), zero - 128) if weight.dtype == np.uint8 else (weight, zero)


def _unsigned(node: Node, value: relax.Expr) -> tuple[relax.Expr, int]:
    """Codes as uint8, and what was added to make them."""
    if node.dtype(value) == "uint8":
        return value, 0
    wide = node.emit(relax.op.add(node.emit(relax.op.astype(value, "int32")), node.scalar(128, "int32")))
    return node.emit(relax.op.astype(wide, "uint8")), 128


def _minus_zeros(node: Node, total: relax.Expr, a: Codes, shift: int, sums: np.ndarray, axis: int | None) -> relax.Expr:
    """total - (za + shift) * sums"""
    known = a.zero_array()
    if known is not None and known.size == 1:
        constant = (known.reshape(()).astype(np.int64) + shift) * sums
        return total if not constant.any() else node.emit(relax.op.subtract(total, node.array(constant, "int32")))
    assert a.zero is not None
    zero = _zero(node, a.zero, axis, node.rank(total))
    zero = node.emit(relax.op.add(zero, node.scalar(shift, "int32"))) if shift else zero
    return node.emit(relax.op.subtract(total, node.emit(relax.op.multiply(zero, node.array(sums, "int32")))))


def _padded(node: Node, data: relax.Expr, x: Codes, shift: int, pads: list[int]) -> relax.Expr:
    """u8 codes [N, C, H, W] with the zero point around them."""
    width = [0, 0, 0, 0, pads[0], pads[2], pads[1], pads[3]]
    known = x.zero_array()
    if known is not None:
        return node.emit(relax.op.nn.pad(data, width, "constant", float(int(known.reshape(())) + shift)))
    assert x.zero is not None
    zero = _zero(node, x.zero, None, 4)
    zero = node.emit(relax.op.add(zero, node.scalar(shift, "int32"))) if shift else zero
    centred = node.emit(relax.op.subtract(node.emit(relax.op.astype(data, "int32")), zero))
    moved = node.emit(relax.op.add(node.emit(relax.op.nn.pad(centred, width, "constant", 0.0)), zero))
    return node.emit(relax.op.astype(moved, "uint8"))
