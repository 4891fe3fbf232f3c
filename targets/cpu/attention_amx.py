"""Attention template of bfloat16 by AMX tiles: the loops of `attention` with both products on tiles of 16 rows.

    s[keys][queries] = k @ q^T                  # k as it lies in memory, q^T in words, as the vector kernel has it
    out^T[width][queries] += v^T @ p            # v^T of a block turned once for all tiles of queries of a task, p in words

Queries stay in the lanes of vectors: maxima, exponentials, sums and the rescaling of out^T need no sum across lanes. Tiles of out^T are turned when a tile of queries is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable
from . import amx
from .amx import ROWS, Tiles
from .attention import Attention, AttentionSchedule, AttentionWorkload
from .attention_emit import AttentionEmitter, TileBuffers
from .attention_scores import Panel
from .attention_views import bytes_between_rows
from .dot import BF16, splat, vector
from .emit import kernel
from .template import Kernel

#: elements of bfloat16 in a row of a tile
_STEP = amx.step_elements(BF16)
#: cycles of a vector of scores between the two products: scale, maximum, exponential, sum, and its part of a word
_SOFTMAX = 24.0


class AttentionAmx(Attention):
    """See the module."""

    name = "attention_amx"

    def workload(self, fused: Fused, constants: frozenset[int]) -> AttentionWorkload:
        workload = super().workload(fused, constants)
        if workload.kind != "bf16" or workload.depth % _STEP or workload.width % ROWS:
            raise Unfusable("not in bfloat16, or heads that do not fill tiles")
        if bytes_between_rows(fused, 1) is None:
            raise Unfusable("rows of keys lie apart by a distance known only at run time")
        return workload

    def space(self, workload: AttentionWorkload, target: Target) -> Sequence[AttentionSchedule]:
        if not amx.available(workload.kind, target) or target.lanes() != ROWS:
            raise Unfusable("no tiles on this machine")
        vectors = None if workload.queries is None else -(-workload.queries // ROWS)
        found = []
        for nv, mr in ((1, ROWS), (1, 2 * ROWS), (2, 2 * ROWS)):
            if vectors is not None and nv > vectors:
                continue
            for block, group in itertools.product((64, 128, 256), (1, 4, 12)):
                usual = block == 64 or workload.keys is None or block < 2 * workload.keys
                if usual and (group == 1 or vectors is None or group <= -(-vectors // nv)):
                    found.append(AttentionSchedule(nv, ROWS, mr, ROWS, 1, block, group))
        return found

    def features(self, workload: AttentionWorkload, schedule: AttentionSchedule, target: Target) -> KernelFeatures:
        """The vector kernel's traffic, and cycles of its own."""
        found = super().features(replace(workload, kind="f32"), schedule, target)
        # what the vector kernel multiplies says how many pairs of query and key there are
        pairs = found.flops / 2.0 / (workload.depth + workload.width)
        vectors = pairs / ROWS
        products = vectors * (workload.depth + workload.width) / _STEP
        turned = vectors / schedule.nv / schedule.group * workload.width / ROWS * 2.5
        rescaled = vectors / schedule.block * workload.width * 1.5
        cycles = 2.0 * products + _SOFTMAX * vectors + turned + rescaled
        return replace(
            found, fma_cycles=cycles, latency_cycles=cycles, load_cycles=products, l2_bytes=found.l2_bytes / 2.0, l3_bytes=found.l3_bytes / 2.0
        )

    def build(self, fused: Fused, workload: AttentionWorkload, schedule: AttentionSchedule, target: Target) -> Kernel:
        with kernel(fused, {}, BF16) as (builder, buffers):
            _Emitter(fused, buffers, schedule).emit()
        return Kernel(builder.get())  # pyright: ignore[reportArgumentType]


