"""Definition of convolution as a tensor expression that carries its attributes; data NHWC, weights HWIO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...compiler.tvm import te, tirx
from .fused import core_attrs
from .legalize import default_legalization, legalizer
from .ops_linear import OUT_ELEMENTWISE_FUSABLE, widened


def conv2d(x: Any, w: Any, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, dtype: str = "") -> Any:
    """x: [N, H, W, Ci], w: [kh, kw, Ci / groups, Co] -> [N, OH, OW, Co] of `dtype` (that of x when empty). padding: top, left, bottom, right, in pixels of zeros."""
    batch, height, width, _ = x.shape
    taps_h, taps_w, depth, features = w.shape
    top, left, bottom, right = padding
    kh, kw, ci = te.reduce_axis((0, taps_h), "kh"), te.reduce_axis((0, taps_w), "kw"), te.reduce_axis((0, depth), "ci")
    out_h = (height + top + bottom - dilation[0] * (taps_h - 1) - 1) // strides[0] + 1
    out_w = (width + left + right - dilation[1] * (taps_w - 1) - 1) // strides[1] + 1
    per_group = features // groups

    def element(n: Any, i: Any, j: Any, co: Any) -> Any:
        row = i * strides[0] + kh * dilation[0] - top
        column = j * strides[1] + kw * dilation[1] - left
        channel = ci if groups == 1 else co // per_group * depth + ci
        value = x[n, row, column, channel]
        if any(padding):
            inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
            value = tirx.if_then_else(inside, value, tirx.const(0, x.dtype))
        return te.sum(widened(value, dtype) * widened(w[kh, kw, ci, co], dtype), axis=[kh, kw, ci])

    attrs = core_attrs("conv2d", strides=list(strides), padding=list(padding), dilation=list(dilation), groups=groups)
    return te.compute((batch, out_h, out_w, features), element, name="conv2d", attrs=attrs)


@legalizer("relax.nn.conv2d")
def _conv2d(builder: Any, call: Any) -> Any:
    attrs = call.attrs
    if (attrs.data_layout, attrs.kernel_layout, attrs.out_layout) != ("NHWC", "HWIO", "NHWC"):
        return default_legalization(builder, call)
    numbers = [[int(value) for value in values] for values in (attrs.strides, attrs.padding, attrs.dilation)]
    return builder.call_te(
        conv2d,
        *call.args,
        *numbers,
        int(attrs.groups),
        str(call.ty.dtype),
        primfunc_name_hint="conv2d",
        primfunc_attrs={"op_pattern": OUT_ELEMENTWISE_FUSABLE},
    )
