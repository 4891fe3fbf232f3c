"""Emits the loop nest of the attention template; see `attention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...compiler.tvm import T, tirx
from ..common.fused import static
from .attention_scores import AttentionScores
from .dot import splat, vector
from .emit import Accumulators, balanced, runs, tasks

#: rows of v between the one that is copied and the one asked for
_COPIED_AHEAD = 8


@dataclass(frozen=True)
class TileBuffers:
    """Buffers of a task: q^T, the output, the running maximum and sum of each of its tiles of queries, a tile's number first; and of the tile and block at hand the scores, the
    probabilities as words, the factor of what was summed before. values: v of the block as words side by side, None where it is read in place.
    """

    panel: Any
    out: Any
    top: Any
    total: Any
    scores: Any
    weights: Any
    shrink: Any
    values: Any


class AttentionEmitter(AttentionScores):
    """State of one kernel; see `AttentionScores`."""

    # ---- the parallel loops

    def emit(self) -> None:
        """out, and when it is asked for, received, from the statistics that the first pass leaves of every query."""
        lanes, nv, group, queries = self.lanes, self.schedule.nv, self.schedule.group, static(self.queries)
        # tiles of nv or nv - 1 vectors where the number of queries is known; where it is not, the last tile computes rows twice
        self.sizes = sizes = [size for _, size in balanced(-(-queries // lanes), nv)] if queries is not None else [nv]
        count = T.int64(len(sizes)) if queries is not None else T.bind(T.ceildiv(self.queries, T.int64(nv * lanes)))
        shares = count if group == 1 else T.int64(-(-len(sizes) // group)) if queries is not None else T.bind(T.ceildiv(count, T.int64(group)))
        statistics = None
        if self.received is not None:
            shape = (self.batch * T.int64(self.heads), count * T.int64(sizes[0] * lanes))
            statistics = [T.alloc_buffer(shape, "float32") for _ in range(2)]
        known = [static(dim) for dim in (self.batch, self.queries, self.keys)]
        work = math.prod(dim or 0 for dim in known) * self.heads * (self.depth + self.width) if None not in known else None
        with tasks(self.batch * T.int64(self.heads) * shares, work) as task:
            head, share = (T.bind(T.floordiv(task, shares)), T.bind(T.floormod(task, shares))) if static(shares) != 1 else (task, T.int64(0))
            b, h = self._place(head)
            if group == 1:
                self._alone(b, h, share, statistics)
            else:
                self._together(b, h, T.bind(share * T.int64(group)), count, statistics)
        if statistics is not None:
            if queries is not None:
                # tiles that are shorter by a vector leave the end untouched
                with (
                    T.serial(self.batch * T.int64(self.heads)) as head,
                    T.serial(T.int64(sum(sizes) * lanes), T.int64(len(sizes) * sizes[0] * lanes)) as i,
                ):
                    for buffer in statistics:
                        T.buffer_store(buffer, T.float32(0), [head, i])
            self._receive(statistics, sizes[0], count, work)

    def _place(self, head: Any) -> tuple[Any, Any]:
        """(batch, head) of a number that counts both."""
        if static(self.batch) == 1:
            return T.int64(0), head
        return T.bind(T.floordiv(head, T.int64(self.heads))), T.bind(T.floormod(head, T.int64(self.heads)))

    def _first(self, tile: Any) -> Any:
        """The first query of a tile."""
        large = self.sizes.count(self.sizes[0])
        first = tile * T.int64(self.sizes[-1] * self.lanes)
        return T.bind(first if large == len(self.sizes) else first + T.min(tile, T.int64(large)) * T.int64(self.lanes))

    def _sized(self, tile: Any, body: Callable[[Any, int], None]) -> None:
        """`body(first query, vectors)` of a tile, once for each number of vectors that tiles have."""
        first, large = self._first(tile), self.sizes.count(self.sizes[0])
        if large == len(self.sizes):
            body(first, self.sizes[0])
            return
        with T.If(tile < T.int64(large)):
            with T.Then():
                body(first, self.sizes[0])
            with T.Else():
                body(first, self.sizes[-1])

    def _alone(self, b: Any, h: Any, tile: Any, statistics: Any) -> None:
        """A task of one tile, which reads keys and values where they are if it can."""
        tiles, local = self._buffers(1), T.int64(0)

        def whole(first: Any, nv: int) -> None:
            self._begin(tiles, local, b, h, first, nv)
            with self._seen(b, h, tile, first, nv * self.lanes) as (start, count):
                if tiles.values is not None:
                    self._copy_values(tiles.values, b, h, start, count)
                self._step(tiles, local, b, h, first, nv, start, count)
            self._finish(tiles, local, b, h, first, nv, statistics)

        self._sized(tile, whole)

    def _together(self, b: Any, h: Any, tile: Any, count: Any, statistics: Any) -> None:
        """A task of `group` tiles from `tile` on, which share a copy of the values of every block. Rows of several heads lie a power of two apart, or nearly: few of them fit into the
        sets of a cache that such addresses fall into."""
        group = self.schedule.group
        tiles, known = self._buffers(group), static(count)
        here = T.int64(group) if known is not None and known % group == 0 else T.bind(T.min(T.int64(group), count - tile))
        with T.serial(here) as local:
            self._sized(T.bind(tile + local), lambda first, nv: self._begin(tiles, local, b, h, first, nv))
        with self._blocks(*self.window.keys(self._first(tile), group * self.sizes[0] * self.lanes, self.keys)) as (start, length):
            self._copy_values(tiles.values, b, h, start, length)
            end = T.bind(start + length)
            with T.serial(here) as local:

                def step(first: Any, nv: int) -> None:
                    begin, limit, _ = self.window.keys(first, nv * self.lanes, end)
                    if begin is None and limit is end:
                        self._step(tiles, local, b, h, first, nv, start, length)
                        return
                    with T.If(tirx.And(limit > start, begin < end) if begin is not None else limit > start), T.Then():
                        self._step(tiles, local, b, h, first, nv, start, T.bind(limit - start))

                self._sized(T.bind(tile + local), step)
        with T.serial(here) as local:
            self._sized(T.bind(tile + local), lambda first, nv: self._finish(tiles, local, b, h, first, nv, statistics))

    @contextmanager
    def _seen(self, b: Any, h: Any, tile: Any, first: Any, queries: int) -> Iterator[tuple[Any, Any]]:
        """Loop over blocks of keys that some queries of a tile see: (first key, how many)."""
        with self._blocks(*self.window.keys(first, queries, self.keys)) as block:
            yield block

    # ---- one tile of queries

    def _buffers(self, group: int) -> TileBuffers:
        block, queries, padded, dot = self.schedule.block, self.sizes[0] * self.lanes, self.wide * self.lanes, self.mix
        scores = T.alloc_buffer((block, queries), "float32")
        return TileBuffers(
            panel=self._panel(group, queries),
            out=T.alloc_buffer((group, queries, padded), "float32"),
            top=T.alloc_buffer((group, queries), "float32"),
            total=T.alloc_buffer((group, queries), "float32"),
            scores=scores,
            weights=T.alloc_buffer((dot.words(block), queries), dot.word) if dot.grouped else scores,
            shrink=T.alloc_buffer((queries,), "float32"),
            values=T.alloc_buffer((dot.words(block), padded), dot.word) if self.copies else None,
        )

    def _begin(self, tiles: TileBuffers, local: Any, b: Any, h: Any, first: Any, nv: int) -> None:
        lanes = self.lanes
        self._fill(tiles.panel, local, b, h, first, nv)
        zero, low = splat(T.float32(0), lanes), splat(T.float32(-math.inf), lanes)
        for v in range(nv):
            place = vector(T.int64(v * lanes), lanes)
            T.buffer_store(tiles.top, low, [local, place])
            T.buffer_store(tiles.total, zero, [local, place])
        self._clear(tiles, local, nv)

    def _clear(self, tiles: TileBuffers, local: Any, nv: int) -> None:
        """The output of a tile, zeros."""
        with T.serial(T.int64(nv * self.lanes)) as i:
            for e in range(self.wide):
                T.buffer_store(tiles.out, splat(T.float32(0), self.lanes), [local, i, vector(T.int64(e * self.lanes), self.lanes)])

    def _step(self, tiles: TileBuffers, local: Any, b: Any, h: Any, first: Any, nv: int, start: Any, count: Any) -> None:
        """Take `count` keys from `start` on into a tile."""
        lanes, scores, top, total, shrink = self.lanes, tiles.scores, tiles.top, tiles.total, tiles.shrink
        places = [vector(T.int64(v * lanes), lanes) for v in range(nv)]
        zero, low = splat(T.float32(0), lanes), splat(T.float32(-math.inf), lanes)
        # the running maximum before this block waits in `shrink`
        for place in places:
            T.buffer_store(shrink, top[local, place], [place])

        def keep(score: Any, key: Any, v: int) -> None:
            T.buffer_store(scores, score, [key, places[v]])
            T.buffer_store(top, tirx.Select(score > top[local, places[v]], score, top[local, places[v]]), [local, places[v]])

        self._scores(b, h, first, tiles.panel, local, start, count, nv, keep)
        base = [T.alloc_buffer((lanes,), "float32") for _ in range(nv)]
        sums = [T.alloc_buffer((lanes,), "float32") for _ in range(nv)]
        everything = vector(T.int64(0), lanes)
        for v, place in enumerate(places):
            # a query that has seen no key yet: 0 in place of -inf, whose difference to itself is no number
            T.buffer_store(base[v], tirx.Select(top[local, place] == low, zero, top[local, place]), [everything])
            T.buffer_store(shrink, self._exp(shrink[place] - base[v][everything]), [place])
            T.buffer_store(sums[v], zero, [everything])
        with T.serial(count) as j:
            for v, place in enumerate(places):
                T.buffer_store(scores, self._exp(scores[j, place] - base[v][everything]), [j, place])
                T.buffer_store(sums[v], sums[v][everything] + scores[j, place], [everything])
        for v, place in enumerate(places):
            T.buffer_store(total, total[local, place] * shrink[place] + sums[v][everything], [local, place])
        if self.mix.grouped:
            self._pair_weights(tiles.weights, scores, count, places)
        kv = self._kv_head(h)

        def value(j: Any, place: Any) -> Any:
            return tiles.values[j, place] if tiles.values is not None else self.v[self._index(2, b, kv, start + j, place)]

        self._accumulate(tiles, local, value, T.ceildiv(count, T.int64(self.mix.group)), nv * lanes)

    def _words(self, count: Any) -> Iterator[tuple[Any, int]]:
        """Loops over the words of `count` rows: (number of the word, rows that it has)."""
        group, known = self.mix.group, static(count)
        with T.serial(T.floordiv(count, T.int64(group))) as word:
            yield word, group
        if group > 1 and (known is None or known % group):
            with T.If(T.floormod(count, T.int64(group)) > T.int64(0)), T.Then():
                yield T.floordiv(count, T.int64(group)), 1

    def _pair_weights(self, weights: Any, scores: Any, count: Any, places: list[Any]) -> None:
        """The probabilities of two keys each as one word."""
        for word, rows in self._words(count):
            for place in places:
                low = scores[word * T.int64(2), place]
                high = scores[word * T.int64(2) + T.int64(1), place] if rows == 2 else splat(T.float32(0), self.lanes)
                T.buffer_store(weights, self.mix.pair(low, high, self.lanes), [word, place])

    def _copy_values(self, values: Any, b: Any, h: Any, start: Any, count: Any) -> None:
        """v of one block in words, its rows side by side and filled up to whole vectors."""
        kv, lanes = self._kv_head(h), self.lanes
        whole, rest = divmod(self.width, lanes)

        for word, rows in self._words(count):
            if self.ahead:
                for i in range(rows):
                    self._ask(2, b, kv, start + word * T.int64(self.mix.group) + T.int64(i + _COPIED_AHEAD))
            for e in range(whole):
                place = T.int64(e * lanes)
                T.buffer_store(values, self._value_words(b, kv, start, word, rows, place, lanes), [word, vector(place, lanes)])
            if rest:
                with T.serial(T.int64(rest)) as e:
                    T.buffer_store(
                        values, self._value_words(b, kv, start, word, rows, e + T.int64(whole * lanes), 1), [word, e + T.int64(whole * lanes)]
                    )
                with T.serial(T.int64(lanes - rest)) as e:
                    T.buffer_store(values, tirx.const(0, self.mix.word), [word, e + T.int64(self.width)])

    def _value_words(self, b: Any, kv: Any, start: Any, word: Any, rows: int, e: Any, size: int) -> Any:
        """`size` columns from e on of a word of the values from key `start` on; rows: keys that the word has."""
        parts = [self.v[self._index(2, b, kv, start + word * T.int64(self.mix.group) + T.int64(i), vector(e, size))] for i in range(rows)]
        if not self.mix.grouped:
            return parts[0]
        kinds = ("uint16", "int32") if size == 1 else (f"uint16x{size}", f"int32x{size}")
        low, *high = (T.Cast(kinds[1], T.reinterpret(kinds[0], part)) for part in parts)
        return low | (high[0] << splat(T.int32(16), size)) if high else low

    def _accumulate(self, tiles: TileBuffers, local: Any, value: Callable[[Any, Any], Any], count: Any, queries: int) -> None:
        """out[i, e] = out[i, e] * shrink[i] + sum over keys of p[key, i] * v[key, e]."""
        lanes, out, shrink, weights, rows = self.lanes, tiles.out, tiles.shrink, tiles.weights, balanced(queries, self.schedule.rows)
        # groups of equally many vectors share one loop: one of three or four iterations LLVM would unroll, and keep the accumulators in memory
        groups = balanced(self.wide, self.schedule.columns)
        for columns, first, edges, _ in runs(groups):
            for size, start, tiles_of_rows, _ in runs(rows):
                with T.serial(T.int64(edges * tiles_of_rows)) as index:
                    edge = T.bind(T.floordiv(index, T.int64(tiles_of_rows)) * T.int64(columns * lanes) + T.int64(first * lanes))
                    row = T.bind(T.floormod(index, T.int64(tiles_of_rows)) * T.int64(size) + T.int64(start))
                    places = [vector(edge + T.int64(e * lanes), lanes) for e in range(columns)]
                    acc = Accumulators(size, columns, lanes, self.mix)
                    acc.fill(lambda i, e: out[local, row + T.int64(i), places[e]] * splat(shrink[row + T.int64(i)], lanes))  # noqa: B023
                    with T.serial(count) as j:
                        acc.multiply(range(size), lambda i: weights[j, row + T.int64(i)], [T.bind(value(j, place)) for place in places])  # noqa: B023
                    for i in range(size):
                        for e in range(columns):
                            T.buffer_store(out, acc.load(i, e), [local, row + T.int64(i), places[e]])

    def _finish(self, tiles: TileBuffers, local: Any, b: Any, h: Any, first: Any, nv: int, statistics: Any) -> None:
        """Divide by the sums and store; keep what the second pass needs of every query: its maximum, and 1 / its sum, 0 for those past the end."""
        lanes, queries, top, total = self.lanes, nv * self.lanes, tiles.top, tiles.total
        zero, one, low = (splat(T.float32(value), lanes) for value in (0.0, 1.0, -math.inf))
        if self.logsum is not None:
            for v in range(nv):
                place = vector(T.int64(v * lanes), lanes)
                T.buffer_store(
                    logsum := T.alloc_buffer((lanes,), "float32"), top[local, place] + T.log(total[local, place]), [vector(T.int64(0), lanes)]
                )
                with T.serial(T.bind(T.max(T.min(T.int64(lanes), self.queries - first - T.int64(v * lanes)), T.int64(0)))) as lane:
                    T.buffer_store(self.logsum, logsum[lane], [b, h, first + T.int64(v * lanes) + lane])
        for v in range(nv):
            place = vector(T.int64(v * lanes), lanes)
            inverse = one / total[local, place]
            T.buffer_store(total, tirx.Select(total[local, place] == zero, zero, inverse) if self.core["safe"] else inverse, [local, place])
            if statistics is not None:
                T.buffer_store(top, tirx.Select(top[local, place] == low, zero, top[local, place]), [local, place])
        if statistics is not None:
            head = b * T.int64(self.heads) + h
            with T.serial(T.int64(queries)) as lane:
                T.buffer_store(statistics[0], top[local, lane], [head, first + lane])
                T.buffer_store(statistics[1], T.if_then_else(first + lane < self.queries, total[local, lane], T.float32(0)), [head, first + lane])
        whole, rest = divmod(self.width, lanes)
        result = self._result(tiles, local, nv)
        with T.serial(T.bind(T.min(T.int64(queries), self.queries - first))) as i:
            row = T.bind(first + i)
            for e in range(whole):
                place = vector(T.int64(e * lanes), lanes)
                T.buffer_store(self.out, result(i, place) * splat(total[local, i], lanes), list(self._index(3, b, h, row, place)))
            if rest:
                with T.serial(T.int64(rest)) as e:
                    T.buffer_store(
                        self.out,
                        result(i, e + T.int64(whole * lanes)) * total[local, i],
                        list(self._index(3, b, h, row, e + T.int64(whole * lanes))),
                    )

    def _result(self, tiles: TileBuffers, local: Any, nv: int) -> Callable[[Any, Any], Any]:
        """(query of a tile, columns) -> the output before it is divided."""
        return lambda i, place: tiles.out[local, i, place]

    # ---- the second pass

    def _receive(self, statistics: Any, nv: int, tiles: Any, work: int | None) -> None:
        """received[b, key] = mean over heads and queries of exp(score - maximum) / sum; scores are computed again, a block of keys per task, one vector of sums per key."""
        lanes, block, queries = self.lanes, self.schedule.block, nv * self.lanes
        count = T.ceildiv(self.keys, T.int64(block))
        everything = vector(T.int64(0), lanes)
        zero = splat(T.float32(0), lanes)
        with tasks(self.batch * count, work) as task:
            b, index = T.bind(T.floordiv(task, count)), T.bind(T.floormod(task, count))
            start = T.bind(index * T.int64(block))
            here = T.bind(T.min(T.int64(block), self.keys - start))
            sums = T.alloc_buffer((block, lanes), "float32")
            part = T.alloc_buffer((block, lanes), "float32")
            with T.serial(here) as j:
                T.buffer_store(sums, zero, [j, everything])
            begin, end = self.window.tiles(start, here, queries, tiles)
            with T.serial(T.int64(self.heads)) as h, T.serial(begin, end) as tile:
                first = T.bind(tile * T.int64(queries))
                head = b * T.int64(self.heads) + h
                panel = self._panel(1, queries)
                self._fill(panel, T.int64(0), b, h, first, nv)

                def share(v: int, score: Any) -> Any:
                    place = vector(first + T.int64(v * lanes), lanes)
                    return self._exp(score - statistics[0][head, place]) * statistics[1][head, place]

                def keep(score: Any, key: Any, v: int) -> None:
                    # a key may come twice: its share is put, not added, and added afterwards
                    previous = zero if v == 0 else part[key, everything]
                    T.buffer_store(part, previous + share(v, score), [key, everything])

                self._scores(b, h, first, panel, T.int64(0), start, here, nv, keep)
                with T.serial(here) as j:
                    T.buffer_store(sums, sums[j, everything] + part[j, everything], [j, everything])
            scale = T.float32(1.0) / T.Cast("float32", self.queries * T.int64(self.heads))
            with T.serial(here) as j:
                total = T.alloc_buffer((1,), "float32")
                T.buffer_store(total, T.float32(0), [0])
                with T.serial(T.int64(lanes)) as lane:
                    T.buffer_store(total, total[0] + sums[j, lane], [0])
                T.buffer_store(self.received, total[0] * scale, [b, start + j])
