"""GEMM and 1x1 convolution of float32 in seven products of half the size instead of eight (Strassen, "Gaussian elimination is not optimal", 1969), for constant weights; one level.

    for chunk in M / 2 / hc:                             # hc pairs of rows, i and M / 2 + i, scaled by powers of two
        for i in hc in parallel:
            terms[7][i][K / 2] = A11 + A22, A21 + A22, A11, A22, A11 + A12, A21 - A11, A12 - A22
        for jo in N / 2 / NR in parallel:                # a pair of panels of NR = nv * lanes columns
            for ko in K / 2 / kc:
                for io in hc / mr:                       # one register tile: mr x nv accumulators
                    for s in 7:
                        panels[s] = sum or difference of two quarters of B[jo] in block ko, or one of them   # by the first tile, beside its multiply-adds
                        acc = terms[s, io, ko] @ panels[s]               # and every few steps lines of what comes next of A and B are prefetched
                        sums[one or two of C11, C12, C21, C22][io] += or -= acc
                    behind the last block of K: C = epilogue(sums[io] * powers of two of the row and of the column)

Rounding: what is added before it is multiplied rounds to the unit of the larger number, so numbers are made alike by powers of two, which is exact: when B is packed, its rows, whose powers columns of A are multiplied by, and then
its columns, whose powers columns of C are multiplied by; while running, rows of A. Errors are in proportion to the largest product of each row and column, 1.5 times those of our direct product; after Ballard,
Benson, Druinsky, Lipshitz and Schwartz, "Improving the numerical stability of fast matrix multiplication" (2016). What a row is paired with shows in its last bits alone: one that holds infinities or NaN is NaN
as a whole, and leaves the other alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from .conv_common import ConvWorkload
from .conv_pointwise import as_gemm, row_reader
from .dot import F32
from .emit import kernel
from .gemm import Gemm, GemmWorkload, pack_panels
from .gemm_emit import GemmOperands
from .gemm_schedules import GemmSchedule, every
from .gemm_strassen_emit import COUNT, DOUBLE, HIGHEST, LOWEST, StrassenEmitter
from .prefetch import LINE, STEPS
from .template import Kernel, Packing

#: pairs of rows and steps of K in a half, at least: with fewer, what is added costs more than is saved
_FEWEST_ROWS, _FEWEST_STEPS = 32, 96
#: pairs of rows in a chunk, at most
_MOST_ROWS = 128
#: steps of a block, at most: numbers that are added up before they are multiplied, and their products, are larger than others, and so is what rounding their sums takes away. Root of the mean
#: square of the error over that of the direct product, K of 768: 1.3 with 128, 1.6 with 192, 2.2 with 384; time 1.02, 1 and 0.99
_MOST_STEPS = 192
#: vectors of columns in a register tile, at least
_FEWEST_VECTORS = 3
#: cycles beside the products, measured on AMD's Zen 4: of a line of a panel that is added up, of one of sums that is added to, of one of the output, of one of terms
_PANEL, _ADD, _OUTPUT, _TERM = 2.5, 2.0, 5.0, 8.0


@dataclass(frozen=True)
class StrassenWorkload:
    """A GEMM; convolution: what it is, if it is a 1x1 convolution."""

    gemm: GemmWorkload
    convolution: ConvWorkload | None = None

    def __str__(self) -> str:
        return str(self.convolution or self.gemm)


@dataclass(frozen=True)
class StrassenSchedule:
    """mr rows x nv vectors of `lanes` columns in registers; hc pairs of rows at a time; kc: steps of half of K in a block."""

    mr: int
    nv: int
    lanes: int
    hc: int
    kc: int


class GemmStrassen:
    """See the module."""

    name = "gemm_strassen"

    def workload(self, fused: Fused, constants: frozenset[int]) -> StrassenWorkload:
        gemm, convolution = as_gemm(fused, constants)
        if not gemm.packed or gemm.kind != "f32":
            raise Unfusable("no constant weights in float32")
        if gemm.m is None or gemm.k is None or gemm.k % 2:
            raise Unfusable("the number of rows is not known, or K is odd")
        if gemm.m < 2 * _FEWEST_ROWS or gemm.k < 2 * _FEWEST_STEPS:
            raise Unfusable("halves are too small")
        weights = getattr(constants, "values", {}).get(fused.param_index(fused.inputs[1]), ())
        if not all(np.isfinite(weight).all() for weight in weights):
            raise Unfusable("weights hold infinities or NaN, which sums of quarters would spread")
        return StrassenWorkload(gemm, convolution)

    def space(self, workload: StrassenWorkload, target: Target) -> Sequence[StrassenSchedule]:
        if target.vector_bits < 512 or target.fma_per_cycle >= 2:
            # AVX2: 0.98 to 1.03 of the time; two multiply-adds of 512 bits in a cycle: not measured
            raise Unfusable("additions gain what they save where a core starts one multiply-add of 512 bits in a cycle")
        gemm = workload.gemm
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        height, half = -(-gemm.m // 2), gemm.k // 2
        hc, kc = _equal(height, _MOST_ROWS), _block(half)
        # the first register tile holds two vectors that it adds up
        tiles = [tile for tile in every(replace(gemm, m=hc), target) if tile.mc == 0 and tile.nv * (tile.mr + 2) < target.vector_registers]
        tiles = [tile for tile in tiles if tile.nv >= _FEWEST_VECTORS and gemm.n > tile.nv * tile.lanes]
        if not tiles:
            raise Unfusable("one panel of columns")
        return [StrassenSchedule(tile.mr, tile.nv, tile.lanes, hc, kc) for tile in tiles]

    def features(self, workload: StrassenWorkload, schedule: StrassenSchedule, target: Target) -> KernelFeatures:
        gemm, nv, lanes = workload.gemm, schedule.nv, schedule.lanes
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        half, height, pairs = gemm.k // 2, -(-gemm.m // 2), -(-gemm.n // (2 * nv * lanes))
        chunks = -(-height // schedule.hc)
        rows, vectors = chunks * schedule.hc, pairs * nv
        one = Gemm().features(replace(gemm, m=rows, k=half, n=vectors * lanes), GemmSchedule(schedule.mr, nv, lanes, schedule.hc), target)
        blocks = -(-half // schedule.kc)
        more = COUNT * _PANEL * chunks * half * vectors + (COUNT + DOUBLE) * _ADD * blocks * rows * vectors + 4 * _OUTPUT * rows * vectors
        more = (more * lanes + COUNT * _TERM * height * half) / LINE
        return replace(
            one,
            flops=2.0 * gemm.m * gemm.k * gemm.n,
            fma_cycles=COUNT * one.fma_cycles + more,
            load_cycles=COUNT * one.load_cycles,
            latency_cycles=COUNT * one.latency_cycles + more,
            l2_bytes=COUNT * one.l2_bytes,
            l3_bytes=COUNT * one.l3_bytes,
            dram_bytes=4.0 * gemm.k * gemm.n,
            tasks=pairs,
        )

    def build(self, fused: Fused, workload: StrassenWorkload, schedule: StrassenSchedule, target: Target) -> Kernel:
        gemm = workload.gemm
        assert gemm.k is not None and gemm.n is not None
        x, weight = fused.inputs
        position = fused.param_index(weight)
        assert position is not None
        nr = schedule.nv * schedule.lanes
        packing = _packing(position, gemm.k, gemm.n, nr)
        with kernel(fused, {position: packing.shape}) as (builder, buffers):
            rows = list(fused.output.shape[:-1])
            flat = T.decl_buffer((product(x.shape),), "float32", data=buffers[x].data)
            address = row_reader(workload.convolution, x, rows, gemm.k)
            panels = T.decl_buffer((_panels(gemm.n, nr), gemm.k + 1, nr), "float32", data=buffers[weight].data)
            operands = GemmOperands([], rows, T.int64(gemm.k), T.int64(gemm.n), flat, address, panels, True, F32)
            StrassenEmitter(fused, buffers, gemm, schedule, operands, buffers[weight]).emit()
        return Kernel(builder.get(), (packing,))


def _equal(count: int, most: int) -> int:
    """The size of as few pieces of at most `most` as `count` takes, as equal as possible."""
    return -(-count // -(-count // most))


def _block(half: int) -> int:
    """Steps of a block: an equal share that is a multiple of what loops are unrolled by, if there is one."""
    fewest = -(-half // _MOST_STEPS)
    even = (half // blocks for blocks in range(fewest, 2 * fewest + 1) if half % (blocks * STEPS) == 0)
    return next(even, _equal(half, _MOST_STEPS))


def _panels(n: int, nr: int) -> int:
    """Panels that N columns take, an even number."""
    return -(-n // (2 * nr)) * 2


def _packing(position: int, k: int, n: int, nr: int) -> Packing:
    """Panels of scaled weights; behind the K rows of each what columns of C are to be multiplied by; behind all panels what columns of A are to be multiplied by."""
    size = _panels(n, nr) * (k + 1) * nr + k

    def pack(weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(k, n).astype(np.float32)
        packed = np.zeros(size, np.float32)
        down, packed[-k:] = _powers(np.abs(weight).max(axis=1))
        weight = weight * down[:, None]
        down, up = _powers(np.abs(weight).max(axis=0))
        made = pack_panels(np.concatenate([weight * down, up[None]]), nr)
        packed[: made.size] = made.reshape(-1)
        return packed

    return Packing(position, (size,), pack, f"strassen{nr}")


def _powers(largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The powers of two below these numbers, one over them and themselves."""
    exponents = np.clip(largest.view(np.int32) >> 23, LOWEST, HIGHEST)
    return ((254 - exponents) << 23).view(np.float32), (exponents << 23).view(np.float32)
