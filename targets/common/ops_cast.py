"""Casts to bfloat16, which TVM rounds without a look at NaN: some of them come out as infinities or zeros."""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import register_intrinsic, relax, te, tirx
from .legalize import default_legalization, legalizer


@legalizer("relax.astype")
def astype(builder: Any, call: Any) -> relax.Expr:
    """float32 -> bfloat16 rounds to nearest, ties to even; NaN stays a (quiet) NaN."""
    types = str(call.args[0].ty.dtype), str(call.attrs.dtype)
    if types == ("bfloat16", "float32"):  # in integers as well: where both are in one kernel, TVM would take the bits for a number
        return builder.call_te(lambda x: te.compute(x.shape, lambda *axes: widened(x[axes]), name="float32"), call.args[0], primfunc_name_hint="cast")
    if types != ("float32", "bfloat16"):
        return default_legalization(builder, call)
    return builder.call_te(lambda x: te.compute(x.shape, lambda *axes: rounded(x[axes]), name="bfloat16"), call.args[0], primfunc_name_hint="cast")


def rounded(value: Any) -> Any:
    """A float32 as bfloat16."""
    return tirx.reinterpret("bfloat16", tirx.call_intrin("uint16", ROUNDED, value))


def widened(value: Any) -> Any:
    """A bfloat16 as float32."""
    return tirx.reinterpret("float32", tirx.Cast("uint32", tirx.reinterpret("uint16", value)) << _bits(16))


def rounded_bits(value: Any, kind: str = "uint32") -> Any:
    """The bits of a float32, or with `kind` of a vector of them, the upper half rounded to a bfloat16; the lower half is of no use."""
    bits = tirx.reinterpret(kind, value)
    odd = (bits >> _bits(16)) & _bits(1)
    # without a branch: by integers alone, as comparisons give booleans, which do not vectorize well; NaN is what is larger than infinity
    magnitude = tirx.max(bits & _bits(0x7FFFFFFF), _bits(0x7F800000))
    nan = tirx.min(magnitude - _bits(0x7F800000), _bits(1))
    nearest = bits + (odd + _bits(0x7FFF)) * (_bits(1) - nan)
    return nearest | nan << _bits(22)


def _bits(value: int) -> Any:
    return tirx.const(value, "uint32")


def _by_integers(call: Any) -> Any:
    x = call.args[0]
    kind = str(x.ty.dtype).replace("float", "uint")
    return tirx.Cast(call.ty.dtype, rounded_bits(x, kind) >> _bits(16))


#: function of a float32: the 16 bits of the bfloat16 it rounds to, as uint16
ROUNDED = "tirx.tcompile_bfloat16_bits"
register_intrinsic(ROUNDED, _by_integers)
