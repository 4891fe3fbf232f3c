"""Schedules of the tensor-core template, and a first analytic model of their time that ranks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...autotune.cost_model import Design
from ...autotune.latency import POLICIES, corrected
from ...autotune.learned import default_model
from ...compiler.tvm import tirx
from ..base import Target

#: k elements per stage
BK = 32
#: multiply-adds of words per cycle and SM that mma.sync does by policy, as a fraction of `Target.fma_per_cycle` (which counts tf32)
_RATE = {"Fp32": 1 / 3, "Tf32": 1.0, "Fp16": 2.0, "Bf16": 2.0, "U8S8": 1.0, "Fp16x2": 1.0, "Bf16x2": 1.0, "E4m3x4": 1.0}
SHARED_BYTES_PER_CYCLE = 128.0
_L2_BYTES_PER_CYCLE = 48.0
#: cycles that a block waits per k step where nothing hides them, and around its loop
_STEP_LATENCY, _BLOCK_LATENCY = 60.0, 1500.0
#: cycles of one more kernel; of a block of keys in attention, whose copies wait for the one before
_SUMS_LATENCY, _KEYS_LATENCY = 3000.0, 800.0
#: equal shares are taken where they are predicted to take less than this much of the time of whole tiles
_SHARES_GAIN = 0.9
#: exponentials of a multiprocessor and cycle
EXPONENTIALS = 16.0
#: registers beyond the limit, relative, that the assembler makes do without
_SQUEEZE = 1.05
#: registers that one thread may have, and those of a multiprocessor
THREAD_REGISTERS, FILE_REGISTERS = 255, 65536
#: 32-bit registers of a fragment of A and of B by number policy (struct A and B in include/tcompile.cuh)
_FRAGMENTS = {"Fp32": (16, 8), "Tf32": (8, 4), "Fp16": (4, 2), "Bf16": (4, 2), "U8S8": (8, 4), "Fp16x2": (8, 4), "Bf16x2": (8, 4), "E4m3x4": (8, 4)}
#: counters, pointers and positions; an address and a predicate per copy of a step (rounded from the points in autotune/pretrained/cuda-points.jsonl.gz)
_OTHER_REGISTERS, _COPY_REGISTERS = 32, 2


@dataclass(frozen=True)
class GemmShape:
    """batch x m x k x n, k in words of 4 bytes; va, vb: words per copy of A and B; windows: A is read through a convolution's windows. groups: the m rows are in so many
    groups, about equally many in each, and a block has rows of one of them. strips: words of k that are multiplied by each strip of a tile's columns, the longest first, where that
    is not all of them."""

    batch: int
    m: int
    k: int
    n: int
    va: int = 4
    vb: int = 4
    windows: bool = False
    groups: int = 1
    strips: tuple[int, ...] = ()


@dataclass(frozen=True)
class TileSchedule:
    """bm x bn of C per block of wm x wn warps, `stages` tiles of k in flight; K in `parts` that different blocks sum up. shares: blocks that take equal numbers of all steps of all tiles
    (stream.py); 0 is a block per tile and part."""

    bm: int
    bn: int
    wm: int
    wn: int
    stages: int
    parts: int = 1
    shares: int = 0

    def part_of(self, k: int) -> int:
        """Words of a part of k: all of them, or whole steps."""
        return k if self.parts == 1 else math.ceil(math.ceil(k / BK) / self.parts) * BK

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
        return f"{self.bm}x{self.bn}x{BK}, {self.wm}x{self.wn} warps, {self.stages} stages" + (
            f", K in {self.parts} parts" if self.parts > 1 else f", {self.shares} equal shares" if self.shares else ""
        )


Tile = TypeVar("Tile", bound=TileSchedule)
#: policies of operands that reach the tensor cores as they lie in memory
_IN_WORDS = ("U8S8", "Fp16x2", "Bf16x2", "E4m3x4")
#: policies whose products of a step are summed apart (`blocked` in include/tcompile.cuh)
BLOCKED = ("Fp32", "E4m3x4")


def space(target: Target, many: bool = False) -> Sequence[TileSchedule]:
    """Tiles whose fragments fit the registers (at most 32 accumulators a thread; with `many` also 64) and whose stages fit the shared memory."""
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
    if many:
        shapes += [(128, 64, 2, 2), (128, 128, 2, 4)]
    found = [TileSchedule(*shape, stages) for shape in shapes for stages in (3, 4)]
    return [tile for tile in found if tile.shared_bytes <= target.shared_bytes]


def predicted_cycles(shape: GemmShape, tile: TileSchedule, target: Target, policy: str) -> float:
    """Cycles from the first block to the last: waves of blocks, each as slow as the slowest of tensor cores, shared memory and L2; and the sums of parts of K."""
    rate = _RATE[policy] * (0.5 if policy == "E4m3x4" and target.name == "sm_90a" else 1.0)  # there mma.sync is made of products of 16 bits
    arithmetic = tile.bm * tile.bn * BK / (target.fma_per_cycle * rate)
    shared = 4.0 * BK * (tile.bm * tile.wn + tile.bn * tile.wm + tile.bm + tile.bn) / SHARED_BYTES_PER_CYCLE
    if tile.shares:
        cycles = in_shares(shape, tile, target, max(arithmetic, shared))
    else:
        cycles = in_waves(shape, tile, target, max(arithmetic, shared), _resident(tile, target))
    family = "grouped_gemm" if shape.groups > 1 else "gemm blocks" if shape.strips else "gemm"
    return timed(shape, tile, target, family, cycles, policy)


def timed(shape: GemmShape, tile: TileSchedule, target: Target, family: str, cycles: float, policy: str = "") -> float:
    """The cycles of a product as the architecture's latency model corrects them."""
    kept = sum(shape.strips) / (len(shape.strips) * shape.k) if shape.strips else 1.0
    sizes = {"batch": shape.batch, "m": shape.m, "k": shape.k, "n": shape.n, "blocks": tile.shares or _blocks(shape, tile)}
    numbers = {
        "windows": shape.windows,
        "bm": tile.bm,
        "bn": tile.bn,
        "threads": tile.threads,
        "stages": tile.stages,
        "parts": tile.parts,
        "shares": tile.shares,
    }
    known = {"policy": POLICIES.index(policy)} if policy else {}
    return corrected(target, family, tile, cycles, kept=kept, **sizes, **numbers, **known)


