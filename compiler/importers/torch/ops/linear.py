"""Matrix products, in the dtype of their operands (TVM's converters make every product float32), and embeddings."""

from __future__ import annotations

from typing import Any

from torch import fx

from ....tvm import relax
from .indexing import from_the_front
from .shape import argument


def _scaled(translator: Any, x: relax.Expr, factor: float) -> relax.Expr:
    return x if factor == 1 else translator.emit(relax.op.multiply(x, relax.const(factor, str(x.ty.dtype.dtype))))


def matmul(translator: Any, node: fx.Node) -> relax.Expr:
    left, right = translator.value(node.args[:2])
    return translator.emit(relax.op.matmul(left, right))


def linear(translator: Any, node: fx.Node) -> relax.Expr:
    """x: [..., K], weight: [N, K], bias: [N] -> [..., N]."""
    x, weight = translator.value(node.args[:2])
    bias = translator.value(argument(node, 2, "bias"))
    product = translator.emit(relax.op.matmul(x, translator.emit(relax.op.permute_dims(weight))))
    return product if bias is None else translator.emit(relax.op.add(product, bias))


def addmm(translator: Any, node: fx.Node) -> relax.Expr:
    """beta * bias + alpha * left @ right, also batched (baddbmm)."""
    bias, left, right = translator.value(node.args[:3])
    product = _scaled(translator, translator.emit(relax.op.matmul(left, right)), node.kwargs.get("alpha", 1))
    if (beta := node.kwargs.get("beta", 1)) == 0:
        return product
    return translator.emit(relax.op.add(product, _scaled(translator, bias, beta)))


def embedding(translator: Any, node: fx.Node) -> relax.Expr:
    """weight: [V, C], ids: [...] -> [..., C]. Ids below 0 raise at run time, as do those that are too large."""
    weight, ids = translator.value(node.args[:2])
    return translator.emit(relax.op.take(weight, from_the_front(translator, ids), axis=0))


CONVERTERS = {
    **{name: matmul for name in ("matmul.default", "mm.default", "bmm.default")},
    **{name: addmm for name in ("addmm.default", "baddbmm.default")},
    "linear.default": linear,
    "embedding.default": embedding,
}
