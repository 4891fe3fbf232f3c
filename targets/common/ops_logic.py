"""Definitions of negations that hold for NaN: TVM rewrites `not a < b` to `b <= a`, and its comparison for inequality is false where a NaN is met."""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import te, tirx, topi
from .legalize import default_legalization, legalizer


def _inverted(condition: Any) -> Any:
    """`not condition`, in integers, where no simplifier looks through."""
    return tirx.Cast("bool", tirx.bitwise_xor(tirx.Cast("int8", condition), tirx.IntImm("int8", 1)))


@legalizer("relax.logical_not")
def _logical_not(builder: Any, call: Any) -> Any:
    if str(call.args[0].ty.dtype) != "bool":
        return default_legalization(builder, call)

    def logical_not(x: Any) -> Any:
        return te.compute(x.shape, lambda *axes: _inverted(x[axes]), name="logical_not")

    return builder.call_te(logical_not, call.args[0], primfunc_name_hint="logical_not")


def _is_number(x: Any) -> Any:
    """x == x: false for NaN, where a simplifier would find it true."""
    return te.compute(x.shape, lambda *axes: _inverted(tirx.isnan(x[axes])), name="is_number")


@legalizer("relax.equal")
def _equal(builder: Any, call: Any) -> Any:
    if "float" not in str(call.args[0].ty.dtype) or not call.args[0].same_as(call.args[1]):
        return default_legalization(builder, call)
    return builder.call_te(_is_number, call.args[0], primfunc_name_hint="equal")


@legalizer("relax.not_equal")
def _not_equal(builder: Any, call: Any) -> Any:
    if "float" not in str(call.args[0].ty.dtype):
        return default_legalization(builder, call)
    if call.args[0].same_as(call.args[1]):
        return builder.call_te(topi.isnan, call.args[0], primfunc_name_hint="not_equal")

    def not_equal(left: Any, right: Any) -> Any:
        same = topi.equal(left, right)
        return te.compute(same.shape, lambda *axes: _inverted(same[axes]), name="not_equal")

    return builder.call_te(not_equal, *call.args, primfunc_name_hint="not_equal")
