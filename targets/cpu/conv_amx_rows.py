"""k x k convolution of stride 1 by AMX tiles that read windows where they are: the pixels of a padded image, numbered through, are rows of a product.

    padded[rows + kh - 1][W'][ci] = input rows of the task, zeros around them   # the input itself where nothing is padded; W' = W + padding
    out[oh * W' + ow] = sum over kh of padded[(oh + kh) * W' + ow : ... + kw, :] @ weights[kh]

Consecutive rows of the product lie ci elements apart, over the ends of image rows, too: the last kw - 1 columns of every W' are computed for nothing and not stored. A gather
(conv_amx.py) would copy every input kh * kw times; here it is copied once. Runs of kw * ci elements have to be whole tiles.
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
from .conv_amx import ConvAmx, depth
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
        if workload.strides != (1, 1) or workload.dilation != (1, 1) or workload.kh == workload.kw == 1:
            raise Unfusable("strides, dilation, or no window")
        if workload.kw * workload.ci % amx.step_elements(tile_dot(workload.kind)):
            raise Unfusable("a row of the window is not whole tiles")
        return workload

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[AmxSchedule]:
        if not amx.available(workload.kind, target):
            raise Unfusable("no tiles on this machine")
        height, width, rows = _size(workload.out_h), _wide(workload), _rows(workload)
        dot = tile_dot(workload.kind)
        steps = amx.steps(depth(workload), dot)
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
        pixel = workload.ci * dot.activation_bytes
        copied = (0.5 + copying(dot) * pixel / amx.ROW_BYTES) * (lines + workload.kh - 1) / lines if _copies(workload, dot) else 0.0
        return amx_schedules.features(_rows(workload), depth(workload), workload.co, schedule, dot, copied, target, float(dot.terms * pixel))

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
        height, pitch = _size(workload.out_h), channels * self.dot.activation_bytes
        run = workload.kw * channels
        line = T.bind(T.floordiv(first, T.int64(wide)))
        image, begin = T.bind(T.floordiv(line, T.int64(height))), T.bind(T.floormod(line, T.int64(height)))

        def element(buffer: Any, start: Any, plane: int = 0) -> Callable[[Any, Any, int], Any]:
            """The first of a window's elements from k on, which is a multiple of a tile's row."""
            return lambda row, k, term: buffer[
                start + term * plane + (row + T.floordiv(k, T.int64(run)) * wide) * channels + T.floormod(k, T.int64(run))
            ]

        if not _copies(workload, self.dot):
            start = T.bind((image * T.int64(_size(workload.h)) + begin) * T.int64(wide * channels))
            return element(self.x, start), pitch
        lines = int(most) // wide + workload.kh - 1
        # rows behind the last line's end are multiplied, too
        pixels = lines * wide + workload.kw - 1
        plane = apart(pixels * channels, self.dot)
        padded = Room(T.alloc_buffer((self.dot.terms * plane,), stored_type(self.dot)), plane, self.dot)
        with T.serial(T.int64(lines)) as here:
            self._line(padded, here * T.int64(wide * channels), image, T.bind(begin + here - T.int64(workload.padding[0])))
        copy_run(padded, (), T.int64(lines * wide * channels), None, (workload.kw - 1) * channels)
        return element(padded.buffer, T.int64(0), plane), pitch

    def _line(self, padded: Room, place: Any, image: Any, line: Any) -> None:
        """One line of the padded image."""
        workload, channels = self.workload, self.workload.ci
        height, width = _size(workload.h), _size(workload.w)
        inside = tirx.And(line >= T.int64(0), line < T.int64(height)) if workload.padding[0] or workload.padding[2] else None
        start = T.bind((image * T.int64(height) + line) * T.int64(width * channels))
        left, right = workload.padding[1] * channels, workload.padding[3] * channels
        with when(inside):
            copy_run(padded, (), place, None, left)
            copy_run(padded, (), place + T.int64(left), lambda first, lanes: self.x[vector(start + first, lanes)], width * channels)
            copy_run(padded, (), place + T.int64(left + width * channels), None, right)
        if inside is not None:
            with when(tirx.Not(inside)):
                copy_run(padded, (), place, None, _wide(workload) * channels)

    def inside(self, lead: Sequence[Any]) -> Any:
        return lead[2] < T.int64(_size(self.workload.out_w))


def _copies(workload: ConvWorkload, dot: Dot) -> bool:
    """Whether windows are not read in the input itself."""
    return dot.terms > 1 or any(workload.padding)


def _size(size: int | None) -> int:
    assert size is not None
    return size


def _wide(workload: ConvWorkload) -> int:
    """Pixels of a line with what is padded left and right."""
    return _size(workload.w) + workload.padding[1] + workload.padding[3]


def _rows(workload: ConvWorkload) -> int:
    """Rows of the product, those that are not stored included."""
    return _size(workload.n) * _size(workload.out_h) * _wide(workload)
