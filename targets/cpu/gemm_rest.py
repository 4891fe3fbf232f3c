"""GEMM and 1x1 convolution of u8 x s8 by `vpmaddubsw` for weights that it would saturate with: the few codes that are too large for a pair are lowered, and what that takes away is added.

    W = fit + rest                                  # at compile time: pairs of `fit` fit 16 bits, `rest` is sparse (see short_sums.py)
    for (block of rows, k in K / 4) in parallel:    # words of A transposed once: words[block][K / 4][rows]
        words[block, k, :] = A[rows of the block, k]
    for (panel, block of rows) in parallel:
        for n in panel:
            for p in pointers[n] .. pointers[n + 1]:            # the words of rest[:, n] that are not zero
                sums[n, rows] += words[block, indices[p], rows] * values[p]     # vectors run along the rows
        for io in rows / mr:                        # the dense GEMM's tiles, which begin with those sums
            acc = transposed sums
            for k in K / 4:
                acc[i][v] += A[io*mr + i, k] * fit[k][v]
            C = epilogue(acc)

Both products are exact in int32. The rest costs in proportion to its words: 3 of 100 of those of BERT in 8 bits, per output channel. Where there are fewer rows than a vector has lanes, its codes are multiplied
one by one instead: such products wait for the weights, half as many bytes as in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from .conv_common import ConvWorkload
from .conv_pointwise import as_gemm, row_reader
from .dot import PAIRS, WIDE, dot_for, splat, vector
from .emit import Accumulators, tasks, with_columns
from .gemm import Gemm, GemmWorkload, pack_gemm
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule, every
from .short_sums import fitting
from .sparse_columns import transpose
from .sparse_emit import StreamBuffers, sparse_kernel
from .sparse_weights import compress, group_mask
from .template import Kernel, Packing

#: vectors of rows whose sums one word of the rest is multiplied into, at most
_VECTORS = 8
#: weights that are split to see how much is left, those of the other call sites resemble them
_SAMPLES = 3


@dataclass(frozen=True)
class RestWorkload:
    """A dense GEMM by pairs; rest: nonzero words of 4 consecutive k by one output / all of them, codes: nonzero codes / all of them. convolution: what it is, if it is a 1x1 convolution."""

    gemm: GemmWorkload
    rest: float
    codes: float
    convolution: ConvWorkload | None = None

    def __str__(self) -> str:
        return f"{self.convolution or self.gemm} rest {self.rest:.3f}".replace(PAIRS.kind, f"{PAIRS.kind}+rest")


@dataclass(frozen=True)
class RestSchedule:
    """mr rows x nv vectors of `lanes` columns in registers; blocks of `rows` rows, those of the rest in as many vectors, 0: one code after the other."""

    mr: int
    nv: int
    lanes: int
    rows: int
    vectors: int


class GemmRest:
    """See the module."""

    name = "gemm_rest"

    def workload(self, fused: Fused, constants: frozenset[int]) -> RestWorkload:
        gemm, convolution = as_gemm(fused, constants)
        if gemm.kind != WIDE.kind:
            raise Unfusable("no weights of 8 bits, or all pairs of them fit 16 bits")
        values = getattr(constants, "values", {}).get(fused.param_index(fused.inputs[1]), ())
        if not values or gemm.m is None or gemm.k is None:
            raise Unfusable("weights or rows are not known")
        rests = [fitting(weight.reshape(gemm.k, -1))[1] for weight in values[:_SAMPLES]]
        words, codes = (float(np.mean([group_mask(rest, size, 1).mean() for rest in rests])) for size in (4, 1))
        return RestWorkload(replace(gemm, kind=PAIRS.kind), words, codes, None if convolution is None else replace(convolution, kind=PAIRS.kind))

    def space(self, workload: RestWorkload, target: Target) -> Sequence[RestSchedule]:
        gemm, lanes, rows = workload.gemm, target.lanes(), workload.gemm.m
        assert rows is not None and gemm.k is not None
        if dot_for(gemm.kind, target) is not PAIRS:
            raise Unfusable("four products are added by one instruction")
        if rows >= lanes and (gemm.k < 4 * lanes or gemm.k % 4):
            raise Unfusable("fewer words of K than a vector has lanes, or part of one")
        blocks = -(-rows // (_VECTORS * lanes))
        while rows >= lanes and -(-_share(rows, blocks) // lanes) * lanes > rows:
            blocks += 1  # vectors of a block reach beyond the last row
        height = _share(rows, blocks)
        vectors = -(-height // lanes) if rows >= lanes else 0
        return [RestSchedule(s.mr, s.nv, s.lanes, height, vectors) for s in every(gemm, target) if not s.mc and s.mr <= height]

    def features(self, workload: RestWorkload, schedule: RestSchedule, target: Target) -> KernelFeatures:
        gemm, vectors, lanes = workload.gemm, schedule.vectors, schedule.lanes
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        blocks, words, panels = -(-gemm.m // schedule.rows), gemm.k // 4, -(-gemm.n // (schedule.nv * lanes))
        found = Gemm().features(replace(gemm, m=blocks * schedule.rows), GemmSchedule(schedule.mr, schedule.nv, lanes, schedule.rows), target)
        # a transposed square takes 2 cycles a vector; the loop over the rest of an output ends where it was not predicted
        entries = workload.rest * words * gemm.n if vectors else workload.codes * gemm.k * gemm.n
        squares = blocks * vectors * (words / lanes + gemm.n / lanes) * 2.0 * lanes
        more = blocks * (entries * (vectors + 1.0 if vectors else 2.0 * gemm.m) + 20.0 * gemm.n) + squares
        return replace(
            found,
            flops=2.0 * gemm.m * gemm.k * gemm.n,
            fma_cycles=found.fma_cycles + more,
            load_cycles=found.load_cycles + more,
            latency_cycles=found.latency_cycles + more,
            l2_bytes=found.l2_bytes + blocks * entries * (4.0 * vectors * lanes + 8.0) + 2.0 * gemm.m * gemm.k,
            dram_bytes=found.dram_bytes + 8.0 * entries,
            tasks=blocks * panels,
        )

    def build(self, fused: Fused, workload: RestWorkload, schedule: RestSchedule, target: Target) -> Kernel:
        gemm, nr = workload.gemm, schedule.nv * schedule.lanes
        assert gemm.k is not None and gemm.n is not None
        x, weight = fused.inputs
        position = fused.param_index(weight)
        assert position is not None
        dense = pack_gemm(position, gemm.k, gemm.n, nr, PAIRS)
        with sparse_kernel(fused, gemm.n, 4, 1, PAIRS, dense.shape) as (builder, buffers, stream):
            flat = T.decl_buffer((product(x.shape),), PAIRS.activation, data=buffers[x].data)
            rows = list(fused.output.shape[:-1])
            address = row_reader(workload.convolution, x, rows, gemm.k)
            operands = GemmOperands([], rows, T.int64(gemm.k), T.int64(gemm.n), flat, address, buffers[weight], True, PAIRS)
            _Emitter(fused, buffers, schedule, operands, stream, gemm).emit()

        def pack(array: np.ndarray) -> tuple[np.ndarray, ...]:
            fit, rest = fitting(array.reshape(gemm.k, gemm.n))
            left = compress(rest, 4, 1, PAIRS) if schedule.vectors else compress(rest, 1, 1)
            return dense.pack(fit), left.values.astype(np.int32), left.indices, left.pointers  # pyright: ignore[reportReturnType]

        return Kernel(builder.get(), (Packing(position, (), pack, f"{dense.key} and rest {'words' if schedule.vectors else 'codes'}"),))


def _share(rows: int, blocks: int) -> int:
    return -(-rows // blocks)


class _Emitter(GemmEmitter):
    """The dense GEMM's tiles over one block of rows and one panel after the other; see the module."""

    def __init__(
        self, fused: Fused, buffers: dict[Any, Any], schedule: RestSchedule, operands: GemmOperands, stream: StreamBuffers, gemm: GemmWorkload
    ):
        super().__init__(fused, buffers, GemmSchedule(schedule.mr, schedule.nv, schedule.lanes, 0), operands)
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        self.stream, self.lanes, self.vectors, self.height = stream, schedule.lanes, schedule.vectors, schedule.vectors * schedule.lanes or gemm.m
        self.block_rows = schedule.rows
        self.rows_known, self.words, self.columns_known = gemm.m, gemm.k // 4, gemm.n
        self.blocks = -(-gemm.m // schedule.rows)
        self.lead: list[Any] = []
        #: of the block and panel at hand: the first row of the rest's sums, and these
        self.first: Any = None
        self.sums: Any = None

    def emit(self) -> None:
        words = self._transposed() if self.vectors else None
        panels = -(-self.columns_known // self.nr)
        with tasks(T.int64(panels * self.blocks), self.rows_known * self.words * 4 * self.columns_known) as task:
            jo, block = T.bind(T.floordiv(task, T.int64(self.blocks))), T.bind(T.floormod(task, T.int64(self.blocks)))

            def outputs(columns: int) -> None:
                self.first = T.bind(self._first_row(block, self.height))
                self.sums = T.alloc_buffer((self.height, self.nr), self.dot.accumulator)
                if self.vectors:
                    self._rest(words, block, jo, columns)
                else:
                    self._rest_of_few(jo, columns)
                own = T.bind(self._first_row(block, self.block_rows))
                self._static_rows(T.int64(0), own, self.block_rows, jo, self._panel(T.int64(0), jo), columns, None)

            with_columns(jo, self.columns_known, self.nr, outputs)

    def _first_row(self, block: Any, count: int) -> Any:
        """Of the `count` rows that a block begins with; they end at the last row, so that some are summed again."""
        return T.min(block * self.block_rows, T.int64(self.rows_known - count))

    def _transposed(self) -> Any:
        """[block, k, :]: the word of 4 codes from 4 k on of every row of a block."""
        lanes, words = self.lanes, T.alloc_buffer((self.blocks, self.words, self.height), self.dot.word)
        steps = -(-self.words // lanes)
        with tasks(T.int64(self.blocks * steps), self.rows_known * self.words) as task:
            block = T.bind(T.floordiv(task, T.int64(steps)))
            k = T.bind(T.min(T.floormod(task, T.int64(steps)) * lanes, T.int64(self.words - lanes)))
            with T.serial(T.int64(self.vectors)) as v:
                row = T.bind(self._first_row(block, self.height) + v * lanes)
                rows = []
                for i in range(lanes):
                    (place,) = self.address(row + i)(k * 4)
                    rows.append(T.bind(T.reinterpret(f"int32x{lanes}", self.a[vector(place, 4 * lanes)])))
                for i, value in enumerate(transpose(rows)):
                    T.buffer_store(words, value, [block, k + i, vector(v * lanes, lanes)])
        return words

    def _rest(self, words: Any, block: Any, jo: Any, columns: int) -> None:
        """self.sums[row, column] of a block and a panel; columns that the panel does not have hold anything."""
        lanes, stream = self.lanes, self.stream
        turned = T.alloc_buffer((lanes, self.height), self.dot.accumulator)
        for start in range(0, columns, lanes):
            with T.serial(T.int64(min(lanes, columns - start))) as n:
                output = T.bind(jo * self.nr + start + n)
                acc = Accumulators(1, self.vectors, lanes, self.dot)
                acc.fill()
                begin, end = T.bind(stream.pointers[output]), T.bind(stream.pointers[output + 1])
                with T.serial(end - begin) as step:
                    p = T.bind(begin + step)
                    k = T.bind(stream.indices[p].astype("int64") // T.int64(4))
                    weight = T.bind(splat(stream.values[p, 0], lanes))
                    for v in range(self.vectors):
                        acc.fma(0, v, words[block, k, vector(T.int64(v * lanes), lanes)], weight)
                for v in range(self.vectors):
                    T.buffer_store(turned, acc.load(0, v), [n, vector(T.int64(v * lanes), lanes)])
            with T.serial(T.int64(self.vectors)) as v:
                squares = transpose([T.bind(turned[i, vector(v * lanes, lanes)]) for i in range(lanes)])
                for i, value in enumerate(squares):
                    T.buffer_store(self.sums, value, [v * lanes + i, vector(T.int64(start), lanes)])

    def _rest_of_few(self, jo: Any, columns: int) -> None:
        """The same, code by code."""
        total, stream = T.alloc_buffer((self.height,), self.dot.accumulator), self.stream
        rows = [self.address(T.int64(i)) for i in range(self.height)]
        with T.serial(T.int64(columns)) as n:
            output = T.bind(jo * self.nr + n)
            for i in range(self.height):
                T.buffer_store(total, T.int32(0), [T.int64(i)])
            begin, end = T.bind(stream.pointers[output]), T.bind(stream.pointers[output + 1])
            with T.serial(end - begin) as step:
                p = T.bind(begin + step)
                k, weight = T.bind(stream.indices[p].astype("int64")), T.bind(stream.values[p, 0])
                for i, address in enumerate(rows):
                    T.buffer_store(total, total[i] + T.cast(self.a[address(k)], "int32") * weight, [T.int64(i)])
            for i in range(self.height):
                T.buffer_store(self.sums, total[i], [T.int64(i), n])

    def _first_sums(self, row: Any) -> Callable[[int, int], Any]:
        return lambda i, v: self.sums[row - self.first + i, vector(T.int64(v * self.lanes), self.lanes)]
