"""Integers in the order of any numbers: what both importers hand to TVM's sorting, which knows neither NaN nor all integer types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..dialect.bitcast import bitcast
from ..tvm import relax

#: integers and booleans that cannot be sorted, and a wider type that can
_WIDER = {"bool": "int32", "int8": "int32", "uint8": "int32", "int16": "int32", "uint16": "int32", "uint32": "int64"}


def sort_keys(emit: Callable[[relax.Expr], relax.Expr], x: relax.Expr) -> relax.Expr:
    """x: a tensor of any type -> integers of its shape that are less where x is less. NaN is the greatest, whatever its sign; zeros are equal.

    Of floats the bits, those of negative ones reversed but for the sign: the order that IEEE 754 gives them.
    """
    op, dtype = relax.op, str(x.ty.dtype.dtype)
    if dtype == "uint64":  # with the highest bit flipped, signed numbers have the same order
        return emit(op.astype(emit(op.bitwise_xor(x, relax.const(1 << 63, dtype))), "int64"))
    if not dtype.startswith(("float", "bfloat")):
        return emit(op.astype(x, _WIDER[dtype])) if dtype in _WIDER else x
    wide = "float64" if dtype == "float64" else "float32"
    integer, x = wide.replace("float", "int"), x if dtype == wide else emit(op.astype(x, wide))
    x = emit(op.where(emit(op.isnan(x)), relax.const(np.nan, wide), emit(op.where(emit(op.equal(x, relax.const(0, wide))), relax.const(0, wide), x))))
    bits = emit(bitcast(x, integer))
    mirrored = emit(op.bitwise_xor(bits, relax.const(np.iinfo(integer).max, integer)))
    return emit(op.where(emit(op.less(bits, relax.const(0, integer))), mirrored, bits))
