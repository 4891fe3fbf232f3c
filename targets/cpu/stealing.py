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
    return func.with_body(tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(_LLVM), body))


def _claimed(loop: Any, most: int) -> Any:
    if loop.kind != tirx.ForKind.PARALLEL or static(loop.extent) == 1:
        return loop
    kind, extent = str(loop.loop_var.ty.dtype), loop.extent
    known = static(extent)
    ranges = most if known is None else min(known, most)
    number = [tirx.const(value, kind) for value in range(2)]
    count = tirx.const(ranges, kind)
    claims = tirx.decl_buffer((ranges + 1,), "int32", "claims")
    first, step = tirx.Var("first", kind), tirx.Var("step", kind)
    place = tirx.Select(first + step < count, first + step, first + step - count)
    claim = tirx.call_extern("int32", _CLAIM, tirx.address_of(claims[place]))
    if known == ranges:
        work = tirx.Bind(loop.loop_var, place), loop.body
        inner: Any = tirx.SeqStmt(list(work))
    else:
        begin, end = tirx.floordiv(place * extent, count), tirx.floordiv((place + number[1]) * extent, count)
        inner = tirx.For(loop.loop_var, loop.min + begin, end - begin, tirx.ForKind.SERIAL, loop.body)
    zero = tirx.const(0, "int32")
    scan = tirx.For(step, number[0], count, tirx.ForKind.SERIAL, tirx.IfThenElse(claim == zero, inner, None))
    over = tirx.BufferStore(claims, tirx.const(1, "int32"), [count])
    turn = tirx.IfThenElse(claims[count] == zero, tirx.SeqStmt([scan, over]), None)
    each = tirx.Var("each", kind)
    clear = tirx.For(each, number[0], count + number[1], tirx.ForKind.SERIAL, tirx.BufferStore(claims, zero, [each]))
    return tirx.SeqStmt([tirx.AllocBuffer(claims), clear, tirx.For(first, number[0], count, tirx.ForKind.PARALLEL, turn)])
