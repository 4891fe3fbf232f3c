"""Layer norm and group norm, with or without scale and shift; softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from ....tvm import relax
from .elementwise import operand
from .shape import argument


def _affine(translator: Any, node: fx.Node, positions: tuple[int, int], shape: list[int], dtype: str) -> tuple[relax.Expr, relax.Expr]:
    """Scale and shift; ones and zeros of `shape` where the node has none."""
    scale, shift = (translator.value(argument(node, position, name)) for position, name in zip(positions, ("weight", "bias"), strict=True))
    scale = relax.const(np.ones(shape, dtype), dtype) if scale is None else scale
    return scale, relax.const(np.zeros(shape, dtype), dtype) if shift is None else shift


def layer_norm(translator: Any, node: fx.Node) -> relax.Expr:
    """layer_norm and native_layer_norm, x: [..., *shape], normalised over the axes of `shape`."""
    x, shape = translator.value(node.args[0]), [int(size) for size in node.args[1]]  # pyright: ignore[reportOptionalIterable]
    scale, shift = _affine(translator, node, (2, 3), shape, str(x.ty.dtype.dtype))
    return translator.emit(relax.op.nn.layer_norm(x, scale, shift, axes=list(range(-len(shape), 0)), epsilon=argument(node, 4, "eps", 1e-5)))


def _group_norm(translator: Any, node: fx.Node, affine: tuple[int, int], groups: int, epsilon: float) -> relax.Expr:
    x = translator.value(node.args[0])
    scale, shift = _affine(translator, node, affine, [int(x.ty.shape[1])], str(x.ty.dtype.dtype))
    axes = list(range(2, len(x.ty.shape)))
    return translator.emit(relax.op.nn.group_norm(x, scale, shift, num_groups=groups, channel_axis=1, axes=axes, epsilon=epsilon))


def group_norm(translator: Any, node: fx.Node) -> relax.Expr:
    """group_norm(x, groups, weight, bias, eps), x: [N, C, ...]."""
    return _group_norm(translator, node, (2, 3), node.args[1], argument(node, 4, "eps", 1e-5))


def native_group_norm(translator: Any, node: fx.Node) -> relax.Expr:
    """native_group_norm(x, weight, bias, N, C, HxW, groups, eps)."""
    return _group_norm(translator, node, (1, 2), node.args[6], node.args[7])


def softmax(op: Callable[..., relax.Expr]) -> Any:
    def convert(translator: Any, node: fx.Node) -> relax.Expr:
        """softmax, log_softmax along an axis, computed in the result's dtype."""
        x, dim = operand(translator, translator.value(node.args[0]), translator.out_dtype(node)), argument(node, 1, "dim", -1)
        if len(x.ty.shape):
            return translator.emit(op(x, dim))
        return translator.emit(relax.op.reshape(translator.emit(op(translator.emit(relax.op.reshape(x, [1])), 0)), []))

    return convert


CONVERTERS = {
    **{name: softmax(relax.op.nn.softmax) for name in ("softmax.int", "_softmax.default")},
    **{name: softmax(relax.op.nn.log_softmax) for name in ("log_softmax.int", "_log_softmax.default")},
    "layer_norm.default": layer_norm,
    "native_layer_norm.default": layer_norm,
    "group_norm.default": group_norm,
    "native_group_norm.default": native_group_norm,
}
