"""Products by constant weights of 1 to 8 bits on tensor cores: y = epilogue(x [.., M, K] @ (code - zero) * scale), a scale (and zero) per group of k and column.

Up to 8 rows (decoding), everything goes straight from memory to registers:

    block (strip of 32 columns, part of K)                      # tc::weight_only_few in include/weight_only.cuh
        warps take turns at the units (32 k) of the part, the next ones on their way:
            codes, scales: up to 128 bits a lane; x: its own words
            codes -> pairs of 16-bit integers by mask, or and subtraction; mma.sync of a unit's columns and 8 rows
            c += scale * sum                                    # fp32, after 32 k (16 where groups are no multiple of 32)
        C = epilogue(sums of the warps, in their order)

more rows, codes and x come by cp.async, several steps ahead, and a warp multiplies its strip by all rows of the block, so that every code is unpacked once per block
(tc::weight_only_many). Where the blocks leave most of the GPU idle, they take parts of K, which a second kernel adds up as for other products.

int8 activations are multiplied as bytes (include/weight_only_int8.cuh), exactly, the same kernels otherwise.

Weights are never rounded: code - zero is exact in 16 bits, and the scale comes in behind the tensor core. Activations keep the precision asked for: in 16 bits they are words, float32 is
the sum of three parts of bf16 (`fp32`), of two (`tf32`: 16 significant bits at the price of 11), or rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...compiler.dialect.weight_only import unpacked
from ...compiler.tvm import tirx
from ..common.fused import Unfusable
from ..common.ops_linear import weight_only_operands
from ..common.words import planes
from .gemm import vector
from .kernel import HALF, Kernel, Packing, Signature, ctype
from .product import ROWS, Product, Request
from .sizes import shown, simplified, times
from .weight_only_schedule import COLUMNS, FEW_ROWS, FewRows, ManyRows, Shape, best

#: number policy of float32 activations -> 16-bit parts that they become, and whether those are of bf16
PARTS = {"Fp32": (3, True), "Tf32": (2, True), "Bf16": (1, True), "Fp16": (1, False)}


class WeightOnly(Product):
    """The product and its kernels by mma.sync; the Hopper template overrides how weights are packed and multiplied."""

    cores = ("weight_only_matmul",)
    open_sizes = True
    kind = "weight only"

    def __init__(self, asked: Request):
        super().__init__(asked)
        fused, known = self.fused, self.known
        self.x, *weights = weight_only_operands(fused)
        if any(fused.param_index(buffer) not in asked.constants for buffer in weights):
            raise Unfusable("weights that are computed")
        dims, dtype = [simplified(dim) for dim in self.x.shape], str(self.x.ty.dtype)
        bits, k, n = fused.core["bits"], dims[-1], int(weights[0].shape[1])
        if not isinstance(k, int):
            raise Unfusable("open sizes other than rows")
        half, integers = dtype in HALF, dtype == "int8"
        if half and k % 2:
            raise Unfusable("rows of 16-bit numbers that are no whole words")
        if integers and (k % 4 or fused.core["group"] % 4):
            raise Unfusable("rows or groups of bytes that are no whole words")
        parts, bf16 = (1, dtype == "bfloat16") if half or integers else PARTS[asked.policy]
        self.row_dims = dims[:-1]
        # one group may be longer than K
        group = min(fused.core["group"], k + k % 2)
        self.m, self.n = times(dims[:-1]), n
        self.shape = Shape(max(1, known.typical(self.m)), k, n, bits, group, len(weights) == 3, parts, bf16, half, integers)
        self.packings = self._packings(weights)

    def best(self) -> FewRows | ManyRows:
        return best(self.shape, self.target)

    def best_for(self, rows: int) -> FewRows | ManyRows:
        return best(replace(self.shape, m=rows), self.target)

    def anchors(self) -> list[int]:
        """One of them is for few rows, if there may be few, which a device function of its own takes; one is for more, whatever is known: another call of the function may have them."""
        few = max(1, self.known.least(self.m))
        return sorted({*super().anchors(), ROWS[0], *([few] if few <= FEW_ROWS else [])})

    def cycles(self, tile: FewRows | ManyRows, rows: int) -> float:
        if isinstance(tile, FewRows) and rows > FEW_ROWS:
            return math.inf
        return tile.predicted_cycles(replace(self.shape, m=rows), self.target)

    def _packings(self, weights: Sequence[Any]) -> tuple[Packing, ...]:
        """Codes as fragments, scales and zeros by strips; see include/weight_only.cuh."""
        shape = self.shape
        # sums of int8 are of codes at the upper end of bytes
        names, scale = (("bytes", "byte_scales"), 2.0 ** (shape.bits - 8)) if shape.integers else (("codes", "float32"), 1.0)
        order, dims = (shape.strips, shape.all_units, shape.bits * 32), (shape.strips, shape.groups, COLUMNS)
        return packings(weights, (*names, "uint8"), order, lambda array: shuffled(array, shape), dims, scale)

    def _product(self, tile: Any, signature: Signature, written: Sequence[Any], value: list[str]) -> Kernel:
        operands, call = self._called(tile, signature)
        kinds = [ctype(buffer.ty.dtype) for buffer in written]
        start = f" + (size_t)blockIdx.z * {signature.size(times([self.m, self.n]))}" if tile.parts > 1 else ""
        lines = [
            *operands,
            f"const tc::To<{', '.join(kinds)}> out{{{', '.join(signature.name(buffer) + start for buffer in written)}}};",
            *call[:-1],
            f"{call[-1]} [&](int m, int n, float sum) -> {kinds[0]} {{",
            *(f"  {line}" for line in value),
            "});",
        ]
        return signature.kernel(
            lines,
            grid=(tile.grid(self.shape)[0], tile.row_blocks(self.m), tile.parts),
            threads=tile.threads,
            resident=tile.resident,
            shared_bytes=tile.shared_bytes(self.shape),
            kind=self.kind,
            workload=self.shape.text(shown(self.m)),
            schedule=str(tile),
        )

    def _called(self, tile: Any, signature: Signature) -> tuple[list[str], list[str]]:
        """Declarations of the operands, and of the tile with the device template called on them, up to its last argument."""
        shape = self.shape
        groups = tuple(size // shape.per_word for size in (shape.k, shape.group, shape.spread))
        # groups that are filled up begin where copies of this width may
        width = vector(math.gcd(*groups[:2]) if shape.group != shape.spread else groups[0])
        x, weights = signature.name(self.x), self._names(signature)
        units = tile.units(shape)
        first, last = ("0", "W::UNITS") if tile.parts == 1 else (f"blockIdx.z * {units}", f"tc::min<int>((blockIdx.z + 1) * {units}, W::UNITS)")
        rows, known = signature.size(self.m), isinstance(self.m, int)
        grouped, words_of_x = ", ".join(map(str, groups)), f"tc::words({x})" if shape.per_word > 1 else x
        operands = [
            f"using A = {'tc::Integers' if shape.integers else f'tc::Activations<{shape.x_parts}, {flag(shape.bf16)}, {flag(shape.half)}>'};",
            f"using W = tc::Weights<{shape.bits}, {shape.k}, {shape.n}, {shape.group}, {flag(shape.zeros)}>;",
            f"const tc::Grouped<{self.m}, {grouped}> x{{{words_of_x}}};" if known else f"const tc::OpenGrouped<{grouped}> x{{{words_of_x}, {rows}}};",
            f"const W w{{{weights}}};",
        ]
        return operands, tile.call(self.m if known else rows, width, first, last)

    def _names(self, signature: Signature) -> str:
        """Codes, scales and zeros, in C."""
        return ", ".join(signature.name(packing.buffer) for packing in self.packings) + ("" if self.shape.zeros else ", nullptr")


def flag(value: bool) -> str:
    return "true" if value else "false"


def packings(
    weights: Sequence[Any],
    names: Sequence[str],
    order: tuple[int, ...],
    pack: Callable[[np.ndarray], np.ndarray],
    dims: tuple[int, int, int],
    scale: float = 1.0,
) -> tuple[Packing, ...]:
    """Codes [bytes, N] packed to words of this order; scales, by a factor, and zeros, if there are any, as [strips, groups, columns]. names: of these layouts."""
    codes, scales, *zeros = weights
    made = [
        Packing(codes, tirx.decl_buffer(order, "int32", names[0]), pack),
        Packing(scales, tirx.decl_buffer(dims, "float32", names[1]), lambda array: strips(array * np.float32(scale), dims)),
    ]
    made += [Packing(buffer, tirx.decl_buffer(dims, "uint8", names[2]), lambda array: strips(array, dims)) for buffer in zeros]
    return tuple(made)


def shuffled(packed: np.ndarray, shape: Shape) -> np.ndarray:
    """packed: [bytes, N] of the dialect's operator -> int32 [strips, units, bits * 32]: a unit's codes in the order of `mma.sync` fragments.

    A unit of 4, 2 and 1 bits is [32 lanes][4, 2 or 1 words]; other widths have one such plane behind the other, as `planes` says. Lane 4 g + t holds columns 4 g + 2 i + r at
    k = 16 s + 4 t + 2 h + e. 4 bits: in word 2 s + i, at bit 4 (4 e + 2 h + r); 2 bits: in word s, at bit 2 (8 e + 4 i + 2 h + r); 1 bit: at bit 16 e + 8 s + 4 i + 2 h + r. 8 bits are
    two loads, of s: in word 2 i + h, at bit 8 (2 e + r), as two's complement of code - 128. Groups are filled up to multiples of 16, columns to whole strips.
    """
    # of one group longer than K, the beginning
    codes = unpacked(packed, shape.groups * shape.group, shape.bits).reshape(shape.groups, shape.group, shape.n)
    spread = np.zeros((shape.groups, shape.spread, shape.strips * COLUMNS), np.uint8)
    spread[:, : shape.group, : shape.n] = codes
    rows = np.zeros((shape.all_units * 32, shape.strips * COLUMNS), np.uint8)
    kept = min(len(rows), shape.groups * shape.spread)
    rows[:kept] = spread.reshape(-1, spread.shape[2])[:kept]
    axes = rows.reshape(shape.all_units, 2, 4, 2, 2, shape.strips, 8, 2, 2)
    if shape.integers:
        # the registers i, s, r of a lane, and the bytes of one: h, e
        octets = axes.transpose(5, 0, 6, 2, 7, 1, 8, 3, 4).reshape(shape.strips, shape.all_units, 32, 8, 4) ^ np.uint8(1 << (shape.bits - 1))
        return np.concatenate([_byte_plane(octets, *plane) for plane in planes(shape.bits)], axis=-1)
    return fragments(axes, shape.bits)


def fragments(axes: np.ndarray, bits: int) -> np.ndarray:
    """axes: codes [unit, s, t, h, e, strip, g, i, r] -> int32 [strips, units, bits * 32]: those of lane 4 g + t at the places that `shuffled` says."""
    units, count = axes.shape[0], axes.shape[5]
    if bits == 8:
        ordered = np.ascontiguousarray(axes.transpose(5, 0, 1, 6, 2, 7, 3, 4, 8)) ^ np.uint8(128)
        return ordered.reshape(count, units, -1).view(np.int32)
    found = []
    for width, low in planes(bits):
        # words of a lane by s and i, the bits of one by e, what is left of these, h, r
        order = {4: (1, 7, 4, 3, 8), 2: (1, 4, 7, 3, 8), 1: (4, 1, 7, 3, 8)}[width]
        fields = (axes.transpose(5, 0, 6, 2, *order) >> low & ((1 << width) - 1)).reshape(count, units, 32 * width, 32 // width)
        found.append((fields.astype(np.uint32) << (width * np.arange(32 // width, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32))
    return np.concatenate(found, axis=-1).view(np.int32)


def _byte_plane(octets: np.ndarray, width: int, low: int) -> np.ndarray:
    """octets: [strips, units, 32 lanes, 8 registers, 4 bytes] -> int32 [strips, units, words] of the `width` bits from `low`: 8 / width registers a word, at the same place of each byte."""
    fields = (octets >> np.uint8(low) & np.uint8((1 << width) - 1)).reshape(*octets.shape[:3], width, 8 // width, 4)
    fields = np.bitwise_or.reduce(fields << (width * np.arange(8 // width, dtype=np.uint8)).reshape(-1, 1), axis=4)
    if width == 8:  # two loads of four words a lane
        fields = fields.reshape(*octets.shape[:3], 2, 4, 4).swapaxes(2, 3)
    return np.ascontiguousarray(fields).view(np.int32).reshape(*octets.shape[:2], 32 * width)


def strips(values: np.ndarray, dims: tuple[int, int, int]) -> np.ndarray:
    """[groups, N] -> [strips, groups, columns] with zeros behind both."""
    count, groups, columns = dims
    wide = np.pad(values, ((0, groups - values.shape[0]), (0, count * columns - values.shape[1])))
    return np.ascontiguousarray(wide.reshape(groups, count, columns).transpose(1, 0, 2))
