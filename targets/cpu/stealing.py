"""Parallel loops whose iterations go to whichever thread is free.

TVM gives every thread an equal share of a loop, and all wait for the slowest: one whose core is shared with other work, or is a small one, holds up the others. Here a loop is cut into ranges, and
a thread claims them one by one: from the first of its own share on, in order, and behind those of its own what others have not begun.

    claims[ranges] = 0
    for first in ranges (parallel):
        if no thread has found all ranges claimed:
            for range in first, first + 1, ... (all of them, from the first again behind the last):
                if claims[range] was 0 until now:
                    for iteration in the range: ...
"""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import structural_map, tirx, tvm
from ..common.fused import static
from .llvm_text import with_functions

#: ranges of a loop, at most: so many a core, and so many on machines of few cores. A claim takes some 20 cycles
_PER_CORE, _FEWEST = 8, 32
_CLAIM = "tcompile_claim"
_LLVM = f"""
define linkonce_odr i32 @{_CLAIM}(ptr %place) alwaysinline nounwind {{
  %before = atomicrmw xchg ptr %place, i32 1 monotonic
  ret i32 %before
}}
"""


def steal_work(func: Any) -> Any:
    """The function with its parallel loops so."""
    target = (func.attrs or {}).get("target") or tvm.target.Target.current()
    most = max(_FEWEST, _PER_CORE * int(target.attrs["num-cores"]))
    body = structural_map(func.body, (tirx.For, lambda loop: _claimed(loop, most)))
    if body.same_as(func.body):
        return func
    return func.with_body(with_functions(body, _LLVM))


def _claimed(loop: Any, most: int) -> Any:
    if loop.kind != tirx.ForKind.PARALLEL or static(loop.extent) == 1:
        return loop
    kind, extent = str(loop.loop_var.ty.dtype), loop.extent
    known = static(extent)
    ranges = most if known is None else min(known, most)
    zero, one, count = tirx.const(0, kind), tirx.const(1, kind), tirx.const(ranges, kind)
    claims = tirx.decl_buffer((ranges + 1,), "int32", "claims")
    first, step, place, within = (tirx.Var(name, kind) for name in ("first", "step", "place", "within"))
    claim = tirx.call_extern("int32", _CLAIM, tirx.address_of(claims[place]))
    if known == ranges:
        inner: Any = tirx.SeqStmt([tirx.Bind(loop.loop_var, loop.min + place), loop.body])
    else:
        begin, end = tirx.Var("begin", kind), tirx.floordiv((place + one) * extent, count)
        work = tirx.SeqStmt([tirx.Bind(loop.loop_var, loop.min + begin + within), loop.body])
        inner = tirx.SeqStmt([tirx.Bind(begin, tirx.floordiv(place * extent, count)), tirx.For(within, zero, end - begin, tirx.ForKind.SERIAL, work)])
    free = tirx.const(0, "int32")
    found = tirx.Bind(place, tirx.Select(first + step < count, first + step, first + step - count))
    scan = tirx.For(step, zero, count, tirx.ForKind.SERIAL, tirx.SeqStmt([found, tirx.IfThenElse(claim == free, inner, None)]))
    over = tirx.BufferStore(claims, tirx.const(1, "int32"), [count])
    turn = tirx.IfThenElse(claims[count] == free, tirx.SeqStmt([scan, over]), None)
    each = tirx.Var("each", kind)
    clear = tirx.For(each, zero, count + one, tirx.ForKind.SERIAL, tirx.BufferStore(claims, free, [each]))
    return tirx.SeqStmt([tirx.AllocBuffer(claims), clear, tirx.For(first, zero, count, tirx.ForKind.PARALLEL, turn)])
