"""Products by AMX tiles, for every template that uses them: rows of A from memory as they are, or gathered, against panels of packed weights.

for (chunk of mc rows, group of panels) in parallel:
    [gathered[mc][K] = rows of A]                    # where they do not lie in memory as tiles want them
    for jo in panels of the group:                   # NR = 16 * columns output channels
        for io in mc / (16 * rows):                  # one block: rows x columns tiles of sums
            for k in K by 64 bytes:                  # and lines of the next panel are prefetched
                c[i][j] += a[i] @ b[j]
            C = epilogue(c, by way of a block of memory)
        the same for the rows that are left, in tiles of fewer rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T, tirx
from ..base import Target
from ..common.fused import Fused, product, static
from . import amx
from .amx import ROW_BYTES, ROWS, Tiles
from .dot import Dot, splat, vector
from .emit import Rows, flat_rows, i64, store_tile, tasks, with_columns
from .prefetch import prefetch

#: bytes of gathered rows per task, as a share of the second-level cache
_SHARE_OF_L2 = 0.5


@dataclass(frozen=True)
class AmxSchedule:
    """tiles: of a block; mc rows per task (0: all of them) against so many `panels` of weights (0: all of them)."""

    tiles: Tiles
    mc: int
    panels: int

    def __str__(self) -> str:
        return f"AmxSchedule({self.tiles.rows}x{self.tiles.columns}, mc={self.mc}, panels={self.panels})"


@dataclass(frozen=True)
class Rowwise:
    """The rows that are multiplied. Either `element(row, k)`, an element of a buffer from which on the rows of a tile lie `stride` bytes apart, or `gather(target, slot, row)`, which emits
    a copy of one row into row `slot` of a buffer [slots, K elements of whole tiles]."""

    stride: int = 0
    element: Callable[[Any, Any], Any] | None = None
    gather: Callable[[Any, Any, Any], None] | None = None


@dataclass(frozen=True)
class StoredSums:
    """A block of sums in memory, rows of `width`, as `store_tile` reads one."""

    buffer: Any
    width: int
    mr: int
    nv: int
    lanes: int = ROWS

    def lane(self, i: Any, v: int, lane: Any) -> Any:
        return self.buffer[i * T.int64(self.width) + T.int64(v * self.lanes) + lane]


class AmxEmitter:
    """Emits one product; see the module for the loop nest. rows: leading dims of the output; weights: packed panels of words [panels, words of whole tiles, NR]."""

    def __init__(
        self, fused: Fused, buffers: dict[Any, Any], schedule: AmxSchedule, rows: list[Any], k: int, n: int, source: Rowwise, weights: Any, dot: Dot
    ):
        self.fused, self.schedule, self.k, self.n, self.source, self.weights, self.dot = fused, schedule, k, n, source, weights, dot
        self.m = product(rows)
        flat, self.buffers = flat_rows(fused, buffers)
        self.rows = Rows(flat if self.buffers is not buffers else rows)
        self.tiles, self.nr = schedule.tiles, ROWS * schedule.tiles.columns
        self.steps = amx.steps(k, dot)
        self.element = source.element

    def emit(self) -> None:
        m, mc, panels = static(self.m), self.schedule.mc, -(-self.n // self.nr)
        each = self.schedule.panels or panels
        groups, chunks = -(-panels // each), T.ceildiv(self.m, T.int64(mc)) if mc else T.int64(1)
        with tasks(chunks * groups, static(product([self.m, self.n, self.k]))) as task:
            chunk = T.bind(T.floordiv(task, T.int64(groups))) if groups > 1 else task
            group = T.bind(T.floormod(task, T.int64(groups))) if groups > 1 else T.int64(0)
            first = T.bind(chunk * T.int64(mc)) if mc else T.int64(0)
            size = T.bind(T.min(T.int64(mc), self.m - first)) if mc else i64(self.m)
            self.memory = T.alloc_buffer((16,), "int32")
            self.sums = T.alloc_buffer((ROWS * self.tiles.rows * self.nr,), self.dot.accumulator)
            # TVM cuts off what no statement touches, and does not know what tiles write
            T.buffer_store(self.sums, self.dot.zero(), [ROWS * self.tiles.rows * self.nr - 1])
            self.element, self.stride = self._rows(first, size)
            own = T.min(T.int64(each), T.int64(panels) - group * each) if panels % each else T.int64(each)
            rest = None if m is None else (m % mc if mc and m > mc else m) % (ROWS * self.tiles.rows)
            if rest == 0:
                self.tiles.configure(self.memory)
            with T.serial(own) as panel:
                jo = T.bind(group * T.int64(each) + panel)
                with_columns(jo, self.n, self.nr, lambda columns: self._panel(jo, columns, first, size, rest))
            amx.release()

    def _rows(self, first: Any, size: Any) -> tuple[Callable[[Any, Any], Any], int]:
        """(row, k) -> element of a buffer, and bytes between rows; rows count from the first one of the chunk."""
        if self.source.element is not None:
            element = self.source.element
            return lambda row, k: element(first + row, k), self.source.stride
        assert self.source.gather is not None
        width = self.steps * amx.step_elements(self.dot)
        known = self.schedule.mc or static(self.m)
        gathered = T.alloc_buffer((i64(known if known is not None else self.m), width), stored_type(self.dot))
        with T.serial(size) as slot:
            self.source.gather(gathered, slot, first + slot)
        return lambda row, k: gathered[row, k], width * self.dot.activation_bytes

    def _panel(self, jo: Any, columns: int, first: Any, size: Any, rest: int | None) -> None:
        """All blocks of a chunk against one panel. rest: rows of the last chunk that do not fill a block, None where they are not known."""
        height = ROWS * self.tiles.rows
        whole = T.bind(T.floordiv(size, T.int64(height)))
        if rest != 0:
            with T.If(whole > 0), T.Then():
                self.tiles.configure(self.memory)
        with T.serial(whole) as block:
            self._block(self.tiles, T.bind(block * height), first, jo, columns, None, block)
        if rest == 0:
            return
        behind = T.bind(whole * height)
        left = T.bind(size - behind)
        for rows in range(1, self.tiles.rows + 1):
            most = ROWS * rows
            if rest is not None and not most - ROWS < rest <= most:
                continue
            fewer = Tiles(rows, self.tiles.columns)
            with T.If(left > 0 if rest is not None else T.And(left > most - ROWS, left <= most)), T.Then():
                fewer.configure(self.memory, rest - most + ROWS if rest is not None else left - (most - ROWS))
                self._block(fewer, behind, first, jo, columns, rest if rest is not None else left, None)

    def _block(self, tiles: Tiles, row: Any, first: Any, jo: Any, columns: int, rows: Any, number: Any) -> None:
        """One block of sums from a row of the chunk on. rows: how many there are, None: all; number: of a whole block, for its share of the next panel."""
        vectors, size = -(-columns // ROWS), amx.step_elements(self.dot)
        for i in range(tiles.rows):
            for j in range(vectors):
                amx.zero(tiles.c(i, j))
        with T.serial(T.int64(self.steps)) as step:
            if number is not None:
                self._ask(jo, step, number)
            for i in range(tiles.rows):
                amx.load(tiles.a(i), self.element(row + i * ROWS, step * size), self.stride)
            for j in range(vectors):
                amx.load(tiles.b(j), self.weights[jo, step * ROWS, j * ROWS], 4 * self.nr)
                for i in range(tiles.rows):
                    amx.multiply(self.dot, tiles.c(i, j), tiles.a(i), tiles.b(j))
        for i in range(tiles.rows):
            for j in range(vectors):
                amx.store(tiles.c(i, j), self.sums[(i * self.nr + j) * ROWS], 4 * self.nr)
        known = rows if isinstance(rows, int) else ROWS * tiles.rows
        inside = (lambda i: i < rows) if rows is not None and not isinstance(rows, int) else None
        number_of = T.bind(first + row)
        store_tile(
            self.fused,
            self.buffers,
            StoredSums(self.sums, self.nr, known, vectors),
            lambda i: self.rows.indices(number_of + i),
            lambda v: jo * self.nr + v * ROWS,
            columns,
            inside=inside,
        )

    def _ask(self, jo: Any, step: Any, number: Any) -> None:
        """One step's part of the requests for the next panel, which all blocks of a chunk share."""
        m = self.schedule.mc or static(self.m)
        blocks = 8 if m is None else m // (ROWS * self.tiles.rows)
        if blocks < 2:
            return
        lines = ROWS * self.tiles.columns  # of a step: a tile is 16 lines
        own = -(-lines // blocks)
        for line in range(own):
            place = number * T.int64(own) + T.int64(line)
            prefetch(
                self.weights[
                    jo + 1, step * ROWS + T.floordiv(place, T.int64(self.tiles.columns)), T.floormod(place, T.int64(self.tiles.columns)) * ROWS
                ],
                level=2,
            )


def run_copies(count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """(first, length) of vectors that copy `count` elements of so many bytes: as many of 64 bytes as there are, then halves."""
    first, length = 0, ROW_BYTES // bytes_each
    while first < count:
        while length > count - first:
            length //= 2
        yield first, length
        first += length


def copy_run(target: Any, slot: Any, place: Any, source: Callable[[Any, int], Any] | None, count: int, dot: Dot) -> None:
    """Emits target[slot, place : place + count] = source(first, lanes), vector by vector, or zeros."""
    whole = ROW_BYTES // dot.activation_bytes
    loops, rest = divmod(count, whole)

    def copied(first: Any, length: int) -> None:
        kind = stored_type(dot) if length == 1 else f"{stored_type(dot)}x{length}"
        value = splat(tirx.const(0, stored_type(dot)), length) if source is None else source(first, length)
        T.buffer_store(
            target,
            value if source is None or stored_type(dot) == dot.activation else T.reinterpret(kind, value),
            [slot, vector(place + first, length)],
        )

    if loops > 1:
        with T.serial(T.int64(loops)) as part:
            copied(part * T.int64(whole), whole)
    elif loops:
        copied(T.int64(0), whole)
    for first, length in run_copies(rest, dot.activation_bytes):
        copied(T.int64(loops * whole + first), length)


def stored_type(dot: Dot) -> str:
    """Type of gathered elements: TVM would keep a buffer of bfloat16 in float32."""
    return "uint16" if dot.activation == "bfloat16" else dot.activation


def space(rows: int | None, n: int, width: int, gathered: bool, target: Target) -> list[AmxSchedule]:
    """Schedules for an output of so many rows and n columns; width: bytes of a row in whole tiles."""
    found = []
    for tiles in amx.shapes(rows, n):
        height, panels = ROWS * tiles.rows, -(-n // (ROWS * tiles.columns))
        chunks = [mc // height * height for mc in (64, 128, 256, 512, 1024) if rows is None or mc < rows]
        if rows is not None or not gathered:
            chunks = [0, *chunks]
        for mc in chunks:
            held = (mc or rows or 0) * width
            if gathered and held > target.l2_bytes * _SHARE_OF_L2 and mc != chunks[0] and mc != 64 // height * height:
                continue
            found += [AmxSchedule(tiles, mc, each) for each in sorted({0, *(p for p in (1, 2, 4, 8, 16) if p < panels)})]
    return found


def features(rows: int, k: int, n: int, schedule: AmxSchedule, dot: Dot, gathered: float, target: Target) -> KernelFeatures:
    """Cost of a product. gathered: cycles that gathering one row takes, 0 where rows are read in place."""
    tiles, steps = schedule.tiles, amx.steps(k, dot)
    height, nr = ROWS * tiles.rows, ROWS * tiles.columns
    mc, panels = min(schedule.mc or rows, rows), -(-n // nr)
    chunks, each = -(-rows // mc), min(schedule.panels or panels, panels)
    groups = -(-panels // each)
    whole, rest = divmod(rows, height)
    busy = latency = load = stores = 0.0
    for count, size in ((whole, height), (1, rest)):
        if count and size:
            used = -(-size // ROWS)
            # with fewer rows a product takes as many cycles as there are rows
            product_cycles = size * tiles.columns
            busy += count * panels * steps * product_cycles
            latency += count * panels * steps * max(LATENCY_OF_STEP, product_cycles)
            load += count * panels * steps * (size + ROWS * tiles.columns) / 2.0
            stores += count * panels * (2.5 * size * tiles.columns + (100.0 if rest else 20.0) + 4.0 * used)
    gathering = gathered * rows * groups
    row_bytes, panel_bytes = float(steps * ROW_BYTES), float(steps * ROWS * 4 * nr)
    blocks = -(-mc // height)
    in_l1 = panel_bytes + height * row_bytes < 0.8 * target.l1_bytes
    l2 = chunks * panels * (panel_bytes * (1 if in_l1 else blocks) + mc * row_bytes)
    chunk_in_l2 = mc * row_bytes + 2 * panel_bytes < 0.75 * target.l2_bytes
    l3 = chunks * panels * panel_bytes + (0 if chunk_in_l2 else chunks * panels * mc * row_bytes)
    more = stores + gathering + 150.0 * chunks * groups
    return KernelFeatures(
        flops=2.0 * rows * k * n,
        fma_cycles=busy + more,
        load_cycles=load,
        latency_cycles=latency + more,
        l2_bytes=l2 / 2.0,  # tiles come twice as fast as vectors, by whole lines
        l3_bytes=l3,
        dram_bytes=panels * panel_bytes,
        tasks=chunks * groups,
    )


#: cycles of a step, at least: each of its sums is added to once
LATENCY_OF_STEP = amx.LATENCY
