"""Emits the loop nest of the attention of few queries; see `attention_few`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...compiler.tvm import T, tirx
from ..common.fused import Fused, static
from .attention_scores import AttentionOperands
from .dot import Dot, fma, splat, vector
from .emit import Accumulators, balanced, tasks

if TYPE_CHECKING:
    from .attention import AttentionWorkload
    from .attention_few import FewSchedule

#: rows up to which their scores are unrolled; a loop over few would copy the keys to the stack, to keep them for the next row
_UNROLLED = 8


class FewEmitter(AttentionOperands):
    """State of one kernel; operands as in the kernel of many queries. A row is a query of one of the heads that share keys and values: (head, query) in that order."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: FewSchedule, dot: Dot, workload: AttentionWorkload):
        super().__init__(fused, buffers, schedule.lanes, dot)
        self.rows, self.few = self.groups * (workload.queries or 1), workload.queries or 1
        self.plan = schedule
        #: floats that a vector read from memory holds are so many vectors
        self.key_parts = self.value_parts = 1 if workload.kind == "f32" else 2
        self.everything = vector(T.int64(0), self.lanes)

    def emit(self) -> None:
        lanes, block = self.lanes, self.plan.block
        kv_heads = self.heads // self.groups
        known = [static(self.batch), static(self.keys)]
        work = math.prod(dim or 0 for dim in known) * self.heads * self.few * (self.depth + self.width) if None not in known else None
        with tasks(self.batch * T.int64(kv_heads), work) as task:
            b, kv = (
                (T.int64(0), task) if known[0] == 1 else (T.bind(T.floordiv(task, T.int64(kv_heads))), T.bind(T.floormod(task, T.int64(kv_heads))))
            )
            query, out = T.alloc_buffer((self.rows, self.depth), "float32"), T.alloc_buffer((self.rows, self.width), "float32")
            scores = T.alloc_buffer((self.rows, block), "float32")
            top, total, shrink = (T.alloc_buffer((self.rows,), "float32") for _ in range(3))
            with T.serial(T.int64(self.rows)) as row:
                self._take(b, kv, row, query)
                with T.serial(T.int64(self.wide)) as e:
                    T.buffer_store(out, splat(T.float32(0), lanes), [row, vector(e * T.int64(lanes), lanes)])
                T.buffer_store(top, T.float32(-math.inf), [row])
                T.buffer_store(total, T.float32(0), [row])
            with T.serial(T.ceildiv(self.keys, T.int64(block))) as index:
                start = T.bind(index * T.int64(block))
                count = T.bind(T.min(T.int64(block), self.keys - start))
                whole = T.bind(T.floordiv(count, T.int64(lanes)))
                with T.serial(whole) as j:
                    self._score(b, kv, query, scores, start, T.bind(j * T.int64(lanes)), tail=False)
                if known[1] is None or known[1] % lanes:
                    with T.If(whole * T.int64(lanes) < count), T.Then():
                        self._score(b, kv, query, scores, start, T.bind(whole * T.int64(lanes)), tail=True)
                vectors = T.bind(T.ceildiv(count, T.int64(lanes)))
                with T.serial(T.int64(self.rows)) as row:
                    self._weights(scores, row, vectors, top, total, shrink)
                self._sums(b, kv, scores, start, count, out, shrink)
            with T.serial(T.int64(self.rows)) as row:
                self._put(b, kv, row, out, top, total)

    def _query_of(self, kv: Any, row: Any) -> tuple[Any, Any]:
        """(head, query) of a row."""
        if self.few == 1:
            return kv * T.int64(self.groups) + row, T.int64(0)
        return T.bind(kv * T.int64(self.groups) + T.floordiv(row, T.int64(self.few))), T.bind(T.floormod(row, T.int64(self.few)))

    def _query_floats(self, b: Any, h: Any, s: Any, d: Any) -> list[Any]:
        """`key_parts` vectors of floats of q from d on."""
        return self._floats(self.q, lambda d: self._index(0, b, h, s, d), d)

    def _key_floats(self, b: Any, kv: Any, key: Any, d: Any) -> list[Any]:
        """As many of a key."""
        return self._floats(self.k, lambda d: self._index(1, b, kv, key, d), d)

    def _value_floats(self, b: Any, kv: Any, key: Any, e: Any) -> list[Any]:
        """`value_parts` vectors of floats of a value from e on."""
        return self._floats(self.v, lambda e: self._index(2, b, kv, key, e), e)

    def _weight(self, weight: Any, b: Any, kv: Any, key: Any) -> Any:
        """What a value is multiplied by, from the probability of its key."""
        return weight

    def _floats(self, buffer: Any, address: Callable[[Any], tuple[Any, ...]], place: Any) -> list[Any]:
        """Vectors of floats from `place` on: the numbers in a row, or the even ones and the odd ones."""
        lanes = self.lanes
        if self.key_parts == 1:
            return [T.bind(buffer[address(vector(place, lanes))])]
        words = T.bind(T.reinterpret(f"int32x{lanes}", buffer[address(vector(place, 2 * lanes))]))
        halves = (words << splat(T.int32(16), lanes), words & splat(T.int32(-65536), lanes))
        return [T.bind(T.reinterpret(f"float32x{lanes}", half)) for half in halves]

    def _take(self, b: Any, kv: Any, row: Any, query: Any) -> None:
        """query[row] = scale * q, in the order of `_floats`."""
        lanes, parts = self.lanes, self.key_parts
        h, s = self._query_of(kv, row)
        scale = splat(T.float32(float(self.core["scale"])), lanes)
        with T.serial(T.int64(self.depth // (lanes * parts))) as d:
            place = T.bind(d * T.int64(lanes * parts))
            for part, value in enumerate(self._query_floats(b, h, s, place)):
                T.buffer_store(query, value * scale, [row, vector(place + T.int64(part * lanes), lanes)])

    def _score(self, b: Any, kv: Any, query: Any, scores: Any, start: Any, place: Any, tail: bool) -> None:
        """scores[row][place..] for `lanes` keys from start + place; in the tail those past the last key are the last again, and score -inf."""
        lanes = self.lanes
        first = T.bind(start + place)
        keys = [T.bind(T.min(first + T.int64(i), self.keys - T.int64(1))) if tail else first + T.int64(i) for i in range(lanes)]
        read = self._keys(b, kv, keys)
        if self.rows > _UNROLLED:
            with T.serial(T.int64(self.rows)) as row:
                self._score_row(b, kv, row, read, first, query, scores, place, tail)
            return
        for row in range(self.rows):
            self._score_row(b, kv, T.int64(row), read, first, query, scores, place, tail)

    def _keys(self, b: Any, kv: Any, keys: list[Any]) -> list[Callable[[Any], list[Any]]]:
        """What reads each of the keys, from one of its dims on."""
        return [lambda d, key=key: self._key_floats(b, kv, key, d) for key in keys]

    def _score_row(
        self, b: Any, kv: Any, row: Any, keys: list[Callable[[Any], list[Any]]], first: Any, query: Any, scores: Any, place: Any, tail: bool
    ) -> None:
        lanes, parts = self.lanes, self.key_parts
        sums = [T.alloc_buffer((lanes,), "float32") for _ in keys]
        for total in sums:
            T.buffer_store(total, splat(T.float32(0), lanes), [self.everything])
        with T.serial(T.int64(self.depth // (lanes * parts))) as v:
            d = T.bind(v * T.int64(lanes * parts))
            own = [T.bind(query[row, vector(d + T.int64(part * lanes), lanes)]) for part in range(parts)]
            for total, key in zip(sums, keys, strict=True):
                for mine, theirs in zip(own, key(d), strict=True):
                    T.buffer_store(total, fma(mine, theirs, total[self.everything], lanes), [self.everything])
        h, s = self._query_of(kv, row)
        T.buffer_store(scores, self._visible(self._across(sums), b, h, s, first, tail), [row, vector(place, lanes)])

    def _across(self, parts: list[Any]) -> Any:
        """The sums of as many vectors as each has lanes, that of vector i in lane i: of every two vectors, half of the lanes go to each other."""
        lanes, step = self.lanes, 1
        while step < lanes:
            low = [lane + lanes - step if lane & step else lane for lane in range(lanes)]
            high = [lane + lanes if lane & step else lane + step for lane in range(lanes)]
            fresh = []
            for one, other in zip(parts[::2], parts[1::2], strict=True):
                pair = [one[self.everything], other[self.everything]]
                fresh.append(T.alloc_buffer((lanes,), "float32"))
                halves = [shuffled(pair, order) for order in (low, high)]
                T.buffer_store(fresh[-1], halves[0] + halves[1], [self.everything])
            parts, step = fresh, 2 * step
        return parts[0][self.everything]

    def _visible(self, score: Any, b: Any, h: Any, s: Any, first: Any, tail: bool) -> Any:
        """Scores of `lanes` keys with the mask applied; in the tail -inf past the last key."""
        lanes = self.lanes
        if self.mask is not None:
            keys, queries = self.mask.shape[2:]
            lead = [T.int64(0) if static(dim) == 1 else index for dim, index in zip(self.mask.shape, (b, h), strict=False)]
            s = T.int64(0) if static(queries) == 1 else s
            if static(keys) == 1:
                extra = splat(self.mask[(*lead, T.int64(0), s)], lanes)
            elif static(queries) == 1 and not tail:
                extra = self.mask[(*lead, first, vector(T.int64(0), lanes))]
            else:
                extra = self._lanes_of(lambda i: self.mask[(*lead, T.min(first + T.int64(i), keys - T.int64(1)), s)])  # pyright: ignore[reportOptionalSubscript]
            score = score + extra if self.core["mask"] == "add" else tirx.Select(extra == splat(T.float32(0), lanes), score, extra)
        if not tail:
            return score
        inside = T.ramp(T.Cast("int32", first), T.int32(1), lanes) < splat(T.Cast("int32", self.keys), lanes)
        return tirx.Select(inside, score, splat(T.float32(-math.inf), lanes))

    def _lanes_of(self, value: Callable[[int], Any]) -> Any:
        """A vector of numbers from memory."""
        made = T.alloc_buffer((self.lanes,), "float32")
        for i in range(self.lanes):
            T.buffer_store(made, value(i), [T.int64(i)])
        return made[self.everything]

    def _weights(self, scores: Any, row: Any, vectors: Any, top: Any, total: Any, shrink: Any) -> None:
        """scores[row] = exp(scores[row] - top[row]), with top, total and shrink as the block changes them."""
        lanes = self.lanes
        most, sums = T.alloc_buffer((lanes,), "float32"), T.alloc_buffer((lanes,), "float32")
        T.buffer_store(most, splat(T.float32(-math.inf), lanes), [self.everything])
        T.buffer_store(sums, splat(T.float32(0), lanes), [self.everything])
        with T.serial(vectors) as j:
            score = T.bind(scores[row, vector(j * T.int64(lanes), lanes)])
            T.buffer_store(most, tirx.Select(score > most[self.everything], score, most[self.everything]), [self.everything])
        before = T.bind(top[row])
        with T.serial(T.int64(lanes)) as lane:
            T.buffer_store(top, tirx.Select(most[lane] > top[row], most[lane], top[row]), [row])
        # no key seen yet: 0 in place of -inf, whose difference to itself is no number
        base = T.bind(tirx.Select(top[row] == T.float32(-math.inf), T.float32(0), top[row]))
        factor = T.alloc_buffer((lanes,), "float32")
        T.buffer_store(factor, self._exp(splat(before - base, lanes)), [self.everything])
        with T.serial(vectors) as j:
            place = vector(j * T.int64(lanes), lanes)
            T.buffer_store(scores, self._exp(scores[row, place] - splat(base, lanes)), [row, place])
            T.buffer_store(sums, sums[self.everything] + scores[row, place], [self.everything])
        T.buffer_store(shrink, factor[0], [row])
        T.buffer_store(total, total[row] * factor[0], [row])
        with T.serial(T.int64(lanes)) as lane:
            T.buffer_store(total, total[row] + sums[lane], [row])

    def _sums(self, b: Any, kv: Any, scores: Any, start: Any, count: Any, out: Any, shrink: Any) -> None:
        """out[row, e] = out[row, e] * shrink[row] + sum over keys of p[row, key] * v[key, e], e in the order of `_floats`."""
        lanes, parts = self.lanes, self.value_parts
        slabs = [(first * parts, size * parts) for first, size in balanced(self.wide // parts, self.plan.columns // parts)]
        with T.serial(T.int64(self.rows)) as row:
            for edge, columns in slabs:
                places = [T.int64((edge + e) * lanes) for e in range(columns)]
                acc = Accumulators(1, columns, lanes)
                acc.fill(lambda _, e: out[row, vector(places[e], lanes)] * splat(shrink[row], lanes))  # noqa: B023
                with T.serial(count) as j:
                    key = T.bind(start + j)
                    values = [part for place in places[::parts] for part in self._value_floats(b, kv, key, place)]
                    acc.multiply(range(1), lambda _: self._weight(scores[row, j], b, kv, key), values)  # noqa: B023
                for e in range(columns):
                    T.buffer_store(out, acc.load(0, e), [row, vector(places[e], lanes)])

    def _put(self, b: Any, kv: Any, row: Any, out: Any, top: Any, total: Any) -> None:
        """The row's sums divided by its total, in order."""
        lanes, parts = self.lanes, self.value_parts
        h, s = self._query_of(kv, row)
        if self.logsum is not None:
            # as a vector: logarithms of those are expanded
            T.buffer_store(logs := T.alloc_buffer((lanes,), "float32"), splat(top[row], lanes) + T.log(splat(total[row], lanes)), [self.everything])
            T.buffer_store(self.logsum, logs[0], [b, h, s])
        inverse = T.float32(1) / total[row]
        factor = T.bind(tirx.Select(total[row] == T.float32(0), T.float32(0), inverse) if self.core["safe"] else inverse)
        with T.serial(T.int64(self.wide // parts)) as e:
            place = T.bind(e * T.int64(lanes * parts))
            pair = [out[row, vector(place + T.int64(part * lanes), lanes)] * splat(factor, lanes) for part in range(parts)]
            for part in range(parts):
                order = [(lane + part * lanes) // 2 + lane % 2 * lanes for lane in range(lanes)]
                value = pair[0] if parts == 1 else shuffled(pair, order)
                T.buffer_store(self.out, value, list(self._index(3, b, h, s, vector(place + T.int64(part * lanes), lanes))))


def shuffled(pair: list[Any], order: list[int]) -> Any:
    """Lanes of two vectors, those of the second counted on."""
    return tirx.Shuffle(pair, [tirx.const(lane, "int32") for lane in order])
