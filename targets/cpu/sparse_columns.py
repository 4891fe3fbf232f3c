"""Unstructured sparse GEMM template: C[M, N] = epilogue(A[M, K] @ W), W a constant with zeros anywhere. Vectors run along the rows of A.

    for (tile, k in K / lanes) in parallel:         # A transposed once: columns[tile][K][rows]
        columns[tile, k .. k + lanes, :] = A[rows of the tile, k .. k + lanes]
    for (tile, panel of `lanes` outputs) in parallel:
        for n in panel:
            for p in pointers[n] .. pointers[n + 1]:            # the nonzero weights of output n
                acc[v] += values[p] * columns[tile, indices[p], v]      # one broadcast of W, `vectors` loads and FMAs
            sums[n, :] = acc
        for rows in tile / lanes:
            C = epilogue(transposed sums)

u8 x s8 -> int32 does the same with words of 4 consecutive k: a quad of weights is stored where one of them is not zero, and `vpdpbusd` takes it.

Every multiply-add is with a nonzero weight. The transposes are butterflies of shuffles in registers, lanes x lanes elements at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, product, static
from .dot import Dot, dot_for, splat, vector
from .emit import Accumulators, Rows, balanced_sizes, flat_rows, store_tile, tasks
from .sparse_emit import SparseWorkload, StreamBuffers, sparse_kernel, sparse_workload, stream_packing
from .template import Kernel


@dataclass(frozen=True)
class ColumnSchedule:
    """`vectors` accumulators of `lanes` rows each; they share every weight."""

    vectors: int
    lanes: int


class GemmColumns:
    """See the module."""

    name = "gemm_columns"

    def workload(self, fused: Fused, constants: frozenset[int]) -> SparseWorkload:
        return sparse_workload(fused, constants)

    def space(self, workload: SparseWorkload, target: Target) -> Sequence[ColumnSchedule]:
        dot, lanes = dot_for(workload.kind, target), target.lanes()
        if dot.name == "madd":
            raise Unfusable("words of two codes would have to be widened at every use")
        most = 8 if workload.m is None else -(-workload.m // lanes)
        return [ColumnSchedule(vectors, lanes) for vectors in range(1, min(most, target.vector_registers // 2) + 1)]

    def features(self, workload: SparseWorkload, schedule: ColumnSchedule, target: Target) -> KernelFeatures:
        m, lanes = workload.m or 128, schedule.lanes
        dot = dot_for(workload.kind, target)
        words = workload.k // dot.group
        nonzero = workload.share(dot.group, 1) * words * workload.n
        tiles = _tiles(m, schedule)
        fma = load = latency = shuffles = l2 = 0.0
        for count, vectors in tiles:
            fma += count * nonzero * vectors / target.fma_per_cycle
            load += count * nonzero * (vectors + 1) / 2.0
            latency += count * nonzero * max(4.0, vectors / target.fma_per_cycle)
            shuffles += count * vectors * (words + workload.n) * 2.0
            tile_bytes = vectors * lanes * words * 4.0
            if tile_bytes > target.l1_bytes / 2:
                # whole lines in a row: the prefetchers hide a part of it, less of a tile that fills L2
                l2 += (0.65 + 0.2 * min(1.0, tile_bytes / target.l2_bytes)) * count * nonzero * vectors * lanes * 4.0
        panels = -(-workload.n // lanes)
        stored = nonzero * 8.0
        passes = sum(count for count, _ in tiles)
        return KernelFeatures(
            flops=2.0 * m * nonzero * dot.group,
            fma_cycles=fma + shuffles,
            load_cycles=load + shuffles,
            latency_cycles=latency,
            l2_bytes=l2 + stored * passes + 2.0 * m * words * 4.0,
            l3_bytes=stored * (passes if stored > target.l2_bytes / 2 else 1),
            dram_bytes=stored,
            scalar_elements=float(m * (workload.n % lanes)),
            tasks=panels * passes,
        )

    def build(self, fused: Fused, workload: SparseWorkload, schedule: ColumnSchedule, target: Target) -> Kernel:
        dot = dot_for(workload.kind, target)
        with sparse_kernel(fused, workload.n, dot.group, 1, dot) as (builder, buffers, stream):
            _Emitter(fused, workload, schedule, buffers, stream, dot).emit()
        return Kernel(builder.get(), (stream_packing(fused, dot.group, 1, dot),))


def _tiles(m: int, schedule: ColumnSchedule) -> list[tuple[int, int]]:
    """Tiles of M rows as (how many, vectors of each), of two sizes that differ by one."""
    return [(count, size) for size, count in balanced_sizes(-(-m // schedule.lanes), schedule.vectors).items()]


class _Emitter:
    """`k` counts words: elements of float32, quads of codes."""

    def __init__(self, fused: Fused, workload: SparseWorkload, schedule: ColumnSchedule, buffers: dict[Any, Any], stream: StreamBuffers, dot: Dot):
        self.fused, self.workload, self.stream, self.dot = fused, workload, stream, dot
        self.lanes, self.k, self.n = schedule.lanes, workload.k // dot.group, workload.n
        a, _ = fused.inputs
        lead = list(a.shape[:-1])
        self.m = product(lead)
        self.a = T.decl_buffer((self.m, a.shape[-1]), dot.activation, data=buffers[a].data)
        flat, self.buffers = flat_rows(fused, buffers)
        self.rows = Rows(flat if self.buffers is not buffers else lead)
        known = static(self.m)
        if known is None:
            self.tiles: list[tuple[Any, int]] = [(T.ceildiv(self.m, T.int64(schedule.vectors * self.lanes)), schedule.vectors)]
        else:
            self.tiles = [(T.int64(count), vectors) for count, vectors in _tiles(known, schedule)]

    def emit(self) -> None:
        """The two loops, for each size of tile; `first` is the row where the tiles of that size begin."""
        first: Any = T.int64(0)
        for count, vectors in self.tiles:
            width = vectors * self.lanes
            columns = T.alloc_buffer((count, T.int64(self.k), T.int64(width)), self.dot.word)
            self._transpose(columns, first, count, vectors)
            self._multiply(columns, first, count, vectors)
            first = first + count * width

    def _transpose(self, columns: Any, first: Any, count: Any, vectors: int) -> None:
        lanes, width = self.lanes, vectors * self.lanes
        whole, rest = divmod(self.k, lanes)
        known = static(self.m)
        work = None if known is None else known * self.k
        with tasks(count * T.int64(whole + (rest > 0)), work) as task:
            tile = T.bind(T.floordiv(task, T.int64(whole + (rest > 0))))
            k = T.bind(T.floormod(task, T.int64(whole + (rest > 0))) * T.int64(lanes))
            with T.serial(T.int64(vectors)) as v:
                row = T.bind(first + tile * width + v * lanes)

                def fast() -> None:
                    rows = [T.bind(self._words(row + i, k)) for i in range(lanes)]
                    for i, value in enumerate(transpose(rows)):
                        T.buffer_store(columns, value, [tile, k + i, vector(v * lanes, lanes)])

                def careful() -> None:
                    with T.serial(T.min(T.int64(lanes), T.int64(self.k) - k)) as i, T.serial(T.int64(lanes)) as lane:
                        value = T.if_then_else(row + lane < self.m, self._word(row + lane, k + i), self.dot.zero())
                        T.buffer_store(columns, value, [tile, k + i, v * lanes + lane])

                _either(tirx.all(row + lanes <= self.m, k + lanes <= T.int64(self.k)), fast, careful)

    def _words(self, row: Any, k: Any) -> Any:
        """`lanes` consecutive words of a row of A."""
        loaded = self.a[row, vector(k * self.dot.group, self.lanes * self.dot.group)]
        return loaded if self.dot.group == 1 else T.reinterpret(f"int32x{self.lanes}", loaded)

    def _word(self, row: Any, k: Any) -> Any:
        return self.dot.read(self.a, lambda at: (row, at), k * self.dot.group)

    def _multiply(self, columns: Any, first: Any, count: Any, vectors: int) -> None:
        lanes, width = self.lanes, vectors * self.lanes
        panels = -(-self.n // lanes)
        whole = self.n // lanes
        known = static(self.m)
        work = None if known is None else int(known * self.k * self.n * self.workload.share(self.dot.group, 1))
        with tasks(count * T.int64(panels), work) as task:
            tile = T.bind(T.floordiv(task, T.int64(panels)))
            panel = T.bind(T.floormod(task, T.int64(panels)))
            sums = T.alloc_buffer((lanes, vectors, lanes), self.dot.accumulator)

            def outputs(real: int) -> None:
                with T.serial(T.int64(real)) as n:
                    self._column(columns, tile, T.bind(panel * lanes + n), n, vectors, sums)
                with T.serial(T.int64(vectors)) as v:
                    self._store(T.bind(first + tile * width + v * lanes), panel, v, real, sums)

            if whole == panels:
                outputs(lanes)
            elif whole == 0:
                outputs(self.n)
            else:
                _either(panel < T.int64(whole), lambda: outputs(lanes), lambda: outputs(self.n - whole * lanes))

    def _column(self, columns: Any, tile: Any, output: Any, n: Any, vectors: int, sums: Any) -> None:
        """All rows of one output."""
        lanes = self.lanes
        acc = Accumulators(1, vectors, lanes, self.dot)
        acc.fill()
        begin, end = T.bind(self.stream.pointers[output]), T.bind(self.stream.pointers[output + 1])
        with T.serial(end - begin) as step:
            p = T.bind(begin + step)
            k = T.bind(self.stream.indices[p].astype("int64") // T.int64(self.dot.group))
            weight = T.bind(splat(self.stream.values[p, 0], lanes))
            for v in range(vectors):
                acc.fma(0, v, columns[tile, k, vector(T.int64(v * lanes), lanes)], weight)
        for v in range(vectors):
            T.buffer_store(sums, acc.load(0, v), [n, v, vector(T.int64(0), lanes)])

    def _store(self, row: Any, panel: Any, v: Any, real: int, sums: Any) -> None:
        """The epilogue of lanes x lanes sums, transposed back."""
        lanes = self.lanes
        acc = Accumulators(lanes, 1, lanes, self.dot)
        # columns beyond the real ones hold what was there before; they are not stored
        values = transpose([T.bind(sums[i, v, vector(T.int64(0), lanes)]) for i in range(lanes)])
        for i, value in enumerate(values):
            acc.store(i, 0, value)

        def lead(i: Any) -> list[Any]:
            return self.rows.indices(row + i)

        def column(_: int) -> Any:
            return panel * lanes

        known = static(self.m)
        if known is not None and known % lanes == 0:
            store_tile(self.fused, self.buffers, acc, lead, column, real)
            return
        _either(
            row + lanes <= self.m,
            lambda: store_tile(self.fused, self.buffers, acc, lead, column, real),
            lambda: store_tile(self.fused, self.buffers, acc, lead, column, real, inside=lambda i: row + i < self.m),
        )


def transpose(rows: Sequence[Any]) -> list[Any]:
    """Vectors r[i][j] -> r[j][i]: log2(lanes) rounds that swap ever larger off-diagonal blocks, two shuffles per pair of vectors."""
    lanes = len(rows)
    values = list(rows)
    step = 1
    while step < lanes:
        after = list(values)
        for i in range(lanes):
            if i & step:
                continue
            a, b = values[i], values[i + step]
            low = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
            high = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
            after[i] = T.bind(tirx.Shuffle([a, b], [tirx.const(index, "int32") for index in low]))
            after[i + step] = T.bind(tirx.Shuffle([a, b], [tirx.const(index, "int32") for index in high]))
        values = after
        step *= 2
    return values


def _either(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()
