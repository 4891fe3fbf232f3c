"""Products by constant weights of which whole tiles are zero: the templates of gemm.py and gemm_hopper.py over the tiles that are kept, instead of all of K.

    block (m tile, strip of columns, part of the strip's tiles): BM x BN of C          # tc::gemm_blocks, tc::gemm_hopper_blocks in include/blocks.cuh
        for each tile of k that the strip keeps: shared <- A where the tile lies along K, the tile
            ... as ever

A strip is as wide as a block's tile, so that all of a step is multiplied or none. Only kept tiles are stored, those of a strip one after the other, behind a list of where they lie along K.
Strips that keep most come first, so that no long one starts last; parts of K are parts of this list. Tiles are 16 words of k by 32, 64 or 128 columns, or 32 words (128 bytes, what TMA
and wgmma take) by 64 to 256; the width is that of the schedule with the least predicted time, and dense templates, or 2:4, keep weights for which theirs is less: those of scattered zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ...compiler.tvm import tirx
from ..common.fused import Unfusable
from . import gemm_hopper, schedule, schedule_hopper, sparse, zeros
from .gemm import Gemm, packed
from .kernel import Packing, Signature
from .product import Product, Request
from .schedule import BK, GemmShape, TileSchedule
from .sizes import blocks
from .zeros import Zeros

#: words of a row of the walk are a multiple of it; those in front of the list of places (struct Walk in include/blocks.cuh)
_ROW, _HEAD = 32, 4


class BlockGemm(Gemm):
    """A product by one matrix of weights that are packed as kept tiles. Rows may be open."""

    #: words of k of a tile, and the columns that it may have
    unit: ClassVar[int] = 16
    widths: ClassVar[Sequence[int]] = (32, 64, 128)
    equal_shares = False

    def __init__(self, asked: Request):
        assert asked.zeros is not None
        self.pattern, self.width = asked.zeros, 0
        super().__init__(asked)
        if self.groups > 1 or self.batch != 1:
            raise Unfusable("several matrices of weights")
        if not (isinstance(self.k, int) and isinstance(self.n, int)):
            raise Unfusable("open sizes other than rows")
        #: columns of a strip
        self.width = self._best(self.shape).bn
        kept = self._kept(self.pattern, self.width)
        self.units, self.strips = kept.shape
        self.row = -(-(_HEAD + self.units) // _ROW) * _ROW
        self.dense, self.packings = self.packings, (self._tiles(),)

    @property
    def kind(self) -> str:
        return f"{super().kind} blocks"

    def best(self) -> TileSchedule:
        """The tile of least predicted time; raises Unfusable when dense ones take less."""
        if not self._faster(self.shape):
            raise Unfusable("dense tiles are faster")
        return self._best(self.shape)

    def cycles(self, tile: TileSchedule, rows: int) -> float:
        return self._cycles(self._walked(self._shape(rows), tile.bn), tile)

    def variants(self) -> Sequence[tuple[TileSchedule, tuple[Any, int | None, int | None] | None]]:
        """Where rows are open, this template takes all if it is faster for most of the numbers of rows that are tried: weights are packed in one way."""
        if not isinstance(self.m, int) and 2 * sum(self._faster(self._shape(rows)) for rows in self.anchors()) <= len(self.anchors()):
            raise Unfusable("dense tiles are faster")
        return Product.variants(self)

    def _faster(self, shape: GemmShape) -> bool:
        """It is predicted to take less time than all other templates of products."""
        return self._least(shape) < self._others(shape)

    def _least(self, shape: GemmShape) -> float:
        tile = self._best(shape)
        return self._cycles(self._walked(shape, tile.bn), tile)

    def _others(self, shape: GemmShape) -> float:
        """Predicted cycles of the fastest of templates that multiply by all tiles."""
        found = [schedule.predicted_cycles(shape, schedule.best_tile(shape, self.target, self.policy), self.target, self.policy)]
        if self.group > 1:
            found.append(gemm_hopper.least_cycles(shape, self.target))
        if self.pattern.two_of_four and self.fused.core["op"] == "matmul":
            found.append(sparse.predicted_cycles(shape, sparse.best_tile(shape, self.target), self.target))
        return min(found)

    def _best(self, shape: GemmShape) -> TileSchedule:
        tiles = [self._best_of(self._walked(shape, width), width) for width in ((self.width,) if self.width else self.widths)]
        return min(tiles, key=lambda tile: self._cycles(self._walked(shape, tile.bn), tile))

    def _best_of(self, shape: GemmShape, width: int) -> TileSchedule:
        return schedule.best_tile(shape, self.target, self.policy, width)

    def _cycles(self, shape: GemmShape, tile: TileSchedule) -> float:
        return schedule.predicted_cycles(shape, tile, self.target, self.policy)

    def _walked(self, shape: GemmShape, width: int) -> GemmShape:
        """The product with what each strip keeps of K."""
        counts = np.sort(self._kept(self.pattern, width).sum(axis=0))[::-1]
        return replace(shape, vb=4, strips=tuple(int(count) * self.unit for count in counts))

    def _kept(self, pattern: Zeros, width: int) -> np.ndarray:
        """bool [tiles along K, strips]."""
        return pattern.kept(self.unit * self.group, width)

    def _words(self, weight: np.ndarray) -> np.ndarray:
        """The weights as int32 [strips, tiles along K, words of a tile] in the order of shared memory: rows of columns."""
        matrix = weight.reshape(-1, weight.shape[-1])
        numbers = packed(matrix, self.group) if self.group > 1 else np.ascontiguousarray(matrix).view(np.int32)
        filled = _filled(numbers, self.units * self.unit, self.strips * self.width)
        return filled.reshape(self.units, self.unit, self.strips, self.width).transpose(2, 0, 1, 3).reshape(self.strips, self.units, -1)

    def _tiles(self) -> Packing:
        """The weights as include/blocks.cuh has them. The buffer has room for all tiles; what is stored ends behind those that are kept."""
        count = self.strips * (self.row + self.units * self.unit * self.width)
        buffer = tirx.decl_buffer((count,), "int32", f"tiles{self.unit}x{self.width}")

        def pack(array: np.ndarray) -> np.ndarray:
            found = zeros.occupied(array)
            kept = self._kept(Zeros(False, found.shape, found.tobytes()), self.width).T
            counts = kept.sum(axis=1)
            order = np.argsort(-counts, kind="stable")
            walk = np.zeros((self.strips, self.row), np.int32)
            walk[:, 0], walk[:, 1], walk[:, 2] = order, counts[order], np.cumsum(counts[order]) - counts[order]
            for row, strip in zip(walk, order, strict=True):
                row[_HEAD : _HEAD + counts[strip]] = np.flatnonzero(kept[strip])
            return np.concatenate([walk.reshape(-1), self._words(array)[order][kept[order]].reshape(-1)])

        return Packing(self.fused.inputs[1], buffer, pack)

    def _rows_first(self) -> bool:
        """Blocks of one strip follow each other, which keeps long strips from starting last: where the rows that they read again for the next strip stay in half of L2."""
        return 4 * self.shape.m * self.shape.k <= self.target.l2_bytes // 2

    def _grid(self, tile: TileSchedule) -> tuple[Any, Any, Any]:
        rows = blocks(self.m, tile.bm)
        return (rows, self.strips, tile.parts) if self._rows_first() else (self.strips, rows, tile.parts)

    def _place(self) -> tuple[str, str]:
        """A block's first row and its number of a row of the walk."""
        row, strip = ("blockIdx.x", "blockIdx.y") if self._rows_first() else ("blockIdx.y", "blockIdx.x")
        return f"{row} * T::BM", strip

    def operands(self, tile: TileSchedule, signature: Signature) -> list[str]:
        a, b = (signature.name(buffer) for buffer in (self.fused.inputs[0], self.packings[0].buffer))
        return [
            self.a.declared("a", a if self.group == 1 else f"tc::words({a})", signature),
            f"const tc::Walk<{self.strips}, {self.units}, {tile.parts}> walk({b}, {self._place()[1]}, blockIdx.z);",
        ]

    def _call(self, tile: TileSchedule, signature: Signature) -> str:
        return f"tc::gemm_blocks<tc::{self.policy}, T, {self.n}, {self.a.vector}>(a, walk, out, {signature.size(self.m)}, {self._place()[0]}"


