"""Weight-only GEMM template: y = epilogue(x [.., M, K] float32 @ (code - zero) * scale), codes of 1 to 8 bits, a scale (and zero) per group of k and column.

Few rows: the codes go from memory to registers and are floats only there,

    for panel in parallel:                               # NR = nv * lanes columns
        for rows in tiles of mr:
            for g in groups:
                for k in group:                          # up to 4 bits: one shift and one table look-up (vpermps) each; other widths: two shifts, or a mask, and a conversion
                    part[i][v] += x[i, k] * float(code[k, v])
                    xs[i] += x[i, k]                     # only with zeros: the sum of (code - zero) x = the sum of code x - zero times the sum of x
                total[i][v] += scale[g, v] * (part[i][v] - zero[g, v] * xs[i])

many rows: a panel is unpacked to float32 once per chunk of rows, which the plain GEMM then multiplies. With M known only at run time the kernel holds both.
Codes are kept signed (code minus half the range), so that sums do not cancel. A column's codes of a group are a string of bits in words of 32, of which few codes lie in two; 8 bits are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.dialect.weight_only import unpacked
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product, static
from ..common.ops_linear import weight_only_operands
from .dot import F32, fma, splat, vector
from .emit import Accumulators, kernel
from .gemm import Gemm, GemmWorkload, pack_panels
from .gemm_emit import GemmEmitter, GemmOperands
from .gemm_schedules import GemmSchedule, every
from .prefetch import passed_once
from .template import Kernel, Packing

#: rows up to which codes are unpacked in registers where M is known only at run time
FEW_ROWS = 8


def rows_of(codes: int, bits: int) -> int:
    """Words, or of 8 bits bytes, that so many codes take."""
    return codes if bits == 8 else -(-codes * bits // 32)


@dataclass(frozen=True)
class WeightOnlyWorkload:
    """M x K x N (M None: known only at run time), codes of `bits` in groups of `group` along k."""

    m: int | None
    k: int
    n: int
    bits: int
    group: int
    zeros: bool
    epilogue: str

    def __str__(self) -> str:
        return f"gemm f32 x int{self.bits} {self.m}x{self.k}x{self.n} group {self.group}{' zeros' if self.zeros else ''}"

    def dense(self) -> GemmWorkload:
        """The float GEMM of the unpacked weights."""
        return GemmWorkload(1, self.m, self.k, self.n, False, self.epilogue)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)

    @property
    def rows(self) -> int:
        """Words (of 8 bits: bytes) of a column that hold a group's codes."""
        return rows_of(self.group, self.bits)

    @property
    def weight_bytes(self) -> float:
        return self.n * self.groups * (self.rows * (1 if self.bits == 8 else 4) + (5 if self.zeros else 4))


def fields(fused: Fused, constants: frozenset[int], dtype: str) -> tuple[int | None, int, int, int, int, bool, str]:
    """Those of the workload of activations of a type; raises Unfusable where it is none."""
    if fused.core["op"] != "weight_only_matmul":
        raise Unfusable("not a product by weights in few bits")
    x, *weights = weight_only_operands(fused)
    if any(fused.param_index(buffer) not in constants for buffer in weights):
        raise Unfusable("weights are not constant")
    if str(x.ty.dtype) != dtype:
        raise Unfusable(f"activations in {x.ty.dtype}")
    k, n, bits, group = static(x.shape[-1]), static(weights[0].shape[1]), fused.core["bits"], fused.core["group"]
    if k is None or n is None:
        raise Unfusable("a run-time K")
    return static(product(x.shape[:-1])), k, n, bits, group, len(weights) == 3, fused.epilogue_text()


@dataclass(frozen=True)
class WeightOnlySchedule:
    """The tiles of a GEMM; panel: weights are unpacked to float32 panels, otherwise in registers."""

    tiles: GemmSchedule
    panel: bool


