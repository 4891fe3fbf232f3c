"""`tcompile.attention_quantized`: attention over keys and values that are integer codes, without a float of either in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax, tirx, tvm
from . import attention as plain
from .attention import AttentionDims

NAME = "tcompile.attention_quantized"
#: operands behind q, k and v, in their order; which of them a call has says its attribute `given`
OPTIONAL = ("k_scales", "v_scales", "k_zeros", "v_zeros", "mask")
CODES = ("int8", "uint8")


@dataclass(frozen=True)
class QuantizedAttrs:
    """scale, causal, fill, safe: as those of the attention. given: names of the operands behind q, k and v, joined by commas.

    k_bits, v_bits: 8, or 4: byte i of a row of uint8 holds element 2 i in its low half and 2 i + 1 in its high half. k_zero, v_zero: the code that stands for 0 where
    `k_zeros` or `v_zeros` gives none.
    """

    scale: float = 1.0
    causal: bool = False
    fill: float = -math.inf
    safe: bool = True
    given: str = ""
    k_bits: int = 8
    v_bits: int = 8
    k_zero: int = 0
    v_zero: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.given.split(",")) if self.given else ()

    @property
    def plain(self) -> dict[str, Any]:
        """Those that the attention has, too."""
        return {name: getattr(self, name) for name in ("scale", "causal", "fill", "safe")}


def attention_quantized(q: relax.Expr, k: relax.Expr, v: relax.Expr, optional: dict[str, relax.Expr], **attrs: Any) -> relax.Call:
    """q: [B, H, S, D] float32, k: [B, Hk, T, D] and v: [B, Hk, T, E], int8 or uint8 codes, or rows of half as many bytes -> [B, H, S, E] float32.

    A key is (code - zero) * scale, and so is a value. optional: k_scales, v_scales [B, Hk, T] float32, by default 1; k_zeros, v_zeros [B, Hk, T] int8 or uint8; mask: as
    that of `attention`. attrs: fields of QuantizedAttrs.
    """
    given = [name for name in OPTIONAL if name in optional]
    attrs["fill"] = float(np.float32(attrs.get("fill", -math.inf)))
    options = QuantizedAttrs(**attrs, given=",".join(given))
    return relax.Call(OPERATOR, [q, k, v, *(optional[name] for name in given)], operator_attrs(**asdict(options)))


def attrs_of(call: relax.Call) -> QuantizedAttrs:
    """The attributes of a call."""
    return QuantizedAttrs(**{field.name: type(field.default)(call.attrs[field.name]) for field in fields(QuantizedAttrs)})  # pyright: ignore[reportOptionalSubscript]


def optional_of(call: relax.Call) -> dict[str, relax.Expr]:
    """The operands behind q, k and v by their names."""
    return dict(zip(attrs_of(call).names, call.args[3:], strict=True))


def dims_of(q: Sequence[Any], k: Sequence[Any], v: Sequence[Any], attrs: QuantizedAttrs) -> AttentionDims:
    """Sizes from the shapes of q and of the codes of k and v."""
    return AttentionDims(q[0], q[1], k[1], q[2], k[2], q[3], v[3] * (8 // attrs.v_bits))


def _infer(builder: Any, call: Any) -> Any:
    attrs = attrs_of(call)
    if len(call.args) != 3 + len(attrs.names) or not set(attrs.names) <= set(OPTIONAL):
        raise ValueError(f"{NAME}: expected q, k, v and '{attrs.given}', got {len(call.args)} operands")
    types = [arg.ty for arg in call.args]
    for name, ty, allowed, bits in zip("qkv", types, (("float32",), CODES, CODES), (8, attrs.k_bits, attrs.v_bits), strict=False):
        if not isinstance(ty, relax.TensorType) or ty.ndim != 4 or ty.shape is None or str(ty.dtype) not in allowed:
            raise ValueError(f"{NAME}: {name} has to be a tensor of four known dims in {' or '.join(allowed)}, is {ty}")
        if bits not in (4, 8) or bits == 4 and str(ty.dtype) != "uint8":
            raise ValueError(f"{NAME}: {bits} bits in {ty.dtype}; expected 8, or 4 in uint8")
    q, k, v = (list(ty.shape) for ty in types[:3])
    analyzer = tvm.sym.Analyzer()

    def agree(what: str, one: Any, other: Any) -> None:
        if isinstance(one, tirx.IntImm) and isinstance(other, tirx.IntImm) and not analyzer.can_prove_equal(one, other):
            raise ValueError(f"{NAME}: {what} differ: {int(one)} and {int(other)}")

    agree("batch sizes of q and k", q[0], k[0])
    agree("depths of q and k", q[3], k[3] * (8 // attrs.k_bits))
    for position, what in enumerate(("batch sizes", "heads", "lengths")):
        agree(f"{what} of k and v", k[position], v[position])
    for name, arg in optional_of(call).items():
        if name != "mask" and (arg.ty.ndim != 3 or str(arg.ty.dtype) not in (("float32",) if "scales" in name else CODES)):
            raise ValueError(f"{NAME}: {name} has to be [B, Hk, T], is {arg.ty}")
        for position, what in enumerate(("batch sizes", "heads", "lengths") if name != "mask" else ()):
            agree(f"{what} of k and {name}", k[position], arg.ty.shape[position])
    return relax.TensorType([*q[:3], dims_of(q, k, v, attrs).width], "float32")


def unpacked(emit: Any, codes: relax.Expr) -> relax.Expr:
    """[.., N] uint8 with two codes of 4 bits each -> [.., 2 N] uint8."""
    op, shape = relax.op, list(codes.ty.shape)
    low = emit(op.bitwise_and(codes, relax.const(np.uint8(15), "uint8")))
    high = emit(op.right_shift(codes, relax.const(np.uint8(4), "uint8")))
    return emit(op.reshape(emit(op.stack([low, high], axis=len(shape))), [*shape[:-1], shape[-1] * 2]))


def dequantized(emit: Any, call: Any, side: str) -> relax.Expr:
    """k or v in float32, by Relax operators."""
    op, attrs, optional = relax.op, attrs_of(call), optional_of(call)
    codes = call.args["qkv".index(side)]
    if getattr(attrs, f"{side}_bits") == 4:
        codes = unpacked(emit, codes)
    value = emit(op.astype(codes, "float32"))

    def column(name: str) -> relax.Expr:
        return emit(op.reshape(emit(op.astype(optional[name], "float32")), [*optional[name].ty.shape, 1]))

    if f"{side}_zeros" in optional:
        value = emit(op.subtract(value, column(f"{side}_zeros")))
    elif zero := getattr(attrs, f"{side}_zero"):
        value = emit(op.subtract(value, relax.const(float(zero), "float32")))
    return emit(op.multiply(value, column(f"{side}_scales"))) if f"{side}_scales" in optional else value


def dequantize(builder: Any, call: Any) -> relax.Call:
    """The attention of dequantised keys and values."""
    mask = optional_of(call).get("mask")
    return builder.normalize(plain.attention(call.args[0], *(dequantized(builder.emit, call, side) for side in "kv"), mask, **attrs_of(call).plain))


def decompose(builder: Any, call: Any) -> relax.Expr:
    """The same by Relax operators; what a target without a kernel runs."""
    return plain.decompose(builder, dequantize(builder, call))


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, optional: dict[str, np.ndarray] | None = None, **attrs: Any) -> np.ndarray:
    """The operator in numpy, in float64; arguments and result as those of `attention_quantized`."""
    options, optional = QuantizedAttrs(**attrs), optional or {}

    def floats(codes: np.ndarray, side: str) -> np.ndarray:
        if getattr(options, f"{side}_bits") == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        zero = optional[f"{side}_zeros"][..., None] if f"{side}_zeros" in optional else getattr(options, f"{side}_zero")
        scale = optional[f"{side}_scales"][..., None] if f"{side}_scales" in optional else 1.0
        return (codes.astype(np.float64) - zero) * scale

    return plain.reference(q, floats(k, "k"), floats(v, "v"), optional.get("mask"), **options.plain)


OPERATOR = register_operator(NAME, ("q", "k", "v", *OPTIONAL), _infer, decompose)
