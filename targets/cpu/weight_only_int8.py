"""Few-bit weights by int8 activations: y = epilogue(x [.., M, K] int8 @ (code - zero) * scale), codes of 1 to 8 bits, a scale (and zero) per group of k and column. Exact in integers in a group:

    for panel in parallel:                               # NR = nv * lanes columns
        for rows in tiles of mr:
            for g in groups:
                for k in group by 32:                    # `bits` words of a column; a word of four k is a shift and a mask of each plane
                    part[i][v] += x[i, k .. k+3] . code[k .. k+3, v]         # vpdpbusd; without VNNI vpmaddubsw, whose sums of 16 bits vpmaddwd widens before they could overflow
                    xs[i] += sum(x[i, k .. k+3])
                total[i][v] += scale[g, v] * float(part[i][v] - zero[g, v] * xs[i])

Codes stay unsigned, as both instructions want one operand, so that nothing is sign-extended. They lie in planes of 8, 4, 2 and 1 bits (`planes`), the fields of a byte of consecutive words of four k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.dialect.weight_only import unpacked
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from ..common.ops_linear import weight_only_operands
from ..common.words import packed_words, planes
from .dot import F32, MADD, VNNI, add_pairs, byte_pairs, fma, integer_dot, splat, vector
from .emit import Accumulators, kernel
from .gemm import Gemm, GemmWorkload, pack_panels
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule, every
from .template import Kernel, Packing
from .weight_only import WeightOnlyWorkload, fields

#: k of a chunk, whose codes are `bits` words, and the largest group whose sums 32 bits hold
CHUNK, MOST = 32, 1 << 16


def words_of(k: int, bits: int) -> int:
    """Words that hold the codes of so many k of a column."""
    chunks, rest = divmod(k, CHUNK)
    return chunks * bits + sum(-(-(-(-rest // 4) * width) // 8) for width, _ in planes(bits))


class IntegerWorkload(WeightOnlyWorkload):
    """A product by few-bit weights whose activations are int8."""

    def __str__(self) -> str:
        return super().__str__().replace("gemm f32", "gemm s8", 1)

    def dense(self) -> GemmWorkload:
        return GemmWorkload(1, self.m, self.k, self.n, False, self.epilogue, "u8s8")

    @property
    def rows(self) -> int:
        """Words of a column that hold a group's codes."""
        return words_of(self.group, self.bits)

    @property
    def weight_bytes(self) -> float:
        return self.n * self.groups * (4 * self.rows + (5 if self.zeros else 4))