class WeightOnly:
    """See the module."""

    name = "weight_only"

    def workload(self, fused: Fused, constants: frozenset[int]) -> WeightOnlyWorkload:
        return WeightOnlyWorkload(*fields(fused, constants, "float32"))

    def space(self, workload: WeightOnlyWorkload, target: Target) -> Sequence[WeightOnlySchedule]:
        dense = every(workload.dense(), target)
        found = (
            []
            if workload.m is not None and workload.m < FEW_ROWS
            else [WeightOnlySchedule(tiles, True) for tiles in dense if tiles.nv > 1 or len(dense) < 8]
        )
        if workload.m is not None and workload.m <= 4 * FEW_ROWS:
            # totals wait in memory for the end of a group
            most = target.vector_registers - 4
            fits = [tiles for tiles in dense if tiles.mc == 0 and tiles.mr * (tiles.nv + workload.zeros) + 2 <= most and tiles.nv <= 8]
            found += [WeightOnlySchedule(tiles, False) for tiles in fits]
        return found

    def features(self, workload: WeightOnlyWorkload, schedule: WeightOnlySchedule, target: Target) -> KernelFeatures:
        tiles, steps = schedule.tiles, self._unpack_steps(workload, target)
        base = Gemm().features(workload.dense(), tiles, target)
        m, vectors = workload.m or 128, -(-workload.n // tiles.lanes)
        repeats = -(-m // (tiles.mc or m)) if schedule.panel else -(-m // tiles.mr)
        # unpacking shares the vector ports with the multiply-adds; two of four take each kind
        unpack = float(repeats * vectors * workload.k * (steps + (2 if schedule.panel else 0))) / 2.0
        weights = workload.weight_bytes * repeats
        return replace(
            base,
            fma_cycles=base.fma_cycles + unpack,
            latency_cycles=base.latency_cycles + unpack,
            l2_bytes=base.l2_bytes + (8.0 * workload.k * workload.n * repeats if schedule.panel else 0.0),
            l3_bytes=weights,
            dram_bytes=workload.weight_bytes,
        )

    @staticmethod
    def _unpack_steps(workload: WeightOnlyWorkload, target: Target) -> int:
        """Vector instructions that make one vector of floats from codes."""
        bits = workload.bits
        if bits == 8:
            return 2
        return 2 if bits <= 4 and target.vector_bits == 512 else 3

    def build(self, fused: Fused, workload: WeightOnlyWorkload, schedule: WeightOnlySchedule, target: Target) -> Kernel:
        nr = schedule.tiles.nv * schedule.tiles.lanes
        packings, dtypes = _packings(fused, workload, nr), {}
        for packing, dtype in zip(packings, ("int8" if workload.bits == 8 else "int32", "float32", "int8"), strict=False):
            dtypes[packing.param] = dtype
        with kernel(fused, {packing.param: packing.shape for packing in packings}, dtypes=dtypes) as (builder, buffers):
            x, *weights = weight_only_operands(fused)
            rows = list(x.shape[:-1])
            flat = T.decl_buffer((product(rows), x.shape[-1]), "float32", data=buffers[x].data)
            operands = GemmOperands([], rows, T.int64(workload.k), T.int64(workload.n), flat, lambda row: lambda k: (row, k), None, True, F32)
            _Emitter(fused, buffers, workload, schedule, operands, [buffers[buffer] for buffer in weights], target).emit()
        return Kernel(builder.get(), packings)


def _packings(fused: Fused, workload: WeightOnlyWorkload, nr: int) -> tuple[Packing, ...]:
    """Panels of NR columns: codes [panel][k][NR] int8, or [panel][group][words][NR], bits of codes of k upwards; scales and zeros [panel][group][NR]."""
    _, *weights = weight_only_operands(fused)
    panels, groups, bits, half = -(-workload.n // nr), workload.groups, workload.bits, 1 << (workload.bits - 1)

    def codes(packed: np.ndarray) -> np.ndarray:
        if bits == 8:
            return pack_panels((packed ^ 128).view(np.int8), nr)
        plain = unpacked(packed, groups * workload.group, bits) ^ np.uint8(half)
        return pack_panels(strings(plain.reshape(groups, workload.group, -1), bits), nr)

    def zeros(values: np.ndarray) -> np.ndarray:
        return pack_panels((values.astype(np.int16) - half).astype(np.int8), nr)

    found = []
    for buffer, pack, depth, key in zip(
        weights, (codes, lambda scales: pack_panels(scales, nr), zeros), (groups * workload.rows, groups, groups), "csz", strict=False
    ):
        position = fused.param_index(buffer)
        assert position is not None
        found.append(Packing(position, (panels, depth, nr), pack, f"weight_only{workload.bits}{key}{nr}"))
    return tuple(found)


def strings(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes: [groups, k, N] uint8 -> int32 [groups * words, N]: those of a group one behind the other, the first in the lowest bits."""
    groups, k, n = codes.shape
    words = np.zeros((groups, rows_of(k, bits) + 1, n), np.uint64)
    for i in range(k):
        word, place = divmod(i * bits, 32)
        shifted = codes[:, i].astype(np.uint64) << np.uint64(place)
        words[:, word] |= shifted & np.uint64(0xFFFFFFFF)
        words[:, word + 1] |= shifted >> np.uint64(32)
    return words[:, :-1].astype(np.uint32).reshape(-1, n).view(np.int32)


class _Emitter(GemmEmitter):
    """A GEMM whose weights are unpacked on the way."""

    def __init__(
        self,
        fused: Fused,
        buffers: Any,
        workload: WeightOnlyWorkload,
        schedule: WeightOnlySchedule,
        operands: GemmOperands,
        weights: list[Any],
        target: Target,
    ):
        super().__init__(fused, buffers, schedule.tiles, operands)
        self._codes_once = passed_once(weights[0], target)
        self.workload, self.panel, self.table = workload, schedule.panel, target.vector_bits == 512
        # one bit without zeros is half of a sign
        self.halves = workload.bits == 1 and not workload.zeros
        self.codes, self.scales, self.zeros = weights[0], weights[1], (weights[2] if workload.zeros else None)

    def _panel(self, batch: Any, jo: Any) -> Any:
        return self._unpacked(jo) if self.panel and self.workload.m is not None else None

    def _rows(self, batch: Any, chunk: Any, jo: Any, panel: Any, columns: int, limit: Any) -> None:
        if self.workload.m is not None:
            super()._rows(batch, chunk, jo, panel, columns, limit)
            return
        tiles = self.schedule
        with T.If(self.m <= T.int64(FEW_ROWS)):
            with T.Then():
                self.schedule = replace(tiles, mr=max(1, 16 // tiles.nv) if self.table else max(1, 8 // tiles.nv))
                super()._rows(batch, chunk, jo, None, columns, limit)
                self.schedule = tiles
            with T.Else():
                super()._rows(batch, chunk, jo, self._unpacked(jo), columns, limit)

    # -- codes to floats ---------------------------------------------------------------------------------------------------------------------------

    @property
    def _step(self) -> tuple[int, int]:
        """(codes, words) of a step, which begins and ends with a word."""
        bits = self.workload.bits
        return (1, 1) if bits == 8 else (32 // math.gcd(bits, 32), bits // math.gcd(bits, 32))

    def _steps(self, jo: Any, group: Any, count: int, nv: int, ahead: bool = False) -> Iterator[tuple[Any, list[list[Any]]]]:
        """Emits the loop over the first `count` k of a group, in steps: yields where the body belongs, with the place of the step's first k in the group, and the step's signed codes as
        vectors of float32. ahead: a step asks for as many codes that follow."""
        codes, words = self._step
        steps, rest = divmod(count, codes)
        start = T.bind(group * T.int64(self.workload.rows))
        if steps:
            with T.serial(T.int64(steps)) as step:
                if ahead and self._codes_once is not None:
                    row = jo * self.codes.shape[1] + start + step * T.int64(words)
                    self._codes_once(row * T.int64(self.nr), words * self.nr)
                yield step * T.int64(codes), self._floats(jo, start + step * T.int64(words), codes, nv)
        if rest:
            yield T.int64(steps * codes), self._floats(jo, start + T.int64(steps * words), rest, nv)

    def _floats(self, jo: Any, row: Any, count: int, nv: int) -> list[list[Any]]:
        """The signed codes of `count` k whose first word is in this row of the packed panel: of every k nv vectors of float32."""
        lanes, bits = self.schedule.lanes, self.workload.bits
        words = [
            [T.bind(self.codes[jo, row + i if i else row, vector(T.int64(v * lanes), lanes)]) for v in range(nv)] for i in range(rows_of(count, bits))
        ]
        if bits == 8:
            return [[T.cast(T.cast(value, f"int32x{lanes}"), f"float32x{lanes}") for value in words[0]]]
        found = []
        for i in range(count):
            word, place = divmod(i * bits, 32)
            parts = words[word : word + (1 if place + bits <= 32 else 2)]
            found.append([self._code([part[v] for part in parts], place) for v in range(nv)])
        return found

    def _code(self, words: Sequence[Any], place: int) -> Any:
        """The code that begins at a bit of a vector of words, and may end in a second one. A table look-up takes the low bits of every lane, and its entries recur; without one, codes are
        shifted up and down again."""
        lanes, bits = self.schedule.lanes, self.workload.bits
        by = lambda count: splat(T.int32(count), lanes)  # noqa: E731
        parted = len(words) > 1
        low = T.reinterpret(f"int32x{lanes}", T.reinterpret(f"uint32x{lanes}", words[0]) >> splat(T.uint32(place), lanes)) if parted else None
        if self.table and lanes == 16 and bits <= 4:
            index = low | words[1] << by(32 - place) if parted else words[0] >> by(place) if place else words[0]
            return T.call_llvm_pure_intrin("float32x16", T.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512"), self._table(), index)
        if parted:
            up = low << by(32 - bits) | words[1] << by(64 - place - bits)
        else:
            up = words[0] << by(32 - bits - place) if place + bits < 32 else words[0]
        value = T.cast(up >> by(32 - bits), f"float32x{lanes}")
        return value + splat(T.float32(0.5), lanes) if self.halves else value

    def _table(self) -> Any:
        """The signed codes as float32, by the low four bits of a lane."""
        bits = self.workload.bits
        half = splat(T.int32(1 << (bits - 1)), 16)
        code = T.ramp(T.int32(0), T.int32(1), 16)
        code = code & splat(T.int32((1 << bits) - 1), 16) if bits < 4 else code
        table = T.cast((code ^ half) - half, "float32x16")
        return table + splat(T.float32(0.5), 16) if self.halves else table

    def _row_of(self, source: Any, jo: Any, group: Any, v: int) -> Any:
        """Scales or zeros of a group as a vector."""
        lanes = self.schedule.lanes
        value = source[jo, group, vector(T.int64(v * lanes), lanes)]
        return value if source is self.scales else T.cast(T.cast(value, f"int32x{lanes}"), f"float32x{lanes}")

    def _unpacked(self, jo: Any) -> Any:
        """The panel in float32; a function (k, v) -> vector."""
        workload, lanes = self.workload, self.schedule.lanes
        panel = T.alloc_buffer((T.int64(workload.groups * workload.group), T.int64(self.nr)), "float32")
        with T.serial(T.int64(workload.groups)) as group:
            scales = [T.bind(self._row_of(self.scales, jo, group, v)) for v in range(self.schedule.nv)]
            zeros = [T.bind(self._row_of(self.zeros, jo, group, v)) for v in range(self.schedule.nv)] if workload.zeros else []
            for k, codes in self._steps(jo, group, workload.group, self.schedule.nv):
                for i, vectors in enumerate(codes):
                    for v, code in enumerate(vectors):
                        value = (code - zeros[v] if zeros else code) * scales[v]
                        T.buffer_store(panel, value, [group * T.int64(workload.group) + k + i, vector(T.int64(v * lanes), lanes)])
        return lambda k, v: T.bind(panel[k, vector(T.int64(v * lanes), lanes)])

    # -- few rows --------------------------------------------------------------------------------------------------------------------------------------

    def _products(self, batch: Any, row: Any, mr: int, jo: Any, panel: Any, nv: int) -> tuple[Any, Accumulators]:
        if panel is not None:
            return super()._products(batch, row, mr, jo, panel, nv)
        workload, lanes = self.workload, self.schedule.lanes
        first = T.bind(batch * self.m + row)
        total, part, sums = Accumulators(mr, nv, lanes), Accumulators(mr, nv, lanes), Accumulators(mr, 1, lanes)
        for registers in (total, part, sums) if workload.zeros else (total, part):
            registers.fill()
        whole, rest = divmod(workload.k, workload.group)

        def finish(group: Any) -> None:
            for v in range(nv):
                scale = T.bind(self._row_of(self.scales, jo, group, v))
                zero = T.bind(self._row_of(self.zeros, jo, group, v)) if workload.zeros else None
                for i in range(mr):
                    value = part.load(i, v) if zero is None else part.load(i, v) - zero * sums.load(i, 0)
                    total.store(i, v, fma(scale, value, total.load(i, v), lanes))
            part.fill()
            if workload.zeros:
                sums.fill()

        if whole:
            with T.serial(T.int64(whole)) as group:
                self._group(first, jo, group, workload.group, part, sums)
                finish(group)
        if rest:
            self._group(first, jo, T.int64(whole), rest, part, sums)
            finish(T.int64(whole))
        return first, total

    def _group(self, first: Any, jo: Any, group: Any, count: int, part: Accumulators, sums: Accumulators) -> None:
        """part += x * codes over the first `count` k of a group."""
        workload = self.workload
        start = T.bind(group * T.int64(workload.group))
        for k, codes in self._steps(jo, group, count, part.nv, self._alone):
            for i, vectors in enumerate(codes):
                weights = [T.bind(code) for code in vectors]
                for m in range(part.mr):
                    value = T.bind(splat(self.a[first + m, start + k + i], part.lanes))
                    for v in range(part.nv):
                        part.fma(m, v, value, weights[v])
                    if workload.zeros:
                        sums.store(m, 0, sums.load(m, 0) + value)