class _Emitter(AttentionEmitter):
    """State of one kernel; a task has one block of tiles for both products."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: AttentionSchedule):
        super().__init__(fused, buffers, schedule, BF16)
        self.tiles = Tiles(schedule.mr // ROWS, schedule.nv)
        self.between = bytes_between_rows(fused, 1)

    # ---- the parallel loops

    def _alone(self, b: Any, h: Any, tile: Any, statistics: Any) -> None:
        super()._alone(b, h, tile, statistics)
        amx.release()

    def _together(self, b: Any, h: Any, tile: Any, count: Any, statistics: Any) -> None:
        super()._together(b, h, tile, count, statistics)
        amx.release()

    # ---- scores

    def _panel(self, tiles: int, queries: int) -> Panel:
        panel = super()._panel(tiles, queries)
        self.panel_width = queries
        self.memory, self.sums = T.alloc_buffer((16,), "int32"), amx.sums(self.schedule.mr * queries, "float32")
        self.tiles.configure(self.memory)
        return panel

    def _products(self, b: Any, kv: Any, key: Any, panel: Panel, local: Any, size: int, nv: int) -> Callable[[Any, int], Any]:
        tiles, width, used = self.tiles, self.panel_width, -(-size // ROWS)
        if size % ROWS:
            fewer = Tiles(used, self.tiles.columns)
            fewer.configure(self.memory, size - (used - 1) * ROWS)
            tiles = fewer
        for i, v in itertools.product(range(used), range(nv)):
            amx.zero(tiles.c(i, v))
        with T.serial(T.int64(self.depth // _STEP)) as step:
            for i in range(used):
                amx.load(tiles.a(i), self.k[self._index(1, b, kv, key + T.int64(i * ROWS), step * _STEP)], self.between)
            for v in range(nv):
                amx.load(tiles.b(v), panel.words[local, step * ROWS, v * ROWS], 4 * width)
                for i in range(used):
                    amx.multiply(self.dot, tiles.c(i, v), tiles.a(i), tiles.b(v))
        for i, v in itertools.product(range(used), range(nv)):
            amx.store(tiles.c(i, v), self.sums[(i * width + v) * ROWS], 4 * width)
        if size % ROWS:
            self.tiles.configure(self.memory)
        return lambda i, v: self.sums[vector(T.bind(i * T.int64(width) + T.int64(v * ROWS)), ROWS)]

    def _each(self, size: int) -> Iterator[Any]:
        with T.serial(T.int64(size)) as key:
            yield key

    # ---- the product by values

    def _buffers(self, group: int) -> TileBuffers:
        buffers, queries = super()._buffers(group), self.sizes[0] * ROWS
        # flat: TVM makes rows shorter that no statement fills
        values = T.alloc_buffer((self.width * self.mix.words(self.schedule.block),), self.mix.word)
        return replace(buffers, out=T.alloc_buffer((group, self.width, queries), "float32"), values=values)

    def _clear(self, tiles: TileBuffers, local: Any, nv: int) -> None:
        with T.serial(T.int64(self.width)) as e:
            for v in range(nv):
                T.buffer_store(tiles.out, splat(T.float32(0), ROWS), [local, e, vector(T.int64(v * ROWS), ROWS)])

    def _pair_weights(self, weights: Any, scores: Any, count: Any, places: list[Any]) -> None:
        super()._pair_weights(weights, scores, count, places)
        words = T.bind(T.ceildiv(count, T.int64(2)))
        with T.serial(words, T.ceildiv(words, T.int64(ROWS)) * ROWS) as word:
            for place in places:
                T.buffer_store(weights, splat(T.int32(0), ROWS), [word, place])

    def _copy_values(self, values: Any, b: Any, h: Any, start: Any, count: Any) -> None:
        """v^T of one block: pairs of keys side by side, zeros where there are none."""
        kv, everything = self._kv_head(h), vector(T.int64(0), ROWS)
        words = T.bind(T.ceildiv(count, T.int64(2)))
        rows = [T.alloc_buffer((ROWS,), self.mix.word) for _ in range(ROWS)]
        with T.serial(T.ceildiv(words, T.int64(ROWS))) as step, T.serial(T.int64(self.width // ROWS)) as e:
            place = T.bind(e * T.int64(ROWS))
            first = T.bind(step * T.int64(ROWS))
            with T.If((first + ROWS) * 2 <= count):
                with T.Then():
                    for i, row in enumerate(rows):
                        T.buffer_store(row, self._value_words(b, kv, start, first + T.int64(i), 2, place, ROWS), [everything])
                with T.Else():
                    for i, row in enumerate(rows):
                        word = T.bind(first + T.int64(i))
                        with T.If(word * 2 + 1 < count):
                            with T.Then():
                                T.buffer_store(row, self._value_words(b, kv, start, word, 2, place, ROWS), [everything])
                            with T.Else(), T.If(word * 2 < count):
                                with T.Then():
                                    T.buffer_store(row, self._value_words(b, kv, start, word, 1, place, ROWS), [everything])
                                with T.Else():
                                    T.buffer_store(row, splat(T.int32(0), ROWS), [everything])
            for i, column in enumerate(self._transposed(rows)):
                row = (place + T.int64(i)) * T.int64(self.mix.words(self.schedule.block))
                T.buffer_store(values, column[everything], [vector(row + first, ROWS)])

    def _accumulate(self, tiles: TileBuffers, local: Any, value: Callable[[Any, Any], Any], count: Any, queries: int) -> None:
        out, width, nv, block = tiles.out, self.panel_width, queries // ROWS, self.mix.words(self.schedule.block)
        factors = [T.alloc_buffer((ROWS,), "float32") for _ in range(nv)]
        places, everything = [vector(T.int64(v * ROWS), ROWS) for v in range(nv)], vector(T.int64(0), ROWS)
        for factor, place in zip(factors, places, strict=True):
            T.buffer_store(factor, tiles.shrink[place], [everything])
        with T.serial(T.int64(self.width)) as e:
            for factor, place in zip(factors, places, strict=True):
                T.buffer_store(out, out[local, e, place] * factor[everything], [local, e, place])

        def columns(first: Any, rows: int) -> None:
            for i, v in itertools.product(range(rows), range(nv)):
                amx.load(self.tiles.c(i, v), out[local, first + i * ROWS, v * ROWS], 4 * width)
            with T.serial(T.ceildiv(count, T.int64(ROWS))) as step:
                for i in range(rows):
                    amx.load(self.tiles.a(i), tiles.values[(first + i * ROWS) * block + step * ROWS], 4 * block)
                for v in range(nv):
                    amx.load(self.tiles.b(v), tiles.weights[step * ROWS, v * ROWS], 4 * width)
                    for i in range(rows):
                        amx.multiply(self.mix, self.tiles.c(i, v), self.tiles.a(i), self.tiles.b(v))
            for i, v in itertools.product(range(rows), range(nv)):
                amx.store(self.tiles.c(i, v), out[local, first + i * ROWS, v * ROWS], 4 * width)

        whole, rest = divmod(self.width // ROWS, self.tiles.rows)
        if whole:
            with T.serial(T.int64(whole)) as e:
                columns(T.bind(e * T.int64(ROWS * self.tiles.rows)), self.tiles.rows)
        if rest:
            columns(T.int64(whole * self.tiles.rows * ROWS), rest)

    def _result(self, tiles: TileBuffers, local: Any, nv: int) -> Callable[[Any, Any], Any]:
        turned = T.alloc_buffer((nv * ROWS, self.width), "float32")
        everything, rows = vector(T.int64(0), ROWS), [T.alloc_buffer((ROWS,), "int32") for _ in range(ROWS)]
        with T.serial(T.int64(nv)) as v, T.serial(T.int64(self.width // ROWS)) as e:
            for i, row in enumerate(rows):
                part = tiles.out[local, e * T.int64(ROWS) + T.int64(i), vector(v * T.int64(ROWS), ROWS)]
                T.buffer_store(row, T.reinterpret(f"int32x{ROWS}", part), [everything])
            for i, column in enumerate(self._transposed(rows)):
                value = T.reinterpret(f"float32x{ROWS}", column[everything])
                T.buffer_store(turned, value, [v * T.int64(ROWS) + T.int64(i), vector(e * T.int64(ROWS), ROWS)])
        return lambda i, place: turned[i, place]
