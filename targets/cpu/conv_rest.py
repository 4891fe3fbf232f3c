"""Direct convolution of u8 x s8 by `vpmaddubsw` for weights that it would saturate with: the split of `gemm_rest.py`, W = fit + rest, for k x k taps.

for rows in parallel:                           # words of 4 channels, pixels innermost, one plane per phase of the stride; padding is zeros
    words[row, phase, ci / 4, :] = x[row, phase + stride * :, ci .. ci + 4]
for (n, panel, block of output rows) in parallel:
    for co in panel:
        for p in pointers[co] .. pointers[co + 1]:          # the words of rest[:, co] that are not zero; places[p] leads to the pixels under that tap
            sums[co, rows, pixels] += words[places[p] + rows, pixels] * values[p]
    the direct template's tiles for the rows, which begin with those sums
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...autotune.cost_model import KernelFeatures
from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Fused, Unfusable
from .conv_common import ConvWorkload, RowWords, pack_conv, unflatten
from .conv_cost import direct_features
from .conv_direct import ConvDirect, DirectEmitter, DirectSchedule
from .dot import PAIRS, WIDE, dot_for, splat, vector
from .emit import Accumulators, tasks, with_columns
from .short_sums import fitting
from .sparse_columns import transpose
from .sparse_emit import StreamBuffers, sparse_kernel
from .sparse_weights import compress, group_mask
from .template import Kernel, Packing

#: vectors of pixels whose sums one word of the rest is multiplied into, at most
_VECTORS = 8
#: weights that are split to see how much is left, those of the other call sites resemble them
_SAMPLES = 3


@dataclass(frozen=True)
class ConvRestWorkload:
    """A direct convolution by pairs; rest: nonzero words of 4 consecutive channels of a tap by one output / all of them."""

    conv: ConvWorkload
    rest: float

    def __str__(self) -> str:
        return f"{self.conv} rest {self.rest:.3f}".replace(PAIRS.kind, f"{PAIRS.kind}+rest")


@dataclass(frozen=True)
class _Planes:
    """How the input lies in words, and how its pixels are cut for the rest: `parts` runs of `vectors` vectors in a row, `rows` output rows at once."""

    conv: ConvWorkload
    lanes: int

    @property
    def parts(self) -> int:
        return -(-self._row // _VECTORS)

    @property
    def vectors(self) -> int:
        return -(-self._row // self.parts)

    @property
    def rows(self) -> int:
        return 1 if self.parts > 1 else min(_VECTORS // self.vectors, self.conv.sizes()[1])

    @property
    def _row(self) -> int:
        return -(-self.conv.sizes()[2] // self.lanes)

    @property
    def width(self) -> int:
        """Words of a plane's row: all vectors of output pixels under the last tap."""
        return self.parts * self.vectors * self.lanes + (self.conv.kw - 1) * self.conv.dilation[1] // self.conv.strides[1]

    @property
    def height(self) -> int:
        return (self.conv.sizes()[1] - 1) * self.conv.strides[0] + (self.conv.kh - 1) * self.conv.dilation[0] + 1

    @property
    def row_words(self) -> int:
        """Words of an input row: its phases, their channels."""
        return self.conv.strides[1] * (self.conv.ci // 4) * self.width

    def places(self, k: np.ndarray) -> np.ndarray:
        """Where the words of a tap and its channels from k = (kh, kw, ci) on begin, from those of an output row's first input row."""
        tap, channel = np.divmod(k, self.conv.ci)
        kh, kw = np.divmod(tap, self.conv.kw)
        shift, phase = np.divmod(kw * self.conv.dilation[1], self.conv.strides[1])
        return kh * self.conv.dilation[0] * self.row_words + (phase * (self.conv.ci // 4) + channel // 4) * self.width + shift


class ConvRest:
    """See the module."""

    name = "conv_rest"

    def workload(self, fused: Fused, constants: frozenset[int]) -> ConvRestWorkload:
        conv = ConvDirect().workload(fused, constants)
        if conv.kind != WIDE.kind or conv.kh * conv.kw == 1:
            raise Unfusable("no weights of 8 bits, all pairs of them fit 16 bits, or a 1x1 convolution")
        values = getattr(constants, "values", {}).get(fused.param_index(fused.inputs[1]), ())
        if not values or None in (conv.n, conv.h, conv.w) or conv.turned or conv.groups > 1 or conv.ci % 4:
            raise Unfusable("weights or pixels are not known, groups, or channels that are no multiple of 4")
        rest = float(np.mean([group_mask(fitting(weight.reshape(-1, conv.co))[1], 4, 1).mean() for weight in values[:_SAMPLES]]))
        return ConvRestWorkload(replace(conv, kind=PAIRS.kind), rest)

    def space(self, workload: ConvRestWorkload, target: Target) -> Sequence[DirectSchedule]:
        if dot_for(workload.conv.kind, target) is not PAIRS:
            raise Unfusable("four products are added by one instruction")
        found = [schedule for schedule in ConvDirect().space(workload.conv, target) if schedule.lanes == target.lanes() and not schedule.rows]
        if not found:
            raise Unfusable("fewer outputs than a vector has lanes")
        return [replace(schedule, rows=_Planes(workload.conv, schedule.lanes).rows) for schedule in found]

    def features(self, workload: ConvRestWorkload, schedule: DirectSchedule, target: Target) -> KernelFeatures:
        conv, lanes = workload.conv, schedule.lanes
        planes = _Planes(conv, lanes)
        found = direct_features(conv, schedule.pixels, schedule.nv, lanes, schedule.rows, target)
        n, out_h, _ = conv.sizes()
        entries = workload.rest * conv.kh * conv.kw * (conv.ci // 4) * conv.co
        runs = n * -(-out_h // planes.rows) * planes.parts
        vectors = planes.rows * planes.vectors
        # as in gemm_rest; a word is copied by itself
        more = runs * (entries * (vectors + 1.0) + 20.0 * conv.co + 2.0 * vectors * conv.co) + 1.5 * n * planes.height * planes.row_words
        return replace(
            found,
            fma_cycles=found.fma_cycles + more,
            load_cycles=found.load_cycles + more,
            latency_cycles=found.latency_cycles + more,
            l2_bytes=found.l2_bytes + runs * entries * (4.0 * vectors * lanes + 8.0),
        )

    def build(self, fused: Fused, workload: ConvRestWorkload, schedule: DirectSchedule, target: Target) -> Kernel:
        conv, nr = workload.conv, schedule.nv * schedule.lanes
        position = fused.param_index(fused.inputs[1])
        assert position is not None
        row, planes = RowWords(conv, schedule.pixels, PAIRS), _Planes(conv, schedule.lanes)
        shape, taps = (-(-conv.co // nr), conv.kh, row.total, nr), (conv.kh, conv.kw, conv.ci, conv.co)
        with sparse_kernel(fused, conv.co, 4, 1, PAIRS, shape) as (builder, buffers, stream):
            _Emitter(fused, buffers, conv, schedule, row, planes, stream).emit()

        def pack(weight: np.ndarray) -> tuple[np.ndarray, ...]:
            fit, rest = fitting(weight.reshape(-1, conv.co))
            left = compress(rest, 4, 1, PAIRS)
            return pack_conv(fit.reshape(taps), 1, nr, row), left.values, planes.places(left.indices).astype(np.int32), left.pointers

        return Kernel(builder.get(), (Packing(position, (), pack, f"conv{nr} and rest {planes}"),))


class _Emitter(DirectEmitter):
    """The direct template's rows of tiles, after the sums of the rest of as many rows; see the module."""

    def __init__(
        self,
        fused: Fused,
        buffers: dict[Any, Any],
        conv: ConvWorkload,
        schedule: DirectSchedule,
        row: RowWords,
        planes: _Planes,
        stream: StreamBuffers,
    ):
        super().__init__(fused, buffers, conv, schedule, row)
        self.planes, self.stream, self.lanes = planes, stream, schedule.lanes
        #: of the rows at hand: the first one, and the sums of the rest [row, pixel, output]
        self.first: Any = None
        self.sums: Any = None

    def emit(self) -> None:
        conv, planes = self.workload, self.planes
        images, out_h, out_w = conv.sizes()
        words = self._words(images)
        extents = (images, -(-conv.co // self.nr), -(-out_h // planes.rows))
        with tasks(T.int64(math.prod(extents)), images * out_h * out_w * conv.co * conv.ci * conv.kh * conv.kw) as task:
            n, panel, block = unflatten(task, [T.int64(size) for size in extents])

            def outputs(columns: int) -> None:
                # the last block ends at the last row: it sums some rows again
                self.first = T.bind(T.min(block * planes.rows, T.int64(out_h - planes.rows)))
                self.sums = T.alloc_buffer((planes.rows, planes.parts * planes.vectors * self.lanes, self.nr), self.dot.accumulator)
                with T.serial(T.int64(planes.parts)) as part:
                    self._rest(words, n, panel, part, columns)
                with T.serial(T.int64(planes.rows)) as step:
                    self.row(n, T.bind(self.first + step), step, T.int64(0), panel, columns)

            with_columns(panel, conv.co, self.nr, outputs)

    def _words(self, images: int) -> Any:
        """The input's words of 4 channels, see the module; flat, as taps begin anywhere."""
        conv, planes = self.workload, self.planes
        assert conv.h is not None and conv.w is not None
        words = T.alloc_buffer((images * planes.height * planes.row_words,), self.dot.word)
        size = images * conv.h * conv.w * conv.ci
        with tasks(T.int64(images * planes.height), size) as line:
            n, row = T.bind(T.floordiv(line, T.int64(planes.height))), T.bind(T.floormod(line, T.int64(planes.height)) - conv.padding[0])
            start = T.bind(line * planes.row_words)
            with T.serial(T.int64(planes.row_words)) as place:
                T.buffer_store(words, T.int32(0), [start + place])
            with T.If(T.And(row >= T.int64(0), row < T.int64(conv.h))), T.Then(), T.serial(T.int64(conv.strides[1])) as phase:
                shift = T.bind(phase - conv.padding[1])
                # the pixels of this phase that exist
                first = T.bind(T.max(T.int64(0), T.floordiv(conv.strides[1] - 1 - shift, T.int64(conv.strides[1]))))
                end = T.bind(T.min(T.int64(planes.width), T.floordiv(conv.w - 1 - shift, T.int64(conv.strides[1])) + 1))
                with T.serial(T.int64(conv.ci // 4)) as channel, T.serial(first, end) as place:
                    pixel = T.bind(((n * conv.h + row) * conv.w + place * conv.strides[1] + shift) * conv.ci + channel * 4)
                    T.buffer_store(
                        words,
                        self.dot.read(self.x, lambda k: (pixel + k,), T.int64(0)),
                        [start + (phase * (conv.ci // 4) + channel) * planes.width + place],
                    )
        return words

    def _rest(self, words: Any, n: Any, panel: Any, part: Any, columns: int) -> None:
        """self.sums of one part of the pixels of the rows; outputs that the panel does not have hold anything."""
        conv, planes, lanes, stream = self.workload, self.planes, self.lanes, self.stream
        run = planes.vectors * lanes
        turned = T.alloc_buffer((lanes, planes.rows * run), self.dot.accumulator)
        base = T.bind((n * planes.height + self.first * conv.strides[0]) * planes.row_words + part * run)
        for start in range(0, columns, lanes):
            with T.serial(T.int64(min(lanes, columns - start))) as channel:
                output = T.bind(panel * self.nr + start + channel)
                acc = Accumulators(planes.rows, planes.vectors, lanes, self.dot)
                acc.fill()
                begin, end = T.bind(stream.pointers[output]), T.bind(stream.pointers[output + 1])
                with T.serial(end - begin) as step:
                    p = T.bind(begin + step)
                    place, weight = T.bind(base + stream.indices[p].astype("int64")), T.bind(splat(stream.values[p, 0], lanes))
                    for i in range(planes.rows):
                        for v in range(planes.vectors):
                            acc.fma(i, v, words[vector(place + (i * conv.strides[0] * planes.row_words + v * lanes), lanes)], weight)
                for i in range(planes.rows):
                    for v in range(planes.vectors):
                        T.buffer_store(turned, acc.load(i, v), [channel, vector(T.int64(i * run + v * lanes), lanes)])
            with T.serial(T.int64(planes.rows)) as i, T.serial(T.int64(planes.vectors)) as v:
                squares = transpose([T.bind(turned[lane, vector(i * run + v * lanes, lanes)]) for lane in range(lanes)])
                for lane, value in enumerate(squares):
                    T.buffer_store(self.sums, value, [i, part * run + v * lanes + lane, vector(T.int64(start), lanes)])

    def first_sums(self, oh: Any, ow: Any) -> Callable[[int, int], Any]:
        return lambda i, v: self.sums[oh - self.first, ow + i, vector(T.int64(v * self.lanes), self.lanes)]
