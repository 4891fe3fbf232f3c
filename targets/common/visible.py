"""Which blocks of an attention's keys its blocks of queries see, told by the values of a constant mask: kernels walk a list of those, and read the mask only where one is cut.

It does not matter who made the mask: windows with sinks, strided and per-head patterns, documents side by side, or padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.dialect.attention import AttentionAttrs, in_window

#: scores at or below this count for nothing beside any other
_HIDDEN = -1e30


@dataclass(frozen=True)
class BlockLists:
    """entries: int32 [n, 2], a block of keys and its tile of the mask, -1 where nothing in it is hidden or changed; those of list i are pointers[i] .. pointers[i + 1]: int32 [lists + 1],
    a list for each block of queries of each pattern. tiles: float32 [m, queries, keys], what is added to scores, or -inf; equal ones are one."""

    entries: np.ndarray
    pointers: np.ndarray
    tiles: np.ndarray


class Visible:
    """A constant mask, [B or 1, H or 1, S or 1, T or 1] bool (True where a key is seen) or float32 (added), with the window of the attributes, over S queries and T keys.

    patterns: (1 or B) * (1 or H). Raises ValueError where what is hidden may count: by a number that is not low enough, or in a query that sees nothing else.
    """

    def __init__(self, mask: np.ndarray, attrs: AttentionAttrs, queries: int, keys: int):
        self.mask, self.queries, self.keys = mask.reshape((1,) * (4 - mask.ndim) + mask.shape), queries, keys
        self.fill = attrs.fill
        self.window = in_window(attrs, queries, keys) if attrs.window != (None, None) else None
        if self.fill > _HIDDEN and (mask.dtype == bool or self.window is not None):
            raise ValueError("scores that a mask hides count")
        self.batch, self.heads = self.mask.shape[:2]
        self.patterns = self.batch * self.heads
        self._flags: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def values(self, pattern: int, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns] of the scores: what is added to them, -inf where they are hidden."""
        part = self.mask[pattern // self.heads, pattern % self.heads]
        part = part[rows if part.shape[0] > 1 else slice(None), columns if part.shape[1] > 1 else slice(None)]
        part = np.where(part, np.float32(0), np.float32(-math.inf)) if part.dtype == bool else np.where(part <= _HIDDEN, np.float32(-math.inf), part)
        shape = len(range(*rows.indices(self.queries))), len(range(*columns.indices(self.keys)))
        part = np.broadcast_to(part, shape)
        return part if self.window is None else np.where(self.window[rows, columns], part, np.float32(-math.inf))

    def flags(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """bool [patterns, ceil(S / rows), T]: whether some of so many queries see a key, and whether to all of them it is as it is."""
        if rows not in self._flags:
            some, plain = (np.zeros((self.patterns, -(-self.queries // rows), self.keys), bool) for _ in range(2))
            for pattern in range(self.patterns):
                for group in range(some.shape[1]):
                    values = self.values(pattern, slice(group * rows, (group + 1) * rows), slice(None))
                    seen = values != -math.inf
                    some[pattern, group], plain[pattern, group] = seen.any(axis=0), (values == 0).all(axis=0)
                    empty = ~seen.any(axis=1)
                    if empty.any() and self._finite(pattern, group * rows + np.flatnonzero(empty)):
                        raise ValueError("a query sees nothing but what a finite number hides")
            self._flags[rows] = some, plain
        return self._flags[rows]

    def _finite(self, pattern: int, rows: np.ndarray) -> bool:
        """Whether one of these queries, which see nothing, has scores above -inf."""
        if self.mask.dtype == bool or self.fill > -math.inf:
            return self.fill > -math.inf
        part = self.mask[pattern // self.heads, pattern % self.heads]
        part = part[rows if part.shape[0] > 1 else [0]] > -math.inf
        return bool((part if self.window is None else part & self.window[rows]).any())

    def seen(self, starts: Sequence[int], rows: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """bool [patterns, len(starts), ceil(T / block)]: whether some of the queries from a start to the next see a key of a block, and whether to all of them all keys are as they are.

        Starts are multiples of `rows`.
        """
        some, plain = self.flags(rows)
        first, edges = [start // rows for start in starts], np.arange(0, self.keys, block)
        some = np.logical_or.reduceat(np.logical_or.reduceat(some, first, axis=1), edges, axis=2)
        return some, np.logical_and.reduceat(np.logical_and.reduceat(plain, first, axis=1), edges, axis=2)

    def lists(self, starts: Sequence[int], rows: int, block: int, height: int, whole: bool) -> BlockLists:
        """The lists for blocks of queries that begin at `starts`, at most `height` long, and of `block` keys. whole: a block that ends behind the keys is cut, too.

        Every list has an entry: where there is nothing to see, a block that is hidden.
        """
        some, plain = self.seen(starts, rows, block)
        if whole and self.keys % block:
            plain = plain.copy()
            plain[:, :, -1] = False
        known: dict[bytes, int] = {}
        entries, pointers, tiles = [], [0], []
        for pattern in range(self.patterns):
            for number, (start, end) in enumerate(zip(starts, [*starts[1:], self.queries], strict=True)):
                found = np.flatnonzero(some[pattern, number])
                for index in found if len(found) else (0,):
                    if plain[pattern, number, index]:
                        entries.append((index, -1))
                        continue
                    tile = np.zeros((height, block), np.float32)
                    values = self.values(pattern, slice(start, end), slice(index * block, (index + 1) * block))
                    tile[: values.shape[0], : values.shape[1]] = values
                    tile[:, values.shape[1] :] = -math.inf
                    place = known.setdefault(tile.tobytes(), len(tiles))
                    if place == len(tiles):
                        tiles.append(tile)
                    entries.append((index, place))
                pointers.append(len(entries))
        made = np.stack(tiles) if tiles else np.zeros((1, height, block), np.float32)
        return BlockLists(np.array(entries, np.int32), np.array(pointers, np.int32), made)


@functools.lru_cache(maxsize=8)
def visible(mask: Any, attrs: AttentionAttrs, queries: int, keys: int) -> Visible | None:
    """Of a constant of the graph; None where what it hides may count."""
    try:
        found = Visible(mask.value.numpy(), attrs, queries, keys)
        found.flags(64)
    except ValueError:
        return None
    return found
