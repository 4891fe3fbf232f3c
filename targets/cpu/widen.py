"""Codes widened to 16 bits before the loops of a kernel that reads every one of them many times: `vpmaddwd` then takes pairs of them as they are in memory.

for (block of vectors) in parallel:
    wide[16 elements] = x[16 elements]          # vpmovzxbw; the last vector overlaps the one before it
"""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import T
from ..common.fused import product, static
from .dot import Dot, vector
from .emit import tasks

_LANES = 16
#: vectors per task
_VECTORS = 256


def activations(x: Any, buffers: dict[Any, Any], dot: Dot, shape: tuple[Any, ...]) -> Any:
    """The elements of parameter x in another shape, as `dot` reads them; emits the loop that widens them where that is wider than they are."""
    if dot.activation == str(x.ty.dtype):
        return T.decl_buffer(shape, dot.activation, data=buffers[x].data)
    size = product(x.shape)
    source, wide, known = T.decl_buffer((size,), x.ty.dtype, data=buffers[x].data), T.alloc_buffer((size,), dot.activation), static(size)

    def vectors() -> None:
        total = T.ceildiv(size, T.int64(_LANES))
        with tasks(T.ceildiv(total, T.int64(_VECTORS)), known) as task, T.serial(T.min(T.int64(_VECTORS), total - task * _VECTORS)) as step:
            place = vector(T.bind(T.min((task * _VECTORS + step) * _LANES, size - _LANES)), _LANES)
            T.buffer_store(wide, T.cast(source[place], f"{dot.activation}x{_LANES}"), [place])

    def elements() -> None:
        with T.serial(size) as place:
            T.buffer_store(wide, T.cast(source[place], dot.activation), [place])

    if known is not None:
        (vectors if known >= _LANES else elements)()
    else:
        with T.If(size >= _LANES):
            with T.Then():
                vectors()
            with T.Else():
                elements()
    return T.decl_buffer(shape, dot.activation, data=wide.data)


def widening(elements: int, dot: Dot) -> float:
    """Cycles that `activations` takes: a load, a shuffle and a store per vector."""
    return elements / _LANES if dot.name == "wide" else 0.0
