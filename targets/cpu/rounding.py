"""Codes of eight bits without an instruction that rounds: the last step of every quantized kernel.

    cast(clip(round(x), low, high))  ->  low byte of the bits of (clip(x, low, high) + 1.5 * 2**23)

Float32 numbers of that size are whole, so that the sum rounds to nearest, ties to even, as `round` does, and the last bits of its significand are the code in two's complement. Clipping goes before
rounding, as the bounds are whole numbers themselves. `vrndscaleps` and `vcvttps2dq` are three operations of vectors; the sum is one, on any machine. NaN, which has no code, becomes the low byte of
its bits (0 for those that arithmetic makes).
"""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import structural_map, structural_walk, tirx
from .math import constant_of

_WHOLE = 1.5 * 2.0**23


def round_while_casting(body: Any) -> Any:
    """A kernel's body with casts of clipped and rounded float32 to codes of eight bits as above; see the module."""
    bound: dict[Any, Any] = {}
    structural_walk(body, (tirx.Bind, lambda bind: bound.__setitem__(bind.var, bind.value)))

    def cast(node: Any) -> Any:
        dtype, source = str(node.ty.dtype), str(node.value.ty.dtype)
        if not dtype.startswith(("uint8", "int8")) or not source.startswith("float32"):
            return node
        clipped = _clipped(node.value, bound)
        if clipped is None:
            return node
        whole = "int32" + source.removeprefix("float32")
        return tirx.Cast(dtype, tirx.reinterpret(whole, clipped + tirx.const(_WHOLE, source)))

    return structural_map(body, (tirx.Cast, cast))


def _clipped(value: Any, bound: dict[Any, Any]) -> Any:
    """x, clipped, of an x that is rounded and then clipped to whole numbers that eight bits hold; None where `value` is something else."""
    limits: list[tuple[Any, Any]] = []
    value = _resolved(value, bound)
    while isinstance(value, (tirx.Max, tirx.Min)):
        limit, other = (value.a, value.b) if constant_of(value.a) is not None else (value.b, value.a)
        number = constant_of(limit)
        if number is None or not -128 <= number <= 255 or number != int(number):
            return None
        limits.append((type(value), limit))
        value = _resolved(other, bound)
    if len({kind for kind, _ in limits}) != 2 or getattr(getattr(value, "op", None), "name", "") != "tirx.nearbyint":
        return None
    value = value.args[0]
    for kind, limit in reversed(limits):
        value = kind(value, limit)
    return value


def _resolved(value: Any, bound: dict[Any, Any]) -> Any:
    while isinstance(value, tirx.Var) and value in bound:
        value = bound[value]
    return value
