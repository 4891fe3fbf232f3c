"""Products of short numbers, made ready for the tensor-core template: short floating-point numbers are not widened for them, and zeros are put behind K where it fills no whole words."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...compiler.dialect.bitcast import NAME as BITCAST
from ...compiler.dialect.bitcast import bitcast
from ...compiler.dialect.weight_only import NAME as WEIGHT_ONLY
from ...compiler.dialect.weight_only import attrs_of
from ...compiler.element_types import FLOAT8, numpy_dtype
from ...compiler.tvm import Constant, is_constant, relax, te, tirx
from ...passes.fusion import OPAQUE
from ...passes.products import operator
from ..common.fused import static
from .kernel import SHORT

_PRODUCTS = ("relax.matmul", "relax.nn.conv2d")
#: types of a product's operands and sums -> consecutive k in a word
GROUPS = {("uint8", "int8", "int32"): 4, ("bfloat16", "bfloat16", "float32"): 2, ("float16", "float16", "float32"): 2, (FLOAT8, FLOAT8, "float32"): 4}


def narrowed(builder: Any, call: Any) -> Any:
    """A matmul or NHWC conv2d of activations that were only widened to float32, by constant weights of no more bits, on the numbers as they are; any other call as it is.
    Products by weights in few bits take such activations, too, where their rows are whole words.

    Nothing is rounded: a product of two such numbers is exact in float32. Models in float16 and bfloat16 are imported with such operands.
    """
    if operator(call) == WEIGHT_ONLY:
        x = call.args[0]
        k = static(x.ty.shape[-1])
        short = _widened_from(builder, x) if k is not None and k % 2 == 0 else None
        return call if short is None else builder.normalize(relax.Call(call.op, [short, *call.args[1:]], call.attrs))
    if operator(call) not in _PRODUCTS or str(call.ty.dtype) != "float32":
        return call
    weight = builder.lookup_binding(call.args[1]) if isinstance(call.args[1], relax.Var) else call.args[1]
    if not isinstance(weight, Constant) or str(weight.ty.dtype) != "float32" or (short := _widened_from(builder, call.args[0])) is None:
        return call
    values, dtype = weight.value.numpy(), str(short.ty.dtype)
    with np.errstate(over="ignore"):
        rounded = values.astype(numpy_dtype(dtype))
    if not np.array_equal(rounded.astype(np.float32), values):
        return call
    weight, attrs = relax.const(rounded, dtype), call.attrs
    if operator(call) == "relax.matmul":
        return builder.normalize(relax.op.matmul(short, weight, out_dtype="float32"))
    numbers = ([int(value) for value in numbers] for numbers in (attrs.strides, attrs.padding, attrs.dilation))
    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
    return builder.normalize(relax.op.nn.conv2d(short, weight, *numbers, int(attrs.groups), *layouts, "float32"))


def rounded_back(builder: Any, call: Any) -> Any:
    """What was widened to float32, where the call rounds that to the type it came from; any other call as it is."""
    if operator(call) != "relax.astype" or str(call.ty.dtype) not in SHORT or (short := _widened_from(builder, call.args[0])) is None:
        return call
    return short if str(short.ty.dtype) == str(call.ty.dtype) else call


def _widened_from(builder: Any, x: Any) -> Any:
    """The tensor of short floating-point numbers of which x is the float32; None where x is something else."""

    def made(expr: Any, name: str) -> Any:
        call = builder.lookup_binding(expr) if isinstance(expr, relax.Var) else None
        return call if operator(call) == name else None

    if (cast := made(x, "relax.astype")) is not None:
        return cast.args[0] if str(cast.args[0].ty.dtype) in SHORT else None
    # bfloat16 comes as its bits: the upper halves of float32
    bits = made(x, BITCAST)
    shift = made(bits.args[0], "relax.left_shift") if bits is not None else None
    wide = made(shift.args[0], "relax.astype") if shift is not None else None
    if wide is None or str(wide.args[0].ty.dtype) != "uint16" or not is_constant(shift.args[1]) or int(shift.args[1].value.numpy()) != 16:
        return None
    return builder.emit(bitcast(wide.args[0], "bfloat16"))


def filled(builder: Any, call: Any) -> Any:
    """A matmul or NHWC conv2d of short activations by constant weights with K, or the channels, padded to whole words; any other call as it is. So are int8 activations of a product by weights in few bits."""
    name = operator(call)
    if name == WEIGHT_ONLY:
        x, k = call.args[0], static(call.args[0].ty.shape[-1])
        if str(x.ty.dtype) != "int8" or k is None or not k % 4 or attrs_of(call)[1] % 4:
            return call
        # groups are whole words, so there are as many as before
        padded = builder.emit(builder.call_te(_longer, x, -k % 4, primfunc_name_hint="pad", primfunc_attrs={"op_pattern": OPAQUE}))
        return relax.Call(call.op, [padded, *call.args[1:]], call.attrs, call.ty_args)
    if name not in _PRODUCTS:
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
