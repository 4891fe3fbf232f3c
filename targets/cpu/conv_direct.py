"""Direct convolution template: k x k, any stride, dilation, padding and groups, NHWC, weights packed as [panel][kh][kw * ci][NR].

    for (n, row chunk, group, panel) in parallel:        # NR = nv * lanes output channels
        for oh in rows of the chunk:
            for ow in tiles of the row:                  # one register tile: pixels x nv accumulators
                for kh in taps inside the input:         # padding is never read: the range is clipped
                    for r in kw * ci:                    # one contiguous run of the input row where nothing is padded or dilated
                        acc[i][v] += x[oh*s + kh, (ow+i)*s, r] * panel[kh, r, v]
                y = epilogue(acc)

Tiles at the left and right edge drop the taps that fall on padding when the width is static, and test them one by one when it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, product, static
from .conv_common import (
    ConvWorkload,
    RowWords,
    TileRun,
    along_the_width,
    conv_workload,
    pack_conv,
    row_chunks,
    row_taps,
    row_tiles,
    unflatten,
    vector_lanes,
)
from .conv_cost import direct_features
from .dot import dot_for
from .emit import SUM_BLOCK, Accumulators, kernel, register_tiles, store_tile, tasks, with_columns
from .prefetch import Ahead, Share, asking, panels_ahead, share
from .short_sums import with_sums
from .template import Kernel, Packing
from .widen import activations


@dataclass(frozen=True)
class DirectSchedule:
    """At most `pixels` output columns x nv vectors of `lanes` channels in registers; `rows` output rows per task (0: all)."""

    pixels: int
    nv: int
    lanes: int
    rows: int


class ConvDirect:
    """See the module."""

    name = "conv_direct"

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvWorkload:
        workload = conv_workload(fused, constants)
        return with_sums(along_the_width(workload), fused, constants, workload.ci_group)

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[DirectSchedule]:
        lanes = vector_lanes(max(workload.co_group, dot_for(workload.kind, target).min_lanes()), target)
        vectors = -(-workload.co_group // lanes)
        most = workload.out_w or 14
        found = []
        for pixels, nv in register_tiles(target, (1, 2, 3, 4), vectors, dot_for(workload.kind, target)):
            if pixels <= most:
                found += [DirectSchedule(pixels, nv, lanes, rows) for rows in row_chunks(workload.out_h)]
        return found

    def features(self, workload: ConvWorkload, schedule: DirectSchedule, target: Target) -> KernelFeatures:
        return direct_features(workload, schedule.pixels, schedule.nv, schedule.lanes, schedule.rows, target)

    def build(self, fused: Fused, workload: ConvWorkload, schedule: DirectSchedule, target: Target) -> Kernel:
        position = fused.param_index(fused.inputs[1])
        assert position is not None
        nr = schedule.nv * schedule.lanes
        dot = dot_for(workload.kind, target)
        row = RowWords(workload, schedule.pixels, dot)
        shape = (workload.groups * -(-workload.co_group // nr), workload.kh, row.total, nr * dot.parts)
        turned = (workload.kh, workload.kw, workload.ci_group, workload.co)
        # the sections of a row depend on where its tiles end
        key = f"conv{nr}g{workload.groups}{'' if not dot.grouped else dot.name if row.even else f'{dot.name}{row.runs}'}"
        packing = Packing(position, shape, lambda w: pack_conv(w.reshape(turned), workload.groups, nr, row), key)
        with kernel(fused, {position: shape}, dot) as (builder, buffers):
            DirectEmitter(fused, buffers, workload, schedule, row, panels_ahead(shape, buffers[fused.inputs[1]], dot, target)).emit()
        return Kernel(builder.get(), (packing,))


class DirectEmitter:
    """Emits one direct convolution; see the module for the loop nest."""

    def __init__(
        self, fused: Fused, buffers: dict[Any, Any], workload: ConvWorkload, schedule: DirectSchedule, row: RowWords, ahead: Ahead | None = None
    ):
        """ahead: prefetch of packed weights, if they are worth it."""
        # with several taps a panel is more than the cache holds beside another, or so little that LLVM spills in the loops of its edges
        self.row_words, self.dot = row, row.dot
        self.ahead: Any = ahead if workload.kh == workload.kw == 1 else None
        self.fused, self.buffers, self.workload, self.schedule = fused, buffers, workload, schedule
        x, w = fused.inputs
        self.n, self.h, self.w = x.shape[:3]
        self.out_h, self.out_w = fused.output.shape[1:3]
        if workload.turned:
            self.h, self.w, self.out_h, self.out_w = self.w, self.h, self.out_w, self.out_h
        self.x = activations(x, buffers, self.dot, (product(x.shape),))
        self.panels = buffers[w]
        self.nr = schedule.nv * schedule.lanes

    def emit(self) -> None:
        workload, schedule = self.workload, self.schedule
        rows = T.int64(schedule.rows) if schedule.rows else self.out_h
        chunks = T.ceildiv(self.out_h, rows) if schedule.rows else T.int64(1)
        extents = [self.n, chunks, T.int64(workload.groups), T.int64(-(-workload.co_group // self.nr))]
        with tasks(product(extents), _work(workload)) as task:
            n, chunk, group, panel = unflatten(task, extents)

            def body(columns: int) -> None:
                first = T.bind(chunk * rows)
                with T.serial(first, T.min(first + rows, self.out_h)) as oh:
                    self.row(n, oh, oh - first, group, panel, columns)

            with_columns(panel, workload.co_group, self.nr, body)

    def first_sums(self, oh: Any, ow: Any) -> Callable[[int, int], Any] | None:
        """What the sums of a tile from output column ow on begin with, zeros by default."""
        return None

    def row(self, n: Any, oh: Any, before: Any, group: Any, panel: Any, columns: int) -> None:
        """All tiles of one output row, of which the task has had so many before."""
        taps = row_taps(self.workload, oh, self.h)
        limit = self.schedule.pixels
        if static(self.out_w) is not None:
            runs = row_tiles(self.workload, limit)
            row, earlier = sum(run.count for run in runs), 0
            for run in runs:
                with T.serial(T.int64(run.count)) as tile:
                    tile_start = T.int64(run.first) + tile * T.int64(run.pixels)
                    made = _Tile(self, n, oh, T.bind(tile_start), group, panel, run.pixels, columns, taps)
                    made.emit(run, self._share(before * T.int64(row) + (tile + T.int64(earlier)), row))
                earlier += run.count
            return
        with T.If(self.out_w >= T.int64(limit)):
            with T.Then(), T.serial(T.ceildiv(self.out_w, T.int64(limit))) as tile:
                # the last tile overlaps the one before it
                ow = T.bind(T.min(tile * T.int64(limit), self.out_w - T.int64(limit)))
                first = T.bind(ow * self.workload.strides[1] - self.workload.padding[1])
                reach = (limit - 1) * self.workload.strides[1] + (self.workload.kw - 1) * self.workload.dilation[1]
                made = _Tile(self, n, oh, ow, group, panel, limit, columns, taps)
                if any(self.workload.padding[1::2]):
                    with T.If(T.And(first >= T.int64(0), first + T.int64(reach) < self.w)):
                        with T.Then():
                            made.emit(None)
                        with T.Else():
                            made.emit_guarded()
                else:
                    made.emit(None)
            with T.Else(), T.serial(self.out_w) as ow:
                _Tile(self, n, oh, ow, group, panel, 1, columns, taps).emit_guarded()

    def _share(self, tile: Any, row: int) -> Share | None:
        """What a tile, by its number within the task, asks for. row: tiles of a row."""
        rows = self.schedule.rows or static(self.out_h)
        return None if self.ahead is None or rows is None else share(tile, rows * row, self.row_words.total, self.nr)


class _Tile:
    """One register tile: `pixels` output columns from `ow` x `columns` channels of a panel."""

    def __init__(self, kernel: DirectEmitter, n: Any, oh: Any, ow: Any, group: Any, panel: Any, pixels: int, columns: int, taps: tuple[Any, Any]):
        self.kernel, self.workload, self.lanes = kernel, kernel.workload, kernel.schedule.lanes
        self.n, self.oh, self.ow, self.group, self.panel, self.taps = n, oh, ow, group, panel, taps
        self.pixels, self.columns, self.nv = pixels, columns, -(-columns // self.lanes)
        self.share: Share | None = None

    def emit(self, run: TileRun | None, share: Share | None = None) -> None:
        """A tile whose padded taps are known: those of `run`, or none at all. share: of the requests for the next panel."""
        workload, self.share = self.workload, share
        acc, total = self._start()
        everything = tuple(range(self.pixels))
        with T.serial(*self.taps) as kh:
            base = self._input_row(kh)
            for taps in run.taps if run else (None,):
                first, count, pixels = (taps.first, taps.count, taps.pixels) if taps else (0, workload.kw, everything)
                if RowWords.folds(workload):
                    word = T.int64(self.kernel.row_words.start(first, count))
                    self._run(acc, kh, word, count * workload.ci, base + T.int64(first * workload.ci), pixels)
                else:
                    with T.serial(T.int64(count)) as tap:
                        self._tap(acc, kh, tap + T.int64(first), base, pixels)
            if total is not acc:
                total.drain(acc)
        self._finish(total)

    def emit_guarded(self) -> None:
        """A tile whose taps are tested at run time, per pixel where some of them fall on padding."""
        workload = self.workload
        acc, total = self._start()
        everything = tuple(range(self.pixels))
        left = T.bind(self.ow * T.int64(workload.strides[1]) - T.int64(workload.padding[1]))
        with T.serial(*self.taps) as kh:
            base = self._input_row(kh)
            with T.serial(T.int64(workload.kw)) as tap:
                column = T.bind(left + tap * T.int64(workload.dilation[1]))
                last = column + T.int64((self.pixels - 1) * workload.strides[1])
                with T.If(T.And(column >= T.int64(0), last < self.kernel.w)):
                    with T.Then():
                        self._tap(acc, kh, tap, base, everything)
                    if self.pixels > 1:
                        with T.Else():
                            for i in everything:
                                at = column + T.int64(i * workload.strides[1])
                                with T.If(T.And(at >= T.int64(0), at < self.kernel.w)), T.Then():
                                    self._tap(acc, kh, tap, base, (i,))
            if total is not acc:
                total.drain(acc)
        self._finish(total)

    def _start(self) -> tuple[Accumulators, Accumulators]:
        """Registers that products are added to, and those that hold the sums in the end: the same unless float32 would add more than `SUM_BLOCK` products one by one, rows of taps else."""
        workload, dot = self.workload, self.kernel.dot
        acc = Accumulators(self.pixels, self.nv, self.lanes, dot)
        acc.fill(self.kernel.first_sums(self.oh, self.ow))
        if dot.grouped or workload.kh == 1 or workload.kh * workload.kw * workload.ci_group <= SUM_BLOCK:
            return acc, acc
        total = Accumulators(self.pixels, self.nv, self.lanes, dot)
        total.fill()
        return acc, total

    def _input_row(self, kh: Any) -> Any:
        """Offset of the first tap of pixel 0 in the input row that tap row kh reads; may point into the padding left of it."""
        workload = self.workload
        row = self.oh * T.int64(workload.strides[0]) + kh * T.int64(workload.dilation[0]) - T.int64(workload.padding[0])
        column = self.ow * T.int64(workload.strides[1]) - T.int64(workload.padding[1])
        pixel = (self.n * self.kernel.h + row) * self.kernel.w + column
        return T.bind(pixel * T.int64(workload.ci) + self.group * T.int64(workload.ci_group))

    def _tap(self, acc: Accumulators, kh: Any, tap: Any, base: Any, pixels: Sequence[int]) -> None:
        """One horizontal tap: ci_group elements."""
        workload = self.workload
        start = base + tap * T.int64(workload.dilation[1] * workload.ci)
        self._run(acc, kh, self.kernel.row_words.tap(tap), workload.ci_group, start, pixels)

    def _run(self, acc: Accumulators, kh: Any, word: Any, count: int, start: Any, pixels: Sequence[int]) -> None:
        """Consecutive words of the panel from `word` against `count` consecutive input elements from `start`."""
        stride, dot = self.workload.strides[1] * self.workload.ci, self.kernel.dot
        panel = self.panel + self.group * T.int64(-(-self.workload.co_group // self.kernel.nr))
        start = T.bind(start)
        words, rest = divmod(count, dot.group)

        def weights(r: Any) -> list[Any]:
            return [dot.weights(lambda place: self.kernel.panels[panel, kh, word + r, place], self.kernel.nr, v, self.lanes) for v in range(self.nv)]

        def address(i: int) -> Callable[[Any], tuple[Any, ...]]:
            return lambda k: (start + k + T.int64(i * stride),)

        if words:
            for r in asking(T.int64(words), self.share, lambda line: self.kernel.ahead(panel + T.int64(1), line)):
                acc.multiply(pixels, lambda i: dot.read(self.kernel.x, address(i), r * dot.group), weights(r))  # noqa: B023
        if rest:
            acc.multiply(pixels, lambda i: dot.read_part(self.kernel.x, address(i), T.int64(words * dot.group), rest), weights(T.int64(words)))

    def _finish(self, acc: Accumulators) -> None:
        channel = T.bind(self.group * T.int64(self.workload.co_group) + self.panel * T.int64(self.kernel.nr))
        kernel = self.kernel

        def lead(i: Any) -> list[Any]:
            pixel = [self.oh, self.ow + i]
            return [self.n, *(reversed(pixel) if self.workload.turned else pixel)]

        store_tile(kernel.fused, kernel.buffers, acc, lead, lambda v: channel + T.int64(v * self.lanes), self.columns)


def _work(workload: ConvWorkload) -> int:
    n, height, width = workload.sizes()
    return n * height * width * workload.co * workload.kh * workload.kw * workload.ci_group
