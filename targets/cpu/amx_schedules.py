"""Schedules of products by AMX tiles and what they cost; see amx_emit.py for the loop nest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ...autotune.cost_model import KernelFeatures
from ..base import Target
from . import amx
from .amx import ROW_BYTES, ROWS, Tiles
from .dot import Dot

#: bytes of gathered rows per task, as a share of the second-level cache
_SHARE_OF_L2 = 0.5
#: what products take longer where more than two follow each other without waiting: a core whose power is bounded then slows all of them down. Measured on whole networks, where blocks of
#: 2 x 2 took 0.93 to 1.01 of the time of 1 x 2 at the core's full rate (BERT-base, ResNet-50), and 1.11 to 1.26 of it where power was bounded
_CROWDED = 2.2
#: steps of K whose part of a panel, two tiles wide, stays in a first-level cache of 48 KiB beside rows of A, and the most rows whose sums may wait for the next slice
_SLICE, _WAITING = 12, 512
#: what bytes from memory cost where every panel is multiplied once: no hardware prefetcher follows loads of tiles. Measured with 1 to 12 rows, where vectors of the same codes took 0.65 to 0.82 of the time
_UNFOLLOWED = 1.35
#: terms of an operand -> products of them that matter, (of A, of B): each follows one that shares a tile with it
PAIRS = {1: ((0, 0),), 2: ((1, 0), (0, 0), (0, 1)), 3: ((2, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 2))}


def loaded(terms: int) -> tuple[int, int]:
    """How often a step loads a tile of A and one of B: where the next product has another term."""
    pairs = PAIRS[terms]
    changes = [sum(pair[side] != before[side] for before, pair in itertools.pairwise(pairs)) for side in (0, 1)]
    return 1 + changes[0], 1 + changes[1]


@dataclass(frozen=True)
class AmxSchedule:
    """tiles: of a block; mc rows per task (0: all of them) against so many `panels` of weights (0: all of them), `depth` steps of K at a time (0: all of them)."""

    tiles: Tiles
    mc: int
    panels: int
    depth: int = 0

    def __str__(self) -> str:
        return f"AmxSchedule({self.tiles.rows}x{self.tiles.columns}, mc={self.mc}, panels={self.panels}, depth={self.depth})"


def space(rows: int | None, n: int, width: int, gathered: bool, target: Target, terms: int = 1) -> list[AmxSchedule]:
    """Schedules for an output of so many rows and n columns; width: bytes of a row in whole tiles, of one of the `terms` of its operands."""
    found = []
    for tiles in amx.shapes(rows, n):
        height, panels = ROWS * tiles.rows, -(-n // (ROWS * tiles.columns))
        chunks = [mc // height * height for mc in (64, 128, 256, 512, 1024) if rows is None or mc < rows]
        if rows is not None or not gathered:
            chunks = [0, *chunks]
        for mc in chunks:
            held = (mc or rows or 0) * width * terms
            if gathered and held > target.l2_bytes * _SHARE_OF_L2 and mc != chunks[0] and mc != 64 // height * height:
                continue
            groups = sorted({0, *(p for p in (1, 2, 4, 8, 16) if p < panels)})
            found += [AmxSchedule(tiles, mc, each, depth) for each in groups for depth in depths(tiles, mc or rows, width // ROW_BYTES, terms)]
    return found


def depths(tiles: Tiles, rows: int | None, steps: int, terms: int = 1) -> list[int]:
    """Slices of so many steps of K to try for chunks of so many rows: all of K, and the slices of one size that keep a part of a panel near. terms: of an operand, see `Dot`."""
    most = _SLICE // terms
    if tiles.columns != 2 or rows is None or not ROWS * tiles.rows <= rows <= _WAITING or steps <= most:
        return [0]
    return [0, -(-steps // -(-steps // most))]


def features(rows: int, k: int, n: int, schedule: AmxSchedule, dot: Dot, gathered: float, target: Target, own_bytes: float = 0.0) -> KernelFeatures:
    """Cost of a product. gathered: cycles that copying one row takes, 0 where rows are read in place. own_bytes: of a row that no other row has, in all terms; those of all K by default."""
    tiles, steps = schedule.tiles, amx.steps(k, dot)
    height, nr = ROWS * tiles.rows, ROWS * tiles.columns
    mc, panels = min(schedule.mc or rows, rows), -(-n // nr)
    chunks, each = -(-rows // mc), min(schedule.panels or panels, panels)
    groups = -(-panels // each)
    whole, rest = divmod(rows, height)
    depth = min(schedule.depth or steps, steps)
    slices = -(-steps // depth)
    products, loads = len(PAIRS[dot.terms]), loaded(dot.terms)
    busy = latency = load = stores = 0.0
    for count, size in ((whole, height), (1, rest)):
        if count and size:
            used = -(-size // ROWS)
            # with fewer rows a product takes as many cycles as there are rows
            product_cycles = size * tiles.columns * (_CROWDED if tiles.rows * tiles.columns > 2 else 1.0)
            busy += count * panels * steps * products * product_cycles
            latency += count * panels * steps * products * max(amx.LATENCY, product_cycles)
            load += count * panels * steps * (loads[0] * size + loads[1] * ROWS * tiles.columns) / 2.0
            stores += count * panels * (2.5 * size * tiles.columns + (100.0 if rest else 20.0) + 4.0 * used)
            # sums are stored and loaded between slices
            load += count * panels * (slices - 1) * (size + ROWS) * tiles.columns / 2.0
    gathering = gathered * rows * groups
    row_bytes, panel_bytes = own_bytes or float(dot.terms * steps * ROW_BYTES), float(dot.terms * steps * ROWS * 4 * nr)
    blocks = -(-mc // height)
    in_l1 = (panel_bytes + height * row_bytes) * depth / steps < 0.8 * target.l1_bytes
    l2 = chunks * panels * (panel_bytes * (1 if in_l1 else blocks) + mc * row_bytes + 8.0 * (slices - 1) * mc * nr)
    chunk_in_l2 = mc * row_bytes + 2 * panel_bytes < 0.75 * target.l2_bytes
    l3 = chunks * panels * panel_bytes + (0 if chunk_in_l2 else chunks * panels * mc * row_bytes)
    if panels > 1 and 4 * n * mc > target.l2_bytes * _SHARE_OF_L2:
        # lines of the output come in pairs, of which the second one is gone again before the next panel writes to it
        l3 += 4.0 * rows * n
    more = stores + gathering + 150.0 * chunks * groups
    return KernelFeatures(
        flops=2.0 * rows * k * n,
        fma_cycles=busy + more,
        load_cycles=load,
        latency_cycles=latency + more,
        l2_bytes=l2 / 2.0,  # tiles come twice as fast as vectors, by whole lines
        l3_bytes=l3,
        dram_bytes=panels * panel_bytes * (_UNFOLLOWED if rows <= height else 1.0),
        tasks=chunks * groups,
    )
