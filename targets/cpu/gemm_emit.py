"""Emits the loop nest of the GEMM template; see `gemm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...compiler.tvm import T
from ..common.fused import Fused, product, static
from .dot import F32, Dot, vector
from .emit import SUM_BLOCK, Accumulators, Rows, balanced, flat_rows, i64, runs, store_tile, tasks, with_columns
from .prefetch import Ahead, Once, Share, asking, expect, share

if TYPE_CHECKING:
    from .gemm_schedules import GemmSchedule

#: register tiles from which on weights are widened in memory
_WIDENED_ONCE = 4


@dataclass(frozen=True)
class GemmOperands:
    """What a GEMM multiplies: leading dims of the output, K and N, the buffer of A and row -> (k -> index), B as packed panels of words or as [batch, K, N]."""

    batch: list[Any]
    rows: list[Any]
    k: Any
    n: Any
    a: Any
    address: Callable[[Any], Callable[[Any], tuple[Any, ...]]]
    b: Any
    packed: bool
    dot: Dot


class GemmEmitter:
    """Emits one GEMM; see `gemm` for the loop nest."""

    def __init__(
        self,
        fused: Fused,
        buffers: dict[Any, Any],
        schedule: GemmSchedule,
        operands: GemmOperands,
        ahead: Ahead | None = None,
        once: Once | None = None,
        streams: Sequence[Any] = (),
    ):
        """ahead, once: prefetch of packed weights by several register tiles and by one, if they are worth it. streams: what a tile asks for before its products, see `emit.streams`."""
        self._ahead: Any = ahead
        self._once: Any = once
        #: number of the register tile at hand and how many pass its panel (None: not known), where it asks for weights
        self._turn: tuple[Any, int | None] | None = None
        self.fused, self.schedule, self.packed = fused, schedule, operands.packed
        self.k, self.n, self.a, self.b = operands.k, operands.n, operands.a, operands.b
        self.address = operands.address
        self.batch, self.m = product(operands.batch), product(operands.rows)
        rows = static(self.m)
        #: weights that enough register tiles read are widened once for all, to a panel in float32
        self.widened = operands.dot.widens and rows is not None and min(rows, schedule.mc or rows) >= _WIDENED_ONCE * schedule.mr
        self.packing, self.dot = operands.dot, F32 if self.widened else operands.dot
        self.batch_dims, row_dims = operands.batch, operands.rows
        flat, self.buffers = flat_rows(fused, buffers)
        self.flat = self.buffers is not buffers
        self.streams = [self.buffers[buffer] for buffer in streams] if self.flat else []
        self.rows = Rows(flat if self.flat else row_dims)
        self.nr = schedule.nv * schedule.lanes

    def emit(self) -> None:
        panels = T.ceildiv(self.n, T.int64(self.nr))
        m, mc = static(self.m), self.schedule.mc
        chunks = i64(-(-m // mc)) if m is not None and mc else T.int64(1)
        with tasks(self.batch * chunks * panels, static(product([self.batch, self.m, self.k, self.n]))) as task:
            batch = T.bind(T.floordiv(task, chunks * panels)) if static(self.batch) != 1 else T.int64(0)
            self.lead = [] if self.flat else Rows(self.batch_dims).indices(batch)
            inner = T.bind(T.floormod(task, chunks * panels)) if static(self.batch) != 1 else task
            chunk = T.bind(T.floordiv(inner, panels)) if static(chunks) != 1 else T.int64(0)
            jo = T.bind(T.floormod(inner, panels)) if static(chunks) != 1 else inner
            panel = self._panel(batch, jo)
            n = static(self.n)
            if n is None:
                full = (jo + 1) * self.nr <= self.n
                with T.If(full):
                    with T.Then():
                        self._rows(batch, chunk, jo, panel, self.nr, None)
                    with T.Else():
                        self._rows(batch, chunk, jo, panel, self.nr, self.n)
            else:
                with_columns(jo, n, self.nr, lambda columns: self._rows(batch, chunk, jo, panel, columns, None))

    def _panel(self, batch: Any, jo: Any) -> Any:
        """A function (k, v) -> vector of B in registers; a run-time B is first copied into a contiguous, zero-filled panel."""
        lanes = self.schedule.lanes
        if self.packed:
            return self._packed(jo, T.int64(0), static(self.k) or 0)
        panel = T.alloc_buffer((self.k, T.int64(self.nr)), "float32")
        column = T.bind(jo * T.int64(self.nr))
        n = static(self.n)
        even = n is not None and n % self.nr == 0

        def copy() -> None:
            with T.serial(self.k) as k:
                for v in range(self.schedule.nv):
                    source = self.b[batch, k, vector(column + T.int64(v * lanes), lanes)]
                    T.buffer_store(panel, source, [k, vector(T.int64(v * lanes), lanes)])

        def guarded() -> None:
            with T.serial(self.k) as k, T.serial(T.int64(self.nr)) as lane:
                T.buffer_store(panel, T.if_then_else(column + lane < self.n, self.b[batch, k, column + lane], T.float32(0)), [k, lane])

        if even:
            copy()
        else:
            with T.If(column + self.nr <= self.n):
                with T.Then():
                    copy()
                with T.Else():
                    guarded()
        return lambda k, v: self.dot.weights(lambda place: panel[k, place], self.nr, v, lanes)

    def _packed(self, jo: Any, start: Any, count: int) -> Any:
        """A function (step of K, v) -> vector of packed B in registers, or of a panel to which `count` rows of it from `start` on are widened."""
        lanes, group = self.schedule.lanes, self.packing.group
        packed = lambda k, v: self.packing.weights(lambda place: self.b[jo, k, place], self.nr, v, lanes)  # noqa: E731
        if not self.widened:
            return packed
        words, first = self.packing.words(count), T.floordiv(start, T.int64(group))
        panel = T.alloc_buffer((T.int64(group * words), T.int64(self.nr)), "float32")
        with T.serial(T.int64(words)) as word:
            for v in range(self.schedule.nv):
                for place, half in enumerate(packed(first + word, v)):
                    T.buffer_store(panel, half, [word * group + place, vector(T.int64(v * lanes), lanes)])
        return lambda k, v: panel[k - start, vector(T.int64(v * lanes), lanes)]

    def _rows(self, batch: Any, chunk: Any, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        """All register tiles of one chunk of rows against one panel."""
        mc, m = self.schedule.mc, static(self.m)
        if m is None:
            self._dynamic_rows(batch, jo, panel, columns, limit)
            return
        step = mc or m
        whole, last = divmod(m, step)
        if whole == 1 and last == 0:
            self._static_rows(batch, T.int64(0), m, jo, panel, columns, limit)
        elif last == 0:
            self._static_rows(batch, chunk * step, step, jo, panel, columns, limit)
        else:
            with T.If(chunk < T.int64(whole)):
                with T.Then():
                    self._static_rows(batch, chunk * step, step, jo, panel, columns, limit)
                with T.Else():
                    self._static_rows(batch, T.int64(whole * step), last, jo, panel, columns, limit)

    def _dynamic_rows(self, batch: Any, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        """Tiles of mr rows, then of half as many for what is left, the last one moved back to end at the edge; single rows where there are fewer than that.

        Three tiles are all the code there is: one for every possible rest would take minutes to compile.
        """
        mr, m = self.schedule.mr, self.m
        half = -(-mr // 2)
        # a rest of more than half a tile is worth a whole one
        whole = T.bind(T.if_then_else(m >= mr, T.floordiv(m + max(0, mr - half - 1), T.int64(mr)), T.int64(0)))
        with T.serial(whole) as io:
            self._turn = io, None
            self._tile(batch, T.min(io * mr, m - mr), mr, jo, panel, columns, limit)
            self._turn = None
        if mr == 1:
            return
        if half > 1:
            with T.If(m >= half), T.Then(), T.serial(T.ceildiv(T.max(m - whole * mr, T.int64(0)), T.int64(half))) as io:
                self._tile(batch, T.min(whole * mr + io * half, m - half), half, jo, panel, columns, limit)
        with T.serial(whole * mr, T.if_then_else(m < half, m, whole * mr) if half > 1 else m) as row:
            self._turn = T.int64(0), 1  # of few rows, most often
            self._tile(batch, row, 1, jo, panel, columns, limit)
            self._turn = None

    def _static_rows(self, batch: Any, first: Any, rows: int, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        """Tiles of two sizes that differ by one: a short last tile would wait for its own multiply-adds."""
        tiles = balanced(rows, self.schedule.mr)
        for size, start, count, before in runs(tiles):
            with T.serial(T.int64(count)) as io:
                self._turn = io + before, len(tiles)
                self._tile(batch, first + io * size + start, size, jo, panel, columns, limit)
                self._turn = None

    @property
    def _width(self) -> int:
        """Packed words of a step of K."""
        return self.nr // (self.packing.group if self.widened else 1)

    @property
    def _alone(self) -> bool:
        """Whether no other register tile passes the panel at hand."""
        return self._turn is not None and self._turn[1] == 1

    def _sharing(self) -> Share | None:
        """What the register tile at hand asks for of the next panel."""
        known = static(self.k)
        return None if self._turn is None or self._ahead is None or known is None else share(*self._turn, self.dot.words(known), self._width)

    def _ks(self, jo: Any, start: Any, count: Any) -> Iterator[Any]:
        """Emits the loop over `count` k from `start`: yields k where its body belongs."""
        own, ahead = self._sharing(), self._ahead
        if own is not None:
            line, between = own
            own = line + T.floordiv(start, T.int64(between)), between
        for k in asking(count, own, lambda line: ahead(jo + 1, line)):
            yield start + k

    def _tile(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        lanes = self.schedule.lanes
        if self.streams:
            start = T.bind(batch * self.m + row)
            expect(self.streams, (self.rows.indices(start + i) for i in range(mr)), jo * self.nr, columns, level=1)
        first, acc = self._products(batch, row, mr, jo, panel, -(-columns // lanes))

        def lead(i: Any) -> list[Any]:
            return self.rows.indices(first + i) if self.flat else self.lead + self.rows.indices(row + i)

        store_tile(self.fused, self.buffers, acc, lead, lambda v: jo * self.nr + v * lanes, columns, limit)

    def _first_sums(self, row: Any) -> Callable[[int, int], Any] | None:
        """What the sums of a tile from `row` on begin with, zeros by default."""
        return None

    def _products(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, nv: int) -> tuple[Any, Accumulators]:
        """The number of the first row among those of all batches, and the tile's sums."""
        lanes = self.schedule.lanes
        first = T.bind(batch * self.m + row)
        dot, known = self.dot, static(self.k)
        acc = Accumulators(mr, nv, lanes, dot)
        acc.fill(self._first_sums(row))
        rows = [self.address(first + i) for i in range(mr)]
        once = self._once if self._alone else None

        def multiply(part: Accumulators, start: Any, count: Any) -> None:
            for k in self._ks(jo, start, count):
                if once is not None:
                    once((jo * self.b.shape[1] + k) * self.b.shape[2], int(self.b.shape[2]))
                part.multiply(range(mr), lambda i: dot.read(self.a, rows[i], k * dot.group), [panel(k, v) for v in range(nv)])  # noqa: B023

        if dot.grouped:
            assert known is not None
            words, rest = divmod(known, dot.group)
            if words:
                multiply(acc, T.int64(0), T.int64(words))
            if rest:
                behind = T.int64(words * dot.group)
                acc.multiply(range(mr), lambda i: dot.read_part(self.a, rows[i], behind, rest), [panel(T.int64(words), v) for v in range(nv)])
        elif known is not None and known <= SUM_BLOCK:
            multiply(acc, T.int64(0), self.k)
        else:
            total, part = Accumulators(mr, nv, lanes), acc
            total.fill()
            # blocks as equal as possible; LLVM unrolls a loop over three and then keeps the totals in registers, at the cost of the accumulators
            blocks = -(-(known or 0) // SUM_BLOCK)
            length = SUM_BLOCK if known is None else -(-known // (blocks if blocks != 3 else 4))
            with T.serial(T.ceildiv(self.k, T.int64(length))) as block:
                start = T.bind(block * length)
                multiply(part, start, T.int64(length) if known and known % length == 0 else T.min(T.int64(length), self.k - start))
                total.drain(part)
            acc = total
        return first, acc
