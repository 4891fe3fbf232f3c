"""GEMM of sm_90a: numbers of 16 bits and of 8 whose product goes through TMA, wgmma and warp groups with a part each (include/hopper.cuh).

    block (n tile, m tile, batch): BM x BN of C                # tc::gemm_hopper
        warp group 0: for k in steps of 128 bytes: stage <- boxes of A and B by TMA, as stages become empty
        the others:   for k in steps of 128 bytes: wgmma on the stage, as it becomes full; C = epilogue(accumulators)

Activations are read as they lie, weights are packed to rows of their columns [N][K], so that both are matrices of rows along k. Parts of K, epilogues, and what is written, are
those of gemm.py, which takes what this template refuses: rows and windows that TMA cannot address, few rows, and products for which its tiles are predicted to be faster.
A convolution's windows are gathered by TMA: a box is as many windows' pixels as a tile has rows, for one tap and 32 words of its channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...compiler.tvm import tirx
from ..base import Target
from ..common.fused import Fused, Unfusable
from . import schedule
from .gemm import Gemm
from .kernel import Packing, Signature
from .product import Request
from .schedule import GemmShape
from .schedule_hopper import HopperSchedule, best_tile, predicted_cycles
from .sizes import simplified, times

#: GPUs that have wgmma, TMA and setmaxnreg
TARGETS = frozenset({"sm_90a"})
#: words of a row of 16 bytes: rows have to begin at multiples of it
_ALIGNED = 4
#: fewer fill less than half of the 64 of a product by wgmma; open rows count from here on
ROWS, _MANY = 32, 256


def least_cycles(shape: GemmShape, target: Target, policy: str = "", shares: bool = False) -> float:
    """Predicted cycles of this template's best tile for a product of matrices in words; infinite where it takes none. shares: as in `best_tile`."""
    if target.name not in TARGETS or shape.k % _ALIGNED or shape.m < ROWS:
        return math.inf
    return predicted_cycles(shape, best_tile(shape, target, policy, shares=shares), target)


class HopperGemm(Gemm):
    """A product whose operands TMA can address: matrices, or an image whose windows it gathers (im2col mode). Rows may be open. It takes what it is predicted to do
    faster than gemm.py."""

    targets = TARGETS

    def __init__(self, asked: Request):
        super().__init__(asked)
        if self.group == 1:
            raise Unfusable("operands in fp32")
        if self.groups > 1:
            raise Unfusable("grouped convolution")
        if not all(isinstance(size, int) for size in (self.k, self.n, *self.a.sizes[1:])):
            raise Unfusable("open sizes other than rows")
        self.image = _Image.of(self.fused, self.group) if self.shape.windows else None
        depth = self.k if self.image is None else self.image.depth
        if depth % _ALIGNED:
            raise Unfusable(f"rows of {4 * depth} bytes, no multiple of {4 * _ALIGNED}")
        #: of k; those of a window's taps do not share one
        self.steps = self.k // depth * math.ceil(depth / schedule.BK)
        self.packings = (self._columns(self.packings[0], depth),)

    @property
    def kind(self) -> str:
        return f"{super().kind} hopper"

    def best(self) -> HopperSchedule:
        """The tile of least predicted time; raises Unfusable when that of gemm.py takes less."""
        if not self._faster(self.shape):
            raise Unfusable("the tiles of mma.sync are faster")
        return self._best(self.shape)

    def _best(self, shape: GemmShape) -> HopperSchedule:
        return best_tile(self._in_steps(shape), self.target, self.policy, shares=self._takes_shares())

    @property
    def k_steps(self) -> int:
        return self.steps

    def streamed(self, sizes: str) -> str:
        return f"gemm_hopper_stream<tc::{self.policy}, {sizes}>"

    def cycles(self, tile: HopperSchedule, rows: int) -> float:
        return predicted_cycles(self._in_steps(self._shape(rows)), tile, self.target)

    def variants(self) -> Sequence[tuple[HopperSchedule, tuple[Any, int | None, int | None] | None]]:
        """Where rows are open, this template takes few of them, too, if it is faster for many: weights are packed in one way."""
        rows = [] if isinstance(self.m, int) else self.anchors()
        if not all(self._faster(self._shape(number)) for number in rows if number >= min(_MANY, rows[-1])):
            raise Unfusable("the tiles of mma.sync are faster")
        return super().variants()

    def _in_steps(self, shape: GemmShape) -> GemmShape:
        return replace(shape, k=self.steps * schedule.BK)

    def _faster(self, shape: GemmShape) -> bool:
        """It is predicted to take less time than gemm.py."""
        mma = schedule.predicted_cycles(shape, super()._best(shape), self.target, self.policy)
        return mma > least_cycles(self._in_steps(shape), self.target, self.policy, self._takes_shares())

    def resident(self, tile: HopperSchedule) -> int:
        return tile.resident

    def _columns(self, packing: Packing, depth: int) -> Packing:
        """The weights as rows along k, with zeros behind the `depth` words of each of several taps up to whole steps."""
        *lead, k, n = (int(dim) for dim in packing.buffer.shape)
        taps, more = k // depth, -depth % schedule.BK if k > depth else 0
        buffer = tirx.decl_buffer((*lead, n, taps * (depth + more)), "int32", "columns")

        def pack(array: np.ndarray) -> np.ndarray:
            numbers = array.reshape(*lead, taps, depth * self.group, n)
            filled = np.pad(numbers, [(0, 0)] * (numbers.ndim - 2) + [(0, more * self.group), (0, 0)])
            return transposed(filled.reshape(*lead, -1, n))

        return replace(packing, buffer=buffer, pack=pack)

    def operands(self, tile: HopperSchedule, signature: Signature) -> list[str]:
        b = self.packings[0].buffer
        if tile.shares:  # of whatever tile
            source, described = self._described(tile, signature)
            weights = signature.map(b, "encode", _rows(b), int(b.shape[-1]), tile.bn)
            return [
                f"const auto {name} = [&](int first) {{ return {of}{{{by}, first}}; }};"
                for name, of, by in (("a", source, described), ("b", "tc::MappedRows", weights))
            ]
        a = self._rows_of_a(tile, signature, "blockIdx.y * T::BM")
        weights = signature.map(b, "encode", _rows(b), int(b.shape[-1]), tile.bn)
        return [a, f"const tc::MappedRows b{{{weights}, (int)({self._row(b, 'blockIdx.x * T::BN', signature)})}};"]

    def _rows_of_a(self, tile: HopperSchedule, signature: Signature, first: str) -> str:
        """The declaration of a source of the rows of A from `first` on."""
        source, described = self._described(tile, signature)
        return f"const {source} a{{{described}, (int)({self._row(self.fused.inputs[0], first, signature)})}};"

    def _described(self, tile: HopperSchedule, signature: Signature) -> tuple[str, str]:
        """The source of A's rows, and the map that it reads."""
        a = self.fused.inputs[0]
        if self.image is None:
            return "tc::MappedRows", signature.map(a, "encode", _rows(a), self.k, tile.bm)
        return self.image.source, signature.map(a, "encode_windows", *self.image.encoding(tile.bm))

    def _row(self, buffer: Any, tile: str, signature: Signature) -> str:
        """The row of a map at which a block's tile begins."""
        batch = self.offset([*(simplified(dim) for dim in buffer.shape[:-1]), 1], self.batch_dims)(signature.size)
        return f"{tile} + {batch}" if batch else tile

    def _call(self, tile: HopperSchedule, signature: Signature) -> str:
        steps = tile.part_of(self.steps * schedule.BK) // schedule.BK
        start = f"blockIdx.z * {steps}" if tile.parts > 1 else "0"
        place = f"blockIdx.y * T::BM, blockIdx.x * T::BN, {start}"
        return f"tc::gemm_hopper<tc::{self.policy}, T, {self.n}>(a, b, out, {signature.size(self.m)}, {place}, {steps}"


