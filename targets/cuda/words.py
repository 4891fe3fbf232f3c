"""Products of short numbers of which K fills no whole words: zeros are put behind K, so that the tensor-core template takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...compiler.tvm import Constant, relax, te, tirx
from ...passes.fusion import OPAQUE

#: types of a product's operands and sums -> consecutive k in a word
GROUPS = {("uint8", "int8", "int32"): 4, ("bfloat16", "bfloat16", "float32"): 2, ("float16", "float16", "float32"): 2}


def filled(builder: Any, call: Any) -> Any:
    """A matmul or NHWC conv2d of short activations by constant weights with K, or the channels, padded to whole words; any other call as it is."""
    name = getattr(call.op, "name", "")
    if name not in ("relax.matmul", "relax.nn.conv2d"):
        return call
    x, weight = call.args
    weight = builder.lookup_binding(weight) if isinstance(weight, relax.Var) else weight
    if not isinstance(weight, Constant) or (types := (str(x.ty.dtype), str(weight.ty.dtype), str(call.ty.dtype))) not in GROUPS:
        return call
    if name == "relax.nn.conv2d" and (int(call.attrs.groups) != 1 or (call.attrs.data_layout, call.attrs.kernel_layout) != ("NHWC", "HWIO")):
        return call
    values = weight.value.numpy()
    more = -values.shape[-2] % GROUPS[types] if values.ndim > 1 else 0
    if not more:
        return call
    longer = np.pad(values, [*([(0, 0)] * (values.ndim - 2)), (0, more), (0, 0)])
    padded = builder.emit(builder.call_te(_longer, x, more, primfunc_name_hint="pad", primfunc_attrs={"op_pattern": OPAQUE}))
    return relax.Call(call.op, [padded, relax.const(longer, types[1])], call.attrs, call.ty_args)


def _longer(x: Any, more: int) -> Any:
    """x with `more` zeros behind each row. A kernel of its own: behind a product it would take that one off the tensor cores."""
    *lead, width = x.shape
    return te.compute((*lead, width + more), lambda *at: tirx.if_then_else(at[-1] < width, x[at], tirx.const(0, x.dtype)), name="pad")
