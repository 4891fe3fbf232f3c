"""`tcompile.attention_int8`: attention whose scores are products of 8-bit codes, a scale to every row of the queries and of the keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from ..tvm import operator_attrs, register_operator, relax
from . import attention as plain
from .attention import AttentionAttrs, attrs_of
from .scaled_rows import INT8_MAX, LEAST, UINT8_ZERO

NAME = "tcompile.attention_int8"
#: the largest magnitude of queries' codes with which sums of two products fit 16 bits, in which CPUs without VNNI multiply
SHORT = 64


def attention_int8(
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    q_scales: relax.Expr,
    k_scales: relax.Expr,
    mask: relax.Expr | None,
    largest: int,
    attrs: AttentionAttrs,
) -> relax.Call:
    """q: int8 [B, H, S, D], k: uint8 [B, Hk, T, D], v: float32 [B, Hk, T, E], q_scales: float32 [B, H, S], k_scales: float32 [B, Hk, T] -> float32 [B, H, S, E].

    A query is q * q_scales, a key (k - 128) * k_scales; their products are exact. largest: the largest magnitude in q; mask, attrs: as those of `attention`. With layout="BSHD" scales
    have the order of their rows, too.
    """
    operands = [q, k, v, q_scales, k_scales, *([] if mask is None else [mask])]
    return relax.Call(OPERATOR, operands, operator_attrs(**asdict(attrs), largest=largest))


def largest_of(call: relax.Call) -> int:
    """The largest magnitude of the queries' codes."""
    return int(call.attrs["largest"])  # pyright: ignore[reportOptionalSubscript]


def dequantize(builder: Any, call: Any) -> relax.Call:
    """The attention of the floats."""
    emit, op = builder.emit, relax.op
    q, k, v, *scales = call.args[:5]
    floats = [emit(op.astype(q, "float32")), emit(op.subtract(emit(op.astype(k, "float32")), relax.const(float(UINT8_ZERO), "float32")))]
    q, k = (emit(op.multiply(value, emit(op.expand_dims(scale, -1)))) for value, scale in zip(floats, scales, strict=True))
    return builder.normalize(plain.attention(q, k, v, call.args[5] if len(call.args) == 6 else None, **asdict(attrs_of(call))))


def _infer(builder: Any, call: Any) -> Any:
    if len(call.args) not in (5, 6):
        raise ValueError(f"{NAME}: expected q, k, v, two scales and at most a mask, got {len(call.args)} operands")
    for name, arg, dtype, dims in zip(
        ("q", "k", "v", "q_scales", "k_scales"), call.args, ("int8", "uint8", *("float32",) * 3), (4, 4, 4, 3, 3), strict=False
    ):
        if not isinstance(arg.ty, relax.TensorType) or arg.ty.ndim != dims or arg.ty.shape is None or str(arg.ty.dtype) != dtype:
            raise ValueError(f"{NAME}: {name} has to be a tensor of {dims} known dims in {dtype}, is {arg.ty}")
    return plain.infer(NAME, call.args[:3], attrs_of(call), "float32")


def decompose(builder: Any, call: Any) -> relax.Expr:
    """The same by Relax operators; what a target without a kernel runs."""
    return plain.decompose(builder, dequantize(builder, call))


def codes(rows: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales [...]) of rows [..., D] in numpy, as `scaled_rows` makes them: integers up to `largest`, ties to even."""
    scales = np.maximum(np.abs(rows).max(-1, initial=0.0) * np.float32(1 / largest), np.float32(LEAST)).astype("float32")
    return np.rint(rows / scales[..., None]), scales


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, largest: int = INT8_MAX, **attrs: Any) -> Any:
    """The attention of float rows whose scores are those of their codes, in float64; arguments as those of `attention`."""
    (q, q_scales), (k, k_scales) = codes(q, largest), codes(k, INT8_MAX)
    return plain.reference(q * q_scales[..., None].astype(np.float64), k * k_scales[..., None].astype(np.float64), v, mask, **attrs)


OPERATOR = register_operator(NAME, ("q", "k", "v", "q_scales", "k_scales", "mask"), _infer, decompose)
