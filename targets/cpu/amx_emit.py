"""Products by AMX tiles, for every template that uses them: rows of A from memory as they are, or gathered, against panels of packed weights.

for (chunk of mc rows, group of panels) in parallel:
    [copy of rows of A]                              # where they do not lie in memory as tiles want them
    for jo in panels of the group:                   # NR = 16 * columns output channels
        for ko in slices of K:                       # one that its part of a panel stays in the first-level cache for
            for io in mc / (16 * rows):              # one block: rows x columns tiles of sums
                c = memory[io] if ko else 0
                for k in the slice by 64 bytes:      # and lines of the next panel are prefetched
                    c[i][j] += a[i] @ b[j]           # and so for every pair of terms that counts, where operands are sums of several
                    C[some rows of a block before] = epilogue(memory)
                memory[io] = c
        the same for the rows that are left, in tiles of fewer rows

Tiles take 16 cycles for a product and leave the vector pipes alone: the epilogue of a block before, whose sums are kept in another part of the memory, runs meanwhile. Without slices that is
the block right before, with slices the same block of the panel before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...compiler.tvm import T, tirx
from ..common.fused import Fused, product, static
from . import amx
from .amx import ROWS, Tiles
from .amx_schedules import PAIRS, AmxSchedule
from .dot import Dot
from .emit import Rows, flat_rows, i64, store_row, streamed, tasks, when, with_columns
from .prefetch import expect, prefetch, soon

#: bytes of weights that stay in a first-level cache of 48 KiB beside what a block reads and writes
NEAR = 1 << 15


class Source(Protocol):
    """The rows that are multiplied."""

    def prepare(self, first: Any, size: Any, most: Any) -> tuple[Callable[[Any, Any, int], Any], int]:
        """Makes `size` rows from `first` on ready, at most `most` of them: (row of these, k, term) -> element of a buffer, and the bytes from one row to the next."""
        ...

    def inside(self, lead: Sequence[Any]) -> Any:
        """Whether a row, by its indices in the leading dims, is one of the output's; None: all are."""
        ...


@dataclass(frozen=True)
class InPlace:
    """Rows that lie in a buffer `stride` bytes apart."""

    element: Callable[[Any, Any], Any]
    stride: int

    def prepare(self, first: Any, size: Any, most: Any) -> tuple[Callable[[Any, Any, int], Any], int]:
        return lambda row, k, term: self.element(first + row, k), self.stride

    def inside(self, lead: Sequence[Any]) -> Any:
        return None


@dataclass(frozen=True)
class StoredSums:
    """Sums in memory from `start` on, rows of `width`, as `store_row` reads them."""

    buffer: Any
    start: Any
    width: int
    nv: int
    lanes: int = ROWS

    def lane(self, i: Any, v: int, lane: Any) -> Any:
        return self.buffer[self.start + i * T.int64(self.width) + T.int64(v * self.lanes) + lane]


@dataclass(frozen=True)
class _Block:
    """A block of sums: its panel of weights, its number among the blocks of the chunk, and the place in the memory where it is kept."""

    panel: Any
    number: Any
    place: Any


