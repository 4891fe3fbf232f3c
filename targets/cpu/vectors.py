"""Which axis of a nest becomes vectors, and whether it can."""

from __future__ import annotations

import math
from typing import Any

from ...compiler.tvm import structural_walk, tirx, tvm
from ..common.fused import loads, static, variables_of
from ..common.nests import Axis, Nest
from ..common.refine import coefficients
from .math_functions import VECTOR_CALLS


def extent_of(axis: Axis) -> int:
    """The extent, or a guess for a dynamic one."""
    return static(axis.extent) or 256


def element_bits(dtype: str) -> int:
    return max(8, tvm.DataType(dtype).bits)


def strides(nest: Nest, axis: Axis) -> list[tuple[int | None, bool]]:
    """(stride, is a wide access) of every access along an axis; None for a stride that is not a known number."""
    found = []
    for step in nest.steps:
        wide = step.wide and not step.combine
        accesses = [(step.address, wide)] if step.address is not None else []
        accesses += [(load.indices[0], step.wide) for load in loads(step.value)]
        for address, is_wide in accesses:
            linear = coefficients(address, [axis.var])
            found.append((static(linear[0]) if linear else None, is_wide))
    return found


def vector_axis(nest: Nest) -> Axis | None:
    """The axis along which most accesses are contiguous; stores and wide accesses weigh more."""

    def score(axis: Axis) -> float:
        total = 0.0
        for stride, wide in strides(nest, axis):
            total += (4.0 if wide else 1.0) * {1: 2.0, 0: 0.5, 2: 0.0}.get(stride, -1.0)
        for step in nest.steps:
            if step.address is not None:
                linear = coefficients(step.address, [axis.var])
                total += 4.0 if linear and static(linear[0]) == 1 and (step.wide or nest.is_map) else 0.0
        return total + 4.0 * min(0.0, math.log2(extent_of(axis) / 8.0))

    return max(nest.axes, key=score, default=None)


def vectorizable(nest: Nest, axis: Axis) -> bool:
    """No step branches by lane or calls what has no vector form; TVM would take such a statement apart, bindings not."""
    varying = {axis.var} | {step.ref for step in nest.steps}
    blocked = False

    def visit(call: Any) -> None:
        nonlocal blocked
        if getattr(call.op, "name", "") == "prim.if_then_else":
            blocked = blocked or bool(varying & variables_of(call.args[0])) or bool(loads(call.args[0]))
        else:
            blocked = blocked or call.op.name not in VECTOR_CALLS

    for step in nest.steps:
        structural_walk(step.value, (tvm.ir.Call, visit))
    return not blocked


def occurrences(expr: Any) -> list[Any]:
    found: list[Any] = []
    structural_walk(expr, (tirx.Var, found.append))
    return found


def power_below(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << max(0, size.bit_length() - 1)
