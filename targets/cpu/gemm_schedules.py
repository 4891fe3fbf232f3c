"""Schedules of the GEMM template: register tiles, chunks of rows that a second-level cache holds, blocks of K where it holds none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base import Target
from .dot import BF16_WEIGHTS, dot_for
from .emit import SUM_BLOCK, register_tiles

if TYPE_CHECKING:
    from .gemm import GemmWorkload

#: share of the second-level cache that a chunk and two panels may take: a neighbour on the core has half of it, rows and results pass through
_SHARE = 0.3
#: rows of a chunk, at least and at most, and at most with blocks of K
_FEWEST, _MOST, _MOST_BLOCKED = 48, 96, 128
#: sums of a register tile, at least, where there are rows for several
_SUMS = 24
#: panels of a task, at most: so many share what a block of rows costs to bring
_PANELS = 8
#: tasks for a core, at least
_TASKS = 4


@dataclass(frozen=True)
class GemmSchedule:
    """mr rows x nv vectors of `lanes` columns in registers; mc rows of A (0: all of them) x nc panels per task; kc: steps of K in a block (0: all of them, and one panel a task), see `gemm_blocked`."""

    mr: int
    nv: int
    lanes: int
    mc: int
    kc: int = 0
    nc: int = 1

    def __str__(self) -> str:
        blocks = f", kc={self.kc}, nc={self.nc}" if self.kc else ""
        return f"GemmSchedule(mr={self.mr}, nv={self.nv}, lanes={self.lanes}, mc={self.mc}{blocks})"


def every(workload: GemmWorkload, target: Target) -> list[GemmSchedule]:
    """Register tiles by chunks of rows, without blocks of K."""
    lanes = target.lanes()
    vectors = None if workload.n is None else -(-workload.n // lanes)
    shapes = register_tiles(target, (1, 2, 3, 4, 6, 8, 12), vectors, dot_for(workload.kind, target))
    m = workload.m
    chunks = [0] if m is None or m <= 64 else [0, 64, 128, 256, 512]
    found = []
    for mr, nv in shapes:
        if m is not None and mr > m:
            continue
        for mc in chunks:
            rounded = mc // mr * mr
            if mc == 0 or (m is not None and rounded < m):
                found.append(GemmSchedule(mr, nv, lanes, rounded))
    return found


def suited(workload: GemmWorkload, target: Target) -> list[GemmSchedule]:
    """`every`; where the third-level cache is far away (cores that start two multiply-adds of 512 bits in a cycle) and weights are constant, of every large register tile the one whose chunk
    suits the second-level cache, as the cost model knows machines whose third-level cache is near.

    Emerald Rapids, one thread, time over that of all rows at once: 1024 rows, K of 768, 64 or 96 a chunk 0.89 to 0.97, K of 576 0.97; K of 3072, 128 a chunk 1.15, blocks of 384 0.97, with 128 rows 0.89.
    """
    found = every(workload, target)
    m, k, n = workload.m, workload.k, workload.n
    far = target.vector_bits >= 512 and target.fma_per_cycle >= 2
    if m is None or k is None or n is None or not workload.packed or workload.kind not in ("f32", BF16_WEIGHTS.name) or not far:
        return found
    tiles = [schedule for schedule in found if schedule.mc == 0]
    large = [tile for tile in tiles if tile.mr * tile.nv >= _SUMS] if m > _FEWEST else []
    chosen = [schedule for tile in large or tiles if (schedule := _chunked(tile, m, k, n, target)) is not None]
    # blocks of K end with whole words
    return [schedule for schedule in chosen if not schedule.kc or k % dot_for(workload.kind, target).group == 0] or found


def _chunked(tile: GemmSchedule, m: int, k: int, n: int, target: Target) -> GemmSchedule | None:
    """All rows at once where they take a quarter of the second-level cache, else chunks that fit it beside two panels, else blocks of K. None where tasks are too few for the cores."""
    nr = tile.nv * tile.lanes
    panels = -(-n // nr)
    fit = int(_SHARE * target.l2_bytes / (4 * k)) - 2 * nr
    if fit >= _FEWEST:
        mc = 0 if 16 * m * k <= target.l2_bytes else _equal(m, min(fit, _MOST), tile.mr)
        made = replace(tile, mc=mc)
    elif m >= 2 * tile.mr and k > SUM_BLOCK:
        mc = _equal(m, _MOST_BLOCKED, tile.mr)
        most = -(-m // (mc or m)) * panels // (_TASKS * target.cores)
        made = replace(tile, mc=mc, kc=_equal(k, SUM_BLOCK, 16), nc=max(1, min(_PANELS, most)))
    else:
        made = tile
    tasks = -(-m // (made.mc or m)) * -(-panels // made.nc)
    return made if tasks >= _TASKS * target.cores else None


def _equal(count: int, most: int, unit: int) -> int:
    """`count` cut into pieces of at most about `most`, as equal as whole units allow; 0 for one piece."""
    pieces = -(-count // most)
    return -(-count // (pieces * unit)) * unit if pieces > 1 else 0
