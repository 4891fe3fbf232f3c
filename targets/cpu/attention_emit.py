"""Emits the loop nest of the attention template; see `attention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...compiler.tvm import T, tirx
from ..common.fused import Fused, static
from .attention_views import element
from .attention_window import Window
from .dot import Dot, splat, vector
from .emit import Accumulators, balanced, tasks
from .math import call_exp_nonpositive
from .ops_attention import sizes

if TYPE_CHECKING:
    from .attention import AttentionSchedule


class AttentionEmitter:
    """State of one kernel; all sizes and positions are int64 expressions, `lane` counts queries within a tile."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: AttentionSchedule, dot: Dot):
        self.schedule, self.lanes, self.core, self.dot = schedule, schedule.lanes, fused.core, dot
        self.q, self.k, self.v = (buffers[buffer] for buffer in fused.inputs[:3])
        self.mask = buffers.get(fused.inputs[3]) if len(fused.inputs) > 3 else None
        outputs = [buffers[param] for param in fused.params if param in buffers][-fused.core["outputs"] :]
        self.out = outputs[0]
        self.received = outputs[1] if fused.core["received"] else None
        self.logsum = outputs[-1] if fused.core.get("logsum") else None
        dims = sizes(fused.core, [buffer.shape for buffer in fused.inputs])
        self.batch, self.queries, self.keys = dims.batch, dims.queries, dims.keys
        self.heads, self.depth, self.width = (int(dim) for dim in (dims.heads, dims.depth, dims.width))
        self.groups = self.heads // int(dims.kv_heads)
        self.wide = -(-self.width // self.lanes)
        self.window = Window(fused.core, self.lanes)

    # ---- the parallel loops

    def emit(self) -> None:
        """out, and when it is asked for, received, from the statistics that the first pass leaves of every query."""
        lanes, nv, queries = self.lanes, self.schedule.nv, static(self.queries)
        # tiles of nv or nv - 1 vectors where the number of queries is known; where it is not, the last tile computes rows twice
        sizes = [size for _, size in balanced(-(-queries // lanes), nv)] if queries is not None else [nv]
        large = sizes.count(sizes[0])
        count = T.int64(len(sizes)) if queries is not None else T.ceildiv(self.queries, T.int64(nv * lanes))
        statistics = None
        if self.received is not None:
            shape = (self.batch * T.int64(self.heads), count * T.int64(sizes[0] * lanes))
            statistics = [T.alloc_buffer(shape, "float32") for _ in range(2)]
        known = [static(dim) for dim in (self.batch, self.queries, self.keys)]
        work = math.prod(dim or 0 for dim in known) * self.heads * (self.depth + self.width) if None not in known else None
        with tasks(self.batch * T.int64(self.heads) * count, work) as task:
            head, tile = (T.bind(T.floordiv(task, count)), T.bind(T.floormod(task, count))) if static(count) != 1 else (task, T.int64(0))
            b, h = self._place(head)
            if large == len(sizes):
                self._tile(b, h, tile, T.bind(tile * T.int64(sizes[0] * lanes)), sizes[0], statistics)
            else:
                first = T.bind(tile * T.int64(sizes[-1] * lanes) + T.min(tile, T.int64(large)) * T.int64(lanes))
                with T.If(tile < T.int64(large)):
                    with T.Then():
                        self._tile(b, h, tile, first, sizes[0], statistics)
                    with T.Else():
                        self._tile(b, h, tile, first, sizes[-1], statistics)
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

    # ---- operands

    def _index(self, operand: int, b: Any, h: Any, s: Any, d: Any) -> tuple[Any, ...]:
        """Indices of q (operand 0), k, v or the output (3)."""
        return element(self.core["rows"][operand], b, h, s, d)

    def _kv_head(self, h: Any) -> Any:
        return h if self.groups == 1 else T.bind(T.floordiv(h, T.int64(self.groups)))

    def _panel(self, b: Any, h: Any, first: Any, nv: int) -> Any:
        """[D / group, queries]: q^T of one tile in words, scaled if they are floats; beyond the last query it repeats that."""
        lanes, words = self.lanes, self.dot.words(self.depth)
        panel = T.alloc_buffer((words, nv * lanes), self.dot.word)
        whole = words // lanes if lanes > 1 else 0
        everything = vector(T.int64(0), lanes)

        def row(lane: Any) -> Any:
            return T.min(first + lane, self.queries - T.int64(1))

        with T.serial(T.int64(nv)) as v, T.serial(T.int64(whole)) as block:
            left = T.bind(v * T.int64(lanes))
            rows = [T.alloc_buffer((lanes,), self.dot.word) for _ in range(lanes)]
            for i in range(lanes):
                T.buffer_store(rows[i], self._query(b, h, row(left + T.int64(i)), block * T.int64(lanes), lanes), [everything])
            for i, column in enumerate(self._transposed(rows)):
                T.buffer_store(panel, column[everything], [block * T.int64(lanes) + T.int64(i), vector(left, lanes)])
        if edge := words - whole * lanes:
            with T.serial(T.int64(nv * lanes)) as lane, T.serial(T.int64(edge)) as d:
                word = T.bind(d + T.int64(whole * lanes))
                T.buffer_store(panel, self._query(b, h, row(lane), word, 1), [word, lane])
        return panel

    def _query(self, b: Any, h: Any, row: Any, word: Any, count: int) -> Any:
        """`count` consecutive words of a row of q."""
        if self.dot.grouped:
            place = vector(word * T.int64(self.dot.group), count * self.dot.group)
            return T.reinterpret("int32" if count == 1 else f"int32x{count}", self.q[self._index(0, b, h, row, place)])
        return self.q[self._index(0, b, h, row, vector(word, count))] * splat(T.float32(float(self.core["scale"])), count)

    def _transposed(self, rows: list[Any]) -> list[Any]:
        """The columns of as many vectors as each has lanes: blocks of twice the size change places at every step."""
        lanes, everything = self.lanes, vector(T.int64(0), self.lanes)
        step = 1
        while step < lanes:
            fresh = [T.alloc_buffer((lanes,), self.dot.word) for _ in range(lanes)]
            low = [lane + lanes - step if lane & step else lane for lane in range(lanes)]
            high = [lane + lanes if lane & step else lane + step for lane in range(lanes)]
            for i in range(lanes):
                pair = [rows[i & ~step][everything], rows[i | step][everything]]
                T.buffer_store(fresh[i], tirx.Shuffle(pair, [tirx.const(lane, "int32") for lane in (high if i & step else low)]), [everything])
            rows, step = fresh, 2 * step
        return rows

    def _masked(self, score: Any, b: Any, h: Any, t: Any, first: Any, v: int) -> Any:
        """The score of key t for vector v of a tile's queries with the mask operand applied."""
        if self.mask is None:
            return score
        rows = static(self.mask.shape[3])
        start = [T.int64(0) if static(dim) == 1 else index for dim, index in zip(self.mask.shape, (b, h, t), strict=False)]
        if rows == 1:
            extra = splat(self.mask[(*start, T.int64(0))], self.lanes)
        else:
            # padded to whole vectors; those that are beyond its end wholly are nobody's, so any other will do
            place = T.min(first + T.int64(v * self.lanes), self.mask.shape[3] - T.int64(self.lanes))
            extra = self.mask[(*start, vector(place, self.lanes))]
        if self.core["mask"] == "add":
            return score + extra
        return tirx.Select(extra == splat(T.float32(0), self.lanes), score, extra)

    def _exp(self, x: Any) -> Any:
        return call_exp_nonpositive(x, "float32" if self.lanes == 1 else f"float32x{self.lanes}")

    # ---- scores

    def _scores(
        self, b: Any, h: Any, first: Any, panel: Any, start: Any, count: Any, nv: int, use: Callable[[Accumulators, Any, int, int], None]
    ) -> None:
        """Hand the masked scores of keys start..start+count to `use(registers, key within the block, row, vector)`, a tile of mr keys at a time.

        Keys past the last whole tile: a tile moved back to end there, which may see keys twice, so `use` has to be idempotent; or single keys when there are fewer.
        """
        mr, known = self.schedule.mr, static(count)
        kv = self._kv_head(h)

        def tile(offset: Any, size: int) -> None:
            acc, dot = Accumulators(size, nv, self.lanes, self.dot), self.dot
            acc.fill()
            key = T.bind(start + offset)
            with T.serial(T.int64(dot.words(self.depth))) as word:
                queries = [T.bind(panel[word, vector(T.int64(v * self.lanes), self.lanes)]) for v in range(nv)]
                acc.multiply(range(size), lambda i: dot.read(self.k, lambda d: self._index(1, b, kv, key + i, d), word * dot.group), queries)

            def finish(hide: bool) -> None:
                for i in range(size):
                    for v in range(nv):
                        if self.mask is not None or hide or dot.grouped:
                            score = acc.load(i, v)
                            score = score * splat(T.float32(float(self.core["scale"])), self.lanes) if dot.grouped else score
                            if hide and not self.window.skips:  # a mask is added to what is filled in
                                score = self.window.hidden(score, key + i, first, v)
                            score = self._masked(score, b, h, key + i, first, v)
                            acc.store(i, v, self.window.hidden(score, key + i, first, v) if hide and self.window.skips else score)
                        use(acc, offset + i, i, v)

            seen = self.window.open(first, nv * self.lanes, key, size)
            if seen is None:
                finish(False)
                return
            with T.If(seen):
                with T.Then():
                    finish(False)
                with T.Else():
                    finish(True)

        if known is not None and known < mr:
            tile(T.int64(0), known)
            return
        with T.serial(T.int64(known // mr) if known is not None else T.floordiv(count, T.int64(mr))) as j:
            tile(T.bind(j * T.int64(mr)), mr)
        if known is not None:
            if known % mr:
                tile(T.int64(known - mr), mr)
            return
        rest = T.bind(T.floormod(count, T.int64(mr)))
        with T.If(tirx.And(rest > T.int64(0), count >= T.int64(mr))), T.Then():
            tile(T.bind(count - T.int64(mr)), mr)
        with T.If(count < T.int64(mr)), T.Then(), T.serial(rest) as j:
            tile(j, 1)

    @contextmanager
    def _seen(self, b: Any, h: Any, tile: Any, first: Any, queries: int) -> Iterator[tuple[Any, Any]]:
        """Loop over blocks of keys that some queries of a tile see: (first key, how many)."""
        with self._blocks(*self.window.keys(first, queries, self.keys)) as block:
            yield block

    @contextmanager
    def _blocks(self, begin: Any, limit: Any, usual: int | None = None) -> Iterator[tuple[Any, Any]]:
        """Loop over blocks of keys from `begin`, None for 0, up to `limit`: (first key, how many). usual: how many keys these mostly are, where that is known."""
        mr, known = self.schedule.mr, static(limit) if begin is None else None
        block = self.schedule.block // mr * mr
        if (expected := usual or known) is not None:
            # as equal as whole tiles allow, so that the last is not a stub
            share = -(-expected // -(-expected // block))
            block = min((share + mr - 1) // mr * mr, expected if begin is None else block)
        if begin is not None:
            with T.serial(T.ceildiv(limit - begin, T.int64(block))) as index:
                start = T.bind(begin + index * T.int64(block))
                yield start, T.bind(T.min(T.int64(block), limit - start))
            return
        with T.serial(T.ceildiv(limit, T.int64(block))) as index:
            start = T.bind(index * T.int64(block))
            whole = known is not None and known % block == 0
            yield start, T.int64(block) if whole else T.bind(T.min(T.int64(block), limit - start))

    # ---- one tile of queries

    def _tile(self, b: Any, h: Any, tile: Any, first: Any, nv: int, statistics: Any) -> None:
        lanes, queries, padded = self.lanes, nv * self.lanes, self.wide * self.lanes
        panel = self._panel(b, h, first, nv)
        scores = T.alloc_buffer((self.schedule.block, queries), "float32")
        # whole vectors of floats are read where they are
        values = T.alloc_buffer((self.dot.words(self.schedule.block), padded), self.dot.word) if self.width % lanes or self.dot.grouped else None
        weights = T.alloc_buffer((self.dot.words(self.schedule.block), queries), self.dot.word) if self.dot.grouped else scores
        out = T.alloc_buffer((queries, padded), "float32")
        top, total, shrink = (T.alloc_buffer((queries,), "float32") for _ in range(3))
        places = [vector(T.int64(v * lanes), lanes) for v in range(nv)]
        zero, low = splat(T.float32(0), lanes), splat(T.float32(-math.inf), lanes)
        for place in places:
            T.buffer_store(top, low, [place])
            T.buffer_store(total, zero, [place])
        with T.serial(T.int64(queries)) as i:
            for e in range(self.wide):
                T.buffer_store(out, zero, [i, vector(T.int64(e * lanes), lanes)])
        with self._seen(b, h, tile, first, queries) as (start, count):
            # the running maximum before this block waits in `shrink`
            for place in places:
                T.buffer_store(shrink, top[place], [place])

            def keep(acc: Accumulators, key: Any, i: int, v: int) -> None:
                T.buffer_store(scores, acc.load(i, v), [key, places[v]])
                T.buffer_store(top, tirx.Select(acc.load(i, v) > top[places[v]], acc.load(i, v), top[places[v]]), [places[v]])

            self._scores(b, h, first, panel, start, count, nv, keep)
            base = [T.alloc_buffer((lanes,), "float32") for _ in range(nv)]
            sums = [T.alloc_buffer((lanes,), "float32") for _ in range(nv)]
            everything = vector(T.int64(0), lanes)
            for v, place in enumerate(places):
                # a query that has seen no key yet: 0 in place of -inf, whose difference to itself is no number
                T.buffer_store(base[v], tirx.Select(top[place] == low, zero, top[place]), [everything])
                T.buffer_store(shrink, self._exp(shrink[place] - base[v][everything]), [place])
                T.buffer_store(sums[v], zero, [everything])
            with T.serial(count) as j:
                for v, place in enumerate(places):
                    T.buffer_store(scores, self._exp(scores[j, place] - base[v][everything]), [j, place])
                    T.buffer_store(sums[v], sums[v][everything] + scores[j, place], [everything])
            for v, place in enumerate(places):
                T.buffer_store(total, total[place] * shrink[place] + sums[v][everything], [place])
            if self.dot.grouped:
                self._pair_weights(weights, scores, count, places)
            if values is not None:
                self._copy_values(values, b, h, start, count)
            kv = self._kv_head(h)

            def value(j: Any, place: Any) -> Any:
                return values[j, place] if values is not None else self.v[self._index(2, b, kv, start + j, place)]

            self._accumulate(out, weights, value, shrink, T.ceildiv(count, T.int64(self.dot.group)), queries)
        self._finish(b, h, first, nv, out, top, total, statistics)

    def _words(self, count: Any) -> Iterator[tuple[Any, int]]:
        """Loops over the words of `count` rows: (number of the word, rows that it has)."""
        group, known = self.dot.group, static(count)
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
                T.buffer_store(weights, self.dot.pair(low, high, self.lanes), [word, place])

    def _copy_values(self, values: Any, b: Any, h: Any, start: Any, count: Any) -> None:
        """v of one block in words, its rows side by side and filled up to whole vectors."""
        kv, lanes = self._kv_head(h), self.lanes
        whole, rest = divmod(self.width, lanes)

        def words(word: Any, rows: int, e: Any, size: int) -> Any:
            parts = [self.v[self._index(2, b, kv, start + word * T.int64(self.dot.group) + T.int64(i), vector(e, size))] for i in range(rows)]
            if not self.dot.grouped:
                return parts[0]
            kinds = ("uint16", "int32") if size == 1 else (f"uint16x{size}", f"int32x{size}")
            low, *high = (T.Cast(kinds[1], T.reinterpret(kinds[0], part)) for part in parts)
            return low | (high[0] << splat(T.int32(16), size)) if high else low

        for word, rows in self._words(count):
            for e in range(whole):
                place = T.int64(e * lanes)
                T.buffer_store(values, words(word, rows, place, lanes), [word, vector(place, lanes)])
            if rest:
                with T.serial(T.int64(rest)) as e:
                    T.buffer_store(values, words(word, rows, e + T.int64(whole * lanes), 1), [word, e + T.int64(whole * lanes)])
                with T.serial(T.int64(lanes - rest)) as e:
                    T.buffer_store(values, tirx.const(0, self.dot.word), [word, e + T.int64(self.width)])

    def _accumulate(self, out: Any, scores: Any, value: Callable[[Any, Any], Any], shrink: Any, count: Any, queries: int) -> None:
        """out[i, e] = out[i, e] * shrink[i] + sum over keys of p[key, i] * v[key, e]."""
        lanes, tiles = self.lanes, balanced(queries, self.schedule.rows)
        # groups of equally many vectors share one loop: one of three or four iterations LLVM would unroll, and keep the accumulators in memory
        groups = balanced(self.wide, self.schedule.columns)
        for columns in sorted({columns for _, columns in groups}, reverse=True):
            edges = [first for first, width in groups if width == columns]
            for size in sorted({size for _, size in tiles}, reverse=True):
                starts = [start for start, length in tiles if length == size]
                with T.serial(T.int64(len(edges) * len(starts))) as index:
                    edge = T.bind(T.floordiv(index, T.int64(len(starts))) * T.int64(columns * lanes) + T.int64(edges[0] * lanes))
                    row = T.bind(T.floormod(index, T.int64(len(starts))) * T.int64(size) + T.int64(starts[0]))
                    places = [vector(edge + T.int64(e * lanes), lanes) for e in range(columns)]
                    acc = Accumulators(size, columns, lanes, self.dot)
                    acc.fill(lambda i, e: out[row + T.int64(i), places[e]] * splat(shrink[row + T.int64(i)], lanes))  # noqa: B023
                    with T.serial(count) as j:
                        acc.multiply(range(size), lambda i: scores[j, row + T.int64(i)], [T.bind(value(j, place)) for place in places])  # noqa: B023
                    for i in range(size):
                        for e in range(columns):
                            T.buffer_store(out, acc.load(i, e), [row + T.int64(i), places[e]])

    def _finish(self, b: Any, h: Any, first: Any, nv: int, out: Any, top: Any, total: Any, statistics: Any) -> None:
        """Divide by the sums and store; keep what the second pass needs of every query: its maximum, and 1 / its sum, 0 for those past the end."""
        lanes, queries = self.lanes, nv * self.lanes
        zero, one, low = (splat(T.float32(value), lanes) for value in (0.0, 1.0, -math.inf))
        if self.logsum is not None:
            for v in range(nv):
                place = vector(T.int64(v * lanes), lanes)
                T.buffer_store(logsum := T.alloc_buffer((lanes,), "float32"), top[place] + T.log(total[place]), [vector(T.int64(0), lanes)])
                with T.serial(T.bind(T.max(T.min(T.int64(lanes), self.queries - first - T.int64(v * lanes)), T.int64(0)))) as lane:
                    T.buffer_store(self.logsum, logsum[lane], [b, h, first + T.int64(v * lanes) + lane])
        for v in range(nv):
            place = vector(T.int64(v * lanes), lanes)
            inverse = one / total[place]
            T.buffer_store(total, tirx.Select(total[place] == zero, zero, inverse) if self.core["safe"] else inverse, [place])
            if statistics is not None:
                T.buffer_store(top, tirx.Select(top[place] == low, zero, top[place]), [place])
        if statistics is not None:
            head = b * T.int64(self.heads) + h
            with T.serial(T.int64(queries)) as lane:
                T.buffer_store(statistics[0], top[lane], [head, first + lane])
                T.buffer_store(statistics[1], T.if_then_else(first + lane < self.queries, total[lane], T.float32(0)), [head, first + lane])
        whole, rest = divmod(self.width, lanes)
        with T.serial(T.bind(T.min(T.int64(queries), self.queries - first))) as i:
            row = T.bind(first + i)
            for e in range(whole):
                place = vector(T.int64(e * lanes), lanes)
                T.buffer_store(self.out, out[i, place] * splat(total[i], lanes), list(self._index(3, b, h, row, place)))
            if rest:
                with T.serial(T.int64(rest)) as e:
                    T.buffer_store(
                        self.out, out[i, e + T.int64(whole * lanes)] * total[i], list(self._index(3, b, h, row, e + T.int64(whole * lanes)))
                    )

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
                panel = self._panel(b, h, first, nv)

                def share(v: int, score: Any) -> Any:
                    place = vector(first + T.int64(v * lanes), lanes)
                    return self._exp(score - statistics[0][head, place]) * statistics[1][head, place]

                def keep(acc: Accumulators, key: Any, i: int, v: int) -> None:
                    # a key may come twice: its share is put, not added, and added afterwards
                    previous = zero if v == 0 else part[key, everything]
                    T.buffer_store(part, previous + share(v, acc.load(i, v)), [key, everything])

                self._scores(b, h, first, panel, start, here, nv, keep)
                with T.serial(here) as j:
                    T.buffer_store(sums, sums[j, everything] + part[j, everything], [j, everything])
            scale = T.float32(1.0) / T.Cast("float32", self.queries * T.int64(self.heads))
            with T.serial(here) as j:
                total = T.alloc_buffer((1,), "float32")
                T.buffer_store(total, T.float32(0), [0])
                with T.serial(T.int64(lanes)) as lane:
                    T.buffer_store(total, total[0] + sums[j, lane], [0])
                T.buffer_store(self.received, total[0] * scale, [b, start + j])
