"""Emits the loop nest of attention over codes; see `attention_codes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...compiler.tvm import T
from ..common.fused import Fused
from .attention_few_emit import FewEmitter, shuffled
from .dot import Dot, splat, vector
from .emit import Accumulators, balanced

if TYPE_CHECKING:
    from .attention_codes import CodesWorkload
    from .attention_few import FewSchedule

#: values that are floats at a time where several rows share them: in L1, beside the scores
_CHUNK = 16


class CodesEmitter(FewEmitter):
    """State of one kernel; operands q, k, v, those that `given` names, and a prepared mask."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], schedule: FewSchedule, dot: Dot, workload: CodesWorkload):
        super().__init__(fused, buffers, schedule, dot, workload)
        self.given = dict(zip(fused.core["given"].split(","), (buffers[buffer] for buffer in fused.inputs[3:]), strict=False))
        self.mask = self.given.get("mask")
        self.key_parts, self.value_parts = (8 // bits for bits in workload.bits)
        self.shared = self.rows > 1

    # ---- floats of codes

    def _query_floats(self, b: Any, h: Any, s: Any, d: Any) -> list[Any]:
        lanes = self.lanes
        pair = [T.bind(self.q[self._index(0, b, h, s, vector(d + T.int64(part * lanes), lanes))]) for part in range(self.key_parts)]
        return pair if self.key_parts == 1 else [shuffled(pair, [2 * lane + odd for lane in range(lanes)]) for odd in range(2)]

    def _key_floats(self, b: Any, kv: Any, key: Any, d: Any) -> list[Any]:
        return self._decoded("k", self.key_parts, b, kv, key, d)

    def _value_floats(self, b: Any, kv: Any, key: Any, e: Any) -> list[Any]:
        return self._decoded("v", self.value_parts, b, kv, key, e)

    def _decoded(self, side: str, parts: int, b: Any, kv: Any, key: Any, place: Any) -> list[Any]:
        """code - zero for `parts` vectors of codes from `place` on."""
        lanes, wide = self.lanes, f"int32x{self.lanes}"
        codes = self.k if side == "k" else self.v
        byte = T.bind(T.Cast(wide, codes[b, kv, key, vector(place if parts == 1 else T.floordiv(place, T.int64(2)), lanes)]))
        found = [byte] if parts == 1 else [byte & splat(T.int32(15), lanes), byte >> splat(T.int32(4), lanes)]
        zero = int(self.core[f"{side}_zero"])
        zeros = self.given.get(f"{side}_zeros")
        if zeros is not None or zero:
            shift = splat(T.int32(zero) if zeros is None else T.bind(T.Cast("int32", zeros[b, kv, key])), lanes)
            found = [code - shift for code in found]
        return [T.bind(T.Cast(f"float32x{lanes}", code)) for code in found]

    # ---- scores

    def _keys(self, b: Any, kv: Any, keys: list[Any]) -> list[Callable[[Any], list[Any]]]:
        if not self.shared:
            return super()._keys(b, kv, keys)
        lanes, parts = self.lanes, self.key_parts
        floats = T.alloc_buffer((len(keys), self.depth), "float32")
        for i, key in enumerate(keys):
            with T.serial(T.int64(self.depth // (lanes * parts))) as v:
                d = T.bind(v * T.int64(lanes * parts))
                for part, value in enumerate(self._key_floats(b, kv, key, d)):
                    T.buffer_store(floats, value, [T.int64(i), vector(d + T.int64(part * lanes), lanes)])

        def read(i: int) -> Callable[[Any], list[Any]]:
            return lambda d: [T.bind(floats[T.int64(i), vector(d + T.int64(part * lanes), lanes)]) for part in range(parts)]

        return [read(i) for i in range(len(keys))]

    def _visible(self, score: Any, b: Any, h: Any, s: Any, first: Any, tail: bool) -> Any:
        scales = self.given.get("k_scales")
        if scales is not None:
            kv = self._kv_head(h)
            own = (
                self._lanes_of(lambda i: scales[b, kv, T.min(first + T.int64(i), self.keys - T.int64(1))])
                if tail
                else scales[b, kv, vector(first, self.lanes)]
            )
            score = score * own
        return super()._visible(score, b, h, s, first, tail)

    # ---- sums

    def _weight(self, weight: Any, b: Any, kv: Any, key: Any) -> Any:
        scales = self.given.get("v_scales")
        return weight if scales is None else weight * scales[b, kv, key]

    def _sums(self, b: Any, kv: Any, scores: Any, start: Any, count: Any, out: Any, shrink: Any) -> None:
        if not self.shared:
            super()._sums(b, kv, scores, start, count, out, shrink)
            return
        lanes, parts = self.lanes, self.value_parts
        scales = self.given.get("v_scales")
        floats = T.alloc_buffer((_CHUNK, self.width), "float32")
        slabs = balanced(self.wide, self.plan.columns)
        with T.serial(T.int64(self.rows)) as row, T.serial(T.int64(self.wide)) as e:
            place = vector(e * T.int64(lanes), lanes)
            T.buffer_store(out, out[row, place] * splat(shrink[row], lanes), [row, place])
        with T.serial(T.ceildiv(count, T.int64(_CHUNK))) as index:
            first = T.bind(index * T.int64(_CHUNK))
            here = T.bind(T.min(T.int64(_CHUNK), count - first))
            with T.serial(here) as j:
                key = T.bind(start + first + j)
                scale = None if scales is None else T.bind(splat(scales[b, kv, key], lanes))
                with T.serial(T.int64(self.wide // parts)) as v:
                    e = T.bind(v * T.int64(lanes * parts))
                    for part, value in enumerate(self._value_floats(b, kv, key, e)):
                        T.buffer_store(floats, value if scale is None else value * scale, [j, vector(e + T.int64(part * lanes), lanes)])
            with T.serial(T.int64(self.rows)) as row:
                for edge, columns in slabs:
                    places = [vector(T.int64((edge + e) * lanes), lanes) for e in range(columns)]
                    acc = Accumulators(1, columns, lanes)
                    acc.fill(lambda _, e: out[row, places[e]])  # noqa: B023
                    with T.serial(here) as j:
                        acc.multiply(range(1), lambda _: scores[row, first + j], [T.bind(floats[j, place]) for place in places])
                    for e in range(columns):
                        T.buffer_store(out, acc.load(0, e), [row, places[e]])
