"""What keys or values are before a dequantisation: integer codes, and the scales and zeros that make floats of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.dialect.attention_quantized import CODES
from ...compiler.tvm import is_constant, relax, tirx
from .graph import Graph, is_unit, scalar, shape
from .match import Miss

#: codes of fewer bytes are read, as long as a dequantised operand would be written
_INTEGERS = (*CODES, "int32")


@dataclass(frozen=True)
class Codes:
    """(codes - zero) * scales. expr: [B, Hk, T, N] codes, two to a byte where bits is 4. zero: one number; zeros: [B | 1, Hk | 1, T | 1, 1], or None. scales: each broadcasts to
    [B, Hk, T, N]: `channels` do not change from token to token, `tokens` are one number for all of a token's channels."""

    expr: Any
    bits: int = 8
    zero: int = 0
    zeros: Any = None
    tokens: tuple[Any, ...] = field(default=())
    channels: tuple[Any, ...] = field(default=())


def codes_of(graph: Graph, operand: Any) -> Codes | Miss | None:
    """The codes of an operand [B, Hk, T, N]; None when it is no dequantisation, a Miss when it is one that this does not know."""
    expr, dims = graph.root(operand), shape(operand)
    scales: list[Any] = []
    zero: Any = None
    if dims is None or len(dims) != 4:
        return None
    while (call := graph.call(expr)) is not None and str(expr.ty.dtype) not in CODES:
        name, args = graph.name(call), [graph.root(arg) for arg in call.args if isinstance(arg.ty, relax.TensorType)]
        if name == "multiply" and zero is None:
            wide = next((place for place in (0, 1) if _carries_codes(graph, args[place])), None)
            if wide is None or not graph.same_dims(shape(args[wide]) or (), dims):
                return None
            scales.append(args[1 - wide])
            expr = args[wide]
        elif name == "subtract" and zero is None:
            expr, zero = args[0], args[1]
        elif name == "dequantize" and zero is None and not is_constant(args[0]):
            axis = int(call.attrs.axis)
            scales.append(_along(args[1], axis))
            expr, zero = args[0], _along(args[2], axis)
        elif name in ("astype", "reshape") and graph.same_dims(shape(args[0]) or (), dims):
            if "int" in str(expr.ty.dtype) and str(args[0].ty.dtype) not in _INTEGERS:
                return None  # a float that is cut off
            expr = args[0]
        else:
            break
    bits, packed = _packed(graph, expr)
    if str(packed.ty.dtype) not in CODES or is_constant(packed):
        return None
    if zero is not None and (number := scalar(zero if is_constant(zero) else None)) is not None:
        if number != int(number) or abs(number) > 255:
            return Miss(f"a zero point of {number:g}")
        signed = _before_shift(graph, packed)
        found = Codes(packed, bits, int(number)) if signed is None else Codes(signed, bits, int(number) - 128)
        return _sorted(graph, found, scales, dims)
    found = Codes(packed, bits) if zero is None else _with_zeros(graph, Codes(packed, bits), zero)
    return found if isinstance(found, Miss) else _sorted(graph, found, scales, dims)


def _carries_codes(graph: Graph, expr: Any) -> bool:
    """Codes are where this comes from, by what a dequantisation is made of."""
    expr = graph.root(expr)
    while (call := graph.call(expr, "astype", "subtract", "multiply", "reshape", "dequantize")) is not None and str(expr.ty.dtype) not in CODES:
        expr = graph.root(call.args[0])
    return str(expr.ty.dtype) in CODES