class HopperBlockGemm(BlockGemm, gemm_hopper.HopperGemm):
    """The same by TMA and wgmma."""

    unit = BK
    widths = (64, 128, 192, 256)

    def _faster(self, shape: GemmShape) -> bool:
        mma = BlockGemm(self.asked)
        return shape.m >= gemm_hopper.ROWS and self._least(shape) < min(self._others(shape), mma._least(shape))

    def _best_of(self, shape: GemmShape, width: int) -> TileSchedule:
        return schedule_hopper.best_tile(shape, self.target, self.policy, width)

    def _cycles(self, shape: GemmShape, tile: Any) -> float:
        return schedule_hopper.predicted_cycles(shape, tile, self.target)

    def _walked(self, shape: GemmShape, width: int) -> GemmShape:
        return super()._walked(self._in_steps(shape), width)

    def _kept(self, pattern: Zeros, width: int) -> np.ndarray:
        taps = 1 if self.image is None else self.k // self.image.depth
        if taps > 1 and self.k * self.group // taps % zeros.K:
            raise Unfusable("channels that are no multiple of a tile")
        return pattern.kept(self.unit * self.group, width, taps)

    def _words(self, weight: np.ndarray) -> np.ndarray:
        """Rows of k."""
        (packing,) = self.dense
        columns = packing.pack(weight)
        filled = _filled(columns.reshape(-1, columns.shape[-1]), self.strips * self.width, self.units * self.unit)
        return filled.reshape(self.strips, self.width, self.units, self.unit).transpose(0, 2, 1, 3).reshape(self.strips, self.units, -1)

    def operands(self, tile: Any, signature: Signature) -> list[str]:
        weights = self.packings[0].buffer
        row, strip = self._place()
        return [
            self._rows_of_a(tile, signature, row),
            f"const tc::Walk<{self.strips}, {self.units}, {tile.parts}> walk({signature.name(weights)}, {strip}, blockIdx.z);",
        ]

    def _call(self, tile: Any, signature: Signature) -> str:
        weights = self.packings[0].buffer
        described = signature.map(weights, "encode", int(weights.shape[0]) // BK, BK, tile.bn)
        rows = signature.size(self.m)
        return f"tc::gemm_hopper_blocks<tc::{self.policy}, T, {self.n}>(a, {described}, walk, out, {rows}, {self._place()[0]}"


def _filled(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """With zeros behind its rows and columns."""
    return np.pad(matrix, ((0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])))
