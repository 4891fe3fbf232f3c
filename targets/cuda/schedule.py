"""Schedules of the tensor-core template, and a first analytic model of their time that ranks them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..base import Target

#: k elements per stage
BK = 32
#: fp32 multiply-adds per cycle and SM that mma.sync does by policy, as a fraction of `Target.fma_per_cycle` (which counts tf32)
_RATE = {"Fp32": 1 / 3, "Tf32": 1.0, "Fp16": 2.0, "Bf16": 2.0}
_SHARED_BYTES_PER_CYCLE = 128.0
_L2_BYTES_PER_CYCLE = 48.0
#: cycles that a block waits per k step where nothing hides them, and around its loop
_STEP_LATENCY, _BLOCK_LATENCY = 60.0, 1500.0


@dataclass(frozen=True)
class GemmShape:
    batch: int
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class TileSchedule:
    """bm x bn of C per block of wm x wn warps, `stages` tiles of k in flight."""

    bm: int
    bn: int
    wm: int
    wn: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.wm * self.wn

    @property
    def shared_bytes(self) -> int:
        return 4 * self.stages * (self.bm * (BK + 8) + BK * (self.bn + 4))

    @property
    def source(self) -> str:
        return f"tc::Tile<{self.bm}, {self.bn}, {self.wm}, {self.wn}, {self.stages}>"

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{BK}, {self.wm}x{self.wn} warps, {self.stages} stages"


def space(target: Target) -> Sequence[TileSchedule]:
    """Tiles whose fragments fit the registers (at most 32 accumulators a thread) and whose stages fit the shared memory."""
    shapes = [
        (16, 32, 1, 2),
        (16, 64, 1, 4),
        (32, 32, 2, 2),
        (32, 64, 2, 2),
        (64, 32, 2, 2),
        (64, 64, 2, 2),
        (64, 128, 2, 4),
        (128, 64, 4, 2),
        (128, 128, 4, 4),
    ]
    found = [TileSchedule(*shape, stages) for shape in shapes for stages in (3, 4)]
    return [tile for tile in found if tile.shared_bytes <= target.shared_bytes]


def predicted_cycles(shape: GemmShape, tile: TileSchedule, target: Target, policy: str) -> float:
    """Cycles from the first block to the last: waves of blocks, each as slow as the slowest of tensor cores, shared memory and L2."""
    blocks = math.ceil(shape.m / tile.bm) * math.ceil(shape.n / tile.bn) * shape.batch
    per_sm = max(1, min(target.shared_bytes // tile.shared_bytes, 2048 // tile.threads, 512 // tile.threads * 2))
    steps = math.ceil(shape.k / BK)
    resident = min(per_sm, math.ceil(blocks / target.cores))
    waves = math.ceil(blocks / (target.cores * resident))
    arithmetic = tile.bm * tile.bn * BK / (target.fma_per_cycle * _RATE[policy])
    shared = 4.0 * BK * (tile.bm * tile.wn + tile.bn * tile.wm + tile.bm + tile.bn) / _SHARED_BYTES_PER_CYCLE
    level2 = 4.0 * BK * (tile.bm + tile.bn) / _L2_BYTES_PER_CYCLE
    return waves * (_BLOCK_LATENCY + steps * (max(arithmetic, shared, level2) * resident + _STEP_LATENCY))


def best_tile(shape: GemmShape, target: Target, policy: str) -> TileSchedule:
    """The tile of least predicted time."""
    return min(space(target), key=lambda tile: predicted_cycles(shape, tile, target, policy))
