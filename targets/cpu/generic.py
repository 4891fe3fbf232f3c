"""The generic scheduler: vector code for every PrimFunc that no template takes.

What can be read as a chain of stages (element-wise code, data movement, reductions, softmax and normalisations, pooling) is planned as loop nests and emitted anew. What can
not (sort, scan, scatter, tuple reductions) keeps its loops, the outer ones made parallel where they carry no dependence. Nothing is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import IRBuilder, T, s_tir, tirx, tvm
from ..base import Target
from ..common.fused import static
from ..common.nests import Flat, Nest, group
from ..common.refine import refine
from ..common.stages import Unreadable, inline, read_stages
from .emit import ATTRS, declare
from .loops import Emitter
from .loops_base import SERIAL_WORK


@dataclass(frozen=True)
class Scheduled:
    """A function and the rule that scheduled it: "map", "row reduction", "column reduction" (joined by "+" over its nests), "parallel loops: why" or "as is: why"."""

    func: tirx.PrimFunc
    rule: str


def schedule(func: tirx.PrimFunc, target: Target) -> Scheduled:
    """Schedule any s_tir PrimFunc; its parameters stay as they are."""
    if "tcompile.scheduled" in (func.attrs or {}):
        return Scheduled(func, "as is: written by hand")
    try:
        outputs = set(func.params)
        flat = Flat()
        nests = [simple for nest in group(inline(read_stages(func), outputs), outputs, flat) for simple in refine(nest)]
        emitted, rule = _emit(func, nests, flat, target)
        return Scheduled(emitted, rule)
    except (Unreadable, tvm.error.InternalError) as reason:
        # an internal error is TVM refusing what was planned: slower code is better than none, and the rule says why
        return _parallel_loops(func, str(reason).splitlines()[0])


def _emit(func: tirx.PrimFunc, nests: list[Nest], flat: Flat, target: Target) -> tuple[tirx.PrimFunc, str]:
    rules: list[str] = []
    used = {step.target for nest in nests for step in nest.steps if step.address is not None}
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr(dict(ATTRS))
        buffers = declare(func.params, {})
        # Relax's reshape analysis wants every function to start with a block
        with T.sblock("root"):
            views = {}
            for source, planned in flat.buffers.items():
                if source in buffers:
                    views[planned] = T.decl_buffer(tuple(planned.shape), planned.ty.dtype, data=buffers[source].data)
                elif planned in used:
                    # TVM turns a temporary of booleans into vectors of int8, and then trips over its use as a condition
                    dtype = "int8" if str(planned.ty.dtype) == "bool" else planned.ty.dtype
                    views[planned] = T.alloc_buffer(tuple(planned.shape), dtype)
            for nest in nests:
                emitter = Emitter(nest, views, target)
                emitter.emit()
                rules.append(emitter.rule)
    return builder.get(), "+".join(dict.fromkeys(rules))  # pyright: ignore[reportReturnType]


def _parallel_loops(func: tirx.PrimFunc, reason: str) -> Scheduled:
    """Make the outermost loop of every block parallel where that is legal, and leave the rest."""
    result, changed = func, False
    try:
        sch = s_tir.Schedule(func, error_render_level="none")
        for block in sch.get_child_blocks(sch.get_sblock("root")):
            loops = sch.get_loops(block)
            if loops and math.prod(static(sch.get(loop).extent) or 256 for loop in loops) >= SERIAL_WORK:
                changed |= _try_parallel(sch, loops[0])
        if changed:
            result = sch.mod["main"]
            for name, value in (func.attrs or {}).items():
                result = result.with_attr(name, value)
    except (s_tir.ScheduleError, tvm.error.InternalError):
        pass  # opaque code: not for the scheduler at all
    return Scheduled(result.with_attr("tcompile.scheduled", True), f"{'parallel loops' if changed else 'as is'}: {reason}")


def _try_parallel(sch: s_tir.Schedule, loop: Any) -> bool:
    try:
        sch.parallel(loop)
    except (s_tir.ScheduleError, tvm.error.InternalError):
        return False  # the loop carries a dependence
    return True
