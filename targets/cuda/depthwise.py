"""Depthwise convolution: one filter per channel, NHWC.

thread: TH x TW neighbouring outputs of V neighbouring channels in registers           # tc::depthwise in include/depthwise.cuh
    for rows of the image under them: for columns under them:
        V channels of a pixel <- one load, for all outputs and taps that see it; sums += pixel * tap
    outputs = epilogue(sums), V channels in one store

The limit is memory: bytes of image, result and weights over bandwidth. What stands between is the first-level cache, which a thread per output asks for a pixel and a tap with every
multiply-add: here a pixel of a row of 4 outputs of 3 taps is loaded once for 2 multiply-adds of V channels each, and a 2 x 4 tile of 3 x 3 taps has 24 loads of pixels and 9 of taps for
72 V multiply-adds. Tiles are ranked by a model of issued instructions, cache and memory, in which too few threads leave latency uncovered, so that small images get small tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...autotune.latency import corrected
from ...compiler.element_types import numpy_dtype
from ..common.fused import Unfusable
from .kernel import Kernel, Signature, ctype
from .product import Product, Request
from .schedule import FILE_REGISTERS, SHARED_BYTES_PER_CYCLE
from .sizes import blocks, shown, simplified, times

#: types of image, weights and sums
_TYPES = frozenset(
    {("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("float16", "float16", "float32"), ("uint8", "int8", "int32")}
)
THREADS = 128
#: taps, and rows or columns under a tile, that are unrolled; sums of a thread
_MOST_TAPS, _MOST_REACH, _MOST_SUMS = 64, 32, 64
#: bytes of one load; threads of a multiprocessor; cycles of a block's start and end, and of a load of memory
_LOAD_BYTES, _RESIDENT, _BLOCK_LATENCY, _LOAD_LATENCY = 16, 2048, 700.0, 500.0
#: bytes that a thread's loads wait for together; cycles from one instruction of a lone warp to the next
_IN_FLIGHT, _ISSUE = 256, 1.5
#: registers beside sums, taps and pixels; instructions of a thread beside loads and multiply-adds, of a load (its address and whether it is inside), and of an output
_OTHER_REGISTERS, _OTHER_INSTRUCTIONS, _LOAD_INSTRUCTIONS, _OUTPUT_INSTRUCTIONS = 32, 40, 3, 3
#: instructions that make a short number of a vector one of 32 bits
_WIDENING = 2


@dataclass(frozen=True)
class DepthwiseSchedule:
    """high x wide outputs of `channels` channels a thread."""

    high: int
    wide: int
    channels: int
    parts: int = 1

    def __str__(self) -> str:
        return f"{self.high}x{self.wide} pixels x {self.channels} channels a thread"


class Depthwise(Product):
    """A fused function as a depthwise convolution with as many channels as it has groups."""

    cores = ("conv2d",)
    open_sizes = True

    def __init__(self, asked: Request):
        super().__init__(asked)
        fused, known = self.fused, self.known
        image, weights, dims = ([simplified(dim) for dim in buffer.shape] for buffer in (*fused.inputs[:2], fused.accumulator))
        if not all(isinstance(size, int) for size in (image[3], *weights)):
            raise Unfusable("channels or taps known only at run time")
        self.images, self.channels, self.taps = image[0], image[3], weights[:2]
        if not fused.core["groups"] == self.channels == dims[-1]:
            raise Unfusable("not depthwise")
        self.types = tuple(str(buffer.ty.dtype) for buffer in (*fused.inputs[:2], fused.accumulator))
        if self.types not in _TYPES:
            raise Unfusable(f"depthwise convolution of {self.types[0]} and {self.types[1]} as {self.types[2]}")
        core = fused.core
        self.strides, self.dilation, (top, left, _, _) = core["strides"], core["dilation"], core["padding"]
        self.row_dims, self.m, self.n, self.sum = dims[:-1], times(dims[:-1]), dims[-1], ctype(self.types[2])
        #: heights and widths of image and result, and whether those and the number of images are known
        self.extents, self.fixed = (*image[1:3], *dims[1:3]), all(isinstance(size, int) for size in (*image, *dims))
        fixed, window = self.extents if self.fixed else (), (*self.taps, *self.strides, top, left, *self.dilation)
        parts = (*fixed[:2], self.channels, *fixed[2:], *window)
        self.source = f"tc::{'' if self.fixed else 'Open'}Channels<{', '.join(map(str, parts))}>"
        #: images, rows and columns of the result that are to be expected
        self.batch, self.high, self.wide = (max(1, known.typical(size)) for size in dims[:3])
        #: bytes that have to move: image, weights and result, and those of one number of the image
        buffers = (*fused.inputs[:2], fused.output, *self.copies)
        self.moved = sum(
            known.typical(times([simplified(dim) for dim in buffer.shape])) * numpy_dtype(str(buffer.ty.dtype)).itemsize for buffer in buffers
        )
        self.number_bytes = numpy_dtype(self.types[0]).itemsize
        if math.prod(self.taps) > _MOST_TAPS or max(self.reach(1, 1)) > _MOST_REACH:
            raise Unfusable(f"{self.taps[0]} x {self.taps[1]} taps of a depthwise convolution")

    def reach(self, high: int, wide: int) -> tuple[int, int]:
        """Rows and columns of the image under so many outputs."""
        sizes = zip((high, wide), self.strides, self.taps, self.dilation, strict=True)
        rows, columns = ((count - 1) * stride + (taps - 1) * apart + 1 for count, stride, taps, apart in sizes)
        return rows, columns

    def space(self) -> Sequence[DepthwiseSchedule]:
        """Tiles whose sums fit the registers, and no larger than the result."""
        return [
            DepthwiseSchedule(rows, columns, channels)
            for channels in (16, 8, 4, 2, 1)
            for rows in (1, 2, 4)
            for columns in (1, 2, 4, 8)
            if self.channels % channels == 0
            and channels * self.number_bytes <= _LOAD_BYTES
            and rows * columns * channels <= _MOST_SUMS
            and rows < 2 * self.high
            and columns < 2 * self.wide
            and max(self.reach(rows, columns)) <= _MOST_REACH
        ]

    def threads(self, tile: DepthwiseSchedule) -> int:
        """Threads that have something to do, of the image that is to be expected."""
        return self.batch * math.ceil(self.high / tile.high) * math.ceil(self.wide / tile.wide) * self.channels // tile.channels

    def predicted_cycles(self, tile: DepthwiseSchedule) -> float:
        """Cycles: of memory, or of waves of threads, each as slow as the slowest of instructions, first-level cache and one thread alone."""
        threads, outputs, taps = self.threads(tile), tile.high * tile.wide, math.prod(self.taps)
        rows, columns = self.reach(tile.high, tile.wide)
        loads = rows * columns + taps
        widened = 0 if self.types[0] == "float32" else _WIDENING * tile.channels * loads
        instructions = tile.channels * outputs * (taps + _OUTPUT_INSTRUCTIONS) + loads * _LOAD_INSTRUCTIONS + widened + _OTHER_INSTRUCTIONS
        registers = tile.channels * (outputs + min(tile.high, self.taps[0]) * self.taps[1] + 2) + _OTHER_REGISTERS
        resident = min(_RESIDENT, FILE_REGISTERS // registers // THREADS * THREADS, math.ceil(threads / self.target.cores / THREADS) * THREADS)
        waves = math.ceil(threads / (self.target.cores * resident))
        cached = resident * loads * tile.channels * self.number_bytes / SHARED_BYTES_PER_CYCLE
        alone = _ISSUE * instructions + _LOAD_LATENCY * math.ceil(loads * tile.channels * self.number_bytes / _IN_FLIGHT)
        memory = self.moved / (self.target.bandwidth_gbs / self.target.frequency_ghz)
        cycles = max(memory, waves * (max(instructions * resident / 128, cached, alone) + _BLOCK_LATENCY))
        sizes = {"batch": self.batch, "m": self.batch * self.high * self.wide, "k": taps, "n": self.channels, "blocks": math.ceil(threads / THREADS)}
        return corrected(
            self.target,
            "depthwise",
            tile,
            cycles,
            bits=8 * self.number_bytes,
            bm=outputs,
            bn=tile.channels,
            threads=THREADS,
            stages=tile.wide,
            **sizes,
        )

    def best(self) -> DepthwiseSchedule:
        """The tile of least predicted time."""
        return min(self.space(), key=self.predicted_cycles)

    def variants(self) -> Sequence[tuple[DepthwiseSchedule, None]]:
        """One tile, for the image that is to be expected: others differ by less than the tiles of products do."""
        return ((self.best(), None),)

    def _product(self, tile: DepthwiseSchedule, signature: Signature, written: Sequence[Any], value: list[str]) -> Kernel:
        kinds = [ctype(buffer.ty.dtype) for buffer in written]
        image, weights = (signature.name(buffer) for buffer in self.fused.inputs[:2])
        out = f"const tc::To<{', '.join(kinds)}> out{{{', '.join(signature.name(buffer) for buffer in written)}}};"
        sizes = f"{tile.channels}, {tile.high}, {tile.wide}, {self.sum}"
        given = f"{image}, {weights}, out, blockIdx.x * {THREADS} + threadIdx.x, [&](int m, int n, {self.sum} sum) -> {kinds[0]} {{"
        high, wide = blocks(self.extents[2], tile.high), blocks(self.extents[3], tile.wide)
        if self.fixed:
            lines = [out, f"tc::depthwise<{self.source}, {self.batch}, {sizes}>({given}"]
        else:
            opened = ", ".join(signature.size(size) for size in (self.images, high, wide))
            extents = ", ".join(map(signature.size, self.extents))
            lines = [out, f"const {self.source} image{{{extents}}};", f"tc::depthwise<{self.source}, {sizes}>(image, {opened}, {given}"]
        lines += [f"  {line}" for line in value] + ["});"]
        taps = "x".join(map(str, self.taps))
        return signature.kernel(
            lines,
            grid=(blocks(times([self.images, high, wide, self.channels // tile.channels]), THREADS), 1, 1),
            threads=THREADS,
            shared_bytes=0,
            kind="depthwise",
            workload=f"depthwise {shown(self.m)}x{self.channels}, {taps} taps, stride {self.strides[0]}, {self.types[0]}",
            schedule=str(tile),
        )
