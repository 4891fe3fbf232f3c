"""Schedules of the Hopper templates (gemm_hopper.py, attention_hopper.py), ranked by the analytic model of schedule.py with the rates of wgmma."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...autotune.latency import corrected
from ..base import Target
from .schedule import (
    BK,
    BLOCKED,
    EXPONENTIALS,
    SHARED_BYTES_PER_CYCLE,
    GemmShape,
    TileSchedule,
    fastest,
    in_shares,
    in_turns,
    in_waves,
    or_shares,
    timed,
)

#: multiply-adds of words per cycle and SM by wgmma, as a fraction of `Target.fma_per_cycle` (what mma.sync does): 1024 of 640
RATE = 1.6
#: cycles from the request of a stage to its arrival, an estimate
COPY_LATENCY = 800.0
#: bytes of a row of a stage, those that the alignment of the stages may take, and those of the two barriers of a stage
_ROW, ALIGNMENT, BARRIERS = 4 * BK, 1024, 16
#: shared memory of a multiprocessor that each of its blocks takes for itself
RESERVED = 1024


class WarpGroups:
    """Of schedules of `groups` warp groups that multiply and one that copies."""

    groups: int

    @property
    def resident(self) -> int:
        """Blocks that are to fit a multiprocessor: two of one group, of which one multiplies while the other stores; two groups share one block's stages."""
        return 2 if self.groups == 1 else 1

    @property
    def threads(self) -> int:
        return 128 * (1 + self.groups)


@dataclass(frozen=True)
class HopperSchedule(WarpGroups, TileSchedule):
    """bm x bn of C per block of `groups` warp groups that multiply and one that copies; every warp makes 16 rows, or several times 16, of the whole width."""

    @property
    def groups(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.wm // 4

    @property
    def shared_bytes(self) -> int:
        return self.stages * (_ROW * (self.bm + self.bn) + BARRIERS) + ALIGNMENT

    @property
    def source(self) -> str:
        return f"tc::HopperTile<{self.bm}, {self.bn}, {self.groups}, {self.stages}, {self.resident}>"

    def __str__(self) -> str:
        parts = f", K in {self.parts} parts" if self.parts > 1 else f", {self.shares} equal shares" if self.shares else ""
        return f"{self.bm}x{self.bn}x{BK}, 1 warp group copies, {self.groups} multiply, {self.stages} stages{parts}"


def space(target: Target, sums: int = 128, width: int | None = None) -> Sequence[HopperSchedule]:
    """Tiles of at most so many sums a thread whose stages fit the shared memory as often as blocks are to be resident. width: where all have to be as narrow, high ones are among them."""
    one = [(bm, bn, 1) for bm, widths in ((64, (64, 128, 192)), (128, (64, 128))) for bn in widths]
    two = [(128, bn, 2) for bn in (128, 192, 256)] + [(256, 128, 2)] + ([(256, 64, 2)] if width == 64 else [])
    found = [HopperSchedule(bm, bn, 4 * groups, 1, stages) for bm, bn, groups in one + two for stages in (5, 4, 3)]
    return [
        tile
        for tile in found
        if tile.bm * tile.bn <= 128 * tile.groups * sums and tile.resident * (tile.shared_bytes + RESERVED) <= target.shared_bytes + RESERVED
    ]


def predicted_cycles(shape: GemmShape, tile: HopperSchedule, target: Target) -> float:
    """As in schedule.py. Each 64 rows read their part of A and the whole of B's tile from shared memory, into which TMA writes both once; all stages but one are
    on their way while that one is multiplied."""
    arithmetic = tile.bm * tile.bn * BK / (target.fma_per_cycle * RATE)
    shared = _ROW * (tile.bm + math.ceil(tile.bm / 64) * tile.bn + tile.bm + tile.bn) / SHARED_BYTES_PER_CYCLE
    step, latency = max(arithmetic, shared), COPY_LATENCY / (tile.stages - 1)
    cycles = in_shares(shape, tile, target, step, latency) if tile.shares else in_waves(shape, tile, target, step, tile.resident, latency)
    return timed(shape, tile, target, "gemm hopper blocks" if shape.strips else "gemm hopper", cycles)


def best_tile(shape: GemmShape, target: Target, policy: str = "", width: int | None = None, shares: bool = False) -> HopperSchedule:
    """The tile of least predicted time for operands of this policy. width: the columns that it has to have. shares: blocks may take equal shares."""
    tiles = [tile for tile in space(target, 96 if policy in BLOCKED else 128, width) if tile.bn == (width or tile.bn)]

    def cycles(tile: HopperSchedule) -> float:
        return predicted_cycles(shape, tile, target)

    best = fastest(shape, tiles, target, cycles)
    return or_shares(shape, best, [(tile, tile.resident) for tile in tiles], target, cycles) if shares else best


#: keys of a step of attention: scores of 64 of them take 32 registers a thread
_KEYS = 128
#: cycles of a step that nothing hides: products of one warp group, its softmax, and the products that wait for it, an estimate
_STEP_LATENCY = 1200.0


@dataclass(frozen=True)
class AttentionSchedule:
    """64 queries for each of `groups` warp groups, `keys` keys a step; `stages` tiles of keys or values are in shared memory, each in boxes of 64 elements a row."""

    groups: int
    stages: int
    depth: int
    width: int
    keys: int = _KEYS

    @property
    def queries(self) -> int:
        return 64 * self.groups

    @property
    def threads(self) -> int:
        return 128 * (1 + self.groups)

    @property
    def shared_bytes(self) -> int:
        boxes = math.ceil(self.depth / 64), math.ceil(self.width / 64)
        return 2 * (_ROW * boxes[0] * self.queries + BARRIERS) + self.stages * (_ROW * max(boxes) * self.keys + BARRIERS) + ALIGNMENT

    @property
    def source(self) -> str:
        return f"tc::HopperHeads<{self.depth}, {self.width}, {self.keys}, {self.groups}, {self.stages}>"

    def __str__(self) -> str:
        return f"{self.queries} queries x {self.keys} keys, 1 warp group copies, {self.groups} multiply, {self.stages} stages"

    def cycles(self, queries: int, keys: int, heads: int, seen: Sequence[int] | None, target: Target) -> float:
        """Predicted; products of one warp group hide the softmax of another. seen: steps of every block of queries of every head, None where queries see all keys."""
        steps = seen if seen is not None else [math.ceil(keys / self.keys)] * (math.ceil(queries / self.queries) * heads)
        pairs = self.queries * self.keys
        step_cycles = max(pairs * (self.depth + self.width) / 2 / (target.fma_per_cycle * RATE), pairs / EXPONENTIALS)
        cycles = in_turns(steps, target, step_cycles, 1, _STEP_LATENCY)
        kept = sum(steps) * self.keys * self.queries / max(1, heads * queries * keys)
        sizes = {"batch": heads, "m": queries, "k": self.depth, "n": keys, "blocks": len(steps)}
        return corrected(
            target, "attention hopper", self, cycles, bm=self.queries, bn=self.keys, threads=self.threads, stages=self.stages, kept=kept, **sizes
        )


def attention_space(depth: int, width: int, target: Target) -> list[AttentionSchedule]:
    """Two warp groups that multiply, or three where heads are narrow enough for their registers (160 a thread), with as many stages as fit, up to three steps'; five fit with the widest heads."""
    groups = (2, 3) if max(depth, width) <= 64 else (2,)
    found = ([AttentionSchedule(count, stages, depth, width) for stages in (6, 5)] for count in groups)
    return [next(each for each in schedules if each.shared_bytes <= target.shared_bytes) for schedules in found]
