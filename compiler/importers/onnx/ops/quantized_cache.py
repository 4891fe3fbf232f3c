"""Caches of ONNX Runtime's GroupQueryAttention that hold integer codes: new keys and values are quantised as they come in, and all are read as code * scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....dialect.attention_quantized import unpacked
from ....tvm import relax
from ..node import Node
from ..values import Refusal

#: inputs of the past key and value, and of their scales
_PAST, _SCALES, _TYPES = (3, 4), (12, 13), ("k_quant_type", "v_quant_type")


@dataclass(frozen=True)
class QuantizedCache:
    """bits: 8, int8, or 4: two codes + 8 in each byte, the first in its low half. scales: of keys and values, each [1, 1, 1, 1] or [1, Hk, 1, D]."""

    node: Node
    bits: int
    scales: tuple[relax.Expr, relax.Expr]

    def codes(self, value: relax.Expr, side: int) -> relax.Expr:
        """[B, Hk, S, D] float32 -> [B, Hk, S, D] int8 or [B, Hk, S, D / 2] uint8: to nearest, ties to even."""
        op, emit, half = relax.op, self.node.emit, 1 << (self.bits - 1)
        code = emit(op.clip(emit(op.round(emit(op.divide(value, self.scales[side])))), -half, half - 1))
        if self.bits == 8:
            return emit(op.astype(code, "int8"))
        code = emit(op.astype(emit(op.add(code, self.node.scalar(8.0, "float32"))), "uint8"))
        shape = self.node.shape(code)
        width = self.node.static(shape[3:], "the head size")[0]
        if width % 2:
            raise Refusal(f"heads of {width} codes of 4 bits fill no whole bytes")
        low, high = (emit(op.strided_slice(code, [3], [first], [width], [2])) for first in range(2))
        return emit(op.bitwise_or(low, emit(op.left_shift(high, relax.const(np.uint8(4), "uint8")))))

    def floats(self, codes: relax.Expr, side: int) -> relax.Expr:
        """The keys or values that a cache stands for."""
        op, emit = relax.op, self.node.emit
        if self.bits == 8:
            return emit(op.multiply(emit(op.astype(codes, "float32")), self.scales[side]))
        value = emit(op.subtract(emit(op.astype(unpacked(emit, codes), "float32")), self.node.scalar(8.0, "float32")))
        return emit(op.multiply(value, self.scales[side]))


def cache_of(node: Node) -> QuantizedCache | None:
    """The form of a node's caches; None where they are floats. Raises Refusal for forms other than int8 and two codes of 4 bits in a byte."""
    kinds = [node.attr(name, "NONE") for name in _TYPES]
    if kinds == ["NONE", "NONE"]:
        return None
    bits = node.attr("kv_cache_bit_width", 8)
    if "NONE" in kinds or not set(kinds) <= {"PER_TENSOR", "PER_CHANNEL"}:
        raise Refusal(f"k_quant_type '{kinds[0]}' with v_quant_type '{kinds[1]}' is not supported")
    if bits not in (4, 8):
        raise Refusal(f"kv_cache_bit_width {bits}; 4 and 8 are supported")
    if not all(node.has(index) for index in (*_PAST, *_SCALES)):
        raise Refusal("a quantized cache needs past_key, past_value, k_scale and v_scale")
    wanted = "int8" if bits == 8 else "uint8"
    for index in _PAST:
        if node.dtype(node.tensor(index)) != wanted:
            raise Refusal(f"a cache of {node.dtype(node.tensor(index))} with {bits} bits; {wanted} is supported")
    return QuantizedCache(node, bits, (_scale(node, 0, kinds[0], bits), _scale(node, 1, kinds[1], bits)))


def _scale(node: Node, side: int, kind: str, bits: int) -> relax.Expr:
    scale, cache = node.tensor(_SCALES[side]), node.shape(node.tensor(_PAST[side]))
    heads, width = node.static([cache[1], cache[3]], "the heads of a cache")
    wanted = [1, 1, 1, 1] if kind == "PER_TENSOR" else [1, heads, 1, width * 8 // bits]
    size, count = node.dims.product(node.shape(scale)), int(np.prod(wanted))
    if size != count:
        raise Refusal(f"scales {node.shape(scale)} of '{kind}'; {wanted} are expected")
    return node.reshape(scale, wanted)
