"""GEMM template: C[batch, M, N] = epilogue(A[batch, M, K] @ B), with B a weight [K, N] packed at compile time or a run-time operand packed per panel.

    for (mo, jo) in parallel:                # mc rows x one panel of NR = nv * lanes columns
        [run-time B: panel[K][NR] = B[:, jo]]
        for io in mc / mr:                   # one register tile: mr x nv accumulators
            for k in K:                      # and every few steps a line of B[:, jo + 1] is prefetched
                acc[i][v] += A[io*mr + i, k] * panel[k][v]      # nv loads of B, mr broadcasts of A, mr * nv FMAs
            C = epilogue(acc)

u8 x s8 -> int32 and bfloat16 -> float32 are the same nest over groups of k: K / 4 words of four codes, one `vpdpbusd` per accumulator and step (see dot.py).

The tile stays in registers, the panel of B in L1/L2, the mc rows of A in L2 (the loop order of BLIS without its K blocking, which gained nothing at these sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product, static
from .cache import conflict_bytes
from .dot import Dot, dot_for, dot_kind, vector
from .emit import SUM_BLOCK, Accumulators, Rows, balanced, chunk_sizes, flat_rows, i64, kernel, register_tiles, store_tile, tasks, with_columns
from .prefetch import Ahead, Once, Share, asking, panels_ahead, passed_once, share
from .short_sums import with_sums
from .template import Kernel, Packing
from .widen import activations, widening


@dataclass(frozen=True)
class GemmWorkload:
    """batch x M x K x N; None marks a size known only at run time. packed: B is a constant. kind: of the product, see `dot.dot_kind`."""

    batch: int | None
    m: int | None
    k: int | None
    n: int | None
    packed: bool
    epilogue: str
    kind: str = "f32"

    def __str__(self) -> str:
        kind = "" if self.kind == "f32" else f"{self.kind} "
        return f"gemm {kind}{self.batch}x{self.m}x{self.k}x{self.n}{' packed' if self.packed else ''}"


@dataclass(frozen=True)
class GemmSchedule:
    """mr rows x nv vectors of `lanes` columns in registers; mc rows of A per task (0: all of them)."""

    mr: int
    nv: int
    lanes: int
    mc: int


class Gemm:
    """See the module."""

    name = "gemm"

    def workload(self, fused: Fused, constants: frozenset[int]) -> GemmWorkload:
        if fused.core["op"] != "matmul":
            raise Unfusable("not a matmul")
        a, b = fused.inputs
        kind = dot_kind(fused.inputs, fused.accumulator)
        _, batch, rows = _split(fused)
        packed = len(b.shape) == 2 and fused.param_index(b) in constants
        if packed and (static(b.shape[0]) is None or static(b.shape[1]) is None):
            raise Unfusable("a constant of unknown size")
        if kind != "f32" and not packed:
            raise Unfusable("operands of fewer bits, and weights that are not constant")
        sizes = static(product(batch)), static(product(rows)), static(b.shape[-2]), static(b.shape[-1])
        return with_sums(GemmWorkload(*sizes, packed, fused.epilogue_text(), kind), fused, constants)

    def space(self, workload: GemmWorkload, target: Target) -> Sequence[GemmSchedule]:
        lanes = target.lanes()
        vectors = None if workload.n is None else -(-workload.n // lanes)
        shapes = register_tiles(target, (1, 2, 3, 4, 6, 8, 12), vectors, dot_for(workload.kind, target))
        m = workload.m
        chunks = [0] if m is None or m <= 64 else [0, 64, 128, 256, 512]
        found = []
        for mr, nv in shapes:
            if m is not None and mr > m:
                continue
            for mc in chunks:
                rounded = mc // mr * mr
                if mc == 0 or (m is not None and rounded < m):
                    found.append(GemmSchedule(mr, nv, lanes, rounded))
        return found

    def features(self, workload: GemmWorkload, schedule: GemmSchedule, target: Target) -> KernelFeatures:
        batch, m, k, n = (workload.batch or 1), (workload.m or 128), (workload.k or 128), (workload.n or 128)
        mr, nv, lanes = schedule.mr, schedule.nv, schedule.lanes
        dot = dot_for(workload.kind, target)
        words, size = dot.words(k), float(dot.activation_bytes)
        fma = load = latency = 0.0
        mc = schedule.mc or m
        tiles = chunk_sizes(m, mc, mr)
        wide, rest = divmod(n, nv * lanes)
        panels = wide + (rest > 0)
        # AVX512 reads a float and spreads it within the multiply-add; pairs of bytes are widened by a shuffle of its own
        broadcast = dot.broadcast_loads if dot.grouped else 0.5 if target.vector_bits == 512 else 1.0
        for rows, count in tiles.items():
            for vectors, columns in ((nv, wide), (-(-rest // lanes), 1)):
                if rows and vectors and count and columns:
                    steps = float(count * columns * words)
                    busy = rows * vectors * dot.instructions / target.fma_per_cycle
                    fma += steps * busy
                    load += steps * (rows * broadcast + vectors * dot.parts) / 2.0
                    latency += steps * max(4.0, busy)
        chunks = -(-m // mc)
        weight_bytes = float(dot.weight_bytes * dot.group * words)
        panel_bytes = weight_bytes * nv * lanes
        a_bytes = size * mc * k
        l2 = batch * (chunks * panels * panel_bytes * (1 if panel_bytes < target.l1_bytes / 2 else -(-mc // mr)))
        a_passes = panels if a_bytes < target.l2_bytes / 2 else 0
        l2 += batch * a_passes * chunks * a_bytes * (1 if size * k * mr < target.l1_bytes / 2 else 2)
        l2 += sum(batch * panels * words * count * conflict_bytes(rows, int(size) * k, target) for rows, count in tiles.items())
        l3 = batch * chunks * weight_bytes * n + (0 if a_passes else batch * panels * chunks * a_bytes)
        dram = weight_bytes * n if workload.packed else 0.0
        return KernelFeatures(
            flops=2.0 * batch * m * k * n,
            fma_cycles=batch * fma + widening(batch * m * k, dot),
            load_cycles=batch * load,
            latency_cycles=batch * latency + widening(batch * m * k, dot),
            l2_bytes=l2,
            l3_bytes=l3,
            dram_bytes=dram,
            scalar_elements=batch * m * (n % lanes),
            tasks=batch * panels * chunks,
        )

    def build(self, fused: Fused, workload: GemmWorkload, schedule: GemmSchedule, target: Target) -> Kernel:
        nr, dot = schedule.nv * schedule.lanes, dot_for(workload.kind, target)
        position = fused.param_index(fused.inputs[1])
        packings: tuple[Packing, ...] = ()
        if workload.packed:
            assert position is not None and workload.k is not None and workload.n is not None
            packings = (pack_gemm(position, workload.k, workload.n, nr, dot),)
        with kernel(fused, {packing.param: packing.shape for packing in packings}, dot) as (builder, buffers):
            a, b = fused.inputs
            _, batch, rows = _split(fused)
            flat = activations(a, buffers, dot, (product([*batch, *rows]), a.shape[-1]))
            weights = buffers[b] if workload.packed else T.decl_buffer((product(batch), *b.shape[-2:]), "float32", data=buffers[b].data)
            operands = GemmOperands(batch, rows, b.shape[-2], b.shape[-1], flat, lambda row: lambda k: (row, k), weights, workload.packed, dot)
            ahead, once = (panels_ahead(packings[0].shape, weights, dot, target), passed_once(weights, target)) if packings else (None, None)
            GemmEmitter(fused, buffers, schedule, operands, ahead, once).emit()
        return Kernel(builder.get(), packings)


def pack_panels(weight: np.ndarray, nr: int) -> np.ndarray:
    """[K, N] -> [ceil(N / nr), K, nr], zero filled."""
    k, n = weight.shape
    panels = -(-n // nr)
    padded = np.zeros((k, panels * nr), weight.dtype)
    padded[:, :n] = weight
    return np.ascontiguousarray(padded.reshape(k, panels, nr).transpose(1, 0, 2))


def pack_gemm(position: int, k: int, n: int, nr: int, dot: Dot) -> Packing:
    """The packing of constant weights [.., K, N] into panels of words."""

    def pack(weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(k, n)
        if not dot.grouped:
            return pack_panels(weight, nr)
        padded = np.zeros((dot.words(k) * dot.group, n), weight.dtype)
        padded[:k] = weight
        return np.ascontiguousarray(dot.pack_words(pack_panels(padded, nr).reshape(-1, dot.words(k), dot.group, nr)))

    return Packing(position, (-(-n // nr), dot.words(k), nr * dot.parts), pack, f"panels{nr}" if not dot.grouped else f"{dot.name}{nr}")


def _split(fused: Fused) -> tuple[Any, list[Any], list[Any]]:
    """(B, batch dims, row dims): with a 2-D B all leading dims of A are rows, otherwise A and B share the batch dims."""
    a, b = fused.inputs
    lead = list(a.shape[:-1])
    if len(b.shape) == 2:
        return b, [], lead
    batch = list(b.shape[:-2])
    if len(batch) != len(lead) - 1 or not all(x.same_as(y) or static(x) == static(y) is not None for x, y in zip(batch, lead, strict=False)):
        raise Unfusable("broadcast batch dims")
    return b, batch, lead[-1:]


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
    """Emits one GEMM; see the module for the loop nest."""

    def __init__(
        self,
        fused: Fused,
        buffers: dict[Any, Any],
        schedule: GemmSchedule,
        operands: GemmOperands,
        ahead: Ahead | None = None,
        once: Once | None = None,
    ):
        """ahead, once: prefetch of packed weights by several register tiles and by one, if they are worth it."""
        self._ahead: Any = ahead
        self._once: Any = once
        #: number of the register tile at hand and how many pass its panel (None: not known), where it asks for weights
        self._turn: tuple[Any, int | None] | None = None
        self.fused, self.schedule, self.packed = fused, schedule, operands.packed
        self.k, self.n, self.a, self.b, self.dot = operands.k, operands.n, operands.a, operands.b, operands.dot
        self.address = operands.address
        self.batch, self.m = product(operands.batch), product(operands.rows)
        self.batch_dims, row_dims = operands.batch, operands.rows
        flat, self.buffers = flat_rows(fused, buffers)
        self.flat = self.buffers is not buffers
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
            return lambda k, v: self.dot.weights(lambda place: self.b[jo, k, place], self.nr, v, lanes)
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
        for size in sorted({size for _, size in tiles}, reverse=True):
            starts = [start for start, length in tiles if length == size]
            before = sum(start < starts[0] for start, _ in tiles)
            with T.serial(T.int64(len(starts))) as io:
                self._turn = io + before, len(tiles)
                self._tile(batch, first + io * size + starts[0], size, jo, panel, columns, limit)
                self._turn = None

    @property
    def _alone(self) -> bool:
        """Whether no other register tile passes the panel at hand."""
        return self._turn is not None and self._turn[1] == 1

    def _sharing(self) -> Share | None:
        """What the register tile at hand asks for of the next panel."""
        known = static(self.k)
        return None if self._turn is None or self._ahead is None or known is None else share(*self._turn, self.dot.words(known), self.nr)

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