def in_shares(shape: GemmShape, tile: TileSchedule, target: Target, step_cycles: float, latency: float = 0.0) -> float:
    """`in_waves` of blocks that take equal shares: all steps at once, the copies of a tile's first ones, which none hides, and the sums of the tiles that are cut."""
    k_steps = math.ceil(shape.k / BK)
    tiles = math.ceil(shape.m / tile.bm) * math.ceil(shape.n / tile.bn)
    resident, steps = math.ceil(tile.shares / target.cores), math.ceil(tiles * k_steps / tile.shares)
    level2 = 4.0 * BK * (tile.bm + tile.bn) / _L2_BYTES_PER_CYCLE
    sums = _SUMS_LATENCY + 4.0 * 4 * tile.bm * tile.bn * tile.shares / (
        target.cores * _L2_BYTES_PER_CYCLE
    )  # two parts of a share are written, and read again
    starts = math.ceil(steps / k_steps) + 1
    return starts * _BLOCK_LATENCY + steps * (max(max(step_cycles, level2) * resident, latency) + _STEP_LATENCY) + sums


def _resident(tile: TileSchedule, target: Target) -> int:
    """Blocks that a multiprocessor holds."""
    return max(1, min(target.shared_bytes // tile.shared_bytes, 2048 // tile.threads, 512 // tile.threads * 2))


def or_shares(shape: GemmShape, best: Tile, tiles: Sequence[tuple[Tile, int]], target: Target, cycles: Callable[[Tile], float]) -> Tile:
    """The best of whole tiles, or one of `tiles` (with the most blocks of it that a multiprocessor holds) in as many shares as the GPU holds blocks at once, if that takes clearly less."""
    found = (replace(tile, shares=target.cores * resident) for tile, most in tiles for resident in range(1, most + 1))
    shared = min((tile for tile in found if tile.shares < _blocks(shape, tile)), key=cycles, default=best)
    return shared if cycles(shared) < _SHARES_GAIN * cycles(best) else best


def in_waves(shape: GemmShape, tile: TileSchedule, target: Target, step_cycles: float, per_sm: int, latency: float = 0.0) -> float:
    """`predicted_cycles` of blocks of which `per_sm` fit a multiprocessor, whose steps take so many cycles of tensor cores and shared memory; latency: what one takes at least."""
    blocks = _blocks(shape, tile)
    resident = min(per_sm, math.ceil(blocks / target.cores))
    waves = math.ceil(blocks / (target.cores * resident))
    steps = waves * math.ceil(tile.part_of(shape.k) / BK)
    if shape.strips:  # a wave takes as long as its first block, whose strip is the longest of them
        firsts = (shape.strips[block * len(shape.strips) // blocks] for block in range(0, blocks, target.cores * resident))
        steps = sum(math.ceil(tile.part_of(k) / BK) for k in firsts)
    level2 = 4.0 * BK * (tile.bm + tile.bn) / _L2_BYTES_PER_CYCLE
    sums = _SUMS_LATENCY + 4.0 * (tile.parts + 1) * shape.m * shape.n / (target.cores * _L2_BYTES_PER_CYCLE) if tile.parts > 1 else 0.0
    return waves * _BLOCK_LATENCY + steps * (max(max(step_cycles, level2) * resident, latency) + _STEP_LATENCY) + sums


def design(shape: GemmShape, tile: TileSchedule, target: Target, policy: str) -> Design:
    """A kernel as the resource model sees it; registers are those that a thread holds or spills. Their estimate: two sets of accumulators where those of
    a step are summed apart, one otherwise, the fragments of a step, its copies, and a constant."""
    high, wide = tile.bm // tile.wm // 16, tile.bn // tile.wn // 8
    copies = [size * BK / width / tile.threads for size, width in ((tile.bm, shape.va), (tile.bn, shape.vb))]
    sets, (a, b) = 2 if policy in BLOCKED else 1, _FRAGMENTS[policy]
    numbers = {
        "batch": math.log2(shape.batch),
        "m": math.log2(shape.m),
        "k": math.log2(shape.k),
        "n": math.log2(shape.n),
        "va": shape.va,
        "vb": shape.vb,
        "windows": int(shape.windows),
        "bm": tile.bm,
        "bn": tile.bn,
        "stages": tile.stages,
        "steps": min(tile.stages, math.ceil(shape.k / BK)),
        "threads": tile.threads,
        "register_limit": register_limit(tile),
        "fragments_high": high,
        "fragments_wide": wide,
        "copies_a": copies[0],
        "copies_b": copies[1],
        "accumulators": 4 * high * wide,
        "accumulator_sets": sets,
        "fragment_registers": a,
        "bfloat16": int(policy == "Bf16"),
        "capability": int("".join(filter(str.isdigit, target.name))),
    }
    registers = 4 * high * wide * sets + high * a + b + _COPY_REGISTERS * sum(copies) + _OTHER_REGISTERS
    modelled = {"registers": float(registers), "shared_bytes": float(tile.shared_bytes)}
    return Design("cuda", {name: float(value) for name, value in numbers.items()}, modelled)


def register_limit(tile: TileSchedule) -> int:
    """Registers a thread can have so that a block fits a multiprocessor."""
    return min(THREAD_REGISTERS, FILE_REGISTERS // tile.threads)


def fitting(shape: GemmShape, tiles: Sequence[TileSchedule], target: Target, policy: str) -> list[TileSchedule]:
    """Tiles that are predicted neither to spill registers nor to exceed a block's shared memory."""
    taken = default_model("cuda").predict([design(shape, tile, target, policy) for tile in tiles])
    limits = [{"registers": _SQUEEZE * register_limit(tile), "shared_bytes": target.shared_bytes} for tile in tiles]
    return [tile for tile, has, may in zip(tiles, taken, limits, strict=True) if all(has[name] <= limit for name, limit in may.items())]


def best_tile(shape: GemmShape, target: Target, policy: str, width: int | None = None, shares: bool = False) -> TileSchedule:
    """The tile of least predicted time, of those that are predicted to fit; of all when none is. width: the columns that it has to have. shares: blocks may take equal shares."""
    # what is neither split nor rounded leaves registers for accumulators, unless narrow copies want them for addresses
    tiles = space(target, policy in _IN_WORDS and policy not in BLOCKED and min(shape.va, shape.vb) == 4)
    tiles = [tile for tile in tiles if tile.bn == (width or tile.bn)]
    found = fitting(shape, tiles, target, policy) or tiles

    def cycles(tile: TileSchedule) -> float:
        return predicted_cycles(shape, tile, target, policy)

    best = fastest(shape, found, target, cycles)
    return or_shares(shape, best, [(tile, _resident(tile, target)) for tile in found], target, cycles) if shares else best


def fastest(shape: GemmShape, tiles: Sequence[Tile], target: Target, cycles: Callable[[Tile], float]) -> Tile:
    """The tile of least cycles; where that one leaves half of the multiprocessors idle (few rows), with K in the best number of parts."""
    best = min(tiles, key=cycles)
    if shape.batch > 1 or 2 * _blocks(shape, best) > target.cores:
        return best
    return min((replace(tile, parts=parts) for tile in tiles for parts in _parts(shape.k)), key=cycles)


def _blocks(shape: GemmShape, tile: TileSchedule) -> int:
    high = shape.groups * math.ceil(shape.m / shape.groups / tile.bm)
    return high * math.ceil(shape.n / tile.bn) * shape.batch * tile.parts


def _parts(k: int) -> list[int]:
    """In how many parts so many words of K may be summed; a part has two steps at least, and none is empty."""
    steps = math.ceil(k / BK)
    lengths = {math.ceil(steps / parts) for parts in (1, 2, 4, 8, 16)}
    return sorted({math.ceil(steps / length) for length in lengths if length > 1} | {1})


def part_of_keys(blocks: int, steps: int, target: Target) -> int:
    """Steps over keys that one block of attention takes: all of them, or fewer where `blocks` that take all leave half of the multiprocessors idle; two at least."""
    if 2 * blocks > target.cores:
        return steps
    whole = steps * _KEYS_LATENCY
    lengths = [length for length in range(2, steps) if blocks * math.ceil(steps / length) <= target.cores]
    best = min(lengths, default=steps)
    return best if best * _KEYS_LATENCY + _SUMS_LATENCY < whole else steps


def attention_cycles(queries: int, keys: int, depth: int, width: int, heads: int, block: int, seen: Sequence[int] | None, target: Target) -> float:
    """Predicted cycles of attention by mma.sync (attention.py), of operands in words of two numbers: 64 queries a block, `block` keys a step; heads: of all batches. seen: steps of every
    block of queries of every head, None where queries see all keys."""
    tiles, all_steps = math.ceil(queries / 64), math.ceil(keys / block)
    part = all_steps if seen is not None else part_of_keys(tiles * heads, all_steps, target)
    steps = seen if seen is not None else [part] * (tiles * heads * math.ceil(all_steps / part))
    resident = min(2, math.ceil(len(steps) / target.cores))
    arithmetic = (
        64 * block * ((depth + width) / 2 / target.fma_per_cycle + 1 / EXPONENTIALS)
    )  # a warp's products and exponentials wait for each other
    cycles = in_turns(steps, target, arithmetic, resident, _KEYS_LATENCY) + (_SUMS_LATENCY if part < all_steps else 0.0)
    sizes = {"batch": heads, "m": queries, "k": depth, "n": keys, "blocks": len(steps)}
    kept = sum(steps) * 64 * block / max(1, heads * queries * keys)
    return corrected(target, "attention", "", cycles, bm=64, bn=block, parts=math.ceil(all_steps / part), kept=kept, **sizes)


def in_turns(steps: Sequence[int], target: Target, step_cycles: float, resident: int, latency: float) -> float:
    """Cycles of blocks of so many steps, `resident` of them on a multiprocessor; latency: what a step takes at least."""
    places = target.cores * resident
    longest = max(max(steps), math.ceil(sum(steps) / places))
    return math.ceil(len(steps) / places) * _BLOCK_LATENCY + longest * max(step_cycles * resident, latency)


def open_part_of_keys(blocks: Any, steps: Any, target: Target) -> Any:
    """`part_of_keys` of sizes that are known while running, as one of them."""
    one, cores = tirx.const(1, "int64"), tirx.const(target.cores, "int64")
    blocks, steps = (tirx.const(size, "int64") if isinstance(size, int) else size for size in (blocks, steps))
    parts = tirx.max(tirx.floordiv(cores, tirx.max(blocks, one)), one)
    length = tirx.max(tirx.floordiv(steps + parts - 1, parts), tirx.const(2, "int64"))
    gain = math.floor(_SUMS_LATENCY / _KEYS_LATENCY) + 1
    return tirx.Select(steps - length >= gain, length, tirx.max(steps, one))
