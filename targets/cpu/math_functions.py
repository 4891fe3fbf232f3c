"""Functions that `math_lowering` puts vector mathematics in the place of, by their names in kernels, and rounding to bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...compiler.tvm import T, tvm
from ..common.ops_cast import ROUNDED
from . import math
from .math import Names, cast, lanes_of, reinterpret, select
from .ops_gelu import GELU, GELU_TANH


def bfloat16_bits(name: Names, x: Any) -> Any:
    """The bfloat16 nearest to x, ties to even, as uint16; NaN stays NaN."""
    x = name(x)
    bits = name(reinterpret("uint32", x))
    nearest = bits + (((bits >> T.uint32(16)) & T.uint32(1)) + T.uint32(0x7FFF))
    return cast("uint16", select(x == x, nearest, bits | T.uint32(1 << 22)) >> T.uint32(16))


def bfloat16_bits_native(name: Names, x: Any) -> Any:
    """The same by `vcvtneps2bf16`, to which denormal numbers are zeros."""
    lanes = lanes_of(x)
    if lanes not in _TO_BFLOAT16:
        return bfloat16_bits(name, x)
    return T.call_pure_extern(f"uint16x{lanes}", f"tcompile_bf16_{32 * lanes}", x)


_TO_BFLOAT16 = (8, 16)
#: LLVM functions of the instruction: TVM has no vectors of bfloat16
NATIVE_LLVM = "".join(
    f"""
declare <{lanes} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.{32 * lanes}(<{lanes} x float>)
define linkonce_odr <{lanes} x i16> @tcompile_bf16_{32 * lanes}(<{lanes} x float> %x) alwaysinline nounwind {{
  %a = call <{lanes} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.{32 * lanes}(<{lanes} x float> %x)
  %r = bitcast <{lanes} x bfloat> %a to <{lanes} x i16>
  ret <{lanes} x i16> %r
}}
"""
    for lanes in _TO_BFLOAT16
)
#: function -> (feature of a target, function there)
NATIVE = {ROUNDED: ("avx512bf16", f"{ROUNDED}.native")}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "tirx.exp": math.exp,
    "tirx.log": math.log,
    "prim.log2": math.log2,
    "tirx.log1p": math.log1p,
    "tirx.erf": math.erf,
    GELU: math.gelu,
    GELU_TANH: math.gelu_tanh,
    "tirx.tanh": math.tanh,
    "tirx.sigmoid": math.sigmoid,
    "tirx.sin": math.sin,
    "tirx.cos": math.cos,
    "tirx.pow": math.power,
    "exp_nonpositive": math.exp_nonpositive,
    ROUNDED: bfloat16_bits,
    NATIVE[ROUNDED][1]: bfloat16_bits_native,
}

#: calls that a vectorised loop may hold
VECTOR_CALLS = frozenset(FUNCTIONS) | {
    f"tirx.{_name}" for _name in ("sqrt", "rsqrt", "floor", "trunc", "nearbyint", "fabs", "isnan", "reinterpret", "shift_left", "shift_right", "bitwise_and",
    "bitwise_or", "bitwise_xor", "bitwise_not")
} | {"prim.ceil", "prim.likely"}  # fmt: skip

# these expand to, or lower to, plain vector arithmetic; TVM's vectoriser would take them apart lane by lane
for _name in ("tirx.erf", "tirx.log1p", "tirx.rsqrt", "tirx.isnan", "tirx.nearbyint"):
    tvm.ir.register_op_attr(_name, "TVectorizable", True)
