"""What one step of a register tile multiplies: one float32 per lane, or a group of integer products that an instruction adds up to int32.

A step reads one *word* of the activations, spread over all lanes, and one word of the weights per lane. float32: a word is an element. u8 x s8: a word holds `group`
consecutive k, and packed weights are int32 words, so that kernels index them exactly as floats, K / group of them. A product is exact in every case: `vpmaddubsw`,
which adds pairs with saturation, is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Unfusable


def vector(base: Any, lanes: int) -> Any:
    """Index of `lanes` consecutive elements from `base`."""
    return T.ramp(base, T.int64(1), lanes) if lanes > 1 else base


def splat(value: Any, lanes: int) -> Any:
    return T.broadcast(value, lanes) if lanes > 1 else value


def fma(a: Any, b: Any, c: Any, lanes: int) -> Any:
    """a * b + c on vectors of float32, rounded once."""
    return T.call_llvm_pure_intrin(_typed("float32", lanes), T.llvm_lookup_intrinsic_id("llvm.fma"), a, b, c)


@dataclass(frozen=True)
class Dot:
    """One way to multiply and add.

    name: "f32", "vnni" (vpdpbusd: 4 products a lane) or "madd" (vpmaddwd, vpaddd: 2 products of 16 bit). group: consecutive k in a word. activation: element type
    of what is read; word: type of a packed weight word and of an accumulator. instructions: per step of one accumulator. weight_bytes: of one packed code.
    """

    name: str
    activation: str
    word: str
    group: int
    instructions: int
    weight_bytes: int

    @property
    def integer(self) -> bool:
        return self.word == "int32"

    @property
    def activation_bytes(self) -> int:
        return 1 if self.integer else 4

    def zero(self) -> Any:
        return T.int32(0) if self.integer else T.float32(0)

    def min_lanes(self) -> int:
        """Fewest lanes of a vector: the instructions exist for 128 bits and more."""
        return 4 if self.integer else 1

    def words(self, k: int) -> int:
        """Words that hold k elements."""
        return -(-k // self.group)

    def read(self, x: Any, address: Callable[[Any], tuple[Any, ...]], k: Any) -> Any:
        """The word of `group` elements of buffer x from `address(k)`, consecutive in memory."""
        *lead, last = address(k)
        if self.group == 1:
            return x[(*lead, last)]
        return T.reinterpret("int32" if self.group == 4 else "uint16", x[(*lead, vector(last, self.group))])

    def read_part(self, x: Any, address: Callable[[Any], tuple[Any, ...]], k: Any, count: int) -> Any:
        """The word of the `count` < group elements from `address(k)`, nothing behind them read."""
        kind = "int32" if self.group == 4 else "uint16"
        word: Any = None
        for position in range(count):
            part = T.cast(x[address(k + position)], kind)
            part = part << T.cast(T.int32(8 * position), kind) if position else part
            word = part if word is None else word | part
        return word

    def broadcast(self, word: Any, lanes: int) -> Any:
        """The word on every lane, as `multiply_add` takes it."""
        if self.name == "madd":
            # pairs of bytes become pairs of 16 bit
            return T.cast(T.reinterpret(f"uint8x{2 * lanes}", splat(word, lanes)), f"int16x{2 * lanes}")
        return splat(word, lanes)

    def multiply_add(self, acc: Any, a: Any, b: Any, lanes: int) -> Any:
        """acc + a * b, or acc + the sum of the products of each lane's group."""
        if self.name == "f32":
            return fma(a, b, acc, lanes)
        kind = _typed("int32", lanes)
        if self.name == "vnni":
            name = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256", 4: "llvm.x86.avx512.vpdpbusd.128"}[lanes]
            octets = f"int8x{4 * lanes}"
            return T.call_llvm_pure_intrin(kind, T.llvm_lookup_intrinsic_id(name), acc, T.reinterpret(octets, a), T.reinterpret(octets, b))
        name = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}[lanes]
        halves = f"int16x{2 * lanes}"
        return acc + T.call_llvm_pure_intrin(kind, T.llvm_lookup_intrinsic_id(name), T.reinterpret(halves, a), T.reinterpret(halves, b))

    def pack_words(self, codes: np.ndarray) -> np.ndarray:
        """codes: [..., W, group, N] (int8; zero filled to whole groups) -> words [..., W, N]."""
        if self.group == 1:
            return codes[..., 0, :]
        wide = np.ascontiguousarray(np.moveaxis(codes, -2, -1)).astype(np.int8 if self.group == 4 else np.int16)
        return wide.view(np.int32)[..., 0]


F32 = Dot("f32", "float32", "float32", 1, 1, 4)
VNNI = Dot("vnni", "uint8", "int32", 4, 1, 1)
MADD = Dot("madd", "uint8", "int32", 2, 2, 2)


def integer_dot(target: Target) -> Dot:
    """The exact u8 x s8 dot product of a machine."""
    return VNNI if target.features & {"avx512vnni", "avxvnni"} else MADD


def dot_kind(inputs: tuple[Any, ...], accumulator: Any) -> str:
    """ "f32" or "u8s8" for a core's two operands; raises Unfusable for other types."""
    types = (*(str(buffer.ty.dtype) for buffer in inputs[:2]), str(accumulator.ty.dtype))
    if types == ("float32", "float32", "float32"):
        return "f32"
    if types == ("uint8", "int8", "int32"):
        return "u8s8"
    raise Unfusable(f"neither float32 nor uint8 x int8 -> int32: {' x '.join(types[:2])} -> {types[2]}")


def dot_for(kind: str, target: Target) -> Dot:
    """The dot product by which `target` computes a kind of `dot_kind`."""
    return F32 if kind == "f32" else integer_dot(target)


def _typed(kind: str, lanes: int) -> str:
    return f"{kind}x{lanes}" if lanes > 1 else kind
