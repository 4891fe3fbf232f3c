"""Which keys `causal` and the window of an attention leave to a tile of queries, as loop bounds and as a select in the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...compiler.tvm import T, tirx
from .emit import splat


class Window:
    """A window of the attributes `about`; positions are int64 expressions, `lanes` queries lie in a vector. before, after: None where there is no limit."""

    def __init__(self, about: Mapping[str, Any], lanes: int):
        self.lanes, self.fill = lanes, float(about["fill"])
        limits = about["before"], 0 if about["causal"] else about["after"]
        self.before, self.after = (limit if limit >= 0 else None for limit in limits)
        #: what is hidden counts for nothing, also for a query that sees nothing else, so that it need not be computed
        self.skips = self.fill == -math.inf

    def hidden(self, score: Any, t: Any, first: Any, v: int) -> Any:
        """The score of key t for vector v of queries from `first` on, with what is hidden filled."""
        lanes = T.int32(v * self.lanes) if self.lanes == 1 else T.ramp(T.int32(v * self.lanes), T.int32(1), self.lanes)
        fill = splat(T.float32(self.fill), self.lanes)
        if self.after is not None:
            score = tirx.Select(splat(T.Cast("int32", _less(t - first, self.after)), self.lanes) <= lanes, score, fill)
        if self.before is not None:
            score = tirx.Select(lanes <= splat(T.Cast("int32", t - first + self.before), self.lanes), score, fill)
        return score

    def open(self, first: Any, queries: int, key: Any, size: int) -> Any:
        """Whether all of `queries` queries see all of `size` keys; None where there is no window."""
        conditions = []
        if self.after is not None:
            conditions.append(_less(key + T.int64(size - 1), self.after) <= first)
        if self.before is not None:
            conditions.append(first + T.int64(queries - 1) <= key + self.before)
        return tirx.And(*conditions) if len(conditions) == 2 else next(iter(conditions), None)

    def keys(self, first: Any, queries: int, keys: Any) -> tuple[Any, Any, int | None]:
        """(first key, end of the keys) that some of `queries` queries see, the first None for 0; and how many these are away from the ends, where both sides are limited."""
        if not self.skips:
            return None, keys, None
        limit = keys if self.after is None else T.bind(T.min(keys, first + T.int64(queries + self.after)))
        if self.before is None:
            return None, limit, None
        begin = T.bind(T.min(T.max(first - self.before, T.int64(0)), limit))
        return begin, limit, None if self.after is None else queries + self.before + self.after

    def tiles(self, start: Any, count: Any, queries: int, tiles: Any) -> tuple[Any, Any]:
        """(first, end) of those of `tiles` tiles of queries that see some of `count` keys."""
        begin, end = T.int64(0), tiles
        if self.skips and self.after is not None:
            begin = T.floordiv(T.max(start - self.after, T.int64(0)) if self.after else start, T.int64(queries))
        if self.skips and self.before is not None:
            end = T.bind(T.min(T.floordiv(start + count - 1 + self.before, T.int64(queries)) + 1, tiles))
        return begin, end


def _less(value: Any, distance: int) -> Any:
    return value - distance if distance else value
