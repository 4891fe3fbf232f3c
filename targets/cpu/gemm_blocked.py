"""Emits the GEMM template with blocks of K, for weights of which the second-level cache holds no panel beside the next one and a chunk of rows:

    for (chunk, group) in parallel:              # mc rows x nc panels of NR = nv * lanes columns
        sums[nc][mc][NR] = 0
        for ko in K / kc:
            for jo in group:
                for io in mc / mr:               # one register tile: mr x nv accumulators
                    acc = A[io, ko] @ B[ko, jo]  # and every few steps a line of the next block of B is prefetched
                    sums[jo, io] += acc          # behind the last block of K: C = epilogue(sums[jo, io] + acc)

A block of rows, two blocks of B and the sums share the cache, and rows come from further away once a group instead of once a panel. After Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication" (2008), with sums beside the output, so that epilogues run on them, and rows where they are: copies of them cost more than they gained (1.05 to 1.1 of the time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...compiler.tvm import T
from ..common.fused import Fused, static
from .dot import splat, vector
from .emit import Accumulators, store_tile, tasks, with_columns
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule
from .prefetch import LINE, Ahead, Once, asking, lines_of, share


def emitter(
    fused: Fused,
    buffers: dict[Any, Any],
    schedule: GemmSchedule,
    operands: GemmOperands,
    ahead: Ahead | None,
    once: Once | None,
    streams: Sequence[Any],
) -> GemmEmitter:
    """The emitter for a schedule; ahead, once, streams: see `GemmEmitter`."""
    if schedule.kc:
        return BlockedEmitter(fused, buffers, schedule, operands)
    return GemmEmitter(fused, buffers, schedule, operands, ahead, once, streams)


class BlockedEmitter(GemmEmitter):
    """See the module. Float32 (weights may be bfloat16, K is even then), constant weights, all sizes known."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: GemmSchedule, operands: GemmOperands):
        super().__init__(fused, buffers, schedule, operands)
        sizes = [static(size) for size in (self.m, self.k, self.n)]
        assert operands.packed and None not in sizes
        self.sizes: list[int] = sizes  # pyright: ignore[reportAttributeAccessIssue]
        self.ahead = lines_of([int(dim) for dim in self.b.shape], self.b)

    def emit(self) -> None:
        m, k, n = self.sizes
        lanes, nc = self.schedule.lanes, self.schedule.nc
        steps, kc = self.dot.words(k), self.dot.words(self.schedule.kc)
        mc = min(self.schedule.mc or m, m)
        panels, blocks = -(-n // self.nr), -(-steps // kc)
        groups = -(-panels // nc)
        self.lead = []
        with tasks(T.int64(-(-m // mc) * groups), m * k * n) as task:
            self.chunk, self.first = T.bind(T.floordiv(task, groups)), T.bind(T.floormod(task, groups) * nc)
            self.count = T.bind(T.min(T.int64(nc), panels - self.first))
            self.start = T.bind(self.chunk * mc)
            self.sums = T.alloc_buffer((nc, mc, self.nr), "float32")
            with T.serial(T.int64(nc)) as jo, T.serial(T.int64(mc)) as row, T.serial(T.int64(self.schedule.nv)) as v:
                T.buffer_store(self.sums, splat(self.dot.zero(), lanes), [jo, row, vector(v * lanes, lanes)])
            with T.serial(T.int64(blocks - 1)) as ko:
                self._block(ko, kc, last=False)
            self._block(T.int64(blocks - 1), steps - (blocks - 1) * kc, last=True)

    def _block(self, ko: Any, size: int, last: bool) -> None:
        """One block of K, of so many steps, for all panels and rows of the task."""
        self.ko, self.size, self.last = ko, size, last
        with T.serial(self.count) as self.jo:
            panel = T.bind(self.first + self.jo)
            weights = self._packed(panel, T.bind(ko * self.dot.words(self.schedule.kc)), size)
            with_columns(panel, self.sizes[2], self.nr, lambda columns: self._rows(T.int64(0), self.chunk, panel, weights, columns, None))

    def _next(self, jo: Any) -> Callable[[Any], None]:
        """Asks for a line of the block of B that follows: of the next panel, of the next block of K, or of the next task."""
        more = self.jo + 1 < self.count
        panel = T.bind(jo + 1 if self.last else T.if_then_else(more, jo + 1, self.first))
        ko = T.bind(T.if_then_else(more, self.ko, T.int64(0) if self.last else self.ko + 1))
        return lambda line: self.ahead(panel, ko * (self.packing.words(self.schedule.kc) * self.nr // LINE) + line)

    def _tile(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        lanes, nv = self.schedule.lanes, -(-columns // self.schedule.lanes)
        start = T.bind(self.ko * self.dot.words(self.schedule.kc))
        acc, group = Accumulators(mr, nv, lanes, self.dot), self.dot.group
        acc.fill()
        rows = [self.address(row + i) for i in range(mr)]
        ahead, own = self._next(jo), None if self._turn is None else share(*self._turn, self.size, self._width)
        for k in asking(T.int64(self.size), own, ahead):
            acc.multiply(range(mr), lambda i: self.dot.read(self.a, rows[i], (start + k) * group), [panel(start + k, v) for v in range(nv)])  # noqa: B023
        local = T.bind(row - self.start)

        def place(i: int, v: int) -> tuple[Any, ...]:
            return self.jo, local + i, vector(T.int64(v * lanes), lanes)

        if self.last:
            acc.fill(lambda i, v: acc.load(i, v) + self.sums[place(i, v)])
            store_tile(self.fused, self.buffers, acc, lambda i: self.rows.indices(row + i), lambda v: jo * self.nr + v * lanes, columns)
            return
        for i in range(mr):
            for v in range(nv):
                T.buffer_store(self.sums, self.sums[place(i, v)] + acc.load(i, v), list(place(i, v)))
