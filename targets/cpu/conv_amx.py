"""k x k convolution by AMX tiles: every task gathers the input of its output pixels, taps side by side, and multiplies that as a GEMM does, see amx_emit.py.

    gathered[pixel][kh][kw * ci] = x[oh * s + kh, ow * s : + kw, :]      # zeros where it is padding; one copy per kh inside of the image

Gathering costs kh * kw * ci bytes of loads and stores a pixel, and a product of as many bytes with 16 outputs a cycle: with 64 output channels about a third of the products' time, with more of them less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T, tirx
from ..base import Target
from ..common.fused import Fused, Unfusable, product
from . import amx, amx_schedules
from .amx_emit import AmxEmitter, Source
from .amx_gather import Gathered, Room, copy_run
from .amx_schedules import AmxSchedule
from .conv_common import ConvWorkload, conv_workload
from .dot import Dot, vector
from .emit import Rows, kernel
from .gemm_amx import copying, named, pack_tiles, tile_dot, tile_kind
from .template import Kernel


@dataclass(frozen=True)
class ConvAmx:
    """See the module."""

    terms: int = 1

    @property
    def name(self) -> str:
        return named("conv_amx", self.terms)

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvWorkload:
        workload = conv_workload(fused, constants)
        if workload.groups > 1:
            raise Unfusable("groups")
        return replace(workload, kind=tile_kind(workload.kind, self.terms))

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[AmxSchedule]:
        if not amx.available(workload.kind, target):
            raise Unfusable("no tiles on this machine")
        rows = _pixels(workload)
        dot = tile_dot(workload.kind)
        return amx_schedules.space(rows, workload.co, amx.steps(self.depth(workload), dot) * amx.ROW_BYTES, True, target, dot.terms)

    def features(self, workload: ConvWorkload, schedule: AmxSchedule, target: Target) -> KernelFeatures:
        n, height, width = workload.sizes()
        dot, k = tile_dot(workload.kind), self.depth(workload)
        run = workload.kw * workload.ci * dot.activation_bytes / amx.ROW_BYTES
        gathering = 8.0 + workload.kh * (6.0 + copying(dot) * run)
        return amx_schedules.features(n * height * width, k, workload.co, schedule, dot, gathering, target)

    def build(self, fused: Fused, workload: ConvWorkload, schedule: AmxSchedule, target: Target) -> Kernel:
        x, w = fused.inputs
        dot, k, position = tile_dot(workload.kind), self.depth(workload), fused.param_index(w)
        assert position is not None
        packing = pack_tiles(position, k, workload.co, schedule, dot, workload.kh)
        with kernel(fused, {position: packing.shape}, dot) as (builder, buffers):
            flat = T.decl_buffer((product(x.shape),), dot.operand, data=buffers[x].data)
            rows, source = self.source(fused, workload, flat, dot)
            AmxEmitter(fused, buffers, schedule, rows, k, workload.co, source, buffers[w], dot).emit()
        return Kernel(builder.get(), (packing,))

    def source(self, fused: Fused, workload: ConvWorkload, x: Any, dot: Dot) -> tuple[list[Any], Source]:
        """The rows of the product by their leading dims, and where they come from. x: all elements of the input in a row."""
        pixels, k = list(fused.output.shape[:3]), self.depth(workload)
        gatherer = _Gatherer(workload, fused.inputs[0].shape, pixels, k, x, dot)
        return pixels, Gathered(gatherer.gather, amx.whole(k, dot), dot)

    def depth(self, workload: ConvWorkload) -> int:
        """Elements that one output is a sum over, with what stands between them."""
        return workload.kh * workload.kw * workload.ci


def _pixels(workload: ConvWorkload) -> int | None:
    sizes = (workload.n, workload.out_h, workload.out_w)
    return None if None in sizes else product([size for size in sizes if size is not None])


class _Gatherer:
    """Copies what an output pixel is computed from, k elements, to a row of its own."""

    def __init__(self, workload: ConvWorkload, shape: Sequence[Any], pixels: list[Any], k: int, x: Any, dot: Dot):
        self.workload, self.shape, self.rows, self.k, self.x, self.dot = workload, shape, Rows(pixels), k, x, dot

    def gather(self, room: Room, slot: Any, row: Any) -> None:
        """Emits one row; zeros fill its last tile."""
        workload, k = self.workload, self.k
        n, oh, ow = self.rows.indices(T.bind(row))
        top, left, bottom, right = workload.padding
        taps, channels = T.int64(workload.kw), workload.ci
        column = T.bind(ow * T.int64(workload.strides[1]) - T.int64(left))
        with T.serial(T.int64(workload.kh)) as kh:
            line = T.bind(oh * T.int64(workload.strides[0]) + kh * T.int64(workload.dilation[0]) - T.int64(top))
            place = T.bind(kh * (taps * T.int64(channels)))
            start = T.bind(((n * self.shape[1] + line) * self.shape[2] + column) * T.int64(channels))

            def tap_by_tap() -> None:
                with T.serial(taps) as tap:
                    step = T.bind(tap * T.int64(workload.dilation[1]))
                    at, into = T.bind(start + step * T.int64(channels)), T.bind(place + tap * T.int64(channels))
                    inside = tirx.And(column + step >= T.int64(0), column + step < self.shape[2])
                    if left or right:
                        self._either(inside, room, slot, into, at, channels)
                    else:
                        self._copy(room, slot, into, at, channels)

            def whole_line() -> None:
                if workload.dilation[1] > 1:
                    tap_by_tap()
                elif left or right:
                    with T.If(tirx.And(column >= T.int64(0), column + taps <= self.shape[2])):
                        with T.Then():
                            self._copy(room, slot, place, start, workload.kw * channels)
                        with T.Else():
                            tap_by_tap()
                else:
                    self._copy(room, slot, place, start, workload.kw * channels)

            if top or bottom:
                with T.If(tirx.And(line >= T.int64(0), line < self.shape[1])):
                    with T.Then():
                        whole_line()
                    with T.Else():
                        copy_run(room, (slot,), place, None, workload.kw * channels)
            else:
                whole_line()
        behind = amx.whole(k, self.dot) - k
        if behind:
            copy_run(room, (slot,), T.int64(k), None, behind)

    def _either(self, inside: Any, room: Room, slot: Any, place: Any, start: Any, count: int) -> None:
        with T.If(inside):
            with T.Then():
                self._copy(room, slot, place, start, count)
            with T.Else():
                copy_run(room, (slot,), place, None, count)

    def _copy(self, room: Room, slot: Any, place: Any, start: Any, count: int) -> None:
        copy_run(room, (slot,), place, lambda first, lanes: self.x[vector(start + first, lanes)], count)
