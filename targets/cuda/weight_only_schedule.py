"""Schedules of products by weights in few bits, and an analytic model of their time that ranks them: bytes over bandwidth, unless too few of them are on their way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...autotune.latency import corrected
from ..base import Target
from .sizes import blocks

#: rows up to which codes go straight to registers
FEW_ROWS = 8
#: columns of a strip; k of a unit; words of a row of x in a step of many rows
COLUMNS, UNIT, STEP_WORDS = 32, 32, 32
#: a warp's registers beside those of codes on their way, in 32-bit words per thread; those of a multiprocessor; its warps and blocks
_OWN_REGISTERS, _FILE_REGISTERS, _WARPS, _BLOCKS = 72, 65536, 64, 32
#: cycles from memory to registers; of a block around its loop; of a second kernel; of a warp's sums; instructions that a multiprocessor issues per cycle
_MEMORY_LATENCY, BLOCK_LATENCY, _SUMS_LATENCY, _WARP_SUMS, ISSUE = 800.0, 1500.0, 3000.0, 20.0, 4.0
_SHARED_BYTES_PER_CYCLE, L2_BYTES_PER_CYCLE, STEP_LATENCY = 128.0, 48.0, 60.0


@dataclass(frozen=True)
class Shape:
    """m x k x n, codes of `bits` in groups of `group` along k, perhaps with zeros; x as `x_parts` words of bf16 or fp16, in memory in 16 bits (`half`) or 32, or int8 (`integers`)."""

    m: int
    k: int
    n: int
    bits: int
    group: int
    zeros: bool
    x_parts: int
    bf16: bool
    half: bool
    integers: bool = False

    @property
    def per_word(self) -> int:
        """Numbers in a word of x."""
        return 4 if self.integers else 2 if self.half else 1

    @property
    def padding(self) -> int:
        """Words behind a row of x in shared memory."""
        return 16 // self.per_word

    @property
    def spread(self) -> int:
        """k of a group in memory."""
        return -(-self.group // 16) * 16

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def all_units(self) -> int:
        """Units of 32 k in memory."""
        return ((self.k - 1) // self.group * self.spread + (self.k - 1) % self.group) // UNIT + 1

    @property
    def strips(self) -> int:
        return -(-self.n // COLUMNS)

    @property
    def sums(self) -> int:
        """Sums of a unit that get a scale each."""
        return 2 if self.spread % UNIT else 1

    @property
    def unit_bytes(self) -> float:
        """Codes, scales and zeros of a unit, of which longer groups have fewer."""
        return COLUMNS * (UNIT * self.bits / 8 + (5 if self.zeros else 4) * UNIT / self.spread)

    @property
    def code_instructions(self) -> float:
        """Instructions of a warp that make fragments of a unit of codes, its scales and zeros aside."""
        planes = self.bits.bit_count()
        if self.integers:  # a register has four codes
            return 8 * (1.75 * planes if self.bits < 8 else 0)
        pairs = 16
        if self.bits == 1 and not self.zeros:
            return pairs * 2.0
        return pairs * (0.75 + 2.0 * planes if self.bits < 8 else 3.25 + self.zeros)

    @property
    def unit_instructions(self) -> float:
        """Those with scales and zeros."""
        return self.code_instructions + self.sums * (4 + (12 if self.integers else 10) * self.zeros)

    @property
    def row_instructions(self) -> float:
        """Instructions of a warp that multiply a unit by 8 rows."""
        if self.integers:
            return 4 + self.sums * (18 + 9 * self.zeros)
        return 2 * (1 + 2 * (not self.half) + 10 * (self.x_parts - 1) + 2 * self.x_parts) + 8 * self.sums

    def __str__(self) -> str:
        return self.text(str(self.m))

    def text(self, rows: str) -> str:
        """The workload of so many rows."""
        x = "int8" if self.integers else {3: "fp32", 2: "tf32"}.get(self.x_parts, "bf16" if self.bf16 else "fp16")
        return f"{x} x int{self.bits} {rows}x{self.k}x{self.n} group {self.group}{' zeros' if self.zeros else ''}"


@dataclass(frozen=True)
class FewRows:
    """A strip per block, whose `warps` take turns at the units, `depth` of them on their way; K in `parts` that different blocks sum up."""

    warps: int
    depth: int
    parts: int = 1
    resident: ClassVar[int] = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def shared_bytes(self, shape: Shape) -> int:
        return 4 * self.warps * 8 * 36

    def units(self, shape: Shape) -> int:
        """Units of a part."""
        return -(-shape.all_units // self.parts)

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return shape.strips, 1, self.parts

    def row_blocks(self, rows: Any) -> Any:
        """Blocks along the rows, of which there are so many."""
        return 1

    def call(self, rows: int | str, width: int, first: str, last: str) -> list[str]:
        """The call of the device function, up to the function of the results. rows: their number, or the parameter that holds it."""
        fixed, given = (f", {rows}", "") if isinstance(rows, int) else ("", f"{rows}, ")
        return [f"tc::weight_only_few<A, W{fixed}, {self.warps}, {self.depth}, {width}>(w, x, out, {given}blockIdx.x, {first}, {last},"]

    def predicted_cycles(self, shape: Shape, target: Target) -> float:
        """The bytes of all weights over the bandwidth, or waves of blocks, if those take longer: as long as a warp waits for its units, or a multiprocessor issues."""
        count = shape.strips * self.parts
        registers = _OWN_REGISTERS + self.depth * (shape.bits + shape.sums * (5 if shape.zeros else 4))
        resident = max(1, min(_WARPS, _FILE_REGISTERS // (32 * registers)) // self.warps)
        resident = min(resident, _BLOCKS, math.ceil(count / target.cores))
        waves = math.ceil(count / (target.cores * resident))
        turns = math.ceil(self.units(shape) / self.warps)
        issue = resident * self.units(shape) * (shape.unit_instructions + shape.row_instructions) / ISSUE
        level2 = resident * self.units(shape) * shape.unit_bytes / L2_BYTES_PER_CYCLE
        waiting = turns * _MEMORY_LATENCY / min(self.depth, turns)
        block = BLOCK_LATENCY + _MEMORY_LATENCY + max(issue, level2, waiting) + _WARP_SUMS * self.warps
        cycles = max(memory_cycles(shape, target), waves * block) + sums_cycles(shape, self.parts, target)
        return _timed(shape, self, target, cycles, bm=8, stages=self.depth)

    def __str__(self) -> str:
        return f"strips of {COLUMNS}, {self.warps} warps along K, {self.depth} units ahead" + (f", K in {self.parts} parts" if self.parts > 1 else "")


@dataclass(frozen=True)
class ManyRows:
    """`bm` rows x a strip per warp, `stages` steps on their way; K in `parts` that different blocks sum up."""

    bm: int
    warps: int
    stages: int
    parts: int = 1
    resident: ClassVar[int] = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @staticmethod
    def step_units(shape: Shape) -> int:
        return shape.per_word

    def shared_bytes(self, shape: Shape) -> int:
        unit = shape.bits * 32 + shape.sums * (40 if shape.zeros else 32)
        return 4 * self.stages * (self.bm * (STEP_WORDS + shape.padding) + self.warps * self.step_units(shape) * unit)

    def units(self, shape: Shape) -> int:
        """Units of a part: all, or whole steps."""
        per_step = self.step_units(shape)
        return -(-shape.all_units // per_step // self.parts) * per_step

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        return -(-shape.strips // self.warps), -(-shape.m // self.bm), self.parts

    def row_blocks(self, rows: Any) -> Any:
        """Blocks along the rows, of which there are so many."""
        return blocks(rows, self.bm)

    def call(self, rows: int | str, width: int, first: str, last: str) -> list[str]:
        """The call of the device function, up to the function of the results. rows: their number, or the parameter that holds it."""
        fixed, given = (f", {rows}", "") if isinstance(rows, int) else ("", f"{rows}, ")
        return [
            f"using T = tc::Strips<A, W, {self.bm}, {self.warps}, {self.stages}>;",
            f"tc::weight_only_many<A, W, T{fixed}, {width}>(w, x, out, {given}blockIdx.y * T::BM, blockIdx.x * T::WARPS, {first}, {last},",
        ]

    def predicted_cycles(self, shape: Shape, target: Target) -> float:
        """Waves of blocks, each as slow as the slowest of tensor cores, instructions, shared memory and L2."""
        count = math.prod(self.grid(shape))
        per_step = self.step_units(shape)
        steps = -(-self.units(shape) // per_step)
        registers = self.bm + _OWN_REGISTERS
        per_sm = max(1, min(target.shared_bytes // self.shared_bytes(shape), _FILE_REGISTERS // (registers * self.threads)))
        resident = min(per_sm, math.ceil(count / target.cores))
        waves = math.ceil(count / (target.cores * resident))
        # 16-bit products are twice as fast as those of tf32, bytes twice as fast again
        arithmetic = self.bm * self.warps * COLUMNS * UNIT * per_step * shape.x_parts / ((4 if shape.integers else 2) * target.fma_per_cycle)
        issue = self.warps * per_step * (shape.unit_instructions + self.bm / 8 * shape.row_instructions) / ISSUE
        x_bytes, w_bytes = 4.0 * self.bm * STEP_WORDS, self.warps * per_step * shape.unit_bytes
        shared = (x_bytes * (self.warps + 1) + 2 * w_bytes) / _SHARED_BYTES_PER_CYCLE
        level2 = (x_bytes + w_bytes) / L2_BYTES_PER_CYCLE
        step = max(arithmetic, issue, shared, level2) * resident + STEP_LATENCY
        cycles = max(memory_cycles(shape, target), waves * (BLOCK_LATENCY + steps * step)) + sums_cycles(shape, self.parts, target)
        return _timed(shape, self, target, cycles, bm=self.bm, stages=self.stages)

    def __str__(self) -> str:
        shape = f"{self.bm}x{self.warps * COLUMNS}, a strip per warp, {self.stages} stages"
        return shape + (f", K in {self.parts} parts" if self.parts > 1 else "")


def _timed(shape: Shape, schedule: FewRows | ManyRows, target: Target, cycles: float, **numbers: float) -> float:
    """The cycles as the architecture's latency model corrects them."""
    sizes = {"batch": 1, "m": shape.m, "k": shape.all_units * UNIT, "n": shape.n, "blocks": math.prod(schedule.grid(shape))}
    own = {"bits": shape.bits, "bn": schedule.warps * COLUMNS, "threads": schedule.threads, "parts": schedule.parts}
    return corrected(target, "weight only", schedule, cycles, **sizes, **own, **numbers)


