"""Memory planning: intermediate tensors share storage by lifetime; static shapes only need one allocation per slot."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from ..compiler.program import Program
from ..compiler.tvm import relax, tirx
from .base import Pass, PassContext


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Turns kernel calls into destination-passing form and assigns storage. Reports planned bytes, the bytes without reuse and the peak of live tensors."""

    name: ClassVar[str] = "plan_memory"

    def run(self, program: Program, context: PassContext) -> Program:
        transform = relax.transform
        module = program.module
        for step in (
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
        ):
            module = step(module)
        unplanned = _storage_bytes(module["main"], "relax.builtin.alloc_tensor")
        module = transform.StaticPlanBlockMemory()(module)
        planned = _storage_bytes(module["main"], "relax.memory.alloc_storage")
        context.matched(storages=planned[1], tensors=unplanned[1])
        context.note(
            f"planned_bytes={planned[0]} unshared_bytes={unplanned[0]} dynamic_tensors={len(_calls(module['main'], 'relax.builtin.alloc_tensor'))}"
        )
        return program.with_module(module)


def _calls(function: Any, op: str) -> list[Any]:
    found: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == op:
            found.append(expr)

    relax.analysis.post_order_visit(function, visit)
    return found


def _storage_bytes(function: Any, op: str) -> tuple[int, int]:
    """(bytes of the allocations with static size, how many)."""
    total = count = 0
    for call in _calls(function, op):
        dims = [int(dim) if isinstance(dim, tirx.IntImm) else None for dim in call.args[0]]
        if None in dims:
            continue
        width = 1 if op.endswith("alloc_storage") else _width(str(call.args[1].value))
        total += prod(dim for dim in dims if dim is not None) * width
        count += 1
    return total, count


def _width(dtype: str) -> int:
    digits = "".join(char for char in dtype if char.isdigit())
    return max(1, int(digits or "8") // 8)
