"""Attention under a constant mask that hides whole blocks of scores, or leaves most as they are: `attention` over a list of the blocks of keys that each tile of queries sees.

    for (b, h, queries) in parallel:
        for (block, tile) in the list of these queries:        # blocks that nothing is seen of are not in it
            scores, as ever; where the block is cut: + mask[tile]     # tiles of equal values are one, so that windows and strides keep a few, whatever the length
            ...

The lists are made from the mask's values, for the tiles of the schedule (`common.visible`). Heads that have one pattern share their lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.dialect.attention import AttentionAttrs
from ...compiler.tvm import IRBuilder, T, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable
from ..common.visible import Visible
from .attention import Attention, AttentionSchedule, AttentionWorkload
from .attention_emit import AttentionEmitter
from .dot import Dot, dot_for, vector
from .emit import ATTRS, balanced, splat
from .llvm_text import defining
from .sparse_weights import Constants
from .template import Kernel, Packing

#: share of all blocks above which the kernel that reads all of the mask is left to it
_DENSE = 0.9


@dataclass(frozen=True)
class BlocksWorkload(AttentionWorkload):
    """kept: share of blocks of 64 queries by 64 keys of which something is seen; the masks of the call sites."""

    kept: float = 1.0
    masks: tuple[Visible, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return f"{super().__str__()} kept {self.kept:.2f}"


class AttentionBlocks:
    """See the module."""

    name = "attention_blocks"

    def workload(self, fused: Fused, constants: frozenset[int]) -> BlocksWorkload:
        plain = Attention().workload(fused, constants)
        position = _mask(fused)
        if position is None or position not in constants or not isinstance(constants, Constants):
            raise Unfusable("no constant mask")
        if plain.received or plain.logsum or None in (plain.batch, plain.queries, plain.keys):
            raise Unfusable("sizes known at run time only, or further results are asked for")
        try:
            masks = tuple(_visible(values, fused) for values in constants.values[position])
            kept = float(np.mean([mask.seen(range(0, mask.queries, 64), 64, 64)[0].mean() for mask in masks]))
        except ValueError as reason:
            raise Unfusable(str(reason)) from reason
        if kept > _DENSE:
            raise Unfusable("a mask that hides no blocks")
        return BlocksWorkload(**asdict(plain), kept=kept, masks=masks)

    def space(self, workload: BlocksWorkload, target: Target) -> Sequence[AttentionSchedule]:
        return [schedule for schedule in Attention().space(workload, target) if schedule.group == 1]  # lists are those of one tile

    def features(self, workload: BlocksWorkload, schedule: AttentionSchedule, target: Target) -> KernelFeatures:
        block, starts = _block(workload, schedule), _starts(workload, schedule)
        seen = np.mean([mask.seen(starts, schedule.lanes, block)[0].sum(axis=2).mean() for mask in workload.masks])
        # as if there were so many keys, and all seen
        return Attention().features(replace(workload, keys=max(1, round(float(seen) * block)), causal=False, before=-1, after=-1), schedule, target)

    def build(self, fused: Fused, workload: BlocksWorkload, schedule: AttentionSchedule, target: Target) -> Kernel:
        dot, position = dot_for(workload.kind, target), _mask(fused)
        assert position is not None
        block, starts = _block(workload, schedule), _starts(workload, schedule)
        height = (starts[1] if len(starts) > 1 else -(-workload.queries // schedule.lanes) * schedule.lanes) if workload.queries else 0
        with _kernel(fused, position, workload, len(starts), (block, height), dot) as (builder, buffers, lists):
            _Emitter(fused, buffers, schedule, dot, lists).emit()
        pack = partial(_packed, fused, starts, schedule.lanes, block, height)
        return Kernel(builder.get(), (Packing(position, (), pack, f"blocks {starts} {block} {fused.core}"),))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Lists:
    """The parameters in place of the mask (see `BlockLists`; tiles have the queries innermost), how many lists a pattern has, and the keys of a block."""

    entries: Any
    pointers: Any
    tiles: Any
    batch: int
    heads: int
    count: int
    block: int


def _mask(fused: Fused) -> int | None:
    """The position of the mask among the parameters."""
    return fused.param_index(fused.inputs[3]) if len(fused.inputs) == 4 else None


def _visible(prepared: np.ndarray, fused: Fused) -> Visible:
    """Of a mask as the kernels read it."""
    core, (queries, keys) = fused.core, (int(fused.core["sizes"][name]) for name in ("queries", "keys"))
    attrs = AttentionAttrs(causal=core["causal"], before=core["before"], after=core["after"], fill=float(core["fill"]))
    return Visible(prepared.transpose(0, 1, 3, 2)[:, :, : max(queries, 1)], attrs, queries, keys)


def _starts(workload: AttentionWorkload, schedule: AttentionSchedule) -> list[int]:
    """The first queries of the kernel's tiles."""
    return [start * schedule.lanes for start, _ in balanced(-(-(workload.queries or 1) // schedule.lanes), schedule.nv)]


def _block(workload: AttentionWorkload, schedule: AttentionSchedule) -> int:
    """Keys of a block: whole tiles of scores."""
    return min(schedule.block // schedule.mr * schedule.mr, workload.keys or 1)


def _packed(fused: Fused, starts: Sequence[int], rows: int, block: int, height: int, prepared: np.ndarray) -> tuple[np.ndarray, ...]:
    found = _visible(prepared, fused).lists(starts, rows, block, height, whole=False)
    return found.entries, found.pointers, found.tiles.transpose(0, 2, 1)


@contextmanager
def _kernel(
    fused: Fused, position: int, workload: BlocksWorkload, count: int, tile: tuple[int, int], dot: Dot
) -> Iterator[tuple[IRBuilder, dict[Any, Any], _Lists]]:
    """A PrimFunc with the parameters of `fused`, the mask's replaced by the lists'."""
    mask = workload.masks[0]
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr(dict(ATTRS))
        buffers, lists = {}, None
        for place, param in enumerate(fused.params):
            if place == position:
                entries = T.arg("entries", T.buffer((tirx.Var("count", "int64"), 2), "int32"))
                pointers = T.arg("pointers", T.buffer((mask.patterns * count + 1,), "int32"))
                tiles = T.arg("tiles", T.buffer((tirx.Var("cut", "int64"), *tile), "float32"))
                lists = _Lists(entries, pointers, tiles, mask.batch, mask.heads, count, tile[0])
            elif hasattr(param, "shape"):
                buffers[param] = T.arg(param.name, T.buffer(tuple(param.shape), param.ty.dtype))
            else:
                T.arg(param.name, param)
        assert lists is not None
        with defining(dot.llvm):
            yield builder, buffers, lists


class _Cut:
    """Has the place of `Window`: what the mask hides in the block that is at hand."""

    skips = True

    def __init__(self, tiles: Any, kind: str, lanes: int):
        self.tiles, self.kind, self.lanes = tiles, kind, lanes
        self.tile: Any = None
        self.start: Any = None

    def hidden(self, score: Any, t: Any, first: Any, v: int) -> Any:
        extra = self.tiles[self.tile, t - self.start, vector(T.int64(v * self.lanes), self.lanes)]
        return score + extra if self.kind == "add" else tirx.Select(extra == splat(T.float32(0), self.lanes), score, extra)

    def open(self, first: Any, queries: int, key: Any, size: int) -> Any:
        return self.tile < 0


class _Emitter(AttentionEmitter):
    """The loops of `attention`, the blocks of a list in place of all."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: AttentionSchedule, dot: Dot, lists: _Lists):
        super().__init__(fused, buffers, schedule, dot)
        self.lists = lists
        self.window = self.cut = _Cut(lists.tiles, self.core["mask"], self.lanes)  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def _seen(self, b: Any, h: Any, tile: Any, first: Any, queries: int) -> Iterator[tuple[Any, Any]]:
        lists = self.lists
        pattern = (b if lists.batch > 1 else 0) * lists.heads + (h if lists.heads > 1 else 0)
        number = T.bind(pattern * lists.count + tile)
        begin, end = (T.bind(T.Cast("int64", lists.pointers[number + i])) for i in range(2))
        with T.serial(end - begin) as index:
            entry = T.bind(begin + index)
            start = T.bind(T.Cast("int64", lists.entries[entry, 0]) * lists.block)
            self.cut.tile, self.cut.start = T.bind(T.Cast("int64", lists.entries[entry, 1])), start
            whole = int(self.keys) % lists.block == 0
            yield start, T.int64(lists.block) if whole else T.bind(T.min(T.int64(lists.block), self.keys - start))
