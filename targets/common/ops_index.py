"""Definitions of operators on positions. Indices are in range: `guards` has seen to it."""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import te, tirx
from .legalize import default_legalization, legalizer

#: elements of the longest range that is kept as a constant
LONGEST_CONSTANT = 1 << 16


def take(data: Any, indices: Any, axis: int) -> Any:
    """data: [..., N, ...] with N at `axis`, indices: [I...] in 0..N-1 -> [..., I..., ...]."""
    end = axis + len(indices.shape)

    def element(*axes: Any) -> Any:
        return data[(*axes[:axis], indices[axes[axis:end]], *axes[end:])]

    return te.compute([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]], element, name="take")


@legalizer("relax.take")
def _take(builder: Any, call: Any) -> Any:
    axis = 0 if call.attrs.axis is None else int(call.attrs.axis)
    return builder.call_te(take, *call.args, axis % len(call.args[0].ty.shape), primfunc_name_hint="take")


@legalizer("relax.arange")
def _arange(builder: Any, call: Any) -> Any:
    """Short ones with known bounds become constants, as in TVM; long ones would fill memory and artifact, so they are computed."""
    size = call.ty.shape[0]
    if not isinstance(size, tirx.IntImm) or int(size) <= LONGEST_CONSTANT:
        return default_legalization(builder, call)
    start, _, step = call.args
    dtype = str(call.ty.dtype)

    def arange() -> Any:
        return te.compute((size,), lambda i: tirx.Cast(dtype, start) + tirx.Cast(dtype, i) * tirx.Cast(dtype, step), name="arange")

    return builder.call_te(arange, primfunc_name_hint="arange")
