"""Products in integers.

    x_u8 = clip(round(x / sx) + zx)                     once per tensor, shared by all its readers
    acc  = x_u8 * w_s8 + (round(bias / (sx sw)) - zx colsum(w))      int32, exact
    y    = float(acc) * (sx sw)                         per output channel

The last line and the codes of the next layer are element-wise, so they end up in the product's epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...compiler.tvm import relax
from ..products import Site
from .formats import Affine, Encoded, Int8, scale_for_16_bits
from .schemes import Codes, Emit, Scheme, channels, number

op = relax.op


@dataclass(frozen=True)
class Integers(Scheme):
    """Weights int8, activations u8 over a range that was observed. short_sums: scales of weights are as wide as it takes for the sums that `vpmaddubsw` makes in 16 bits to be
    exact."""

    short_sums: bool = False
    name: ClassVar[str] = "int8"
    chained: ClassVar[bool] = True
    covering = staticmethod(Affine.of_range)

    def weight(self, site: Site) -> Encoded:
        return weight_codes(site.weight, self.short_sums and not site.depthwise)

    def codes(self, emit: Emit, x: Any, covering: Affine) -> Codes:
        return Codes(quantized(emit, x, covering))

    def decoded(self, emit: Emit, codes: Codes, covering: Affine) -> Any:
        return dequantized(emit, codes.expr, covering)

    def product(self, emit: Emit, site: Site, codes: Codes, covering: Affine, weight: Encoded) -> Any:
        return integer_product(emit, site, codes.expr, covering, weight)


def weight_codes(weight: np.ndarray, short_sums: bool) -> Encoded:
    """[K, N] or OIHW -> int8, symmetric per output channel. short_sums: with scales by which sums of products fit 16 bits."""
    matmul = weight.ndim == 2
    if not short_sums:
        return Int8(1 if matmul else 0).encode(weight)
    if matmul:
        return Int8(1).encode(weight, scale_for_16_bits(weight))
    # K, the input channels of a tap, second to last; where they are no multiple of eight, words of several taps begin anywhere, and any two weights have to fit
    if weight.shape[1] % 8 and weight[0, 0].size > 1:
        least = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(64)
    else:
        least = scale_for_16_bits(weight.transpose(2, 3, 1, 0))
    return Int8(0).encode(weight, least.reshape(-1, 1, 1, 1))


def quantized(emit: Emit, x: Any, affine: Affine) -> Any:
    """The u8 codes of a float tensor, in plain operators."""
    value = emit(op.round(emit(op.multiply(x, number(1 / affine.scale)))))
    value = emit(op.add(value, number(affine.zero))) if affine.zero else value
    return emit(op.astype(emit(op.clip(value, 0, 255)), "uint8"))


def dequantized(emit: Emit, codes: Any, affine: Affine) -> Any:
    value = emit(op.astype(codes, "float32"))
    value = emit(op.subtract(value, number(affine.zero))) if affine.zero else value
    return emit(op.multiply(value, number(affine.scale)))


def integer_product(emit: Emit, site: Site, codes: Any, affine: Affine, weight: Encoded) -> Any:
    """`site` with its bias, from the codes of its operand. weight: codes of the site's weight, symmetric per output channel."""
    w = weight.codes
    scale = np.float32(affine.scale) * weight.scale.reshape(-1)
    scale = np.broadcast_to(scale, (site.channels,)).astype(np.float32)
    constant = np.zeros(site.channels, np.int64)
    late_bias = site.bias
    if site.bias is not None:
        rounded = np.rint(site.bias.astype(np.float64) / scale)
        if np.abs(rounded).max(initial=0) < 2**30:
            constant, late_bias = rounded.astype(np.int64), None
    sums = w.astype(np.int64).sum(axis=0 if site.kind == "matmul" else (1, 2, 3))
    constant = (constant - affine.zero * sums).astype(np.int32)
    if site.kind == "matmul":
        acc = op.matmul(codes, relax.const(np.ascontiguousarray(w), "int8"), out_dtype="int32")
    else:
        acc = integer_conv(emit, site.call.attrs, codes, w, affine.zero)
    acc = emit(acc)
    if constant.any():
        acc = emit(op.add(acc, channels(site, constant, "int32")))
    value = emit(op.multiply(emit(op.astype(acc, "float32")), channels(site, scale)))
    return value if late_bias is None else emit(op.add(value, channels(site, late_bias)))


def integer_conv(emit: Emit, attrs: Any, codes: Any, w: np.ndarray, zero: int) -> Any:
    """The int32 sums of an NCHW convolution; padding holds the code of 0.0."""
    padding = [int(pad) for pad in attrs.padding]
    if zero and any(padding):
        top, left, bottom, right = padding
        codes = emit(op.nn.pad(codes, [0, 0, 0, 0, top, bottom, left, right], "constant", float(zero)))
        padding = [0, 0, 0, 0]
    numbers = ([int(value) for value in attrs.strides], padding, [int(value) for value in attrs.dilation], int(attrs.groups))
    return op.nn.conv2d(codes, relax.const(np.ascontiguousarray(w), "int8"), *numbers, "NCHW", "OIHW", "NCHW", "int32")
