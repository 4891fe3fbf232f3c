"""Maps that put a few planes side by side (an image from channels first to channels last): vectors of every plane, and one store of all of them mixed.

Without it every lane would be stored by itself: one plane after the other, each with a distance of as many elements as there are planes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...compiler.tvm import T, tirx
from ..common.fused import static
from ..common.nests import Axis, Nest
from ..common.refine import coefficients
from .dot import vector

if TYPE_CHECKING:
    from .loops import Emitter

#: planes whose vectors stay in registers while they are mixed
MOST = 4


def planes(nest: Nest, axis: Axis) -> Axis | None:
    """The short axis along which the only store of a map is contiguous, while vectors along `axis` are as far apart as the short one is long; None where there is none."""
    if not nest.is_map or static(axis.extent) is None:
        return None
    *values, last = nest.steps
    if last.address is None or last.dtype == "bool" or any(step.address is not None for step in values):
        return None
    for short in nest.axes:
        count = static(short.extent)
        if short is axis or count is None or not 2 <= count <= MOST:
            continue
        linear = coefficients(last.address, [short.var, axis.var])
        if linear and [static(factor) for factor in linear[:2]] == [1, count]:
            return short
    return None


def mixed_tile(emitter: Emitter, rows: dict[Any, Any], base: Any, short: Axis) -> None:
    """One vector of every plane from position `base` of the emitter's axis on, stored together."""
    steps, lanes, count = list(emitter.nest.steps), emitter.lanes, static(short.extent)
    assert emitter.axis is not None and count is not None
    last, axis = steps[-1], emitter.axis
    # TVM keeps temporaries of bfloat16 in float32
    kind = "uint16" if last.dtype == "bfloat16" else last.dtype
    parts = T.alloc_buffer((count * lanes,), kind)
    for plane in range(count):
        emitter.share(steps, lanes)

        def body(position: Any, slot: Any) -> None:
            here = {**rows, short.var: tirx.const(plane, "int64"), axis.var: position}  # noqa: B023
            for step in steps:
                value = emitter.value(step, here, slot)
                if step is last:
                    T.buffer_store(parts, value if kind == last.dtype else T.reinterpret(kind, value), [slot + plane * lanes])  # noqa: B023
                else:
                    emitter.know(step, value, slot)

        emitter.vector(base, 1, body)
    order = [tirx.const(plane * lanes + lane, "int32") for lane in range(lanes) for plane in range(count)]
    mixed = tirx.Shuffle([parts[vector(T.int64(plane * lanes), lanes)] for plane in range(count)], order)
    address = emitter.address(last, {**rows, short.var: tirx.const(0, "int64"), axis.var: base})
    value = mixed if kind == last.dtype else T.reinterpret(f"{last.dtype}x{count * lanes}", mixed)
    T.buffer_store(emitter.views[last.target], value, [vector(address, count * lanes)])
