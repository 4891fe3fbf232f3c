"""Memory plan: where every intermediate tensor lies in one workspace, by lifetime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.weights import DEVICE_ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """size_bytes, and the launches (first to last, both included) during which the tensor is needed."""

    size_bytes: int
    first: int
    last: int


def aligned(size: int) -> int:
    return -(-size // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT


def plan(lifetimes: Mapping[int, Lifetime]) -> tuple[dict[int, int], int]:
    """(offset of each tensor, size of the workspace in bytes): the largest first, each into the lowest gap among those alive with it.

    Greedy by size, Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020).
    """
    offsets: dict[int, int] = {}
    for key in sorted(lifetimes, key=lambda key: (-lifetimes[key].size_bytes, key)):
        own = lifetimes[key]
        taken = sorted(
            (offsets[other], offsets[other] + aligned(lifetimes[other].size_bytes)) for other in offsets if _together(lifetimes[other], own)
        )
        offsets[key] = _lowest_gap(taken, aligned(own.size_bytes))
    return offsets, max((offset + aligned(lifetimes[key].size_bytes) for key, offset in offsets.items()), default=0)


def _together(a: Lifetime, b: Lifetime) -> bool:
    return a.first <= b.last and b.first <= a.last


def _lowest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    offset = 0
    for begin, end in taken:
        if begin - offset >= size:
            break
        offset = max(offset, end)
    return offset
