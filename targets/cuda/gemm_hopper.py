"""GEMM of sm_90a: numbers of 16 bits and of 8 whose product goes through TMA, wgmma and warp groups with a part each (include/hopper.cuh).

    block (n tile, m tile, batch): BM x BN of C                # tc::gemm_hopper
        warp group 0: for k in steps of 128 bytes: stage <- boxes of A and B by TMA, as stages become empty
        the others:   for k in steps of 128 bytes: wgmma on the stage, as it becomes full; C = epilogue(accumulators)

Activations are read as they lie, weights are packed to rows of their columns [N][K], so that both are matrices of rows along k. Parts of K, epilogues, and what is written, are
those of gemm.py, which takes what this template refuses: windows of convolutions, rows that TMA cannot address, and products for which its tiles are predicted to be faster (few rows).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ...compiler.tvm import tirx
from ..base import Target
from ..common.fused import Fused, Unfusable
from . import schedule
from .gemm import Gemm, plan
from .kernel import Packing, Plan, Signature
from .schedule_hopper import HopperSchedule, best_tile, predicted_cycles

#: GPUs that have wgmma, TMA and setmaxnreg
TARGETS = frozenset({"sm_90a"})
#: words of a row of 16 bytes: rows have to begin at multiples of it
_ALIGNED = 4


def gemm(
    fused: Fused, target: Target, policy: str, constants: frozenset[int] = frozenset(), tile: HopperSchedule | None = None, rounded: str = ""
) -> Plan:
    """As `gemm.gemm`, of this tile, or of the best, when that is predicted to be faster than the best of gemm.py; raises Unfusable otherwise."""
    if target.name not in TARGETS:
        raise Unfusable(f"no wgmma on {target.name}")
    return plan(HopperGemm, fused, target, policy, constants, tile, rounded)


class HopperGemm(Gemm):
    """A product whose operands are matrices that TMA can address."""

    def __init__(self, fused: Fused, target: Target, policy: str, constants: frozenset[int], rounded: str = ""):
        super().__init__(fused, target, policy, constants, rounded)
        if self.group == 1:
            raise Unfusable("operands in fp32")
        if self.shape.windows:
            raise Unfusable("windows of a convolution")
        if self.k % _ALIGNED:
            raise Unfusable(f"rows of {4 * self.k} bytes, no multiple of {4 * _ALIGNED}")

    @property
    def kind(self) -> str:
        return f"{super().kind} hopper"

    def best(self) -> HopperSchedule:
        """The tile of least predicted time; raises Unfusable when that of gemm.py takes less."""
        other, tile = super().best(), best_tile(self.shape, self.target)
        if schedule.predicted_cycles(self.shape, other, self.target, self.policy) <= predicted_cycles(self.shape, tile, self.target):
            raise Unfusable("the tiles of mma.sync are faster")
        return tile

    def resident(self, tile: HopperSchedule) -> int:
        return tile.resident

    def _packing(self, constants: frozenset[int]) -> Packing:
        packing = super()._packing(constants)
        *lead, k, n = (int(dim) for dim in packing.buffer.shape)
        buffer = tirx.decl_buffer((*lead, n, k), "int32", "columns")
        return replace(packing, buffer=buffer, pack=lambda array: transposed(array.reshape(*lead, k * self.group, n)))

    def _operands(self, tile: HopperSchedule, signature: Signature) -> list[str]:
        a, b = self.fused.inputs[0], self.packings[0].buffer
        return [
            f"const tc::TensorMap &a = {signature.map(a, _rows(a), self.k, tile.bm)}, &b = {signature.map(b, _rows(b), self.k, tile.bn)};",
            f"const int a_row = {self._row(a, 'blockIdx.y * T::BM')}, b_row = {self._row(b, 'blockIdx.x * T::BN')};",
        ]

    def _row(self, buffer: Any, tile: str) -> str:
        """The row of a map at which a block's tile begins."""
        batch = self.offset([*(int(dim) for dim in buffer.shape[:-1]), 1], self.batch_dims)
        return f"{tile} + {batch}" if batch else tile

    def _call(self, tile: HopperSchedule) -> str:
        sizes = f"{self.m}, {self.n}, {tile.part_of(self.k)}"
        return f"tc::gemm_hopper<tc::{self.policy}, T, {sizes}>(a, b, out, blockIdx.y * T::BM, blockIdx.x * T::BN, {self._start(tile)}, a_row, b_row"


def transposed(numbers: np.ndarray) -> np.ndarray:
    """[..., K, N] of numbers of one or two bytes -> rows of words [..., N, words of K] of consecutive k."""
    return np.ascontiguousarray(numbers.swapaxes(-1, -2)).view(np.int32)


def _rows(buffer: Any) -> int:
    return math.prod(int(dim) for dim in buffer.shape[:-1])
