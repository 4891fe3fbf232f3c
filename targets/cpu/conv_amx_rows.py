"""k x k convolution by AMX tiles that read windows where they are: the pixels of a padded image, numbered through, are rows of a product.

    padded[phase][i][W'] = input rows phase + i * s of those that the task needs, zeros around them     # the input itself where nothing is padded and s = 1; W' = padded width, whole strides
    out[oh * W' / s + ow] = sum over kh of padded[kh % s][oh + kh / s][ow * s : + kw, :] @ weights[kh]

Consecutive rows of the product lie s * ci elements apart, over the ends of image rows, too: the last columns of every line are computed for nothing and not stored. A gather
(conv_amx.py) would copy every input kh * kw times; here it is copied once. Runs of kw * ci elements that are not whole tiles go on into the next pixels, which codes multiply by zero weights;
numbers that may be infinite cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable
from . import amx, amx_schedules
from .amx_emit import Source
from .amx_gather import Room, apart, copy_run, stored_type
from .amx_schedules import AmxSchedule
from .conv_amx import ConvAmx
from .conv_common import ConvWorkload
from .dot import Dot, vector
from .emit import when
from .gemm_amx import copying, named, tile_dot


class ConvAmxRows(ConvAmx):
    """See the module; a schedule's `mc` is a multiple of W'."""

    @property
    def name(self) -> str:
        return named("conv_amx_rows", self.terms)

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvWorkload:
        workload = super().workload(fused, constants)
        if None in (workload.n, workload.h, workload.w):
            raise Unfusable("an image of a size known only at run time")
        if workload.dilation != (1, 1) or workload.kh == workload.kw == 1:
            raise Unfusable("dilation, or no window")
        if workload.strides[0] > workload.kh or workload.strides[1] > workload.kw:
            raise Unfusable("pixels between windows")
        dot = tile_dot(workload.kind)
        whole = _run(workload, dot) == workload.kw * workload.ci
        if not whole and dot.accumulator != "int32":
            raise Unfusable("a row of the window is not whole tiles")
        if whole and workload.strides != (1, 1):
            # every input is in few windows, and rows that are whole lines come faster: gathered ones took 0.88 to 0.92 of the time, ResNet-50's 3x3
            raise Unfusable("strides")
        return workload

    def depth(self, workload: ConvWorkload) -> int:
        return workload.kh * _run(workload, tile_dot(workload.kind))

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[AmxSchedule]:
        if not amx.available(workload.kind, target):
            raise Unfusable("no tiles on this machine")
        height, width, rows = _size(workload.out_h), _wide(workload), _rows(workload)
        dot = tile_dot(workload.kind)
        steps = amx.steps(self.depth(workload), dot)
        found = []
        for tiles in amx.shapes(rows, workload.co):
            panels = -(-workload.co // (amx.ROWS * tiles.columns))
            for lines in (lines for lines in range(1, height + 1) if height % lines == 0 and (lines == height or lines * width >= 48)):
                groups = sorted({0, *(p for p in (2, 4, 8) if p < panels)})
                found += [
                    AmxSchedule(tiles, lines * width, each, slices)
                    for each in groups
                    for slices in amx_schedules.depths(tiles, lines * width, steps, dot.terms)
                ]
        return found

    def features(self, workload: ConvWorkload, schedule: AmxSchedule, target: Target) -> KernelFeatures:
        dot, lines = tile_dot(workload.kind), schedule.mc // _wide(workload)
        pixel = workload.strides[1] * workload.ci * dot.activation_bytes
        copied = (0.5 + copying(dot) * pixel / amx.ROW_BYTES) * _lines(workload, lines) / lines if _copies(workload, dot) else 0.0
        own = float(dot.terms * pixel * workload.strides[0])
        return amx_schedules.features(_rows(workload), self.depth(workload), workload.co, schedule, dot, copied, target, own)

    def source(self, fused: Fused, workload: ConvWorkload, x: Any, dot: Dot) -> tuple[list[Any], Source]:
        return [*fused.output.shape[:2], T.int64(_wide(workload))], _Windows(workload, x, dot)


@dataclass(frozen=True)
class _Windows:
    """Rows of a padded image; see `amx_emit.Source`."""

    workload: ConvWorkload
    x: Any
    dot: Dot

    def prepare(self, first: Any, size: Any, most: Any) -> tuple[Callable[[Any, Any, int], Any], int]:
        workload, wide, channels = self.workload, _wide(self.workload), self.workload.ci
        height, pixel = _size(workload.out_h), workload.strides[1] * channels
        run, stride = _run(workload, self.dot), workload.strides[0]
        line = T.bind(T.floordiv(first, T.int64(wide)))
        image, begin = T.bind(T.floordiv(line, T.int64(height))), T.bind(T.floormod(line, T.int64(height)))
        # lines of a phase: those a stride apart
        each = int(most) // wide - 1 + -(-workload.kh // stride)

        def element(buffer: Any, start: Any, plane: int = 0) -> Callable[[Any, Any, int], Any]:
            """The first of a window's elements from k on, which is a multiple of a tile's row."""

            def address(row: Any, k: Any, term: int) -> Any:
                kh = T.floordiv(k, T.int64(run))
                tap = kh if stride == 1 else T.floormod(kh, T.int64(stride)) * each + T.floordiv(kh, T.int64(stride))
                return buffer[start + term * plane + (row + tap * wide) * pixel + T.floormod(k, T.int64(run))]

            return address

        pitch = pixel * self.dot.activation_bytes
        if not _copies(workload, self.dot):
            start = T.bind((image * T.int64(_size(workload.h)) + begin) * T.int64(wide * channels))
            return element(self.x, start), pitch
        lines, size = _lines(workload, int(most) // wide), stride * each * wide * pixel
        # what the last window reads behind the last line
        behind = max(0, run - pixel)
        plane = apart(size + behind, self.dot)
        padded = Room(T.alloc_buffer((self.dot.terms * plane,), stored_type(self.dot)), plane, self.dot)
        for phase in range(stride):
            with T.serial(T.int64(-(-(lines - phase) // stride))) as here:
                place = (here + T.int64(phase * each)) * T.int64(wide * pixel)
                self._line(padded, place, image, T.bind(begin * stride + here * stride + T.int64(phase - workload.padding[0])))
        copy_run(padded, (), T.int64(size), None, behind)
        return element(padded.buffer, T.int64(0), plane), pitch

    def _line(self, padded: Room, place: Any, image: Any, line: Any) -> None:
        """One line of the padded image."""
        workload, channels = self.workload, self.workload.ci
        height, width = _size(workload.h), _size(workload.w)
        whole = _wide(workload) * workload.strides[1] * channels
        inside = tirx.And(line >= T.int64(0), line < T.int64(height)) if workload.padding[0] or workload.padding[2] else None
        start = T.bind((image * T.int64(height) + line) * T.int64(width * channels))
        left = workload.padding[1] * channels
        right = whole - left - width * channels
        with when(inside):
            copy_run(padded, (), place, None, left)
            copy_run(padded, (), place + T.int64(left), lambda first, lanes: self.x[vector(start + first, lanes)], width * channels)
            copy_run(padded, (), place + T.int64(left + width * channels), None, right)
        if inside is not None:
            with when(tirx.Not(inside)):
                copy_run(padded, (), place, None, whole)

    def inside(self, lead: Sequence[Any]) -> Any:
        return lead[2] < T.int64(_size(self.workload.out_w))


def _copies(workload: ConvWorkload, dot: Dot) -> bool:
    """Whether windows are not read in the input itself: nor does anybody read behind its end."""
    return dot.terms > 1 or any(workload.padding) or workload.strides != (1, 1) or _run(workload, dot) > workload.kw * workload.ci


def _size(size: int | None) -> int:
    assert size is not None
    return size


def _run(workload: ConvWorkload, dot: Dot) -> int:
    """Elements of a row of the window, in whole tiles."""
    return amx.whole(workload.kw * workload.ci, dot)


def _wide(workload: ConvWorkload) -> int:
    """Rows of the product for a line: strides in its pixels with what is padded left and right."""
    return -(-(_size(workload.w) + workload.padding[1] + workload.padding[3]) // workload.strides[1])


def _lines(workload: ConvWorkload, lines: int) -> int:
    """Padded lines of the input that so many of the output are made from."""
    return (lines - 1) * workload.strides[0] + workload.kh


def _rows(workload: ConvWorkload) -> int:
    """Rows of the product, those that are not stored included."""
    return _size(workload.n) * _size(workload.out_h) * _wide(workload)
