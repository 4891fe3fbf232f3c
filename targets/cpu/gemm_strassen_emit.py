"""Emits the loop nest of `gemm_strassen`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.tvm import T, tirx
from ..common.fused import Fused
from .dot import fma, splat, vector
from .emit import Accumulators, balanced, runs, store_tile, tasks, when, with_columns
from .gemm import GemmWorkload
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule
from .prefetch import LINE, Share, asking, lines_of, prefetch, steps

if TYPE_CHECKING:
    from .gemm_strassen import StrassenSchedule

#: quarters of a matrix, (row, column, sign) each
_Quarters = tuple[tuple[int, int, int], ...]
#: per product, quarters of A and of B that are added up for it, and those of C that it is added to. Of two, the first is positive; those for a single quarter of C come last
PRODUCTS: tuple[tuple[_Quarters, _Quarters, _Quarters], ...] = (
    (((0, 0, 1), (1, 1, 1)), ((0, 0, 1), (1, 1, 1)), ((0, 0, 1), (1, 1, 1))),
    (((1, 0, 1), (1, 1, 1)), ((0, 0, 1),), ((1, 0, 1), (1, 1, -1))),
    (((0, 0, 1),), ((0, 1, 1), (1, 1, -1)), ((0, 1, 1), (1, 1, 1))),
    (((1, 1, 1),), ((1, 0, 1), (0, 0, -1)), ((0, 0, 1), (1, 0, 1))),
    (((0, 0, 1), (0, 1, 1)), ((1, 1, 1),), ((0, 1, 1), (0, 0, -1))),
    (((1, 0, 1), (0, 0, -1)), ((0, 0, 1), (0, 1, 1)), ((1, 1, 1),)),
    (((0, 1, 1), (1, 1, -1)), ((1, 0, 1), (1, 1, 1)), ((0, 0, 1),)),
)
COUNT = len(PRODUCTS)
#: products that are added to two quarters
DOUBLE = sum(len(targets) == 2 for _, _, targets in PRODUCTS)
#: biased exponents between which rows and columns are scaled, and that of infinities and NaN
LOWEST, HIGHEST, _NOT_FINITE = 1, 253, 255


class StrassenEmitter(GemmEmitter):
    """See `gemm_strassen`."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], gemm: GemmWorkload, schedule: StrassenSchedule, operands: GemmOperands, packed: Any):
        """packed: the panels of `operands`, and behind them what columns of A are to be multiplied by."""
        super().__init__(fused, buffers, GemmSchedule(schedule.mr, schedule.nv, schedule.lanes, 0), operands)
        assert gemm.m is not None and gemm.k is not None and gemm.n is not None
        self.count, self.half, self.columns = gemm.m, gemm.k // 2, gemm.n
        self.lanes, self.nv, self.hc, self.kc = schedule.lanes, schedule.nv, schedule.hc, schedule.kc
        self.height, self.pairs, self.blocks = -(-gemm.m // 2), -(-gemm.n // (2 * self.nr)), -(-self.half // schedule.kc)
        self.ahead = lines_of([int(dim) for dim in self.b.shape], self.b)
        self.lead = []
        self.packed, self.behind = packed, int(packed.shape[0]) - gemm.k

    def emit(self) -> None:
        self.terms = T.alloc_buffer((COUNT, self.hc, self.half), "float32")
        self.scales = T.alloc_buffer((2, self.hc), "float32")
        chunks = -(-self.height // self.hc)
        with T.serial(T.int64(chunks)) as chunk:
            # the last chunk ends at the last pair of rows, and leaves to the one before what that one stores
            self.own = T.bind(chunk * self.hc)
            self.start = T.bind(T.min(self.own, T.int64(self.height - self.hc)))
            with tasks(T.int64(self.hc), self.hc * 4 * self.half) as row:
                self._terms(row)
            with tasks(T.int64(self.pairs), self.hc * 4 * self.half * self.columns) as self.pair:
                self._columns_of_pair()

    def _columns_of_pair(self) -> None:
        """What a task computes: the chunk's rows of one pair of panels."""
        self.sums = T.alloc_buffer((4, self.hc, self.nr), "float32")
        self.panels = T.alloc_buffer((COUNT, self.kc, self.nr), "float32")
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
            addresses.append(self.address(T.bind(T.min(self.start + row + side * self.height, T.int64(self.count - 1)))))
        for side, bits in enumerate(self._largest(addresses)):
            exponent, finite = T.bind(T.max(T.min(bits >> 23, T.int32(HIGHEST)), T.int32(LOWEST))), T.bind(bits >> 23 != T.int32(_NOT_FINITE))
            up = T.if_then_else(finite, T.reinterpret("float32", exponent << 23), T.float32(np.nan))
            T.buffer_store(self.scales, up, [T.int64(side), row])
            scales.append(T.bind(T.reinterpret("float32", (T.int32(254) - exponent) << 23)))
            there.append(T.bind(tirx.And(finite, self.start + row + side * self.height < self.count)))

        def write(first: Any, width: int) -> None:
            def quarter(side: int, part: int) -> Any:
                value = self._read(addresses[side], first + part * self.half, width) * splat(scales[side], width)
                return T.bind(tirx.Select(splat(there[side], width), value, splat(T.float32(0), width)))

            quarters = {(side, part): quarter(side, part) for side in range(2) for part in range(2)}
            for s, (terms, _, _) in enumerate(PRODUCTS):
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
        """Elements of a row of A, scaled as rows of B are."""
        *lead, place = address(k)
        return self.a[(*lead, vector(place, width))] * self.packed[vector(self.behind + k, width)]

    # -- products

    def _block(self, last: Any) -> None:
        """All register tiles of one block of K, and behind the last block their results."""
        tiles = balanced(self.hc, self.schedule.mr)
        # all but the first tile ask for all four quarters of what comes next; blocks that steps do not divide would end with a loop of their own
        passes = COUNT * (len(tiles) - 1)
        between = max(step for step in range(1, steps(passes // 4, self.nr) + 1) if self.kc % step == 0)
        for rows, start, count, before in runs(tiles):
            with T.serial(T.int64(count)) as io:
                row = T.bind(io * rows + start)
                with T.serial(T.int64(COUNT)) as s:
                    acc = Accumulators(rows, self.nv, self.lanes)
                    acc.fill()
                    turn = T.bind(((io + (before - 1)) * COUNT + s) * (self.kc // between))
                    with when(io > 0 if before == 0 else None):
                        self._multiply(acc, s, row, lambda k, v: self.panels[s, k, self._at(v)], (turn, between))
                    if before == 0:
                        with T.If(io == 0), T.Then():
                            self._first(acc, s)
                    self._add(acc, s, row)
                with T.If(last), T.Then(), T.serial(T.int64(4)) as quarter:
                    self._result(quarter, row, rows)

    def _first(self, acc: Accumulators, s: Any) -> None:
        """The first register tile of product s, which makes the panel for the others."""

        def quarter(number: int) -> Callable[[Any, int], Any]:
            places = [quarters[min(number, len(quarters) - 1)] for _, quarters, _ in PRODUCTS]
            start = T.bind(self.begin + _digit(s, [part for part, _, _ in places]) * self.half)
            panel = T.bind(2 * self.pair + _digit(s, [side for _, side, _ in places]))
            return lambda k, v: self.b[panel, start + k, self._at(v)]

        first, second = quarter(0), quarter(1)
        sign = _digit(s, [1 + sum(sign for _, _, sign in quarters[1:]) for _, quarters, _ in PRODUCTS])
        made = (lambda k, v: first(k, v) - second(k, v), first, lambda k, v: first(k, v) + second(k, v))
        for number, columns in enumerate(made):
            with T.If(sign == number), T.Then():
                self._multiply(acc, s, T.int64(0), columns, None)

    def _multiply(self, acc: Accumulators, s: Any, row: Any, columns: Callable[[Any, int], Any], own: Share | None) -> None:
        """The products of one register tile. own: what it asks for; the first tile asks for nothing, and keeps the columns."""
        flat = T.decl_buffer((COUNT * self.hc, self.half), "float32", data=self.terms.data)
        after = T.bind(T.if_then_else(s + 1 < COUNT, (s + 1) * self.hc + row, row + acc.mr))

        def ask(line: Any) -> None:
            self._ask(line)
            if own is not None:
                for i in range(acc.mr):
                    prefetch(flat[after + i, self.begin + (line - own[0]) * own[1]], level=2)

        for k in asking(self.size, own, ask):
            values = [T.bind(columns(k, v)) for v in range(self.nv)]
            acc.multiply(range(acc.mr), lambda i: self.terms[s, row + i, self.begin + k], values)  # noqa: B023
            if own is None:
                for v, value in enumerate(values):
                    T.buffer_store(self.panels, value, [s, k, self._at(v)])

    def _add(self, acc: Accumulators, s: Any, row: Any) -> None:
        """Adds the products of a register tile to one quarter of the sums or two."""
        for number in range(2):
            targets = [places[min(number, len(places) - 1)] for _, _, places in PRODUCTS]
            quarter = _digit(s, [2 * side + part for side, part, _ in targets])
            sign = splat(T.cast(_digit(s, [1 + sign for _, _, sign in targets]) - 1, "float32"), self.lanes)
            with when(s < DOUBLE if number else None):
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

    def _result(self, quarter: Any, local: Any, rows: int) -> None:
        """Stores what a register tile has of one quarter."""
        side, panel = T.bind(T.floordiv(quarter, 2)), T.bind(2 * self.pair + T.floormod(quarter, 2))
        # the last panel may be there for the sake of pairs alone
        panels = -(-self.columns // self.nr)
        with when(panel < panels if panels % 2 else None):
            with_columns(panel, self.columns, self.nr, lambda columns: self._store(panel, quarter, side, local, rows, columns))

    def _store(self, panel: Any, quarter: Any, side: Any, local: Any, rows: int, columns: int) -> None:
        own, first = self.start + local, T.bind(self.start + local + side * self.height)
        conditions = []
        if self.height % self.hc:
            conditions.append(lambda i: own + i >= self.own)
        if self.count % 2:
            conditions.append(lambda i: first + i < self.count)
        acc = Accumulators(rows, -(-columns // self.lanes), self.lanes)

        def value(i: int, v: int) -> Any:
            scale = splat(self.scales[side, local + i], self.lanes) * self.b[panel, 2 * self.half, self._at(v)]
            return self.sums[quarter, local + i, self._at(v)] * scale

        acc.fill(value)
        store_tile(
            self.fused,
            self.buffers,
            acc,
            lambda i: self.rows.indices(first + i),
            lambda v: panel * self.nr + v * self.lanes,
            columns,
            inside=(lambda i: functools.reduce(tirx.And, [holds(i) for holds in conditions])) if conditions else None,
        )


def _digit(place: Any, digits: Sequence[int]) -> Any:
    """One of a few numbers of two bits, by a place that is known only at run time."""
    return T.bind((T.int64(sum(digit << 2 * position for position, digit in enumerate(digits))) >> (place * 2)) & T.int64(3))
