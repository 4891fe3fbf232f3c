"""Grouped GEMM template (a mixture of experts): y [S, N] = epilogue(x [S, K] @ weight [owner[row], K, N]), rows of one owner next to each other.

    for (mo, jo) in parallel:                    # mc rows x one panel of NR = nv * lanes columns
        row = first of the chunk
        while row in the chunk:
            e = owner[row]; count = rows from here on of the same owner
            for io in count / mr:                # whole tiles, then smaller ones for what is left
                acc[i][v] += x[row + i, k] * panel[e][jo][k][v]
                y = epilogue(acc)
            row += count

Every (chunk, panel) has as many rows and columns as any other, so threads share the work evenly however rows are spread over experts. Weights are packed per expert; only
those of owners are read. Rows without an owner (e = E) take zeros through the epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, static
from ..common.ops_linear import grouped_operands
from .dot import dot_for, dot_kind
from .emit import Accumulators, kernel
from .gemm import Gemm, GemmWorkload, pack_gemm
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule, every
from .selection import Number
from .template import Kernel, Packing

#: rows assumed where they are known at run time only
_GUESS = 32
#: tiles for fewer rows than a whole one: few tokens per expert are common
_SMALL = (4, 3, 2, 1)


@dataclass(frozen=True)
class GroupedWorkload:
    """M rows (None: known only at run time) spread over E experts of K x N. kind: of the product, see `dot.dot_kind`."""

    experts: int
    m: int | None
    k: int
    n: int
    epilogue: str
    kind: str = "f32"

    def __str__(self) -> str:
        return f"grouped gemm {'' if self.kind == 'f32' else f'{self.kind} '}{self.m}x{self.k}x{self.n} of {self.experts}"

    @property
    def active(self) -> int:
        """Experts that have rows, at most."""
        return min(self.m or _GUESS, self.experts)

    def dense(self) -> GemmWorkload:
        """The GEMM of as many batches as experts have rows, all equally many."""
        return GemmWorkload(self.active, -(-(self.m or _GUESS) // self.active), self.k, self.n, True, self.epilogue, self.kind)


class GroupedGemm:
    """See the module."""

    name = "grouped_gemm"

    def workload(self, fused: Fused, constants: frozenset[int]) -> GroupedWorkload:
        if fused.core["op"] != "grouped_matmul":
            raise Unfusable("not a grouped product")
        x, weight, _ = grouped_operands(fused)
        if fused.param_index(weight) not in constants:
            raise Unfusable("weights are not constant")
        experts, k, n = (static(dim) for dim in weight.shape)
        if experts is None or k is None or n is None:
            raise Unfusable("a constant of unknown size")
        return GroupedWorkload(experts, static(x.shape[0]), k, n, fused.epilogue_text(), dot_kind((x, weight), fused.accumulator))

    def space(self, workload: GroupedWorkload, target: Target) -> Sequence[GemmSchedule]:
        return every(GemmWorkload(1, workload.m, workload.k, workload.n, True, workload.epilogue, workload.kind), target)

    def features(self, workload: GroupedWorkload, schedule: GemmSchedule, target: Target) -> KernelFeatures:
        found = Gemm().features(workload.dense(), replace(schedule, mc=0), target)
        return replace(found, dram_bytes=found.dram_bytes * workload.active)

    def build(self, fused: Fused, workload: GroupedWorkload, schedule: GemmSchedule, target: Target) -> Kernel:
        nr, dot = schedule.nv * schedule.lanes, dot_for(workload.kind, target)
        x, weight, owner = grouped_operands(fused)
        position = fused.param_index(weight)
        assert position is not None
        one = pack_gemm(position, workload.k, workload.n, nr, dot)

        def pack(weights: np.ndarray) -> np.ndarray:
            return np.stack([one.pack(each) for each in weights])

        packing = Packing(position, (workload.experts, *one.shape), pack, f"grouped {one.key}")
        with kernel(fused, {position: packing.shape}, dot) as (builder, buffers):
            flat = T.decl_buffer(tuple(x.shape), dot.activation, data=buffers[x].data)
            k, n = T.int64(workload.k), T.int64(workload.n)
            operands = GemmOperands([], [x.shape[0]], k, n, flat, lambda row: lambda k: (row, k), buffers[weight], True, dot)
            _Emitter(fused, buffers, schedule, operands, buffers[owner], workload.experts).emit()
        return Kernel(builder.get(), (packing,))


class _Emitter(GemmEmitter):
    """A GEMM whose chunks of rows are cut into runs of one owner."""

    def __init__(self, fused: Fused, buffers: Any, schedule: GemmSchedule, operands: GemmOperands, owner: Any, experts: int):
        super().__init__(fused, buffers, schedule, operands)
        self.owner, self.experts = owner, experts

    def _panel(self, batch: Any, jo: Any) -> Any:
        return None

    def _rows(self, batch: Any, chunk: Any, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        mc = self.schedule.mc
        last = T.bind(T.min((chunk + 1) * T.int64(mc), self.m) if mc else self.m)
        row, end = Number(chunk * T.int64(mc) if mc else T.int64(0)), Number()
        with T.While(row.now < last):
            start = T.bind(row.now)
            expert = T.bind(self.owner[start])
            end.set(start + 1)
            with T.While(tirx.And(end.now < last, self.owner[T.min(end.now, last - 1)] == expert)):
                end.add(1)
            count = T.bind(end.now - start)
            with T.If(expert < T.int32(self.experts)):
                with T.Then():
                    self._run(batch, start, count, jo, self._weights(T.bind(T.cast(expert, "int64")), jo), columns, limit)
                with T.Else(), T.serial(count) as i:
                    self._tile(batch, start + i, 1, jo, None, columns, limit)
            row.set(start + count)

    def _weights(self, expert: Any, jo: Any) -> Any:
        lanes = self.schedule.lanes
        return lambda k, v: self.dot.weights(lambda place: self.b[expert, jo, k, place], self.nr, v, lanes)

    def _run(self, batch: Any, first: Any, count: Any, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        """The rows of one expert: tiles of mr, and of ever fewer for what is left."""
        mr = self.schedule.mr
        done = T.int64(0)
        for size in sorted({mr, -(-mr // 2), *(size for size in _SMALL if size < mr)}, reverse=True):
            tiles = T.bind(T.floordiv(count - done, T.int64(size)))
            with T.serial(tiles) as io:
                self._tile(batch, first + done + io * T.int64(size), size, jo, panel, columns, limit)
            done = T.bind(done + tiles * T.int64(size))

    def _products(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, nv: int) -> tuple[Any, Accumulators]:
        if panel is not None:
            return super()._products(batch, row, mr, jo, panel, nv)
        zeros = Accumulators(mr, nv, self.schedule.lanes, self.dot)
        zeros.fill()
        return T.bind(row), zeros
