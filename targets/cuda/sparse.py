"""Products by constant 16-bit weights of the 2:4 pattern on sparse tensor cores: two of four consecutive k stay, `mma.sp` multiplies those alone.

    block (strips of 32 columns, m tile, part of K): BM x BN of C        # tc::gemm_sparse in include/sparse.cuh
        for k in steps of 64: shared <- rows of X, the strips' weights and positions by cp.async, several steps ahead
            warps: fragments <- shared, as they lie; mma.sp of a strip and 8 rows
        C = epilogue(accumulators)

Everything but the operands is gemm.py's. Whether weights are of this pattern is seen by their values, so it does not matter who pruned them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.tvm import tirx
from ..base import Target
from ..common.fused import Unfusable
from . import gemm_hopper, schedule
from .gemm import Gemm
from .kernel import HALF, Packing, Signature
from .product import Request
from .schedule import BK, SHARED_BYTES_PER_CYCLE, GemmShape, TileSchedule, fastest, in_waves, timed

#: columns of a strip; words of a unit of 32 k: weights, and their positions
COLUMNS, UNIT_WORDS = 32, 2 * 128 + 32
#: words of k in a unit
_UNIT = 16
#: multiply-adds of words per cycle and SM of mma.sp, zeros counted, as a fraction of `Target.fma_per_cycle`
_RATE = 2.0


@dataclass(frozen=True)
class SparseSchedule(TileSchedule):
    """bm rows x a strip for each of wn warps."""

    @property
    def shared_bytes(self) -> int:
        return 4 * self.stages * (self.bm * (BK + 4) + self.wn * BK // _UNIT * UNIT_WORDS)

    @property
    def source(self) -> str:
        return f"tc::SparseTile<{self.bm}, {self.wn}, {self.stages}>"

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}, a strip of 2:4 per warp, {self.stages} stages" + (f", K in {self.parts} parts" if self.parts > 1 else "")


def space(target: Target) -> Sequence[SparseSchedule]:
    """Tiles whose accumulators fit the registers and whose stages fit the shared memory."""
    shapes = [(bm, warps) for bm in (8, 16, 32, 64, 128) for warps in (1, 2, 4, 8) if bm * warps <= 512 and (bm <= 32 or warps > 1)]
    found = [SparseSchedule(bm, COLUMNS * warps, 1, warps, stages) for bm, warps in shapes for stages in (3, 4)]
    return [tile for tile in found if tile.shared_bytes <= target.shared_bytes]


def predicted_cycles(shape: GemmShape, tile: SparseSchedule, target: Target) -> float:
    """As in schedule.py: every warp reads all rows of X, and its own weights once."""
    per_sm = max(1, min(target.shared_bytes // tile.shared_bytes, 512 // tile.threads * 2))
    arithmetic = tile.bm * tile.bn * BK / (target.fma_per_cycle * _RATE)
    weights = 4.0 * tile.wn * BK / _UNIT * UNIT_WORDS
    shared = (4.0 * BK * tile.bm * (tile.wn + 1) + 2 * weights) / SHARED_BYTES_PER_CYCLE
    return timed(shape, tile, target, "gemm 2:4", in_waves(shape, tile, target, max(arithmetic, shared), per_sm))


def best_tile(shape: GemmShape, target: Target) -> SparseSchedule:
    """The tile of least predicted time."""
    return fastest(shape, space(target), target, lambda tile: predicted_cycles(shape, tile, target))


class SparseGemm(Gemm):
    """A matmul of 16-bit numbers by one matrix. Rows may be open."""

    equal_shares = False

    def __init__(self, asked: Request):
        super().__init__(asked)
        if self.fused.core["op"] != "matmul" or self.group != 2 or self.batch != 1:
            raise Unfusable("no matrix product of 16-bit numbers")
        if not (isinstance(self.k, int) and isinstance(self.n, int)):
            raise Unfusable("open sizes other than rows")

    @property
    def kind(self) -> str:
        return "gemm 2:4"

    def best(self) -> SparseSchedule:
        if not self._faster(self.shape):
            raise Unfusable("dense tiles are faster")
        return self._best(self.shape)

    def _best(self, shape: GemmShape) -> SparseSchedule:
        return best_tile(shape, self.target)

    def cycles(self, tile: SparseSchedule, rows: int) -> float:
        return predicted_cycles(self._shape(rows), tile, self.target)

    def variants(self) -> Sequence[tuple[SparseSchedule, tuple[Any, int | None, int | None] | None]]:
        """Where rows are open, this template takes all if it is faster for most of the numbers of rows that are tried: weights are packed in one way."""
        if not isinstance(self.m, int) and 2 * sum(self._faster(self._shape(rows)) for rows in self.anchors()) <= len(self.anchors()):
            raise Unfusable("dense tiles are faster")
        return super().variants()

    def _faster(self, shape: GemmShape) -> bool:
        """It is predicted to take less time than dense tiles."""
        dense = schedule.predicted_cycles(shape, super()._best(shape), self.target, self.policy)
        return min(dense, gemm_hopper.least_cycles(shape, self.target)) >= predicted_cycles(shape, best_tile(shape, self.target), self.target)

    def _packing(self, constants: frozenset[int]) -> Packing:
        packing = super()._packing(constants)
        *_, k, n = (int(dim) for dim in packing.buffer.shape)
        buffer = tirx.decl_buffer((-(-n // COLUMNS), -(-k // _UNIT), UNIT_WORDS), "int32", "two_of_four")
        return Packing(packing.param, buffer, lambda array: compressed(array.reshape(2 * k, n)))

    def operands(self, tile: TileSchedule, signature: Signature) -> list[str]:
        a, b = (signature.name(buffer) for buffer in (self.fused.inputs[0], self.packings[0].buffer))
        bf16 = "true" if str(self.fused.inputs[0].ty.dtype) == "bfloat16" else "false"
        return [
            self.a.declared("a", f"tc::words({a})", signature),
            f"const tc::Sparse<{bf16}, {2 * self.k}, {self.n}> b{{{b}}};",
        ]

    def _call(self, tile: TileSchedule, signature: Signature) -> str:
        units, most = tile.part_of(self.k) // _UNIT, -(-self.k // _UNIT)
        first, last = ("0", f"{most}") if tile.parts == 1 else (f"blockIdx.z * {units}", f"tc::min<int>((blockIdx.z + 1) * {units}, {most})")
        place = f"blockIdx.y * T::BM, blockIdx.x * T::WARPS, {first}, {last}"
        if isinstance(self.m, int):
            return f"tc::gemm_sparse<T, {self.m}, {self.a.vector}>(a, b, out, {place}"
        return f"tc::gemm_sparse<T, {self.a.vector}>(a, b, out, {signature.size(self.m)}, {place}"


def two_of_four(weight: np.ndarray) -> bool:
    """Whether of four consecutive rows of one matrix [..., K, N] of 16-bit numbers no column has more than two that are not zero."""
    if weight.dtype.name not in HALF or weight.ndim < 2 or math.prod(weight.shape[:-2]) != 1 or weight.shape[-2] < 4 or not weight.size:
        return False
    fours = _fours(weight.reshape(weight.shape[-2:]), 4)
    return bool((np.count_nonzero(fours & 0x7FFF, axis=1) <= 2).all())


def _fours(weight: np.ndarray, rows: int) -> np.ndarray:
    """The bits of [K, N] as [K / 4, 4, N], filled up to a multiple of `rows` with zeros."""
    bits = weight.view(np.uint16)
    return np.pad(bits, ((0, -len(bits) % rows), (0, 0))).reshape(-1, 4, bits.shape[1])


def compressed(weight: np.ndarray) -> np.ndarray:
    """weight: [K, N] of 16-bit numbers, two_of_four -> int32 [strips, units, UNIT_WORDS] in the order of `mma.sp` fragments; see include/sparse.cuh."""
    fours = _fours(np.pad(weight, ((0, 0), (0, -weight.shape[1] % COLUMNS))), 32)
    units, strips = len(fours) // 8, fours.shape[2] // COLUMNS
    zero = (fours & 0x7FFF) == 0
    kept = np.sort(np.argsort(zero, axis=1, kind="stable")[:, :2], axis=1)
    # axes: unit, h, t, e, strip, g, i, r
    values = np.take_along_axis(fours, kept, axis=1).reshape(units, 2, 4, 2, strips, 8, 2, 2)
    words = np.ascontiguousarray(values.transpose(4, 0, 6, 5, 2, 1, 7, 3)).view(np.uint32).reshape(strips, units, 256)
    nibbles = (kept[:, 0] | kept[:, 1] << 2).astype(np.uint32).reshape(units, 2, 4, strips, 8, 2, 2)
    halves = (nibbles << (4 * np.arange(4, dtype=np.uint32))[None, None, :, None, None, None, None]).sum(axis=2, dtype=np.uint32)
    # axes: unit, half of k, strip, g, i
    positions = (halves[..., 0] | halves[..., 1] << np.uint32(16)).transpose(2, 0, 3, 4, 1).reshape(strips, units, 32)
    return np.concatenate([words, positions], axis=2).view(np.int32)
