"""Grouped products (a mixture of experts) on tensor cores: rows sorted by expert, each by the matrix of its expert.

    block (n tile, run of rows of one expert within BM rows, part of K)       # tc::run_of in include/grouped.cuh
        the tile of gemm.py over the rows of the run, by the weights of the expert

Rows are cut at multiples of BM and where the expert changes. A run's number, row / BM + expert, ascends with the row, so that a block finds its own by a search in the experts of the rows,
and there are S / BM + E blocks at most; those without rows end at once. Weights of experts without rows are not read. Rows without an expert take zeros through the epilogue.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..common.fused import Unfusable
from ..common.ops_linear import grouped_operands
from .gemm import Gemm, Operand, vector
from .kernel import Signature
from .schedule import GemmShape, TileSchedule
from .sizes import blocks, shown, simplified, times


class Grouped(Gemm):
    """See the module."""

    cores = ("grouped_matmul",)
    equal_shares = False

    def _factors(self) -> tuple[Any, Any]:
        x, weight, self.owner = grouped_operands(self.fused)
        self.experts = simplified(weight.shape[0])
        if not all(isinstance(simplified(dim), int) for dim in weight.shape):
            raise Unfusable("weights of a size known only at run time")
        return x, weight

    def _matrices(self) -> tuple[list[Any], list[Any], Any, Operand, Operand]:
        _, k, n = (simplified(dim) for dim in self.factors[1].shape)
        k = self._in_words(k)
        return [], self.dims[:-1], k, Operand("tc::OpenMatrix", vector(k)), Operand(f"tc::Matrix<{k}, {n}>", vector(n))

    def _shape(self, rows: int) -> GemmShape:
        return replace(super()._shape(rows), groups=min(max(1, rows), self.experts))

    @property
    def kind(self) -> str:
        return "grouped_gemm"

    def _sizes_text(self) -> str:
        return f"grouped gemm {shown(self.m)}x{shown(times([self.k, self.group]))}x{shown(self.n)} of {self.experts}"

    def resident(self, tile: TileSchedule) -> int:
        """Where it is left to nvcc, it makes room for more blocks than there is shared memory for, and spills."""
        return 1

    def _row_blocks(self, tile: TileSchedule) -> Any:
        return simplified(blocks(self.m, tile.bm) + self.experts)

    def operands(self, tile: TileSchedule, signature: Signature) -> list[str]:
        x, weights = self._data(signature)
        return [
            f"const tc::Run run = tc::run_of<T::BM>({signature.name(self.owner)}, {signature.size(self.m)}, {self.experts}, blockIdx.y);",
            "if (run.first == run.last) return;",
            f"const bool owned = run.owner < {self.experts};",
            f"const {self.a.source} a{{{x}, run.last, {self.k}, {self.k}}};",
            f"const {self.b.source} b{{{weights} + (owned ? (size_t)run.owner * {self.k * self.n} : 0)}};",
        ]

    def _call(self, tile: TileSchedule, signature: Signature) -> str:
        start = f"blockIdx.z * {tile.part_of(self.k)}" if tile.parts > 1 else "0"
        sizes = f"run.last, {self.n}, owned ? {tile.part_of(self.k)} : 0, {self.n}"
        return f"tc::gemm<tc::{self.policy}, T, {self.a.vector}, {self.b.vector}>(a, b, out, {sizes}, run.first, blockIdx.x * T::BN, {start}"
