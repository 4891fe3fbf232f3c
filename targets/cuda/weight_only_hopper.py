"""Products of 16-bit activations by constant weights of 1 to 8 bits on sm_90a, by wgmma with the weights in registers: y = epilogue(x [.., M, K] @ (code - zero) * scale).

    block (strips of 64 columns, rows of x, part of K)          # tc::weight_only_hopper in include/weight_only_hopper.cuh
        warp group 0: for k in steps of 64: stage <- box of x by TMA; codes, scales, zeros of each strip as they lie, as stages become empty
        the others, a strip each: for k in steps of 64: codes -> fragments of W^T in registers; wgmma by the rows of x in the stage
            c += scale * sum                                     # fp32, where a group ends
        C = epilogue(c)

Codes, numbers and epilogues are those of weight_only.py, which takes what this template refuses: few rows, other activations, rows of x and groups that TMA and products of 16 k cannot
cut, and products that `mma.sync` is predicted to do faster.

The limit of a step by 128 rows: 256 cycles of tensor cores a strip, beside which a warp unpacks codes (44 instructions of 4 bits) and scales sums (64 each time that a group ends), of one issued a
cycle: two warp groups keep tensor cores busy in turns unless groups are of 16 k. 16 KB of x and 2 KB of codes a strip come from L2 for it, 40 bytes a cycle for two strips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.latency import corrected
from ...compiler.dialect.weight_only import unpacked
from ..base import Target
from ..common.fused import Unfusable
from .gemm_hopper import ROWS, TARGETS
from .kernel import Packing, Signature
from .product import Product, Request
from .schedule import SHARED_BYTES_PER_CYCLE
from .schedule_hopper import ALIGNMENT, BARRIERS, COPY_LATENCY, RATE, RESERVED, WarpGroups
from .sizes import blocks, times
from .weight_only import WeightOnly, flag, fragments, packings
from .weight_only_schedule import BLOCK_LATENCY, ISSUE, L2_BYTES_PER_CYCLE, STEP_LATENCY, Shape, memory_cycles, sums_cycles

#: columns of a strip, k of a step; numbers of a row of x begin at multiples of 16 bytes
_COLUMNS, _STEP, _ALIGNED = 64, 64, 8
#: cycles from the last product of a group to the first one that follows its scales, and from step to step, where another warp group does not multiply, estimates
_SCALED, _ASKED = 60.0, 40.0


@dataclass(frozen=True)
class HopperRows(WarpGroups):
    """`rows` of x x a strip for each of `groups` warp groups that multiply, beside one that copies; `stages` steps on their way; K in `parts` that different blocks sum up."""

    rows: int
    groups: int
    stages: int
    parts: int = 1

    def step_bytes(self, shape: Shape) -> int:
        return 128 * self.rows + self.groups * (512 * shape.bits + (5 if shape.zeros else 4) * _COLUMNS * _touched(shape))

    def shared_bytes(self, shape: Shape) -> int:
        return self.stages * (-(-self.step_bytes(shape) // ALIGNMENT) * ALIGNMENT + BARRIERS) + ALIGNMENT

    def steps(self, shape: Shape) -> int:
        """Steps of a part."""
        return -(-_steps(shape) // self.parts)

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return -(-_strips(shape) // self.groups), -(-shape.m // self.rows), self.parts

    def row_blocks(self, rows: Any) -> Any:
        """Blocks along the rows, of which there are so many."""
        return blocks(rows, self.rows)

    def predicted_cycles(self, shape: Shape, target: Target) -> float:
        """Waves of blocks, each as slow as the slowest of tensor cores, one warp group by itself, instructions, shared memory, L2 and copies."""
        count = math.prod(self.grid(shape))
        resident = min(self.resident, math.ceil(count / target.cores))
        waves, groups = math.ceil(count / (target.cores * resident)), self.groups * resident
        scaled = _STEP / _group(shape)  # how often, in a step
        tensor = self.rows * _COLUMNS * _STEP / 2 / (target.fma_per_cycle * RATE)
        alone = tensor + scaled * (self.rows / 2 + _SCALED) + _ASKED
        issue = 4 * (shape.code_instructions + scaled * (self.rows / 2 + 6 + 10 * shape.zeros) + _ASKED) / ISSUE
        bytes_ = self.step_bytes(shape)
        shared = (128.0 * self.rows * (self.groups - 1) + 2 * bytes_) / SHARED_BYTES_PER_CYCLE  # x is read once by each warp group
        step = max(
            groups * tensor, alone, groups * issue, resident * shared, resident * bytes_ / L2_BYTES_PER_CYCLE, COPY_LATENCY / (self.stages - 1)
        )
        cycles = max(memory_cycles(shape, target), waves * (BLOCK_LATENCY + self.steps(shape) * (step + STEP_LATENCY)))
        sizes = {"batch": 1, "m": shape.m, "k": _steps(shape) * _STEP, "n": shape.n, "blocks": count}
        own = {"bits": shape.bits, "bm": self.rows, "bn": _COLUMNS * self.groups, "threads": self.threads, "parts": self.parts, "stages": self.stages}
        return corrected(target, "weight only hopper", self, cycles + sums_cycles(shape, self.parts, target), **sizes, **own)

    def __str__(self) -> str:
        shape = f"{self.rows}x{_COLUMNS * self.groups}, 1 warp group copies, {self.groups} multiply, {self.stages} stages"
        return shape + (f", K in {self.parts} parts" if self.parts > 1 else "")


def _steps(shape: Shape) -> int:
    return -(-shape.k // _STEP)


def _strips(shape: Shape) -> int:
    return -(-shape.n // _COLUMNS)


def _group(shape: Shape) -> int:
    """k of a group; of one group whole steps."""
    return shape.group if shape.groups > 1 else _steps(shape) * _STEP


def _touched(shape: Shape) -> int:
    """Groups of a step at most."""
    group = _group(shape)
    return (group - math.gcd(group, _STEP) + _STEP - 1) // group + 1


def space(shape: Shape, target: Target) -> Sequence[HopperRows]:
    """Schedules whose sums, of a group and of all, fit the registers and whose stages fit the shared memory, none with parts that are empty."""
    # three groups have 160 registers a thread, others 224 at least
    tiles = [(rows, groups) for groups, most in ((2, 128), (1, 128), (3, 64)) for rows in (128, 96, 64, 32) if rows <= most]
    found = [HopperRows(rows, groups, stages, parts) for rows, groups in tiles for stages in (6, 4, 3) for parts in (1, 2, 4, 8, 16)]
    found = [one for one in found if one.resident * (one.shared_bytes(shape) + RESERVED) <= target.shared_bytes + RESERVED]
    return [one for one in found if one.parts == 1 or (one.parts - 1) * one.steps(shape) < _steps(shape)]


def best(shape: Shape, target: Target) -> HopperRows:
    """The schedule of least predicted time; of equal ones the first."""
    return min(space(shape, target), key=lambda schedule: schedule.predicted_cycles(shape, target))


class HopperWeightOnly(WeightOnly):
    """The product by wgmma, where that is predicted to be faster than weight_only.py. Rows may be open where there are never few."""

    targets = TARGETS
    kind = "weight only hopper"

    def __init__(self, asked: Request):
        super().__init__(asked)
        shape = self.shape
        if not shape.half:
            raise Unfusable("activations that do not lie in memory in 16 bits")
        if shape.k % _ALIGNED:
            raise Unfusable(f"rows of {2 * shape.k} bytes, no multiple of {2 * _ALIGNED}")
        if shape.groups > 1 and shape.group % 16:
            raise Unfusable("groups that are no multiples of 16")

    def best(self) -> HopperRows:
        """Raises Unfusable when the best of weight_only.py takes less."""
        if not self._faster(self.shape):
            raise Unfusable("the kernels of mma.sync are faster")
        return best(self.shape, self.target)

    def best_for(self, rows: int) -> HopperRows:
        return best(replace(self.shape, m=rows), self.target)

    def anchors(self) -> list[int]:
        return Product.anchors(self)

    def cycles(self, tile: HopperRows, rows: int) -> float:
        return tile.predicted_cycles(replace(self.shape, m=rows), self.target)

    def variants(self) -> Sequence[tuple[HopperRows, tuple[Any, int | None, int | None] | None]]:
        """Weights are packed in one way: where rows are open, this template takes all or none."""
        if not isinstance(self.m, int) and not all(
            self._faster(replace(self.shape, m=rows)) for rows in (max(1, self.known.least(self.m)), *self.anchors())
        ):
            raise Unfusable("the kernels of mma.sync are faster")
        return super().variants()

    def _faster(self, shape: Shape) -> bool:
        """It is predicted to take less time than weight_only.py."""
        if shape.m < ROWS:
            return False
        mma = super().best_for(shape.m)
        return best(shape, self.target).predicted_cycles(shape, self.target) < mma.predicted_cycles(shape, self.target)

    def _packings(self, weights: Sequence[Any]) -> tuple[Packing, ...]:
        shape = self.shape
        order, dims = (_strips(shape), _steps(shape), 128 * shape.bits), (_strips(shape), shape.groups + _touched(shape) - 1, _COLUMNS)
        return packings(weights, ("wgmma_codes", "wgmma_scales", "wgmma_zeros"), order, lambda array: columns(array, shape), dims)

    def _called(self, tile: HopperRows, signature: Signature) -> tuple[list[str], list[str]]:
        shape, steps = self.shape, tile.steps(self.shape)
        x = signature.map(self.x, "encode", times(self.x.shape[:-1]), shape.k // 2, tile.rows)
        first, last = ("0", "W::STEPS") if tile.parts == 1 else (f"blockIdx.z * {steps}", f"tc::min<int>((blockIdx.z + 1) * {steps}, W::STEPS)")
        operands = [
            f"using W = tc::HopperWeights<{shape.bits}, {shape.k}, {shape.n}, {shape.group}, {flag(shape.zeros)}>;",
            f"const W w{{{self._names(signature)}}};",
        ]
        place = f"{signature.size(self.m)}, blockIdx.y * T::ROWS, blockIdx.x * T::GROUPS, {first}, {last}"
        return operands, [
            f"using T = tc::HopperStrips<W, {tile.rows}, {tile.groups}, {tile.stages}, {tile.resident}>;",
            f"tc::weight_only_hopper<{flag(shape.bf16)}, W, T>(w, {x}, out, {place},",
        ]


def columns(packed: np.ndarray, shape: Shape) -> np.ndarray:
    """packed: [bytes, N] of the dialect's operator -> int32 [strips, steps, bits * 128]: a step's codes in the order of include/weight_only_hopper.cuh, by warps, by planes, by lanes.

    Lane 4 g + t of warp w holds column 16 w + 2 g + r of the strip at k = 16 (2 s + i) + 8 h + 2 t + e, where `weight_only.shuffled` has that of these letters."""
    codes = unpacked(packed, shape.groups * shape.group, shape.bits)[: shape.k]
    steps, strips = _steps(shape), _strips(shape)
    rows = np.pad(codes, ((0, steps * _STEP - len(codes)), (0, strips * _COLUMNS - shape.n)))
    # k: s, i, h, t, e; columns: strip, warp, g, r
    axes = rows.reshape(steps, 2, 2, 2, 4, 2, strips * 4, 8, 2).transpose(0, 1, 4, 3, 5, 6, 7, 2, 8)
    words = fragments(axes, shape.bits).reshape(strips, 4, steps, -1)
    return np.ascontiguousarray(words.swapaxes(1, 2)).reshape(strips, steps, -1)