@dataclass(frozen=True)
class _Image:
    """The NHWC image of a convolution and its windows; depth: words of a pixel, pads and strides as the core has them."""

    sizes: tuple[Any, int, int]
    depth: int
    out: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(fused: Fused, group: int) -> _Image:
        """Raises Unfusable for windows that TMA cannot gather (limits of cuTensorMapEncodeIm2col)."""
        core = fused.core
        batch, height, width, channels = (simplified(dim) for dim in fused.inputs[0].shape)
        taps, out = (tuple(int(dim) for dim in dims) for dims in (fused.inputs[1].shape[:2], fused.accumulator.shape[1:3]))
        image = _Image(
            (batch, height, width), channels // group, out, taps, *(tuple(map(int, core[name])) for name in ("strides", "padding", "dilation"))
        )
        corners, reach = image.encoding(1)[5:9], ((count - 1) * apart for count, apart in zip(taps, image.dilation, strict=True))
        if not all(-128 <= corner <= 127 for corner in corners) or max(reach) > 255 or max(image.strides) > 8:
            raise Unfusable("windows that TMA does not gather")
        return image

    @property
    def source(self) -> str:
        numbers = (self.depth, *self.out, self.taps[1], *self.strides, *self.padding[:2], *self.dilation)
        return f"tc::MappedWindows<{', '.join(map(str, numbers))}>"

    def encoding(self, box: int) -> tuple[Any, ...]:
        """Arguments of `encode_windows`: sizes, the first base of a window and the last (from the last pixel), each (w, h), and strides."""
        top, left, bottom, right = self.padding
        last = [after - (count - 1) * apart for after, count, apart in zip((bottom, right), self.taps, self.dilation, strict=True)]
        return (*self.sizes, self.depth, box, -left, -top, last[1], last[0], self.strides[1], self.strides[0])


def transposed(numbers: np.ndarray) -> np.ndarray:
    """[..., K, N] of numbers of one or two bytes -> rows of words [..., N, words of K] of consecutive k."""
    return np.ascontiguousarray(numbers.swapaxes(-1, -2)).view(np.int32)


def _rows(buffer: Any) -> Any:
    return times(buffer.shape[:-1])
