"""What a loop nest does to the caches."""

from __future__ import annotations

from collections import Counter
from functools import cache

from ..base import Target

LINE = 64
#: sets of L1 on x86: a way is a page, so that the address translation does not hold up the look-up
SETS = 64


def conflict_bytes(rows: int, stride_bytes: int, target: Target) -> float:
    """Bytes fetched from L2 per step of walking `rows` rows side by side, one element of each, beyond one line per 16 steps.

    Rows whose stride is a multiple of 4 KB share a set of L1. More of them than it has ways, and lines are gone before their next element
    is read: on a Zen 4, tiles of 13 rows 12 KB apart run at 92 GFLOP/s, of 8 rows at 110 (bench: GEMM 128 x 3072 x 768).
    """
    return _conflict_bytes(rows, stride_bytes, target.l1_bytes // (LINE * SETS))


@cache
def _conflict_bytes(rows: int, stride_bytes: int, ways: int) -> float:
    crowd = Counter(row * stride_bytes // LINE % SETS for row in range(rows))
    return float(LINE * sum(max(0, count - ways) for count in crowd.values()))
