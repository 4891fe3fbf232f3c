"""The operands of the attention template and its tiles of scores; see `attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...compiler.tvm import T, tirx
from ..common.fused import Fused, static
from .attention_views import element, rows_apart
from .attention_window import Window
from .dot import F32, Dot, splat, vector
from .emit import Accumulators
from .math import call_exp_nonpositive
from .ops_attention import sizes
from .prefetch import prefetch

if TYPE_CHECKING:
    from .attention import AttentionSchedule

#: keys from which on rows that lie apart are prefetched: fewer stay in the second-level cache, whose hardware prefetcher does not follow rows over pages
_FAR = 256


@dataclass(frozen=True)
class Panel:
    """q^T of tiles, a tile's number first: [tiles, D / group, queries] words. Of codes also their scales, times that of the scores, and what sums of products begin with: [tiles, queries]."""

    words: Any
    scales: Any = None
    starts: Any = None


class AttentionOperands:
    """What the emitters of all attention kernels read and write; all sizes and positions are int64 expressions."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], lanes: int, dot: Dot):
        self.lanes, self.core, self.dot = lanes, fused.core, dot
        self.q, self.k, self.v = (buffers[buffer] for buffer in fused.inputs[:3])
        further: list[Any] = [buffers.get(buffer) for buffer in fused.inputs[3:]]
        codes = dot.accumulator == "int32"
        #: of the codes of queries and keys, which are multiplied as such; values are not codes
        self.scales: Any = further[:2] if codes else None
        self.mix = F32 if codes else dot
        self.mask = next(iter(further[2:] if codes else further), None)
        outputs = [buffers[param] for param in fused.params if param in buffers][-fused.core["outputs"] :]
        self.out = outputs[0]
        self.received = outputs[1] if fused.core["received"] else None
        self.logsum = outputs[-1] if fused.core.get("logsum") else None
        dims = sizes(fused.core, [buffer.shape for buffer in fused.inputs])
        self.batch, self.queries, self.keys = dims.batch, dims.queries, dims.keys
        self.heads, self.depth, self.width = (int(dim) for dim in (dims.heads, dims.depth, dims.width))
        self.groups = self.heads // int(dims.kv_heads)
        self.wide = -(-self.width // self.lanes)

    def _index(self, operand: int, b: Any, h: Any, s: Any, d: Any) -> tuple[Any, ...]:
        """Indices of q (operand 0), k, v or the output (3)."""
        return element(self.core["rows"][operand], b, h, s, d)

    def _kv_head(self, h: Any) -> Any:
        return h if self.groups == 1 else T.bind(T.floordiv(h, T.int64(self.groups)))

    def _exp(self, x: Any) -> Any:
        return call_exp_nonpositive(x, "float32" if self.lanes == 1 else f"float32x{self.lanes}")


class AttentionScores(AttentionOperands):
    """Tiles of scores; `lane` counts queries within a tile."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: AttentionSchedule, dot: Dot):
        super().__init__(fused, buffers, schedule.lanes, dot)
        self.schedule, self.window = schedule, Window(fused.core, self.lanes)
        #: whether tiles get v in words of its own; whole vectors of floats may be read where they are
        self.copies = schedule.group > 1 or self.width % self.lanes > 0 or self.mix.grouped
        keys = static(self.keys)
        self.ahead = (keys is None or keys >= _FAR) and rows_apart(fused)

    # ---- operands

    def _panel(self, tiles: int, queries: int) -> Panel:
        """Room for so many tiles of so many queries."""
        words = T.alloc_buffer((tiles, self.dot.words(self.depth), queries), self.dot.word)
        if self.scales is None:
            return Panel(words)
        return Panel(words, T.alloc_buffer((tiles, queries), "float32"), T.alloc_buffer((tiles, queries), "int32"))

    def _fill(self, panel: Panel, local: Any, b: Any, h: Any, first: Any, nv: int) -> None:
        """The queries of one tile, scaled if they are floats; beyond the last query it repeats that."""
        lanes, words = self.lanes, self.dot.words(self.depth)
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
                T.buffer_store(panel.words, column[everything], [local, block * T.int64(lanes) + T.int64(i), vector(left, lanes)])
        if edge := words - whole * lanes:
            with T.serial(T.int64(nv * lanes)) as lane, T.serial(T.int64(edge)) as d:
                word = T.bind(d + T.int64(whole * lanes))
                T.buffer_store(panel.words, self._query(b, h, row(lane), word, 1), [local, word, lane])
        if self.scales is None:
            return
        # codes of keys are 128 too large
        with T.serial(T.int64(nv)) as v:
            place = vector(v * T.int64(lanes), lanes)
            T.buffer_store(excess := T.alloc_buffer((lanes,), "int32"), splat(T.int32(0), lanes), [everything])
            with T.serial(T.int64(words)) as word:
                extra = self.dot.multiply_add(excess[everything], splat(T.int32(-0x7F7F7F80), lanes), panel.words[local, word, place], lanes)
                T.buffer_store(excess, extra, [everything])
            T.buffer_store(panel.starts, splat(T.int32(0), lanes) - excess[everything], [local, place])
        with T.serial(T.int64(nv * lanes)) as lane:
            scale = self.scales[0][self._index(0, b, h, row(lane), T.int64(0))[:-1]] * T.float32(float(self.core["scale"]))
            T.buffer_store(panel.scales, scale, [local, lane])

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

    def _score(self, products: Any, panel: Panel, local: Any, key: Callable[[], tuple[Any, ...]], place: Any) -> Any:
        """The scores that sums of products are: those of floats have the scale already."""
        if self.scales is not None:
            factors = panel.scales[local, place] * splat(self.scales[1][key()[:-1]], self.lanes)
            return T.Cast("float32" if self.lanes == 1 else f"float32x{self.lanes}", products) * factors
        return products * splat(T.float32(float(self.core["scale"])), self.lanes) if self.dot.grouped else products

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

    def _ask(self, operand: int, b: Any, h: Any, s: Any) -> None:
        """Prefetch a row of k (operand 1) or v (2); there may be none at s."""
        buffer, dot = ((self.k, self.dot), (self.v, self.mix))[operand - 1]
        for d in range(0, (self.depth, self.width)[operand - 1], 64 // dot.activation_bytes):
            prefetch(buffer[self._index(operand, b, h, s, T.int64(d))])

    # ---- scores

    def _scores(
        self, b: Any, h: Any, first: Any, panel: Panel, local: Any, start: Any, count: Any, nv: int, use: Callable[[Any, Any, int], None]
    ) -> None:
        """Hand the masked scores of keys start..start+count by the queries of a tile to `use(scores, key within the block, vector)`, a tile of mr keys at a time.

        Keys past the last whole tile: a tile moved back to end there, which may see keys twice, so `use` has to be idempotent; or single keys when there are fewer.
        """
        mr, known = self.schedule.mr, static(count)
        kv = self._kv_head(h)

        def tile(offset: Any, size: int) -> None:
            places = [vector(T.int64(v * self.lanes), self.lanes) for v in range(nv)]
            key = T.bind(start + offset)
            if self.ahead:
                for i in range(size):
                    self._ask(1, b, kv, key + T.int64(i + 2 * size))
                    if not self.copies:
                        self._ask(2, b, kv, key + T.int64(i))
            products = self._products(b, kv, key, panel, local, size, nv)

            def finish(hide: bool) -> None:
                for i in self._each(size):
                    for v in range(nv):
                        score = self._score(products(i, v), panel, local, lambda: self._index(1, b, kv, key + i, T.int64(0)), places[v])  # noqa: B023
                        if hide and not self.window.skips:  # a mask is added to what is filled in
                            score = self.window.hidden(score, key + i, first, v)
                        score = self._masked(score, b, h, key + i, first, v)
                        score = self.window.hidden(score, key + i, first, v) if hide and self.window.skips else score
                        plain = self.mask is None and not hide and not self.dot.grouped
                        use(score if plain else T.bind(score), offset + i, v)

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

    def _products(self, b: Any, kv: Any, key: Any, panel: Panel, local: Any, size: int, nv: int) -> Callable[[Any, int], Any]:
        """Emits the sums of `size` keys by the queries of a tile; (key within them, vector) -> sums."""
        acc, dot = Accumulators(size, nv, self.lanes, self.dot), self.dot
        places = [vector(T.int64(v * self.lanes), self.lanes) for v in range(nv)]
        acc.fill(None if panel.starts is None else lambda i, v: panel.starts[local, places[v]])
        with T.serial(T.int64(dot.words(self.depth))) as word:
            columns = [T.bind(panel.words[local, word, place]) for place in places]
            acc.multiply(range(size), lambda i: dot.read(self.k, lambda d: self._index(1, b, kv, key + i, d), word * dot.group), columns)
        return acc.load

    def _each(self, size: int) -> Iterator[Any]:
        """Emits what is done with each of `size` keys: yields its number where that belongs."""
        yield from range(size)

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
