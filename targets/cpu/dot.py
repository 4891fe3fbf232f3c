"""What one step of a register tile multiplies: one float32 per lane, or a group of short numbers whose products are added up to int32 or float32.

A step reads one *word* of the activations, spread over all lanes, and one word of the weights per lane. float32: a word is an element. u8 x s8 and bfloat16: a word holds
`group` consecutive k, and packed weights are int32 words, so that kernels index them exactly as floats, K / group of them. Integer products are exact in every case:
`vpmaddubsw`, which adds pairs with saturation, is used for weights with which it cannot saturate (see short_sums.py). Products of bfloat16 are exact too; their sums round to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.tvm import T
from ..base import Target
from ..common.fused import Unfusable
from ..common.ops_cast import rounded_bits
from ..common.words import packed_words


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

    name: "f32", "vnni" (vpdpbusd: 4 products a lane), "madd" (vpmaddwd, vpaddd: 2 products of 16 bit), "wide" (the same of activations that were widened before, see widen.py), "pairs" (vpmaddubsw, vpmaddwd by ones, vpaddd: 4 products), "quads" (two
    words, their vpmaddubsw added in 16 bits: 8 products), "bf16" (vdpbf16ps: 2 products a lane), "bf16fma" (the same by two multiply-adds), "f32xbf16" (float32 by weights of bfloat16 that are widened in registers: tuples of two numbers), "bf16x2" or "bf16x3" (bfloat16 by tiles, see `terms`). group: consecutive k of a step.
    activation: element type of what is read. accumulator: type of a sum. instructions: what a step of one accumulator takes, in multiplications. weight_bytes: of one packed number.
    broadcast_loads: loads that a word of the activations costs. parts: words of 4 bytes of a step; where there are several, `read`, `broadcast` and `weights` give tuples. terms: bfloat16 numbers that add up to one operand,
    which is float32 in memory where there are several.
    """

    name: str
    activation: str
    accumulator: str
    group: int
    instructions: float
    weight_bytes: int
    broadcast_loads: float = 1.0
    parts: int = 1
    terms: int = 1

    @property
    def operand(self) -> str:
        """Type of the activations in memory."""
        return self.activation if self.terms == 1 else "float32"

    @property
    def kind(self) -> str:
        """The kind of a product of u8 x s8 whose weights allow this."""
        return f"u8s8/{self.name}"

    @property
    def scratch(self) -> int:
        """Registers that a step takes beside sums, weights and a word of the activations: products, ones, and the second word."""
        return {"wide": 1, "pairs": 2, "quads": 4}.get(self.name, 0)

    @property
    def weight_registers(self) -> int:
        """Registers that a step's weights take, of one vector of columns."""
        return 2 if self.widens else self.parts

    @property
    def widens(self) -> bool:
        """Weights are widened to float32, for float32."""
        return self.name == "f32xbf16"

    @property
    def separate(self) -> bool:
        """Products are added by instructions of their own."""
        return self.name in ("madd", "wide", *_BY_BYTES)

    @property
    def grouped(self) -> bool:
        """Words hold several elements."""
        return self.group > 1

    @property
    def word(self) -> str:
        """Type of a packed weight word."""
        return "int32" if self.grouped else "float32"

    @property
    def activation_bits(self) -> int:
        return {"uint8": 8, "int16": 16, "bfloat16": 16, "float32": 32}[self.activation]

    @property
    def activation_bytes(self) -> int:
        return self.activation_bits // 8

    @property
    def llvm(self) -> str:
        """What a kernel imports, see `kernel`."""
        return _BF16_LLVM if self.name == "bf16" else ""

    def zero(self) -> Any:
        return T.int32(0) if self.accumulator == "int32" else T.float32(0)

    def min_lanes(self) -> int:
        """Fewest lanes of a vector: the instructions exist for 128 bits and more."""
        return 1 if self.name in ("f32", "bf16fma", "f32xbf16") else 4

    def words(self, k: int) -> int:
        """Words that hold k elements."""
        return -(-k // self.group)

    def read(self, x: Any, address: Callable[[Any], tuple[Any, ...]], k: Any) -> Any:
        """The `group` elements of buffer x from `address(k)`, consecutive in memory."""
        *lead, last = address(k)
        if not self.grouped:
            return x[(*lead, last)]
        if self.widens:
            return x[(*lead, last)], x[(*lead, last + 1)]
        size = self.group // self.parts
        words = tuple(
            T.reinterpret(self._word_read, x[(*lead, vector(last + T.int64(part * size) if part else last, size))]) for part in range(self.parts)
        )
        return words if self.parts > 1 else words[0]

    def read_part(self, x: Any, address: Callable[[Any], tuple[Any, ...]], k: Any, count: int) -> Any:
        """The same of `count` < group elements from `address(k)`, nothing behind them read."""
        if self.widens:
            return x[address(k)], self.zero()
        kind, bits, size = self._word_read, self.activation_bits, self.group // self.parts

        def word(first: int) -> Any:
            made: Any = None
            for position in range(min(size, count - first)):
                element = x[address(k + (first + position))]
                part = T.cast(T.reinterpret("uint16", element) if bits == 16 else element, kind)
                part = part << T.cast(T.int32(bits * position), kind) if position else part
                made = part if made is None else made | part
            return T.cast(T.int32(0), kind) if made is None else made

        words = tuple(word(part * size) for part in range(self.parts))
        return words if self.parts > 1 else words[0]

    @property
    def _word_read(self) -> str:
        return "int32" if self.activation_bits * self.group >= 32 else "uint16"

    def weights(self, row: Callable[[Any], Any], nr: int, v: int, lanes: int) -> Any:
        """Vector v of a step's packed weights, `row(place)` reading where a row of nr columns is packed."""
        words = tuple(T.bind(row(vector(T.int64(part * nr + v * lanes), lanes))) for part in range(self.parts))
        if self.widens:
            return _halves(words[0], lanes)
        return words if self.parts > 1 else words[0]

    def broadcast(self, word: Any, lanes: int) -> Any:
        """What `read` gave on every lane, as `multiply_add` takes it, in registers."""
        if self.parts > 1 or self.widens:
            return tuple(T.bind(splat(part, lanes)) for part in word)
        if self.name == "madd":
            # pairs of bytes become pairs of 16 bit
            return T.bind(T.cast(T.reinterpret(f"uint8x{2 * lanes}", splat(word, lanes)), f"int16x{2 * lanes}"))
        return T.bind(splat(word, lanes))

    def multiply_add(self, acc: Any, a: Any, b: Any, lanes: int) -> Any:
        """acc + a * b, or acc + the sum of the products of each lane's group."""
        if self.name == "f32":
            return fma(a, b, acc, lanes)
        if self.name == "bf16":
            return T.call_pure_extern(_typed("float32", lanes), f"tcompile_dpbf16ps_{32 * lanes}", acc, a, b)
        kind, halves = _typed("int32", lanes), f"int16x{2 * lanes}"
        if self.name in ("bf16fma", "f32xbf16"):
            pairs = zip(a, b, strict=True) if self.widens else zip(_halves(a, lanes), _halves(b, lanes), strict=True)
            for x, y in pairs:
                acc = fma(x, y, acc, lanes)
            return acc
        octets = f"int8x{4 * lanes}"
        if self.name == "vnni":
            return _call(kind, _DPBUSD[lanes], acc, T.reinterpret(octets, a), T.reinterpret(octets, b))
        if self.name in _BY_BYTES:
            words = zip(a, b, strict=True) if self.parts > 1 else ((a, b),)
            first, *others = (byte_pairs(x, y, lanes) for x, y in words)
            return add_pairs(acc, first + others[0] if others else first, lanes)
        return acc + _call(kind, _MADD[lanes], T.reinterpret(halves, a), T.reinterpret(halves, b))

    def pair(self, low: Any, high: Any, lanes: int) -> Any:
        """The words of two vectors of float32 rounded to bfloat16, `low` first in k."""
        if self.name == "bf16" and lanes in _PAIRED:
            return T.call_pure_extern(f"int32x{lanes}", f"tcompile_bf16_pairs_{32 * lanes}", low, high)
        kind = _typed("uint32", lanes)
        words = (rounded_bits(low, kind) >> splat(T.uint32(16), lanes)) | (rounded_bits(high, kind) & splat(T.uint32(0xFFFF0000), lanes))
        return T.reinterpret(_typed("int32", lanes), words)

    def pack_words(self, codes: np.ndarray) -> np.ndarray:
        """codes: [..., W, group, N] (int8 or bfloat16; zero filled to whole groups) -> words [..., W, N], or [..., W, parts * N]."""
        if not self.grouped:
            return codes[..., 0, :]
        if self.parts > 1:
            *lead, group, n = codes.shape
            return packed_words(codes.reshape(*lead, self.parts, group // self.parts, n)).reshape(*lead, self.parts * n)
        return packed_words(codes.astype(np.int16) if self.name in ("madd", "wide") else codes)


#: dot products by `vpmaddubsw`
_BY_BYTES = ("pairs", "quads")
#: instructions by lanes of 32 bits
_DPBUSD = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256", 4: "llvm.x86.avx512.vpdpbusd.128"}
_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}
_MADDUBS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw", 4: "llvm.x86.ssse3.pmadd.ub.sw.128"}
#: lanes of the vectors for which `pair` has functions
_PAIRED = (8, 16)


def _bf16_functions() -> str:
    """LLVM functions of vcvtneps2bf16 and vdpbf16ps on words: TVM widens bfloat16 arguments of an intrinsic to float32, so they have to be hidden from it."""
    text = ""
    for lanes in _PAIRED:
        floats, words, shorts, halves, bits = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{lanes} x i16>", f"<{lanes} x bfloat>", 32 * lanes
        shift = f"<{', '.join(['i32 16'] * lanes)}>"
        text += f"""
declare {halves} @llvm.x86.avx512bf16.cvtneps2bf16.{bits}({floats})
define linkonce_odr {words} @tcompile_bf16_pairs_{bits}({floats} %low, {floats} %high) alwaysinline nounwind {{
  %a = call {halves} @llvm.x86.avx512bf16.cvtneps2bf16.{bits}({floats} %low)
  %b = call {halves} @llvm.x86.avx512bf16.cvtneps2bf16.{bits}({floats} %high)
  %c = bitcast {halves} %a to {shorts}
  %d = bitcast {halves} %b to {shorts}
  %e = zext {shorts} %c to {words}
  %f = zext {shorts} %d to {words}
  %g = shl {words} %f, {shift}
  %r = or {words} %e, %g
  ret {words} %r
}}
"""
    for lanes in (4, 8, 16):
        floats, words, halves, bits = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>", 32 * lanes
        text += f"""
declare {floats} @llvm.x86.avx512bf16.dpbf16ps.{bits}({floats}, {halves}, {halves})
define linkonce_odr {floats} @tcompile_dpbf16ps_{bits}({floats} %sum, {words} %a, {words} %b) alwaysinline nounwind {{
  %x = bitcast {words} %a to {halves}
  %y = bitcast {words} %b to {halves}
  %r = call {floats} @llvm.x86.avx512bf16.dpbf16ps.{bits}({floats} %sum, {halves} %x, {halves} %y)
  ret {floats} %r
}}
"""
    return text


_BF16_LLVM = _bf16_functions()

F32 = Dot("f32", "float32", "float32", 1, 1, 4)
VNNI = Dot("vnni", "uint8", "int32", 4, 1, 1)
MADD = Dot("madd", "uint8", "int32", 2, 2, 2, broadcast_loads=2.0)
WIDE = Dot("wide", "int16", "int32", 2, 1.25, 2)
PAIRS = Dot("pairs", "uint8", "int32", 4, 2, 1)
QUADS = Dot("quads", "uint8", "int32", 8, 3, 1, broadcast_loads=2.0, parts=2)
BF16 = Dot("bf16", "bfloat16", "float32", 2, 1, 2)
BF16X2 = Dot("bf16x2", "bfloat16", "float32", 2, 1, 2, terms=2)
BF16X3 = Dot("bf16x3", "bfloat16", "float32", 2, 1, 2, terms=3)
BF16_FMA = Dot("bf16fma", "bfloat16", "float32", 2, 2, 2, broadcast_loads=2.0)
BF16_WEIGHTS = Dot("f32xbf16", "float32", "float32", 2, 2, 2)


def has_vnni(target: Target) -> bool:
    """Whether four products of u8 x s8 are added to 32 bits by one instruction."""
    return bool(target.features & {"avx512vnni", "avxvnni"})


def integer_dot(target: Target, kind: str = "u8s8") -> Dot:
    """The exact u8 x s8 dot product of a machine, for a kind that says what the weights allow."""
    return VNNI if has_vnni(target) else next((dot for dot in (WIDE, PAIRS, QUADS) if dot.kind == kind), MADD)


def dot_kind(inputs: tuple[Any, ...], accumulator: Any) -> str:
    """ "f32", "bf16", "f32xbf16" or "u8s8" for a core's two operands; raises Unfusable for other types."""
    types = (*(str(buffer.ty.dtype) for buffer in inputs[:2]), str(accumulator.ty.dtype))
    if types == ("float32", "float32", "float32"):
        return "f32"
    if types == ("bfloat16", "bfloat16", "float32"):
        return "bf16"
    if types == ("float32", "bfloat16", "float32"):
        return BF16_WEIGHTS.name
    if types == ("uint8", "int8", "int32"):
        return "u8s8"
    raise Unfusable(f"neither float32, bfloat16 -> float32, float32 x bfloat16 nor uint8 x int8 -> int32: {' x '.join(types[:2])} -> {types[2]}")


def dot_for(kind: str, target: Target) -> Dot:
    """The dot product by which `target` computes a kind of `dot_kind`."""
    if kind == "bf16":
        return BF16 if "bfloat16" in target.formats else BF16_FMA
    if kind == BF16_WEIGHTS.name:
        return BF16_WEIGHTS
    return F32 if kind == "f32" else integer_dot(target, kind)


def _halves(word: Any, lanes: int) -> tuple[Any, Any]:
    """The two bfloat16 of every lane as vectors of float32, the one in the low bits first."""
    floats, low, high = _typed("float32", lanes), splat(T.int32(16), lanes), splat(T.int32(-65536), lanes)
    return T.reinterpret(floats, word << low), T.reinterpret(floats, word & high)


def byte_pairs(a: Any, b: Any, lanes: int) -> Any:
    """Sums of two products of bytes, u8 x s8, in 16 bits, where they saturate."""
    octets = f"int8x{4 * lanes}"
    return _call(f"int16x{2 * lanes}", _MADDUBS[lanes], T.reinterpret(octets, a), T.reinterpret(octets, b))


def add_pairs(acc: Any, pairs: Any, lanes: int) -> Any:
    """acc + the two sums of 16 bits in every lane."""
    return acc + _call(_typed("int32", lanes), _MADD[lanes], pairs, splat(T.int16(1), 2 * lanes))


def _call(kind: str, name: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(kind, T.llvm_lookup_intrinsic_id(name), *args)


def _typed(kind: str, lanes: int) -> str:
    return f"{kind}x{lanes}" if lanes > 1 else kind
