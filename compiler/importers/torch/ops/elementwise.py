"""Element-wise operators whose dtype promotion or arguments TVM's converters get wrong."""

from __future__ import annotations

from typing import Any

from torch import fx

from ....tvm import relax


def _operand(translator: Any, value: Any, dtype: str) -> relax.Expr:
    """A tensor or a number, in `dtype`."""
    if isinstance(value, relax.Expr):
        return value if str(value.ty.dtype.dtype) == dtype else translator.emit(relax.op.astype(value, dtype))
    return relax.const(value, dtype)


def where(translator: Any, node: fx.Node) -> relax.Expr:
    condition, left, right = translator.value(node.args[:3])
    dtype = translator.out_dtype(node)
    return translator.emit(relax.op.where(condition, _operand(translator, left, dtype), _operand(translator, right, dtype)))


def masked_fill(translator: Any, node: fx.Node) -> relax.Expr:
    x, mask, value = translator.value(node.args[:3])
    return translator.emit(relax.op.where(mask, _operand(translator, value, translator.out_dtype(node)), x))


CONVERTERS = {
    **{name: where for name in ("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")},
    **{name: masked_fill for name in ("masked_fill.Scalar", "masked_fill.Tensor")},
}
