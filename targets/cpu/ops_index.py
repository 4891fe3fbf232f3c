"""Definitions of operators that read at computed positions. Their indices are in range: `guards` has seen to it."""

from __future__ import annotations

from typing import Any

from ...compiler.tvm import te
from .legalize import legalizer


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
