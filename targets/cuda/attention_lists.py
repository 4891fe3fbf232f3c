"""Attention under a constant mask that hides whole blocks of scores: both templates over lists of the blocks of keys that blocks of queries see, made from the mask's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.dialect.attention import AttentionAttrs
from ...compiler.tvm import Constant, tirx
from ..common.visible import Visible, visible
from .kernel import MAX_ELEMENTS, Packing

#: granularity of what is known of a mask: blocks of queries are multiples of it
_ROWS = 64
#: share of blocks above which all of them are taken
_DENSE = 0.9


@dataclass(frozen=True)
class Lists:
    """Those of blocks of `queries` queries and `keys` keys, a list for each block of queries of each head that has a pattern of its own."""

    visible: Visible
    attrs: AttentionAttrs
    queries: int
    keys: int

    @property
    def starts(self) -> range:
        return range(0, self.visible.queries, self.queries)

    def steps(self, heads: int, batch: int) -> list[int]:
        """Blocks of keys of every block of queries of every head."""
        counts = np.maximum(self.visible.seen(self.starts, _ROWS, self.keys)[0].sum(axis=2), 1)
        own = counts.reshape(self.visible.batch, self.visible.heads, -1)
        return np.broadcast_to(own, (batch, heads, own.shape[2])).reshape(-1).tolist()

    @property
    def growing(self) -> bool:
        """Later queries see more."""
        counts = self.visible.seen(self.starts, _ROWS, self.keys)[0].sum(axis=(0, 2))
        return bool(counts[len(counts) // 2 :].sum() > counts[: -(-len(counts) // 2)].sum())

    def number(self, batch: str, head: str, tile: str) -> str:
        """Of a list, in C."""
        terms = [f"{batch} * {self.visible.heads}"] * (self.visible.batch > 1) + [head] * (self.visible.heads > 1)
        return f"({' + '.join(terms)}) * {len(self.starts)} + {tile}" if terms else tile

    def score(self, name: str, score: str, factor: str = "") -> list[str]:
        """The end of the body of (s, t, x, tile) -> score, in C, from the score without a mask. name: of the packed lists. factor: of what is added."""
        value = f"tc::as_float({name}[tile + s % {self.queries} * {self.keys} + t % {self.keys}]){factor}"
        end = f"return extra == 0.0f ? {score} : extra;" if self.visible.mask.dtype == bool else f"return {score} + extra;"
        return [f"if (tile < 0) return {score};", f"const float extra = {value};", end]

    def packing(self, mask: Any) -> Packing:
        """The lists in place of the mask: struct BlockList in include/attention.cuh. They are longer than their buffer, by the tiles."""
        count = self.visible.patterns * len(self.starts)
        room = count * (2 + 2 * -(-self.visible.keys // self.keys))
        before, after = self.attrs.window
        buffer = tirx.decl_buffer((room,), "int32", f"lists{self.queries}x{self.keys}_{before}_{after}")
        return Packing(mask, buffer, lambda values: self._packed(values, count))

    def _packed(self, values: np.ndarray, count: int) -> np.ndarray:
        own = Visible(values, self.attrs, self.visible.queries, self.visible.keys)
        found = own.lists(self.starts, _ROWS, self.keys, self.queries, whole=True)
        head, behind = 2 * count, 2 * count + found.entries.size
        table = np.stack([head + 2 * found.pointers[:-1], np.diff(found.pointers)], axis=1)
        places = np.where(found.entries[:, 1] < 0, -1, behind + found.entries[:, 1] * (self.queries * self.keys))
        entries = np.stack([found.entries[:, 0], places], axis=1)
        return np.concatenate([part.astype(np.int32).reshape(-1) for part in (table, entries)] + [found.tiles.view(np.int32).reshape(-1)])


def lists(call: Any, attrs: AttentionAttrs, queries: Any, keys: Any, block: tuple[int, int]) -> Lists | None:
    """For blocks of so many queries and keys; None where the mask is no constant, where sizes are open, and where nothing is gained."""
    if len(call.args) < 4 or not isinstance(call.args[3], Constant) or not (isinstance(queries, int) and isinstance(keys, int)):
        return None
    found = visible(call.args[3], attrs, queries, keys)
    if found is None:
        return None
    made = Lists(found, attrs, *block)
    some, plain = found.seen(made.starts, _ROWS, block[1])
    fits = np.count_nonzero(some & ~plain) * block[0] * block[1] < MAX_ELEMENTS // 2
    return made if fits and some.mean() <= _DENSE else None
