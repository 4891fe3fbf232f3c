"""Products in float8_e4m3fn.

    x8  = float8(x / sx)              once per tensor, shared by all its readers; saturating
    acc = x8 * w8                     products exact, sums float32
    y   = acc * (sx sw) + bias        per output channel

sx is a constant where ranges were observed, and otherwise the largest magnitude of a row (of a matrix product) or of an image (of a convolution) over 448, found while the model runs.
A cast to float8_e4m3fn rounds to nearest, ties to even, and saturates at 448; NaN stays NaN (`targets/common/float8.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...compiler.dialect.scaled_rows import row_scales, scaled_rows
from ...compiler.element_types import FLOAT8
from ...compiler.tvm import relax
from ..products import Site
from .formats import Covering, Encoded, Float8, ScaledFloat8, SlicedFloat8
from .schemes import Codes, Emit, Scheme, channels, number

op = relax.op


class Fp8(Scheme):
    """Weights and activations float8_e4m3fn."""

    name = "fp8"
    covering = staticmethod(ScaledFloat8.of_range)

    def weight(self, site: Site) -> Encoded:
        return Float8(axis=1 if site.kind == "matmul" else 0).encode(site.weight)

    def codes(self, emit: Emit, x: Any, covering: Covering) -> Codes:
        if not isinstance(covering, SlicedFloat8):
            return Codes(emit(op.astype(emit(op.multiply(x, number(1 / covering.scale))), FLOAT8)))
        if covering.axes == (-1,):
            both = emit(scaled_rows(x))
            scales = emit(relax.TupleGetItem(both, 1))
            return Codes(emit(relax.TupleGetItem(both, 0)), emit(op.reshape(scales, [*list(x.ty.shape)[:-1], 1])))
        scale = row_scales(emit, x, list(covering.axes))
        return Codes(emit(op.astype(emit(op.divide(x, scale)), FLOAT8)), scale)

    def decoded(self, emit: Emit, codes: Codes, covering: Covering) -> Any:
        wide = emit(op.astype(codes.expr, "float32"))
        return emit(op.multiply(wide, number(covering.scale) if isinstance(covering, ScaledFloat8) else codes.scale))

    def product(self, emit: Emit, site: Site, codes: Codes, covering: Covering, weight: Encoded) -> Any:
        w, scale = relax.const(np.ascontiguousarray(weight.codes), FLOAT8), weight.scale.reshape(-1)
        if site.kind == "matmul":
            value = emit(op.matmul(codes.expr, w, out_dtype="float32"))
        else:
            attrs = site.call.attrs
            numbers = ([int(value) for value in values] for values in (attrs.strides, attrs.padding, attrs.dilation))
            value = emit(op.nn.conv2d(codes.expr, w, *numbers, int(attrs.groups), "NCHW", "OIHW", "NCHW", "float32"))
        if isinstance(covering, ScaledFloat8):
            scale = np.float32(covering.scale) * scale
        else:
            value = emit(op.multiply(value, codes.scale))
        value = emit(op.multiply(value, channels(site, scale)))
        return value if site.bias is None else emit(op.add(value, channels(site, site.bias)))