def _packed(graph: Graph, expr: Any) -> tuple[int, Any]:
    """(bits, the tensor of codes): low and high halves of bytes that were laid side by side are those bytes."""
    flat, wide = graph.call(expr, "reshape"), shape(expr)
    joined = graph.call(flat.args[0], "stack", "concat") if flat is not None else None
    parts = graph.fields(joined.args[0]) if joined is not None else []
    if joined is None or wide is None or len(parts) != 2:
        return 8, expr
    if graph.name(joined) == "concat":
        parts = [_before_unit(graph, part) for part in parts]
    low, high = (graph.call(part) for part in parts)
    if low is None or high is None or [graph.name(low), graph.name(high)] != ["bitwise_and", "right_shift"]:
        return 8, expr
    whole, numbers = graph.root(low.args[0]), [scalar(graph.root(call.args[1])) for call in (low, high)]
    narrow = shape(whole)
    if narrow is None or str(whole.ty.dtype) != "uint8" or not graph.root(high.args[0]).same_as(whole) or numbers != [15.0, 4.0]:
        return 8, expr
    behind = int(joined.attrs.axis) in (-1, len(narrow)) and graph.same_dims([*narrow[:-1], narrow[-1] * 2], wide)
    return (4, whole) if behind else (8, expr)


def _before_unit(graph: Graph, expr: Any) -> Any:
    """What got a last dim of 1."""
    call, own = graph.call(expr, "expand_dims", "reshape"), shape(expr)
    before = shape(graph.root(call.args[0])) if call is not None else None
    return graph.root(call.args[0]) if call is not None and own and before and is_unit(own[-1]) and graph.same_dims(own[:-1], before) else expr


def _before_shift(graph: Graph, codes: Any) -> Any:
    """The int8 codes to which 128 was added to make these uint8 ones (by the pass `recognize-qdq`), None for others."""
    narrowed = graph.call(codes, "astype")
    added = graph.call(narrowed.args[0], "add") if narrowed is not None else None
    widened = graph.call(added.args[0], "astype") if added is not None and scalar(graph.root(added.args[1])) == 128.0 else None
    source = graph.root(widened.args[0]) if widened is not None else None
    return source if source is not None and str(source.ty.dtype) == "int8" else None


def _along(parameter: Any, axis: int) -> Any:
    """A constant scale or zero of `relax.dequantize` as it broadcasts over four dims."""
    if not is_constant(parameter):
        return parameter
    values = parameter.value.numpy()
    return relax.const(values.reshape([-1 if place == axis % 4 else 1 for place in range(4)]) if values.ndim else values, str(parameter.ty.dtype))


def _narrow(graph: Graph, parameter: Any) -> Any:
    """A scale or zero without the channels over which it is repeated."""
    parameter = graph.root(parameter)
    while (call := graph.call(parameter, "repeat", "broadcast_to", "astype")) is not None:
        source = graph.root(call.args[0])
        before, after = shape(source), shape(parameter)
        if graph.name(call) == "astype" and str(source.ty.dtype) not in _INTEGERS:
            break
        if graph.name(call) == "repeat" and not (before and after and is_unit(before[-1]) and graph.same_dims(before[:-1], after[:-1])):
            break
        parameter = source
    return parameter


def _aligned(parameter: Any) -> list[Any] | None:
    dims = shape(parameter)
    return None if dims is None or len(dims) > 4 else [tirx.const(1, "int64")] * (4 - len(dims)) + dims


def _with_zeros(graph: Graph, codes: Codes, zero: Any) -> Codes | Miss:
    zero = _narrow(graph, zero)
    dims = _aligned(zero)
    if dims is None or not is_unit(dims[3]):
        return Miss("zero points that change from channel to channel")
    if str(zero.ty.dtype) not in CODES:
        return Miss(f"zero points of type {zero.ty.dtype}")
    return Codes(codes.expr, codes.bits, zeros=zero)


def _sorted(graph: Graph, codes: Codes, scales: Sequence[Any], dims: Sequence[Any]) -> Codes | Miss:
    tokens, channels = [], []
    for scale in scales:
        narrow = _narrow(graph, scale)
        own = _aligned(narrow)
        if own is None or not all(is_unit(dim) or graph.equal(dim, size) for dim, size in zip(own, dims, strict=True)):
            return Miss("scales of unknown shape")
        if str(narrow.ty.dtype) not in ("float32", "float16"):
            return Miss(f"scales of type {narrow.ty.dtype}")
        if is_unit(own[2]):
            channels.append(narrow)
        elif is_unit(own[3]):
            tokens.append(narrow)
        else:
            return Miss("scales that change from token to token and from channel to channel")
    return Codes(codes.expr, codes.bits, codes.zero, codes.zeros, tuple(tokens), tuple(channels))
