"""Integer products of which K fills no whole words: zeros are put behind K, so that the tensor-core template takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...compiler.tvm import Constant, relax

#: bytes in a word
WORD = 4


def filled(builder: Any, call: Any) -> Any:
    """A matmul or NHWC conv2d of uint8 activations by constant int8 weights with K, or the channels, padded to whole words; any other call as it is."""
    name = getattr(call.op, "name", "")
    if name not in ("relax.matmul", "relax.nn.conv2d"):
        return call
    x, weight = call.args
    weight = builder.lookup_binding(weight) if isinstance(weight, relax.Var) else weight
    if not isinstance(weight, Constant) or (str(x.ty.dtype), str(weight.ty.dtype), str(call.ty.dtype)) != ("uint8", "int8", "int32"):
        return call
    if name == "relax.nn.conv2d" and (int(call.attrs.groups) != 1 or (call.attrs.data_layout, call.attrs.kernel_layout) != ("NHWC", "HWIO")):
        return call
    values = weight.value.numpy()
    more = -values.shape[-2] % WORD if values.ndim > 1 else 0
    if not more:
        return call
    longer = np.pad(values, [*([(0, 0)] * (values.ndim - 2)), (0, more), (0, 0)])
    padded = builder.emit(relax.op.nn.pad(x, [0] * (2 * x.ty.ndim - 1) + [more], "constant", 0))
    return relax.Call(call.op, [padded, relax.const(longer, "int8")], call.attrs, call.ty_args)
