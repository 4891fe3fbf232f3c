"""GEMM and convolution on tensor cores: a fused function whose core is a matmul or an NHWC conv2d, its epilogue on the accumulators.

    block (n tile, m tile, batch): BM x BN of C            # tc::gemm in include/tcompile.cuh
        for k in steps of 32: shared <- A, B by cp.async, several steps ahead
            warps: fragments <- shared, rounded or split to the number policy; mma.sync
        C = epilogue(accumulators)

Where the blocks would leave most of the GPU idle (few rows: decoding), blockIdx.z counts parts of K, too: every block writes its sums to the workspace, and a second kernel adds
them up in their order, so that equal inputs give equal bits, and runs the epilogue.

A convolution is the same product over the windows of its image, whose addresses are computed (implicit GEMM): nothing is copied in global memory.

uint8 times int8, float8_e4m3fn, bfloat16 and float16 are the same product of words: four or two consecutive k of an activation lie in one already, and constant weights are packed to words
[K / 4][N] or [K / 2][N]. Copies, tiles and fragments do not care what a word holds; only `mma.sync` does.

Groups of a convolution are a batch: each a product of its channels of every window by its columns of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...compiler.element_types import FLOAT8
from ...compiler.tvm import tirx
from ..common.fused import Unfusable
from ..common.words import packed_words
from . import stream
from .kernel import Kernel, Packing, Signature, ctype
from .product import Product, Request
from .schedule import BK, GemmShape, TileSchedule, best_tile, predicted_cycles
from .sizes import blocks, divides, same, shown, simplified, times
from .words import GROUPS

#: fewer columns of a group leave part of every fragment empty
_LEAST_COLUMNS = 8
#: types of A -> number policy of include/tcompile.cuh of what lies in words; fp32 products have the policy that was asked for
_POLICIES = {"uint8": "U8S8", "bfloat16": "Bf16x2", "float16": "Fp16x2", FLOAT8: "E4m3x4"}


#: prints where a batch begins, by a function that gives the C of a size
Offset = Callable[[Callable[[Any], str]], str]


@dataclass(frozen=True)
class Operand:
    """A source of include/tcompile.cuh: its type, words per copy, the offset of a batch, and the open sizes that it holds."""

    source: str
    vector: int
    offset: Offset = field(default=lambda size: "")
    sizes: tuple[Any, ...] = ()

    def declared(self, name: str, data: str, signature: Signature) -> str:
        offset = self.offset(signature.size)
        fields = "".join(f", {signature.size(size)}" for size in self.sizes)
        return f"const {self.source} {name}{{{data}{f' + {offset}' if offset else ''}{fields}}};"


class Gemm(Product):
    """A fused function as a product of matrices of words, and its kernels by mma.sync; other templates override how operands reach the tensor cores."""

    cores = ("matmul", "conv2d")
    open_sizes = True
    #: the template knows equal shares (stream.py)
    equal_shares = True

    def __init__(self, asked: Request):
        super().__init__(asked)
        fused, known = self.fused, self.known
        self.factors = self._factors()
        types = tuple(str(buffer.ty.dtype) for buffer in (*self.factors, fused.accumulator))
        if types != ("float32",) * 3 and types not in GROUPS:
            raise Unfusable(f"products of {types[0]} and {types[1]} as {types[2]}")
        self.groups = fused.core.get("groups", 1)
        self.policy, self.group, self.sum = _POLICIES.get(types[0], asked.policy), GROUPS.get(types, 1), ctype(types[2])
        self.packings = () if self.group == 1 else (self._packing(asked.constants),)
        self.dims = [simplified(dim) for dim in fused.accumulator.shape]
        if fused.core["op"] == "conv2d":
            self.batch_dims, self.row_dims, self.k, self.a, self.b = [], self.dims[:-1], *self._windows()
        else:
            self.batch_dims, self.row_dims, self.k, self.a, self.b = self._matrices()
        #: words of k
        self.m, self.n, self.batch = times(self.row_dims), simplified(self.dims[-1] // self.groups), times([*self.batch_dims, self.groups])
        #: the sizes of a product of matrices are known
        self.fixed = all(isinstance(size, int) for size in (self.m, self.k, self.n, *self.a.sizes))
        self.shape = self._shape(known.typical(self.m))

    def _factors(self) -> tuple[Any, Any]:
        """What is multiplied: activations, weights."""
        return self.fused.inputs[0], self.fused.inputs[1]

    def _shape(self, rows: int) -> GemmShape:
        """The product of so many rows, its other sizes as they are expected."""
        batch, k, n = (max(1, self.known.typical(size)) for size in (self.batch, self.k, self.n))
        return GemmShape(batch, max(1, rows), k, n, self.a.vector, self.b.vector, "Windows" in self.a.source)

    @property
    def kind(self) -> str:
        """The template's name."""
        return "conv2d" if self.fused.core["op"] == "conv2d" else "gemm"

    def best(self) -> TileSchedule:
        """The tile of least predicted time."""
        return self._best(self.shape)

    def _best(self, shape: GemmShape) -> TileSchedule:
        tile = best_tile(shape, self.target, self.policy, shares=self._takes_shares())
        return tile if isinstance(self.k, int) else replace(tile, parts=1)

    @property
    def k_steps(self) -> int:
        """Steps of K."""
        return math.ceil(self.k / BK)

    def streamed(self, sizes: str) -> str:
        """The device template of equal shares, of these sizes."""
        return f"gemm_stream<tc::{self.policy}, {sizes}, {self.a.vector}, {self.b.vector}>"

    def _takes_shares(self) -> bool:
        """Whether blocks may take equal shares of it: one product of known sizes."""
        return self.equal_shares and self.fixed and all(isinstance(size, int) and size == 1 for size in (self.batch, self.groups))

    def _of(self, tile: TileSchedule) -> tuple[Kernel, ...]:
        return stream.kernels(self, tile) if tile.shares else super()._of(tile)

    def best_for(self, rows: int) -> TileSchedule:
        return self._best(self._shape(rows))

    def cycles(self, tile: TileSchedule, rows: int) -> float:
        return predicted_cycles(self._shape(rows), tile, self.target, self.policy)

    def resident(self, tile: TileSchedule) -> int | None:
        """Blocks that are to fit a multiprocessor, where that is not left to nvcc: it makes room for more of those of words than there is shared memory for, and spills."""
        return 1 if self.group > 1 else None

    def _product(self, tile: TileSchedule, signature: Signature, written: Sequence[Any], value: list[str]) -> Kernel:
        """The product, or that of a part of K for every blockIdx.z. value: body of the lambda (m, n, sum) -> what is written."""
        operands, call = self.operands(tile, signature), self._call(tile, signature)
        whole = self.n if self.groups > 1 else times([self.m, self.n])
        start = f" + (size_t)blockIdx.z * {signature.size(whole)}" if tile.parts > 1 or self.batch != 1 else ""
        kinds = [ctype(buffer.ty.dtype) for buffer in written]
        out = f"const tc::To<{', '.join(kinds)}> out{{{', '.join(signature.name(buffer) + start for buffer in written)}}};"
        column = "column" if self.groups > 1 else "n"
        value = [f"const int n = blockIdx.z * {self.n} + column;", *value] if self.groups > 1 else value
        lines = [f"using T = {tile.source};", *operands, out, f"{call}, [&](int m, int {column}, {self.sum} sum) -> {kinds[0]} {{"]
        lines += [f"  {line}" for line in value] + ["});"]
        return signature.kernel(
            lines,
            grid=self._grid(tile),
            threads=tile.threads,
            resident=self.resident(tile),
            shared_bytes=tile.shared_bytes,
            kind=self.kind,
            workload=self.workload(),
            schedule=str(tile),
        )

    def workload(self) -> str:
        return f"{self._sizes_text()} {self.policy}"

    def _grid(self, tile: TileSchedule) -> tuple[Any, Any, Any]:
        return blocks(self.n, tile.bn), self._row_blocks(tile), times([self.batch, tile.parts])

    def _row_blocks(self, tile: TileSchedule) -> Any:
        """Blocks along y."""
        return blocks(self.m, tile.bm)

    def _sizes_text(self) -> str:
        return f"{self.kind.split()[0]} {shown(self.batch)}x{shown(self.m)}x{shown(times([self.k, self.group]))}x{shown(self.n)}"

    def _data(self, signature: Signature) -> list[str]:
        """Where activations and weights, packed ones if there are any, lie in memory."""
        operands = [self.factors[0], self.packings[0].buffer if self.packings else self.factors[1]]
        return [signature.name(buffer) if self.group == 1 else f"tc::words({signature.name(buffer)})" for buffer in operands]

    def operands(self, tile: TileSchedule, signature: Signature) -> list[str]:
        """Declarations of what the call reads."""
        names = self._data(signature)
        return [operand.declared(side, name, signature) for side, name, operand in zip("ab", names, (self.a, self.b), strict=True)]

    def _call(self, tile: TileSchedule, signature: Signature) -> str:
        """The device template called on them, up to its last argument."""
        k = tile.part_of(self.k)
        start = f"blockIdx.z * {k}" if tile.parts > 1 else "0"
        sizes, vectors = ", ".join(map(signature.size, (self.m, self.n, k))), f"{self.a.vector}, {self.b.vector}"
        place = f"blockIdx.y * T::BM, blockIdx.x * T::BN, {start}"
        if self.fixed:
            distance = f", {self.dims[-1]}" if self.groups > 1 else ""
            return f"tc::gemm<tc::{self.policy}, T, {sizes}, {vectors}{distance}>(a, b, out, {place}"
        return f"tc::gemm<tc::{self.policy}, T, {vectors}>(a, b, out, {sizes}, {signature.size(self.dims[-1])}, {place}"

    def _in_words(self, size: Any) -> Any:
        if not isinstance(size, int) and self.group > 1:
            raise Unfusable("numbers of fewer bits, of which so many are known only at run time")
        if self.group > 1 and size % self.group:
            raise Unfusable(f"{size} consecutive elements, no multiple of {self.group}")
        return size // self.group if self.group > 1 else size

    def _packing(self, constants: frozenset[int]) -> Packing:
        weight = self.factors[1]
        if list(self.fused.params).index(weight) not in constants:
            raise Unfusable("weights that are computed")
        shape = [simplified(dim) for dim in weight.shape]
        if self.fused.core["op"] == "conv2d":
            shape = [math.prod(shape[:3]), shape[3]]
        buffer = tirx.decl_buffer((*shape[:-2], shape[-2] // self.group, shape[-1]), "int32", "weights")
        return Packing(weight, buffer, lambda array: packed(array.reshape(shape), self.group))

    def _matrices(self) -> tuple[list[Any], list[Any], Any, Operand, Operand]:
        a, b = ([simplified(dim) for dim in buffer.shape] for buffer in self.fused.inputs)
        a[-1] = b[-2] = self._in_words(a[-1])
        k, n = b[-2:]
        flat = times(b[:-2]) == 1  # one B for all: the leading dims of A are rows
        batch, rows = ([], self.dims[:-1]) if flat and same(times(a[:-1]), times(self.dims[:-1])) else (self.dims[:-2], self.dims[-2:-1])
        one, other = (_matrix(height, width, self.offset(dims, batch), width) for height, width, dims in ((times(rows), k, a), (k, n, b)))
        return batch, rows, k, one, other

    @staticmethod
    def offset(shape: Sequence[Any], batch: Sequence[Any]) -> Offset:
        """Where the matrix of batch blockIdx.z begins; dims of 1 broadcast. It is printed by a function that gives the C of a size."""
        lead = [1] * (len(batch) - len(shape) + 2) + list(shape[:-2])
        if same(times(batch), times(shape[:-2])) and times(batch) != 1:
            return lambda size: f"(size_t)blockIdx.z * {size(times(shape[-2:]))}"

        def terms(size: Callable[[Any], str]) -> str:
            found, own, whole = [], times(shape[-2:]), 1
            for mine, dim in zip(reversed(lead), reversed(batch), strict=False):
                if mine != 1:
                    index = f"blockIdx.z / {size(whole)} % {size(dim)}" if whole != 1 else f"blockIdx.z % {size(dim)}"
                    found.append(f"(size_t)({index}) * {size(own)}")
                    own = times([own, mine])
                whole = times([whole, dim])
            return " + ".join(found)

        return terms

    def _windows(self) -> tuple[int, Operand, Operand]:
        core = self.fused.core
        batch, height, width, _ = (simplified(dim) for dim in self.fused.inputs[0].shape)
        taps_h, taps_w, depth, features = (simplified(dim) for dim in self.fused.inputs[1].shape)
        if not all(isinstance(size, int) for size in (depth, taps_h, taps_w, features)):
            raise Unfusable("channels or taps known only at run time")
        depth, columns = self._in_words(depth), features // self.groups
        if self.groups > 1 and columns < _LEAST_COLUMNS:
            raise Unfusable(f"a grouped convolution of {columns} features a group")
        (stride_h, stride_w), (top, left, _, _), (dilate_h, dilate_w) = core["strides"], core["padding"], core["dilation"]
        k = taps_h * taps_w * depth
        offsets = (f"blockIdx.z * {depth}", f"blockIdx.z * {columns}") if self.groups > 1 else ("", "")
        first, second = (_at(offset) for offset in offsets)
        # rows of a group's channels and columns lie further apart than they are long
        weights = _matrix(k, columns, second, features)
        plain = taps_h == taps_w == stride_h == stride_w == 1 and not any(core["padding"])
        if plain:
            return k, _matrix(times([batch, height, width]), depth, first, depth * self.groups), weights
        numbers = (batch, height, width, depth, self.dims[1], self.dims[2], taps_h, taps_w, stride_h, stride_w, top, left, dilate_h, dilate_w)
        pixel = f", {depth * self.groups}"
        if all(isinstance(size, int) for size in numbers):
            return k, Operand(f"tc::Windows<{', '.join(map(str, numbers))}{pixel if self.groups > 1 else ''}>", vector(depth), first), weights
        extents = (*numbers[:3], *numbers[4:6])
        types = ", ".join("int" if isinstance(size, int) else "tc::Size" for size in extents)
        source = f"tc::OpenWindows<{', '.join(map(str, (depth, *numbers[6:])))}{pixel}, {types}>"
        return k, Operand(source, vector(depth), first, extents), weights


def _at(offset: str) -> Offset:
    return lambda size: offset


def _matrix(rows: Any, columns: Any, offset: Offset, distance: Any) -> Operand:
    """distance: from row to row."""
    if isinstance(rows, int) and isinstance(columns, int):
        return Operand(f"tc::Matrix<{rows}, {columns}{'' if distance == columns else f', {distance}'}>", vector(columns), offset)
    return Operand("tc::OpenMatrix", vector(columns), offset, (rows, columns, distance))


def packed(codes: np.ndarray, group: int) -> np.ndarray:
    """[..., K, N] of `group` elements in 4 bytes -> words [..., K / group, N] of consecutive k."""
    *lead, k, n = codes.shape
    return packed_words(codes.reshape(*lead, k // group, group, n))


def vector(columns: Any) -> int:
    """Floats, or words, per asynchronous copy along rows of this length: all rows have to be as aligned as the first."""
    return next(width for width in (4, 2, 1) if divides(width, columns))