def memory_cycles(shape: Shape, target: Target) -> float:
    """All weights from memory."""
    return shape.strips * shape.all_units * shape.unit_bytes * target.frequency_ghz / target.bandwidth_gbs


def sums_cycles(shape: Shape, parts: int, target: Target) -> float:
    """The second kernel, which adds up parts of K."""
    if parts == 1:
        return 0.0
    return _SUMS_LATENCY + 4.0 * (parts + 1) * shape.m * shape.n / (target.cores * L2_BYTES_PER_CYCLE)


def space(shape: Shape, target: Target) -> Sequence[FewRows | ManyRows]:
    """Schedules that fit registers and shared memory, none with parts that are empty."""
    found: list[FewRows | ManyRows]
    if shape.m <= FEW_ROWS:
        # short codes want more units on their way
        depths = (1, 2, 4) if shape.bits >= 4 else (1, 2, 4, 8)
        found = [FewRows(warps, depth, parts) for warps in (1, 2, 4, 8, 16) for depth in depths for parts in (1, 2, 4, 8, 16)]
    else:
        tiles = [(bm, warps) for bm in (16, 32, 64, 128) for warps in (2, 4, 8) if (bm, warps) != (128, 8)]
        found = [ManyRows(bm, warps, stages, parts) for bm, warps in tiles for stages in (3, 4) for parts in (1, 2, 4, 8, 16)]
    found = [one for one in found if one.shared_bytes(shape) <= target.shared_bytes]
    return [one for one in found if one.parts == 1 or (one.parts - 1) * one.units(shape) < shape.all_units]


def best(shape: Shape, target: Target) -> FewRows | ManyRows:
    """The schedule of least predicted time; of equal ones the first."""
    return min(space(shape, target), key=lambda schedule: schedule.predicted_cycles(shape, target))