class AmxEmitter:
    """Emits one product; see the module for the loop nest. rows: leading dims of the output, or longer ones if the source has rows outside of it; weights: packed panels of words
    [panels, words of whole tiles, NR], the terms of a step behind each other."""

    def __init__(
        self, fused: Fused, buffers: dict[Any, Any], schedule: AmxSchedule, rows: list[Any], k: int, n: int, source: Source, weights: Any, dot: Dot
    ):
        self.fused, self.schedule, self.k, self.n, self.source, self.weights, self.dot = fused, schedule, k, n, source, weights, dot
        self.m = product(rows)
        self.buffers, dims = buffers, rows
        if source.inside([T.int64(0)] * len(rows)) is None:
            flat, self.buffers = flat_rows(fused, buffers)
            dims = flat if self.buffers is not buffers else rows
        self.rows = Rows(dims)
        self.streams = [self.buffers[buffer] for buffer in streamed(fused) or []] if self.buffers is not buffers else []
        self.tiles, self.height, self.nr = schedule.tiles, ROWS * schedule.tiles.rows, ROWS * schedule.tiles.columns
        self.steps = amx.steps(k, dot)
        self.once = soon(weights)
        #: rows of a whole chunk, where they are known
        self.rows_of_chunk = schedule.mc or static(self.m)
        self.slice = schedule.depth or self.steps
        self.slices = -(-self.steps // self.slice)

    def emit(self) -> None:
        m, mc, panels = static(self.m), self.schedule.mc, -(-self.n // self.nr)
        each = self.schedule.panels or panels
        groups, chunks = -(-panels // each), T.ceildiv(self.m, T.int64(mc)) if mc else T.int64(1)
        with tasks(chunks * groups, static(product([self.m, self.n, self.k]))) as task:
            chunk = T.bind(T.floordiv(task, T.int64(groups))) if groups > 1 else task
            group = T.bind(T.floormod(task, T.int64(groups))) if groups > 1 else T.int64(0)
            self.first = T.bind(chunk * T.int64(mc)) if mc else T.int64(0)
            size = T.bind(T.min(T.int64(mc), self.m - self.first)) if mc else i64(self.m)
            self.memory, self.sums = T.alloc_buffer((16,), "int32"), amx.sums(self._kept(mc or m) * self.height * self.nr, self.dot.accumulator)
            self.element, self.stride = self.source.prepare(self.first, size, i64(mc if mc else m if m is not None else self.m))
            own = T.bind(T.min(T.int64(each), T.int64(panels) - group * each)) if panels % each else T.int64(each)
            # chunks are whole blocks but for the last one, or all of one size
            rest = None if m is None else ((m % mc or mc) if mc else m) % self.height
            self.blocks = T.bind(T.floordiv(size, T.int64(self.height)))
            self.apart = T.int64(1) if self.slices == 1 else self.blocks
            if rest == 0:
                self.tiles.configure(self.memory)
            if self._near(each):
                self._blocks_by_panels(group * T.int64(each), own, size, rest)
            else:
                with T.serial(own) as panel:
                    jo = T.bind(group * T.int64(each) + panel)
                    self._panel(panel, jo, size, rest)
            with T.If(self.blocks > 0), T.Then():
                panel = T.bind(group * T.int64(each) + own - 1)
                with T.serial(self.apart) as left:
                    number = T.bind(self.blocks - self.apart + left)
                    self._finish(_Block(panel, number, self._place((own - 1) * self.blocks + number)), T.int64(0), self.height)
            amx.release()

    def _near(self, panels: int) -> bool:
        """Whether the first-level cache holds so many panels of weights beside what a block reads and writes."""
        return self.slices == 1 and panels > 1 and panels * self.steps * self.dot.terms * ROWS * 4 * self.nr <= NEAR

    def _blocks_by_panels(self, group: Any, own: Any, size: Any, rest: int | None) -> None:
        """All blocks of a chunk, each against one panel after the other: what belongs to a row is read and written at one time."""
        if rest != 0:
            with T.If(self.blocks > 0), T.Then():
                self.tiles.configure(self.memory)
        with T.serial(self.blocks) as block, T.serial(own) as panel:
            jo = T.bind(group + panel)
            turn = T.bind(block * own + panel)
            now = _Block(jo, block, self._place(turn))
            starts = panel == T.int64(0)
            before = _Block(
                T.bind(tirx.Select(starts, group + own - 1, jo - 1)), T.bind(tirx.Select(starts, block - 1, block)), self._place(turn + 1)
            )
            self._products(self.tiles, T.bind(block * self.height), now, None, None, self._between(now, before, turn))
        if rest != 0:
            with T.serial(own) as panel:
                self._rest(own * self.blocks, T.bind(group + panel), size, rest)

    def _kept(self, rows: int | None) -> int:
        """Blocks of sums that the memory holds: two, or with slices twice those of a chunk of so many rows, and one for the rows that are left."""
        if self.slices == 1:
            return 2
        assert rows is not None, "slices of K are for chunks of known size"
        return 2 * (rows // self.height) + 1

    def _panel(self, panel: Any, jo: Any, size: Any, rest: int | None) -> None:
        """All blocks of a chunk against one panel. rest: rows of the last chunk that do not fill a block, None where they are not known."""
        if rest != 0:
            with T.If(self.blocks > 0), T.Then():
                self.tiles.configure(self.memory)
        with T.serial(T.int64(self.slices)) as part:
            with T.serial(self.blocks) as block:
                turn = T.bind(panel * self.blocks + block)
                now = _Block(jo, block, self._place(turn))
                if self.slices == 1:
                    starts = block == T.int64(0)
                    panel_before, block_before = tirx.Select(starts, jo - 1, jo), tirx.Select(starts, self.blocks - 1, block - 1)
                else:
                    panel_before, block_before = jo - 1, block
                before = _Block(T.bind(panel_before), T.bind(block_before), self._place(turn + self.apart))
                blocks = 8 if self.rows_of_chunk is None else self.rows_of_chunk // self.height
                self._products(self.tiles, T.bind(block * self.height), now, (block, max(1, blocks)), part, self._between(now, before, turn))
        if rest != 0:
            self._rest((panel + 1) * self.blocks, jo, size, rest)

    def _rest(self, turn: Any, jo: Any, size: Any, rest: int | None) -> None:
        """The rows of a chunk that do not fill a block against one panel, in the turn behind that of the last block. rest: as many, None where that is not known."""
        behind = T.bind(self.blocks * self.height)
        left = T.bind(size - behind)
        for rows in range(1, self.tiles.rows + 1):
            most = ROWS * rows
            if rest is not None and not most - ROWS < rest <= most:
                continue
            fewer = Tiles(rows, self.tiles.columns)
            with T.If(left > 0 if rest is not None else T.And(left > most - ROWS, left <= most)), T.Then():
                fewer.configure(self.memory, rest - most + ROWS if rest is not None else left - (most - ROWS))
                # a place that no block waits in for its epilogue
                odd = _Block(jo, self.blocks, self._place(turn) if self.slices == 1 else T.bind(2 * self.blocks))
                self._products(
                    fewer, behind, odd, (T.int64(0), 1) if self.rows_of_chunk is None or self.rows_of_chunk < self.height else None, None, None
                )
                self._finish(odd, T.int64(0), rest if rest is not None else left)

    def _between(self, now: _Block, before: _Block, turn: Any) -> Callable[[Any], None]:
        """What is emitted behind a step of a block: requests for what its epilogue needs, and its share of the epilogue of the block before."""
        few = -(-self.height // self.steps)

        def between(step: Any) -> None:
            self._expect(now, step * T.int64(few), few)
            with T.If(turn >= self.apart), T.Then():
                self._finish(before, step * T.int64(few), few, few * self.steps > self.height)

        return between

    def _place(self, turn: Any) -> Any:
        """Where a block is kept that is the turn-th of its task: blocks that are `apart` or fewer from each other do not share it."""
        return T.bind(T.floormod(turn, T.int64(2) * self.apart))

    def _products(
        self, tiles: Tiles, row: Any, block: _Block, share: tuple[Any, int] | None, part: Any, between: Callable[[Any], None] | None
    ) -> None:
        """The sums of one block from a row of the chunk on, to its place in the memory. share: its number among so many blocks, for what each asks for; part: the slice of K, None for all of K;
        between(step): emitted among the products."""
        jo, size = block.panel, amx.step_elements(self.dot)
        tiled = [(tiles.c(i, j), self.sums[self._start(block) + (i * self.nr + j) * ROWS]) for i in range(tiles.rows) for j in range(tiles.columns)]
        if part is None or self.slices == 1:
            first, count = T.int64(0), T.int64(self.steps)
        else:
            first = T.bind(part * T.int64(self.slice))
            count = T.bind(T.min(T.int64(self.slice), T.int64(self.steps) - first)) if self.steps % self.slice else T.int64(self.slice)
        for tile, _ in tiled:
            amx.zero(tile)
        if part is not None and self.slices > 1:
            with T.If(part > T.int64(0)), T.Then():
                for tile, memory in tiled:
                    amx.load(tile, memory, 4 * self.nr)
        with T.serial(count) as each:
            step = T.bind(first + each)
            if share is not None:
                self._ask(jo, step, *share)
            held: dict[int, tuple[int, int]] = {}
            for left, right in PAIRS[self.dot.terms]:
                for i in range(tiles.rows):
                    if held.get(tiles.a(i)) != (i, left):
                        amx.load(tiles.a(i), self.element(row + i * ROWS, step * size, left), self.stride)
                        held[tiles.a(i)] = (i, left)
                for j in range(tiles.columns):
                    if held.get(tiles.b(j)) != (j, right):
                        amx.load(tiles.b(j), self.weights[jo, (step * self.dot.terms + right) * ROWS, j * ROWS], 4 * self.nr)
                        held[tiles.b(j)] = (j, right)
                    for i in range(tiles.rows):
                        amx.multiply(self.dot, tiles.c(i, j), tiles.a(i), tiles.b(j))
            if between is not None:
                between(step)
        for tile, memory in tiled:
            amx.store(tile, memory, 4 * self.nr)

    def _expect(self, block: _Block, first: Any, count: int) -> None:
        """Asks for `count` rows of the output from `first` on, and of what its epilogue reads of the same size: the block's turn is next, and stores that miss the second-level cache would hold up the products
        behind it."""
        row_of = T.bind(self.first + block.number * T.int64(self.height) + first)
        if self.streams:
            expect(self.streams, (self.rows.indices(row_of + each) for each in range(count)), block.panel * self.nr, self.nr, level=2)

    def _start(self, block: _Block) -> Any:
        return block.place * T.int64(self.height * self.nr)

    def _finish(self, block: _Block, first: Any, count: Any, guarded: bool = False) -> None:
        """The epilogue of `count` rows of a block from `first` on. guarded: there may be fewer."""
        row_of = T.bind(self.first + block.number * T.int64(self.height))

        def rows(columns: int) -> None:
            sums = StoredSums(self.sums, self._start(block), self.nr, -(-columns // ROWS))
            with T.serial(i64(count)) as each:
                row = T.bind(first + each)
                with when(row < self.height if guarded else None):
                    lead = self.rows.indices(row_of + row)
                    with when(self.source.inside(lead)):
                        store_row(self.fused, self.buffers, sums, row, lead, lambda v: block.panel * self.nr + v * ROWS, columns)

        with_columns(block.panel, self.n, self.nr, rows)

    def _ask(self, jo: Any, step: Any, number: Any, blocks: int) -> None:
        """One step's requests for weights, of the block of this number: its part of those for the next panel, which all blocks of a chunk share, or, if it is alone, those for what it multiplies soon."""
        words, columns = self.dot.terms * ROWS, self.tiles.columns  # a tile is 16 lines
        if blocks == 1:
            self.once((jo * self.weights.shape[1] + step * words) * self.nr, words * self.nr)
            return
        own = -(-words * columns // blocks)
        for line in range(own):
            place = number * T.int64(own) + T.int64(line)
            word, column = T.floordiv(place, T.int64(columns)), T.floormod(place, T.int64(columns))
            prefetch(self.weights[jo + 1, step * words + word, column * ROWS], level=2)
