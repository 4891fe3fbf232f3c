"""Block-sparse GEMM template: C[M, N] = epilogue(A[M, K] @ W) where W is a constant whose zeros come in groups of R consecutive k by a panel of outputs.

    for (mo, jo) in parallel:                       # mc rows x one panel of NR = nv * lanes outputs
        for io in mc / mr:                          # one register tile: mr x nv accumulators
            for p in pointers[jo] .. pointers[jo + 1]:          # the groups of the panel that are not all zero
                for r in R:
                    acc[i][v] += A[io*mr + i, indices[p] + r] * values[p, r, v]      # nv loads of W, mr broadcasts of A, mr * nv FMAs
            C = epilogue(acc)

u8 x s8 -> int32 steps over words of consecutive k as the dense GEMM does: R is a multiple of 4 for `vpdpbusd`, of 2 for `vpmaddwd`.

Rows, tails and the epilogue are those of the dense GEMM. One kernel serves all weights of a shape and class of density: how many groups there are is the size of a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from .dot import dot_for, vector
from .emit import SUM_BLOCK, Accumulators, chunk_sizes, register_tiles, store_tile
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule
from .sparse_emit import SparseWorkload, row_chunks, sparse_kernel, sparse_workload, stream_packing
from .sparse_weights import DENSE
from .template import Kernel


@dataclass(frozen=True)
class BlockSchedule:
    """Groups of r consecutive k by nv vectors of `lanes` outputs; mr rows in registers; mc rows of A per task (0: all of them)."""

    r: int
    mr: int
    nv: int
    lanes: int
    mc: int


class GemmBlocks:
    """See the module."""

    name = "gemm_blocks"

    def workload(self, fused: Fused, constants: frozenset[int]) -> SparseWorkload:
        return sparse_workload(fused, constants)

    def space(self, workload: SparseWorkload, target: Target) -> Sequence[BlockSchedule]:
        found = [entry for entry in self.legal(workload, target) if workload.share(entry.r, entry.nv * entry.lanes) <= DENSE]
        if not found:
            raise Unfusable("the zeros leave no group of inputs empty over a panel of outputs")
        return found

    def legal(self, workload: SparseWorkload, target: Target) -> list[BlockSchedule]:
        """All schedules that compute the workload, also those that multiply mostly by zeros."""
        lanes, group = target.lanes(), dot_for(workload.kind, target).group
        shapes = register_tiles(target, (2, 3, 4), -(-workload.n // lanes))
        shapes += [(mr, 1) for mr in (1, 2, 4, 8, *range(10, target.vector_registers // 2 + 1))]
        found = []
        for mr, nv in shapes:
            if workload.m is not None and mr > workload.m or mr < 4 and (workload.m is None or workload.m >= 16):
                continue
            for r in (group, 2 * group, 4 * group, 8 * group):
                # halving the groups saves their indices; it must not store many more zeros
                if r > 16 or workload.k % r or r > group and workload.share(r, nv * lanes) > 1.2 * workload.share(r // 2, nv * lanes):
                    break
                found += [BlockSchedule(r, mr, nv, lanes, mc) for mc in row_chunks(workload.m, mr)]
        return found

    def features(self, workload: SparseWorkload, schedule: BlockSchedule, target: Target) -> KernelFeatures:
        m, mr, nv, r = workload.m or 128, schedule.mr, schedule.nv, schedule.r
        dot = dot_for(workload.kind, target)
        nr, size = nv * schedule.lanes, float(dot.activation_bytes)
        broadcast = dot.broadcast_loads
        panels, mc = -(-workload.n // nr), schedule.mc or m
        groups = workload.share(r, nr) * panels * -(-workload.k // r)
        tiles = chunk_sizes(m, mc, mr)
        fma = load = latency = 0.0
        for rows, count in tiles.items():
            steps = count * groups * r / dot.group
            busy = rows * nv * dot.instructions / target.fma_per_cycle
            fma += steps * busy
            # every group reads its index, and its rows of A begin anywhere
            load += (steps * (rows * broadcast + nv) + count * groups * 2) / 2.0 + count * 12 * panels
            latency += steps * max(4.0, busy)
        stored = groups * (r * nr * float(dot.weight_bytes) + 4.0)
        # a panel touches the lines of A that hold one of its groups; from L2 where a tile of rows is larger than L1
        far = size * mr * workload.k > target.l1_bytes / 2
        touched = 1.0 - (1.0 - workload.share(r, nr)) ** max(1.0, 64 / size / r)
        lines = m * workload.k * size * (touched * panels if far else 1.0)
        return KernelFeatures(
            flops=2.0 * m * groups * r * nr,
            fma_cycles=fma,
            load_cycles=load,
            latency_cycles=latency,
            l2_bytes=lines + stored * tiles.total(),
            l3_bytes=stored * -(-m // mc),
            dram_bytes=stored,
            scalar_elements=float(m * (workload.n % schedule.lanes)),
            tasks=panels * -(-m // mc),
        )

    def build(self, fused: Fused, workload: SparseWorkload, schedule: BlockSchedule, target: Target) -> Kernel:
        nr, dot = schedule.nv * schedule.lanes, dot_for(workload.kind, target)
        with sparse_kernel(fused, workload.n, schedule.r, nr, dot) as (builder, buffers, stream):
            a, _ = fused.inputs
            rows = list(a.shape[:-1])
            flat = T.decl_buffer((product(rows), a.shape[-1]), dot.activation, data=buffers[a].data)
            sizes = T.int64(workload.k), T.int64(workload.n)
            operands = GemmOperands([], rows, *sizes, flat, lambda row: lambda k: (row, k), stream, True, dot)
            long = not dot.grouped and workload.longest(schedule.r, nr) * schedule.r > 2 * SUM_BLOCK
            _Emitter(fused, buffers, schedule, operands, long).emit()
        return Kernel(builder.get(), (stream_packing(fused, schedule.r, nr, dot),))


class _Emitter(GemmEmitter):
    """The dense GEMM's loops over rows and panels, with the groups of a panel in place of its k."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: BlockSchedule, operands: GemmOperands, long: bool):
        super().__init__(fused, buffers, GemmSchedule(schedule.mr, schedule.nv, schedule.lanes, schedule.mc), operands)
        self.stream, self.r, self.long = operands.b, schedule.r, long

    def _panel(self, batch: Any, jo: Any) -> Any:
        pointers = self.stream.pointers
        return T.bind(pointers[jo]), T.bind(pointers[jo + 1])

    def _tile(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        lanes = self.schedule.lanes
        nv = -(-columns // lanes)
        first = T.bind(batch * self.m + row)
        dot = self.dot
        acc = Accumulators(mr, nv, lanes, dot)
        acc.fill()
        a_rows = [self.address(first + i) for i in range(mr)]
        begin, end = panel

        def multiply(part: Accumulators, start: Any, count: Any) -> None:
            with T.serial(count) as step:
                p = T.bind(start + step)
                k = T.bind(self.stream.indices[p].astype("int64"))
                for word in range(self.r // dot.group):
                    weights = [T.bind(self.stream.values[p, vector(T.int64(word * self.nr + v * lanes), lanes)]) for v in range(nv)]
                    part.multiply(range(mr), lambda i: dot.read(self.a, a_rows[i], k + word * dot.group), weights)  # noqa: B023

        if not self.long:
            multiply(acc, begin, end - begin)
        else:  # sums in blocks, as in the dense GEMM
            total, part, length = Accumulators(mr, nv, lanes), acc, SUM_BLOCK // self.r
            total.fill()
            with T.serial((end - begin + (length - 1)) // length) as block:
                start = T.bind(begin + block * length)
                multiply(part, start, T.min(T.int32(length), end - start))
                total.drain(part)
            acc = total

        def lead(i: Any) -> list[Any]:
            return self.rows.indices(first + i) if self.flat else self.lead + self.rows.indices(row + i)

        store_tile(self.fused, self.buffers, acc, lead, lambda v: jo * self.nr + v * lanes, columns, limit)
