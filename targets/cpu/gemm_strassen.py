"""GEMM and 1x1 convolution of float32 in seven products of half the size instead of eight (Strassen, "Gaussian elimination is not optimal", 1969), for constant weights; one level.

    for i in M / 2 in parallel:                      # rows i and M / 2 + i, each over a power of two near its largest number
        terms[7][i][K / 2] = A11 + A22, A21 + A22, A11, A22, A11 + A12, A21 - A11, A12 - A22
    for (chunk, jo) in parallel:                     # hc pairs of rows x one pair of panels of NR = nv * lanes columns
        for ko in K / 2 / kc:
            for io in hc / mr:                       # one register tile: mr x nv accumulators
                for s in 7:
                    panels[s] = sum or difference of two quarters of B[jo] in block ko, or one of them   # by the first tile, beside its multiply-adds
                    acc = terms[s, io, ko] @ panels[s]                       # and every few steps a line of what comes next of A and B is prefetched
                    sums[one or two of C11, C12, C21, C22][io] += or -= acc
                behind the last block of K: C = epilogue(sums[io] * powers of two of the row and of the column)

Rounding: what is added before it is multiplied rounds to the unit of the larger number. So rows of A while running, and columns of B when they are packed, are scaled by powers of two, which is exact, and
sums have errors in proportion to the largest numbers of *their* row and column, two to three times those of the direct product; after Ballard, Benson, Druinsky, Lipshitz and Schwartz, "Improving the
numerical stability of fast matrix multiplication" (2016). A row that holds infinities or NaN is NaN as a whole, and leaves the others alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from .conv_common import ConvWorkload
from .conv_pointwise import ConvPointwise, gemm_of, pixel_reader
from .dot import F32, fma, splat, vector
from .emit import Accumulators, balanced, kernel, store_tile, tasks, when, with_columns
from .gemm import Gemm, GemmWorkload, pack_panels
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule, every
from .prefetch import LINE, Share, asking, lines_of, prefetch, steps
from .template import Kernel, Packing

#: quarters of a matrix, (row, column, sign) each
_Quarters = tuple[tuple[int, int, int], ...]
#: per product, quarters of A and of B that are added up for it, and those of C that it is added to. Of two, the first is positive; those for a single quarter of C come last
_PRODUCTS: tuple[tuple[_Quarters, _Quarters, _Quarters], ...] = (
    (((0, 0, 1), (1, 1, 1)), ((0, 0, 1), (1, 1, 1)), ((0, 0, 1), (1, 1, 1))),
    (((1, 0, 1), (1, 1, 1)), ((0, 0, 1),), ((1, 0, 1), (1, 1, -1))),
    (((0, 0, 1),), ((0, 1, 1), (1, 1, -1)), ((0, 1, 1), (1, 1, 1))),
    (((1, 1, 1),), ((1, 0, 1), (0, 0, -1)), ((0, 0, 1), (1, 0, 1))),
    (((0, 0, 1), (0, 1, 1)), ((1, 1, 1),), ((0, 1, 1), (0, 0, -1))),
    (((1, 0, 1), (0, 0, -1)), ((0, 0, 1), (0, 1, 1)), ((1, 1, 1),)),
    (((0, 1, 1), (1, 1, -1)), ((1, 0, 1), (1, 1, 1)), ((0, 0, 1),)),
)
_COUNT = len(_PRODUCTS)
#: products that are added to two quarters
_DOUBLE = sum(len(targets) == 2 for _, _, targets in _PRODUCTS)
#: pairs of rows and steps of K in a half, at least: with fewer, what is added costs more than is saved
_FEWEST_ROWS, _FEWEST_STEPS = 32, 96
#: pairs of rows in a chunk, at most
_MOST_ROWS = 128
#: steps of a block, at most: numbers that are added up before they are multiplied, and their products, are larger than others, and so is what rounding their sums takes away. Root of the mean
#: square of the error over that of the direct product, K of 768: 1.3 with 128, 2.2 with 384, at one hundredth of the time
_MOST_STEPS = 128
#: vectors of columns in a register tile, at least
_FEWEST_VECTORS = 3
#: cycles beside the products, measured on AMD's Zen 4: of a line of a panel that is added up, of one of sums that is added to, of one of the output, of one of terms; of a register tile
_PANEL, _ADD, _OUTPUT, _TERM, _TILE = 3.0, 2.5, 6.0, 10.0, 30.0
#: biased exponents between which rows and columns are scaled, and that of infinities and NaN
_LOWEST, _HIGHEST, _NOT_FINITE = 1, 253, 255


@dataclass(frozen=True)
class StrassenWorkload:
    """A GEMM; convolution: what it is, if it is a 1x1 convolution."""

    gemm: GemmWorkload
    convolution: ConvWorkload | None = None

    def __str__(self) -> str:
        return str(self.convolution or self.gemm)


@dataclass(frozen=True)
class StrassenSchedule:
    """mr rows x nv vectors of `lanes` columns in registers; hc pairs of rows and one pair of panels a task; kc: steps of half of K in a block."""

    mr: int
    nv: int
    lanes: int
    hc: int
    kc: int


class GemmStrassen:
    """See the module."""

    name = "gemm_strassen"

    def workload(self, fused: Fused, constants: frozenset[int]) -> StrassenWorkload:
        convolution = ConvPointwise().workload(fused, constants) if fused.core["op"] == "conv2d" else None
        gemm = Gemm().workload(fused, constants) if convolution is None else gemm_of(convolution)
        if not gemm.packed or gemm.kind != "f32":
            raise Unfusable("no constant weights in float32")
        if gemm.m is None or gemm.k is None or gemm.k % 2:
            raise Unfusable("the number of rows is not known, or K is odd")
        if gemm.m < 2 * _FEWEST_ROWS or gemm.k < 2 * _FEWEST_STEPS:
            raise Unfusable("halves are too small")
        weights = getattr(constants, "values", {}).get(fused.param_index(fused.inputs[1]), ())
        if not all(np.isfinite(weight).all() for weight in weights):
            raise Unfusable("weights hold infinities or NaN, which sums of quarters would spread")
        return StrassenWorkload(gemm, convolution)

    def space(self, workload: StrassenWorkload, target: Target) -> Sequence[StrassenSchedule]:
        if target.vector_bits < 512 or target.fma_per_cycle >= 2:
            # AVX2: 0.98 to 1.02 of the time; two multiply-adds of 512 bits in a cycle: not measured
            raise Unfusable("additions gain what they save where a core starts one multiply-add of 512 bits in a cycle")
        gemm = workload.gemm
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        height, half = -(-gemm.m // 2), gemm.k // 2
        hc, kc = _equal(height, _MOST_ROWS), _equal(half, _MOST_STEPS)
        # the first register tile holds two vectors that it adds up
        tiles = [tile for tile in every(replace(gemm, m=hc), target) if tile.mc == 0 and tile.nv * (tile.mr + 2) < target.vector_registers]
        tiles = [tile for tile in tiles if tile.nv >= _FEWEST_VECTORS and gemm.n > tile.nv * tile.lanes]
        if not tiles:
            raise Unfusable("one panel of columns")
        return [StrassenSchedule(tile.mr, tile.nv, tile.lanes, hc, kc) for tile in tiles]

    def features(self, workload: StrassenWorkload, schedule: StrassenSchedule, target: Target) -> KernelFeatures:
        gemm, nv, lanes = workload.gemm, schedule.nv, schedule.lanes
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        half, height, pairs = gemm.k // 2, -(-gemm.m // 2), -(-gemm.n // (2 * nv * lanes))
        chunks = -(-height // schedule.hc)
        rows, vectors = chunks * schedule.hc, pairs * nv
        one = Gemm().features(replace(gemm, m=rows, k=half, n=vectors * lanes), GemmSchedule(schedule.mr, nv, lanes, schedule.hc), target)
        blocks = -(-half // schedule.kc)
        more = _COUNT * _PANEL * chunks * half * vectors + (_COUNT + _DOUBLE) * _ADD * blocks * rows * vectors + 4 * _OUTPUT * rows * vectors
        more = (more * lanes + _COUNT * _TERM * height * half) / LINE + _TILE * _COUNT * blocks * pairs * chunks * -(-schedule.hc // schedule.mr)
        return replace(
            one,
            flops=2.0 * gemm.m * gemm.k * gemm.n,
            fma_cycles=_COUNT * one.fma_cycles + more,
            load_cycles=_COUNT * one.load_cycles,
            latency_cycles=_COUNT * one.latency_cycles + more,
            l2_bytes=_COUNT * one.l2_bytes,
            l3_bytes=_COUNT * one.l3_bytes,
            dram_bytes=4.0 * gemm.k * gemm.n,
            tasks=chunks * pairs,
        )

    def build(self, fused: Fused, workload: StrassenWorkload, schedule: StrassenSchedule, target: Target) -> Kernel:
        gemm = workload.gemm
        assert gemm.k is not None and gemm.n is not None
        x, weight = fused.inputs
        position = fused.param_index(weight)
        assert position is not None
        packing = _packing(position, gemm.k, gemm.n, schedule.nv * schedule.lanes)
        with kernel(fused, {position: packing.shape}) as (builder, buffers):
            rows, k = list(fused.output.shape[:-1]), T.int64(gemm.k)
            flat = T.decl_buffer((product(x.shape),), "float32", data=buffers[x].data)
            address = (lambda row: lambda at: (row * k + at,)) if workload.convolution is None else pixel_reader(workload.convolution, x, rows)
            operands = GemmOperands([], rows, k, T.int64(gemm.n), flat, address, buffers[weight], True, F32)
            _Emitter(fused, buffers, gemm, schedule, operands).emit()
        return Kernel(builder.get(), (packing,))


def _equal(count: int, most: int) -> int:
    """The size of as few pieces of at most `most` as `count` takes, as equal as possible."""
    return -(-count // -(-count // most))


def _packing(position: int, k: int, n: int, nr: int) -> Packing:
    """Panels of scaled columns, an even number of them; behind the K rows of each what its columns are to be multiplied by."""
    panels = -(-n // (2 * nr)) * 2

    def pack(weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(k, n)
        exponents = np.clip(np.abs(weight).max(axis=0).astype(np.float32).view(np.int32) >> 23, _LOWEST, _HIGHEST)
        down, up = ((254 - exponents) << 23).view(np.float32), (exponents << 23).view(np.float32)
        packed = np.zeros((panels, k + 1, nr), np.float32)
        made = pack_panels(np.concatenate([weight * down, up[None]]), nr)
        packed[: len(made)] = made
        return packed

    return Packing(position, (panels, k + 1, nr), pack, f"strassen{nr}")


class _Emitter(GemmEmitter):
    """See the module."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], gemm: GemmWorkload, schedule: StrassenSchedule, operands: GemmOperands):
        super().__init__(fused, buffers, GemmSchedule(schedule.mr, schedule.nv, schedule.lanes, 0), operands)
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        self.count, self.half, self.columns = gemm.m, gemm.k // 2, gemm.n
        self.lanes, self.nv, self.hc, self.kc = schedule.lanes, schedule.nv, schedule.hc, schedule.kc
        self.height, self.pairs, self.blocks = -(-gemm.m // 2), -(-gemm.n // (2 * self.nr)), -(-self.half // schedule.kc)
        self.ahead = lines_of([int(dim) for dim in self.b.shape], self.b)
        self.lead = []

    def emit(self) -> None:
        self.terms = T.alloc_buffer((_COUNT, self.height, self.half), "float32")
        self.scales = T.alloc_buffer((2, self.height), "float32")
        with tasks(T.int64(self.height), self.count * 2 * self.half) as row:
            self._terms(row)
        chunks = -(-self.height // self.hc)
        with tasks(T.int64(chunks * self.pairs), self.count * 2 * self.half * self.columns) as task:
            chunk, self.pair = T.bind(T.floordiv(task, self.pairs)), T.bind(T.floormod(task, self.pairs))
            # the last chunk ends at the last pair of rows, and leaves to the one before what that one stores
            self.own = T.bind(chunk * self.hc)
            self.start = T.bind(T.min(self.own, T.int64(self.height - self.hc)))
            self.sums = T.alloc_buffer((4, self.hc, self.nr), "float32")
            self.panels = T.alloc_buffer((_COUNT, self.kc, self.nr), "float32")
            with T.serial(T.int64(4)) as quarter, T.serial(T.int64(self.hc)) as row, T.serial(T.int64(self.nv)) as v:
                T.buffer_store(self.sums, splat(T.float32(0), self.lanes), [quarter, row, self._at(v)])
            with T.serial(T.int64(self.blocks)) as ko:
                self.begin = T.bind(ko * self.kc)
                self.size = T.int64(self.kc) if self.half % self.kc == 0 else T.bind(T.min(T.int64(self.kc), self.half - self.begin))
                last = T.bind(ko + 1 == self.blocks)
                #: the pair and the block of K that come next
                self.next = T.bind(T.if_then_else(last, self.pair + 1, self.pair)), T.bind(T.if_then_else(last, T.int64(0), self.begin + self.kc))
                self._block(last)

    def _at(self, v: Any) -> Any:
        """Index of vector v of a row of a panel."""
        return vector(T.int64(v * self.lanes) if isinstance(v, int) else v * self.lanes, self.lanes)

    # -- rows

    def _terms(self, row: Any) -> None:
        """Scales a pair of rows and writes what the seven products read of it."""
        addresses, scales, there = [], [], []
        for side in range(2):
            addresses.append(self.address(T.bind(T.min(row + side * self.height, T.int64(self.count - 1)))))
        for side, bits in enumerate(self._largest(addresses)):
            exponent, finite = T.bind(T.max(T.min(bits >> 23, T.int32(_HIGHEST)), T.int32(_LOWEST))), T.bind(bits >> 23 != T.int32(_NOT_FINITE))
            up = T.if_then_else(finite, T.reinterpret("float32", exponent << 23), T.float32(np.nan))
            T.buffer_store(self.scales, up, [T.int64(side), row])
            scales.append(T.bind(T.reinterpret("float32", (T.int32(254) - exponent) << 23)))
            there.append(T.bind(tirx.And(finite, row + side * self.height < self.count)))

        def write(first: Any, width: int) -> None:
            def quarter(side: int, part: int) -> Any:
                value = self._read(addresses[side], first + part * self.half, width) * splat(scales[side], width)
                return T.bind(tirx.Select(splat(there[side], width), value, splat(T.float32(0), width)))

            quarters = {(side, part): quarter(side, part) for side in range(2) for part in range(2)}
            for s, (terms, _, _) in enumerate(_PRODUCTS):
                (first_side, first_part, _), *rest = terms
                value = quarters[first_side, first_part]
                for side, part, sign in rest:
                    value = value + quarters[side, part] if sign > 0 else value - quarters[side, part]
                T.buffer_store(self.terms, value, [T.int64(s), row, vector(first, width)])

        self._columns(write)

    def _largest(self, addresses: Sequence[Callable[[Any], tuple[Any, ...]]]) -> list[Any]:
        """Bits of the largest magnitude of each row: those of numbers that are not negative have their order, those of infinities and NaN come last."""
        # four chains of maxima beside one another
        most = {(side, part): T.alloc_buffer((self.lanes,), "int32") for side in range(2) for part in range(2)}
        for buffer in most.values():
            T.buffer_store(buffer, splat(T.int32(0), self.lanes), [vector(T.int64(0), self.lanes)])

        def take(first: Any, width: int) -> None:
            for (side, part), buffer in most.items():
                bits = T.reinterpret("int32" if width == 1 else f"int32x{width}", self._read(addresses[side], first + part * self.half, width))
                at = vector(T.int64(0), width)
                T.buffer_store(buffer, T.max(buffer[at], bits & splat(T.int32(0x7FFFFFFF), width)), [at])

        self._columns(take)
        return [T.bind(functools.reduce(T.max, [most[side, part][lane] for part in range(2) for lane in range(self.lanes)])) for side in range(2)]

    def _columns(self, body: Callable[[Any, int], None]) -> None:
        """`body(first, width)` for half of K, by vectors and what is left one by one."""
        whole, rest = divmod(self.half, self.lanes)
        with T.serial(T.int64(whole)) as step:
            body(step * self.lanes, self.lanes)
        if rest:
            with T.serial(T.int64(rest)) as step:
                body(step + whole * self.lanes, 1)

    def _read(self, address: Callable[[Any], tuple[Any, ...]], k: Any, width: int) -> Any:
        *lead, place = address(k)
        return self.a[(*lead, vector(place, width))]

    # -- products

    def _block(self, last: Any) -> None:
        """All register tiles of one block of K, and behind the last block their results."""
        tiles = balanced(self.hc, self.schedule.mr)
        # all but the first tile ask for all four quarters of what comes next; blocks that steps do not divide would end with a loop of their own
        passes = _COUNT * (len(tiles) - 1)
        between = max(step for step in range(1, steps(passes // 4, self.nr) + 1) if self.kc % step == 0)
        for rows in sorted({length for _, length in tiles}, reverse=True):
            starts = [start for start, length in tiles if length == rows]
            before = sum(start < starts[0] for start, _ in tiles)
            with T.serial(T.int64(len(starts))) as io:
                row = T.bind(io * rows + starts[0])
                with T.serial(T.int64(_COUNT)) as s:
                    acc = Accumulators(rows, self.nv, self.lanes)
                    acc.fill()
                    turn = T.bind(((io + (before - 1)) * _COUNT + s) * (self.kc // between))
                    with when(io > 0 if before == 0 else None):
                        self._multiply(acc, s, row, lambda k, v: self.panels[s, k, self._at(v)], (turn, between))  # noqa: B023
                    if before == 0:
                        with T.If(io == 0), T.Then():
                            self._first(acc, s)
                    self._add(acc, s, row)
                with T.If(last), T.Then():
                    for quarter in range(4):
                        self._result(quarter, row, rows)

    def _first(self, acc: Accumulators, s: Any) -> None:
        """The first register tile of product s, which makes the panel for the others."""

        def quarter(number: int) -> Callable[[Any, int], Any]:
            places = [quarters[min(number, len(quarters) - 1)] for _, quarters, _ in _PRODUCTS]
            start = T.bind(self.begin + _digit(s, [part for part, _, _ in places]) * self.half)
            panel = T.bind(2 * self.pair + _digit(s, [side for _, side, _ in places]))
            return lambda k, v: self.b[panel, start + k, self._at(v)]

        first, second = quarter(0), quarter(1)
        sign = _digit(s, [1 + sum(sign for _, _, sign in quarters[1:]) for _, quarters, _ in _PRODUCTS])
        made = (lambda k, v: first(k, v) - second(k, v), first, lambda k, v: first(k, v) + second(k, v))
        for number, columns in enumerate(made):
            with T.If(sign == number), T.Then():
                self._multiply(acc, s, T.int64(0), columns, None)

    def _multiply(self, acc: Accumulators, s: Any, row: Any, columns: Callable[[Any, int], Any], own: Share | None) -> None:
        """The products of one register tile. own: what it asks for; the first tile asks for nothing, and keeps the columns."""
        first = T.bind(self.start + row)
        flat = T.decl_buffer((_COUNT * self.height, self.half), "float32", data=self.terms.data)
        after = T.bind(T.if_then_else(s + 1 < _COUNT, (s + 1) * self.height + first, first + acc.mr))

        def ask(line: Any) -> None:
            self._ask(line)
            if own is not None:
                for i in range(acc.mr):
                    prefetch(flat[after + i, self.begin + (line - own[0]) * own[1]], level=2)

        for k in asking(self.size, own, ask):
            values = [T.bind(columns(k, v)) for v in range(self.nv)]
            acc.multiply(range(acc.mr), lambda i: self.terms[s, first + i, self.begin + k], values)  # noqa: B023
            if own is None:
                for v, value in enumerate(values):
                    T.buffer_store(self.panels, value, [s, k, self._at(v)])

    def _add(self, acc: Accumulators, s: Any, row: Any) -> None:
        """Adds the products of a register tile to one quarter of the sums or two."""
        for number in range(2):
            targets = [places[min(number, len(places) - 1)] for _, _, places in _PRODUCTS]
            quarter = _digit(s, [2 * side + part for side, part, _ in targets])
            sign = splat(T.cast(_digit(s, [1 + sign for _, _, sign in targets]) - 1, "float32"), self.lanes)
            with when(s < _DOUBLE if number else None):
                for i in range(acc.mr):
                    for v in range(self.nv):
                        place = (quarter, row + i, self._at(v))
                        value = fma(acc.load(i, v), sign, self.sums[place], self.lanes) if number else self.sums[place] + acc.load(i, v)
                        T.buffer_store(self.sums, value, list(place))

    def _ask(self, line: Any) -> None:
        """Asks for a line of the four quarters that come next."""
        lines = self.kc * self.nr // LINE
        quarter = T.bind(T.floordiv(line, lines))
        pair, begin = self.next
        start = begin + T.floordiv(quarter, 2) * self.half
        self.ahead(2 * pair + T.floormod(quarter, 2), start * (self.nr // LINE) + T.floormod(line, lines))

    # -- results

    def _result(self, quarter: int, row: Any, rows: int) -> None:
        """Stores what a register tile has of one quarter."""
        side, part = divmod(quarter, 2)
        panel = T.bind(2 * self.pair + part)
        # the last panel may be there for the sake of pairs alone
        missing = part == 1 and 2 * self.pairs * self.nr - self.columns >= self.nr
        with when(panel < -(-self.columns // self.nr) if missing else None):
            with_columns(panel, self.columns, self.nr, lambda columns: self._store(panel, quarter, side, row, rows, columns))

    def _store(self, panel: Any, quarter: int, side: int, local: Any, rows: int, columns: int) -> None:
        row, limit = T.bind(self.start + local), self.count - side * self.height
        conditions = []
        if self.height % self.hc:
            conditions.append(lambda row: row >= self.own)
        if limit < self.height:
            conditions.append(lambda row: row < limit)
        acc = Accumulators(rows, -(-columns // self.lanes), self.lanes)

        def value(i: int, v: int) -> Any:
            scale = splat(self.scales[side, row + i], self.lanes) * self.b[panel, 2 * self.half, self._at(v)]
            return self.sums[T.int64(quarter), local + i, self._at(v)] * scale

        acc.fill(value)
        store_tile(
            self.fused,
            self.buffers,
            acc,
            lambda i: self.rows.indices(row + side * self.height + i),
            lambda v: panel * self.nr + v * self.lanes,
            columns,
            inside=(lambda i: functools.reduce(tirx.And, [holds(row + i) for holds in conditions])) if conditions else None,
        )


def _digit(place: Any, digits: Sequence[int]) -> Any:
    """One of a few numbers of two bits, by a place that is known only at run time."""
    return T.bind((T.int64(sum(digit << 2 * position for position, digit in enumerate(digits))) >> (place * 2)) & T.int64(3))
