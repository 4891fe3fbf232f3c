"""Depthwise convolution template: one filter per channel, vectors over channels, NHWC, weights as they are [kh, kw, C].

    for (n, row chunk, channel block) in parallel:
        for oh in rows of the chunk:
            for ow in tiles of the row, c in vectors of the block:     # either may be outside
                for kh, kw inside the input:
                    acc[i] += x[oh*s + kh, (ow+i)*s + kw, c] * w[kh, kw, c]      # every x loaded once per kh for all pixels and taps
                y = epilogue(acc)

With `channels_outer` a channel vector's weights stay in L1 while all tiles of a row pass; without, the input is read in its memory order.
The last channel vector overlaps the one before it instead of being partial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable, product, static
from .conv_common import ConvWorkload, Taps, conv_workload, row_chunks, row_taps, row_tiles, unflatten, vector_lanes
from .conv_cost import depthwise_features
from .dot import Dot, dot_for, vector
from .emit import Accumulators, kernel, store_tile, tasks
from .template import Kernel, Packing


@dataclass(frozen=True)
class DepthwiseSchedule:
    """At most `pixels` output columns x one vector of `lanes` channels in registers; `rows` output rows per task (0: all)."""

    pixels: int
    lanes: int
    rows: int
    channels_outer: bool


class ConvDepthwise:
    """See the module."""

    name = "conv_depthwise"

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvWorkload:
        workload = conv_workload(fused, constants)
        if not workload.depthwise:
            raise Unfusable("not depthwise")
        if workload.kind == "bf16":
            raise Unfusable("depthwise in bfloat16: bound by memory")
        if workload.kind != "f32" and workload.ci < 4:
            raise Unfusable("fewer channels than an integer vector has lanes")
        return workload

    def space(self, workload: ConvWorkload, target: Target) -> Sequence[DepthwiseSchedule]:
        lanes = vector_lanes(workload.ci, target)
        # one row of weights, one input and the accumulators share the registers
        most = max(1, min(target.vector_registers - workload.kw - 1, 8, workload.out_w or 8))
        return [
            DepthwiseSchedule(pixels, lanes, rows, outer)
            for pixels in range(max(1, most - 5), most + 1)
            for rows in row_chunks(workload.out_h)
            for outer in (False, True)
        ]

    def features(self, workload: ConvWorkload, schedule: DepthwiseSchedule, target: Target) -> KernelFeatures:
        return depthwise_features(workload, schedule.pixels, schedule.lanes, schedule.rows, schedule.channels_outer, target)

    def build(self, fused: Fused, workload: ConvWorkload, schedule: DepthwiseSchedule, target: Target) -> Kernel:
        dot = dot_for(workload.kind, target)
        packings: tuple[Packing, ...] = ()
        if dot.grouped:
            # one code per word: its product with an activation widened to 32 bit is the only one that is not zero
            w = fused.inputs[1]
            position = fused.param_index(w)
            assert position is not None
            shape = (workload.kh, workload.kw, 1, workload.co)
            packings = (Packing(position, shape, lambda codes: codes.astype(np.int32), "int32"),)
        with kernel(fused, {packing.param: packing.shape for packing in packings}, dot) as (builder, buffers):
            _Emitter(fused, buffers, workload, schedule, dot).emit()
        return Kernel(builder.get(), packings)


class _Emitter:
    """Emits one depthwise convolution; see the module for the loop nest."""

    def __init__(self, fused: Fused, buffers: dict[Any, Any], workload: ConvWorkload, schedule: DepthwiseSchedule, dot: Dot):
        self.fused, self.buffers, self.workload, self.schedule = fused, buffers, workload, schedule
        self.dot = dot
        x, w = fused.inputs
        self.n, self.h, self.w = x.shape[:3]
        self.out_h, self.out_w = fused.output.shape[1:3]
        self.x = T.decl_buffer((product(x.shape),), dot.activation, data=buffers[x].data)
        self.filters = buffers[w]
        self.vectors = -(-workload.ci // schedule.lanes)

    def emit(self) -> None:
        workload = self.workload
        rows = T.int64(self.schedule.rows) if self.schedule.rows else self.out_h
        chunks = T.ceildiv(self.out_h, rows) if self.schedule.rows else T.int64(1)
        n, height, width = workload.sizes()
        with tasks(product([self.n, chunks]), n * height * width * workload.ci * workload.kh * workload.kw) as task:
            batch, chunk = unflatten(task, [self.n, chunks])
            first = T.bind(chunk * rows)
            with T.serial(first, T.min(first + rows, self.out_h)) as oh:
                if self.schedule.channels_outer:
                    with T.serial(T.int64(self.vectors)) as block:
                        self._row(batch, oh, block)
                else:
                    self._row(batch, oh, None)

    def _row(self, n: Any, oh: Any, block: Any) -> None:
        """All tiles of one output row, for one channel vector or (None) for all of them, innermost."""
        taps = row_taps(self.workload, oh, self.h)
        limit = self.schedule.pixels
        if static(self.out_w) is not None:
            for run in row_tiles(self.workload, limit):
                with T.serial(T.int64(run.count)) as tile:
                    ow = T.bind(T.int64(run.first) + tile * T.int64(run.pixels))
                    self._channels(n, oh, ow, block, run.pixels, taps, run.taps)
            return
        workload = self.workload
        everything = (Taps(0, workload.kw, tuple(range(limit))),)
        with T.If(self.out_w >= T.int64(limit)):
            with T.Then(), T.serial(T.ceildiv(self.out_w, T.int64(limit))) as tile:
                # the last tile overlaps the one before it
                ow = T.bind(T.min(tile * T.int64(limit), self.out_w - T.int64(limit)))
                first = T.bind(ow * workload.strides[1] - workload.padding[1])
                reach = (limit - 1) * workload.strides[1] + (workload.kw - 1) * workload.dilation[1]
                with T.If(T.And(first >= T.int64(0), first + T.int64(reach) < self.w)):
                    with T.Then():
                        self._channels(n, oh, ow, block, limit, taps, everything)
                    with T.Else(), T.serial(T.int64(limit)) as i:
                        self._channels(n, oh, ow + i, block, 1, taps, None)
            with T.Else(), T.serial(self.out_w) as ow:
                self._channels(n, oh, ow, block, 1, taps, None)

    def _channels(self, n: Any, oh: Any, ow: Any, block: Any, pixels: int, rows: tuple[Any, Any], taps: tuple[Taps, ...] | None) -> None:
        """The tile at (oh, ow) for one channel vector or all of them. taps: None tests each tap against the input's width."""
        if block is not None:
            self._tile(n, oh, ow, block, pixels, rows, taps)
            return
        with T.serial(T.int64(self.vectors)) as inner:
            self._tile(n, oh, ow, inner, pixels, rows, taps)

    def _tile(self, n: Any, oh: Any, ow: Any, block: Any, pixels: int, rows: tuple[Any, Any], taps: tuple[Taps, ...] | None) -> None:
        workload, lanes = self.workload, self.schedule.lanes
        channel = block * T.int64(lanes)
        if workload.ci % lanes:
            channel = T.min(channel, T.int64(workload.ci - lanes))
        channel = T.bind(channel)
        stride, dilation = workload.strides[1], workload.dilation[1]
        left = T.bind(ow * T.int64(stride) - T.int64(workload.padding[1]))
        acc = Accumulators(pixels, 1, lanes, self.dot)
        acc.fill()
        with T.serial(*rows) as kh:
            row = oh * T.int64(workload.strides[0]) + kh * T.int64(workload.dilation[0]) - T.int64(workload.padding[0])
            base = T.bind(((n * self.h + row) * self.w + left) * T.int64(workload.ci) + channel)

            def load(column: Any) -> Any:
                value = self.x[vector(base + column * T.int64(workload.ci), lanes)]
                return T.bind(T.cast(value, f"int32x{lanes}") if self.dot.grouped else value)

            def filters(tap: Any) -> Any:
                return T.bind(self.filters[kh, tap, T.int64(0), vector(channel, lanes)])

            if taps is None:
                with T.serial(T.int64(workload.kw)) as tap:
                    at = left + tap * T.int64(dilation)
                    with T.If(T.And(at >= T.int64(0), at < self.w)), T.Then():
                        acc.fma(0, 0, load(tap * T.int64(dilation)), filters(tap))
            else:
                users: dict[int, list[tuple[int, int]]] = {}
                for run in taps or ():
                    for tap in range(run.first, run.first + run.count):
                        for i in run.pixels:
                            users.setdefault(i * stride + tap * dilation, []).append((i, tap))
                weights = {tap: filters(T.int64(tap)) for tap in sorted({tap for pairs in users.values() for _, tap in pairs})}
                for column in sorted(users):
                    value = load(T.int64(column))
                    for i, tap in users[column]:
                        acc.fma(i, 0, value, weights[tap])
        store_tile(self.fused, self.buffers, acc, lambda i: [n, oh, ow + i], lambda v: channel, lanes)