class WeightOnlyInt8:
    """See the module."""

    name = "weight_only int8"

    def workload(self, fused: Fused, constants: frozenset[int]) -> IntegerWorkload:
        found = IntegerWorkload(*fields(fused, constants, "int8"))
        if min(found.k, found.group) > MOST:
            raise Unfusable(f"groups of more than {MOST}")
        return found

    def space(self, workload: IntegerWorkload, target: Target) -> Sequence[GemmSchedule]:
        vnni = integer_dot(target) is VNNI
        found = []
        for tiles in every(workload.dense(), target):
            # without VNNI, sums of 16 bits are in registers beside those of 32; totals wait in memory
            busy = tiles.mr * (tiles.nv + 1) * (1 if vnni else 2) + tiles.nv
            if tiles.mc == 0 and busy <= target.vector_registers - 2 and tiles.nv <= 8:
                found.append(tiles)
        return found

    def features(self, workload: IntegerWorkload, schedule: GemmSchedule, target: Target) -> KernelFeatures:
        base = Gemm().features(workload.dense(), schedule, target)
        m, vectors = workload.m or 128, -(-workload.n // schedule.lanes)
        repeats = -(-m // schedule.mr)
        # a shift, a mask and an or of every plane for four k, beside the sums of x and what ends a group
        unpack = repeats * vectors * workload.k / 4 * (3 * len(planes(workload.bits)) - 1) / 2.0
        ends = repeats * workload.groups * vectors * schedule.mr * 4 / 2.0
        return replace(
            base,
            fma_cycles=base.fma_cycles * (1 + 1 / schedule.nv) + unpack + ends,
            latency_cycles=base.latency_cycles + unpack + ends,
            l3_bytes=workload.weight_bytes * repeats,
            dram_bytes=workload.weight_bytes,
        )

    def build(self, fused: Fused, workload: IntegerWorkload, schedule: GemmSchedule, target: Target) -> Kernel:
        packings, dtypes = _packings(fused, workload, schedule.nv * schedule.lanes), {}
        for packing, dtype in zip(packings, ("int32", "float32", "uint8"), strict=False):
            dtypes[packing.param] = dtype
        with kernel(fused, {packing.param: packing.shape for packing in packings}, dtypes=dtypes) as (builder, buffers):
            x, *weights = weight_only_operands(fused)
            rows = list(x.shape[:-1])
            flat = T.decl_buffer((product(rows), x.shape[-1]), "int8", data=buffers[x].data)
            operands = GemmOperands([], rows, T.int64(workload.k), T.int64(workload.n), flat, lambda row: lambda k: (row, k), None, True, F32)
            _Emitter(fused, buffers, workload, schedule, operands, [buffers[buffer] for buffer in weights], target).emit()
        return Kernel(builder.get(), packings)


def _packings(fused: Fused, workload: IntegerWorkload, nr: int) -> tuple[Packing, ...]:
    """Panels of NR columns: codes [panel][group][words][NR], scales and zeros [panel][group][NR]; the scales of signs halved."""
    _, *weights = weight_only_operands(fused)
    panels, groups, bits, group = -(-workload.n // nr), workload.groups, workload.bits, workload.group
    halved = np.float32(0.5 if bits == 1 and not workload.zeros else 1)

    def codes(packed: np.ndarray) -> np.ndarray:
        return pack_panels(in_planes(unpacked(packed, groups * group, bits).reshape(groups, group, -1), bits), nr)

    packs = (codes, lambda scales: pack_panels(scales * halved, nr), lambda zeros: pack_panels(zeros, nr))
    found = []
    for buffer, pack, depth, key in zip(weights, packs, (groups * workload.rows, groups, groups), "csz", strict=False):
        position = fused.param_index(buffer)
        assert position is not None
        found.append(Packing(position, (panels, depth, nr), pack, f"weight_only{bits}i{key}{nr}"))
    return tuple(found)


def in_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes: [groups, k, N] uint8 -> int32 [groups * words, N]: of 32 k (or the rest of a group) the words of every plane, each word with the fields of 8 / width words of four k."""
    groups, k, n = codes.shape
    found = []
    for start in range(0, k, CHUNK):
        chunk = codes[:, start : start + CHUNK]
        quads = -(-chunk.shape[1] // 4)
        for width, low in planes(bits):
            per_word = 8 // width
            words = -(-quads // per_word)
            parts = np.zeros((groups, words * per_word * 4, n), np.uint8)
            parts[:, : chunk.shape[1]] = chunk >> np.uint8(low) & np.uint8((1 << width) - 1)
            parts = parts.reshape(groups, words, per_word, 4, n) << (width * np.arange(per_word, dtype=np.uint8)).reshape(1, 1, -1, 1, 1)
            found.append(packed_words(np.bitwise_or.reduce(parts, axis=2)))
    return np.concatenate(found, axis=1).reshape(-1, n)


class _Emitter(GemmEmitter):
    """A GEMM whose weights are unpacked to bytes in registers."""

    def __init__(
        self,
        fused: Fused,
        buffers: Any,
        workload: IntegerWorkload,
        schedule: GemmSchedule,
        operands: GemmOperands,
        weights: list[Any],
        target: Target,
    ):
        super().__init__(fused, buffers, schedule, operands)
        self.workload, self.vnni = workload, integer_dot(target) is VNNI
        self.codes, self.scales, self.zeros = weights[0], weights[1], (weights[2] if workload.zeros else None)

    def _panel(self, batch: Any, jo: Any) -> Any:
        return None

    def _products(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, nv: int) -> tuple[Any, Accumulators]:
        workload, lanes = self.workload, self.schedule.lanes
        first = T.bind(batch * self.m + row)
        total, part, sums = Accumulators(mr, nv, lanes), Accumulators(mr, nv, lanes, VNNI), Accumulators(mr, 1, lanes, VNNI)
        total.fill()
        whole, rest = divmod(workload.k, workload.group)
        if whole:
            with T.serial(T.int64(whole)) as group:
                self._group(first, jo, group, workload.group, total, part, sums)
        if rest:
            self._group(first, jo, T.int64(whole), rest, total, part, sums)
        return first, total

    def _group(self, first: Any, jo: Any, group: Any, count: int, total: Accumulators, part: Accumulators, sums: Accumulators) -> None:
        """total += the first `count` k of a group."""
        workload, lanes, nv = self.workload, self.schedule.lanes, total.nv
        part.fill()
        sums.fill()
        word, k = T.bind(group * T.int64(workload.rows)), T.bind(group * T.int64(workload.group))
        chunks, rest = divmod(count, CHUNK)
        if chunks:
            with T.serial(T.int64(chunks)) as chunk:
                self._chunk(first, jo, word + chunk * T.int64(workload.bits), k + chunk * T.int64(CHUNK), CHUNK, CHUNK, part, sums)
        if rest:
            packed = min(CHUNK, workload.group - chunks * CHUNK)
            self._chunk(first, jo, word + T.int64(chunks * workload.bits), k + T.int64(chunks * CHUNK), rest, packed, part, sums)
        signs = workload.bits == 1 and self.zeros is None
        for v in range(nv):
            place = (jo, group, vector(T.int64(v * lanes), lanes))
            scale = T.bind(self.scales[place])
            zero = (
                splat(T.int32(1 << max(workload.bits - 1, 0)), lanes) if self.zeros is None else T.bind(T.cast(self.zeros[place], f"int32x{lanes}"))
            )
            for i in range(total.mr):
                value = part.load(i, v)
                # a sign is twice the code less one
                value = value + value - sums.load(i, 0) if signs else value - zero * sums.load(i, 0)
                total.store(i, v, fma(scale, T.cast(value, f"float32x{lanes}"), total.load(i, v), lanes))

    def _chunk(self, first: Any, jo: Any, word: Any, k: Any, count: int, packed: int, part: Accumulators, sums: Accumulators) -> None:
        """part += products, and sums += x, of the first `count` of `packed` k up to a chunk, whose codes begin at a row of the packed panel."""
        lanes, mr, nv, bits, quads = part.lanes, part.mr, part.nv, self.workload.bits, -(-count // 4)
        loaded: dict[tuple[int, int], list[Any]] = {}
        ones = splat(T.int32(0x01010101), lanes)
        # products of bytes that a sum of 16 bits holds
        most = quads if self.vnni or bits == 8 else max(1, 32767 // (2 * 128 * ((1 << bits) - 1)))
        for start in range(0, quads, most):
            short: dict[tuple[int, int], Any] = {}
            for quad in range(start, min(start + most, quads)):
                weights = [T.bind(code) for code in self._codes(jo, word, -(-packed // 4), quad, nv, loaded)]
                for m in range(mr):
                    x = T.bind(splat(self._word(first + m, k + T.int64(4 * quad), min(4, count - 4 * quad)), lanes))
                    for v, (code, into) in enumerate(zip([*weights, ones], [*([part] * nv), sums], strict=True)):
                        column = v if v < nv else 0
                        if self.vnni:
                            into.store(m, column, VNNI.multiply_add(into.load(m, column), code, x, lanes))
                        elif bits == 8 and v < nv:
                            into.store(m, column, _wide(into.load(m, column), code, x, lanes))
                        else:
                            pairs = byte_pairs(code, x, lanes)
                            short[m, v] = T.bind(short[m, v] + pairs if (m, v) in short else pairs)
            for (m, v), pairs in short.items():
                into, column = (part, v) if v < nv else (sums, 0)
                into.store(m, column, add_pairs(into.load(m, column), pairs, lanes))

    def _codes(self, jo: Any, word: Any, quads: int, quad: int, nv: int, loaded: dict[tuple[int, int], list[Any]]) -> list[Any]:
        """Four codes in the bytes of every lane, of every vector of columns. loaded: words that are in registers, by their plane and place in it."""
        lanes, found, start = self.schedule.lanes, [None] * nv, 0
        for width, low in planes(self.workload.bits):
            per_word = 8 // width
            index, place = quad // per_word, width * (quad % per_word) - low
            if (width, index) not in loaded:
                row = word + T.int64(start + index)
                loaded[width, index] = [T.bind(self.codes[jo, row, vector(T.int64(v * lanes), lanes)]) for v in range(nv)]
            mask = splat(T.int32(((1 << width) - 1 << low) * 0x01010101), lanes) if width < 8 else None
            for v, value in enumerate(loaded[width, index]):
                by = splat(T.int32(abs(place)), lanes)
                value = value >> by if place > 0 else value << by if place < 0 else value
                value = value if mask is None else value & mask
                found[v] = value if found[v] is None else found[v] | value
            start += -(-quads // per_word)
        return found

    def _word(self, row: Any, k: Any, count: int) -> Any:
        """The bytes of x from k, zeros behind `count` of them."""
        if count == 4:
            return T.reinterpret("int32", self.a[row, vector(k, 4)])
        parts = [T.cast(T.reinterpret("uint8", self.a[row, k + T.int64(i)]), "int32") << T.int32(8 * i) for i in range(count)]
        word = parts[0]
        for part in parts[1:]:
            word = word | part
        return word


def _wide(acc: Any, codes: Any, x: Any, lanes: int) -> Any:
    """acc + the products of four bytes, u8 x s8, of which those of 8 bits would overflow sums of 16."""
    halves, low, eight = f"int16x{2 * lanes}", splat(T.int32(0x00FF00FF), lanes), splat(T.int16(8), 2 * lanes)
    pairs = T.reinterpret(halves, x)
    acc = MADD.multiply_add(acc, codes & low, (pairs << eight) >> eight, lanes)
    return MADD.multiply_add(acc, (codes >> splat(T.int32(8), lanes)) & low, pairs >> eight, lanes)
