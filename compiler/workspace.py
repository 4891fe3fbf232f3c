"""Where every intermediate tensor lies in one workspace, by lifetime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lifetime:
    """size_bytes, and the steps (first to last, both included) during which the tensor is needed."""

    size_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Workspace:
    """size_bytes: of the one allocation. unshared_bytes: if no two tensors shared memory. lower_bound_bytes: the most that is needed at any step: no plan takes less.
    offsets: of each tensor, by its key.
    """

    size_bytes: int
    unshared_bytes: int
    lower_bound_bytes: int
    offsets: Mapping[int, int]

    def report(self) -> dict[str, int]:
        """What a model's report says under "memory"."""
        return {"workspace_bytes": self.size_bytes, "lower_bound_bytes": self.lower_bound_bytes, "unshared_bytes": self.unshared_bytes}


def aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def plan(lifetimes: Mapping[int, Lifetime], alignment: int) -> Workspace:
    """One tensor after the other into the lowest gap among those alive with it, in three orders, the best kept. Every offset is a multiple of `alignment`.

    The orders: the largest first; those alive when most is alive first (greedy by size and by breadth, Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference", 2020); the largest product of size and lifetime first.
    """
    keys = list(lifetimes)
    sizes = np.array([aligned(lifetimes[key].size_bytes, alignment) for key in keys], np.int64)
    first, last = (np.array([getattr(lifetimes[key], name) for key in keys], np.int64) for name in ("first", "last"))
    alive = _alive(sizes, first, last)
    breadth = [int(alive[begin : end + 1].max()) for begin, end in zip(first, last, strict=True)]
    orders: list[Callable[[int], tuple[int, ...]]] = [
        lambda at: (-sizes[at], first[at]),
        lambda at: (-breadth[at], -sizes[at], first[at]),
        lambda at: (-sizes[at] * (last[at] - first[at] + 1), first[at]),
    ]
    tried = [_placed(sorted(range(len(keys)), key=order), sizes, first, last) for order in orders]
    size, offsets = min(tried, key=lambda found: found[0])
    return Workspace(size, int(sizes.sum()), int(alive.max(initial=0)), {key: int(offset) for key, offset in zip(keys, offsets, strict=True)})


def stacked(lifetimes: Mapping[int, Lifetime], planned: Workspace) -> dict[int, list[int]]:
    """Key of each tensor -> keys of those below it, for sizes that are known only while running: planned for sizes that are to be expected, tensors keep their order.

    A tensor begins where the last of those below it ends, 0 without any; so no two that are alive together meet, whatever their sizes are. Those that lie below one of the list are
    left out; keys come with those below them first.
    """
    keys = sorted(lifetimes, key=lambda key: (planned.offsets[key], lifetimes[key].size_bytes, key))
    first, last = (np.array([getattr(lifetimes[key], name) for key in keys], np.int64) for name in ("first", "last"))
    found: dict[int, list[int]] = {}
    reached: list[set[int]] = []  # of each tensor, all that lie below it
    for own, key in enumerate(keys):
        alive = np.flatnonzero((first[:own] <= last[own]) & (last[:own] >= first[own]))
        direct: list[int] = []
        below: set[int] = set()
        for other in reversed(alive.tolist()):
            if other not in below:
                direct.append(other)
                below |= reached[other] | {other}
        reached.append(below)
        found[key] = [keys[other] for other in direct]
    return found


def _placed(order: Sequence[int], sizes: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[int, np.ndarray]:
    """(size of the workspace, offset of each tensor)."""
    offsets, placed = np.zeros_like(sizes), np.array(order, np.int64)
    for count, own in enumerate(order):
        there = placed[:count]
        there = there[(first[there] <= last[own]) & (last[there] >= first[own])]
        there = there[np.argsort(offsets[there])]
        # where each gap begins: at 0, and behind all that begins before
        begins = np.maximum.accumulate(np.append(0, offsets[there] + sizes[there]))
        wide = np.append(offsets[there] - begins[:-1] >= sizes[own], True)
        offsets[own] = begins[np.argmax(wide)]
    return int((offsets + sizes).max(initial=0)), offsets


def _alive(sizes: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Bytes alive at each step."""
    change = np.zeros(int(last.max(initial=-1)) + 2, np.int64)
    np.add.at(change, first, sizes)
    np.subtract.at(change, last + 1, sizes)
    return np.cumsum(change)
