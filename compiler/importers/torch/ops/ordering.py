"""Sorting, the greatest elements, and extremes with their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ....tvm import relax
from ...sort_keys import sort_keys
from .elementwise import operand
from .shape import argument

#: (translator, node) -> the Relax expressions of several results
Converter = Callable[[Any, fx.Node], list[relax.Expr]]


def _vector(translator: Any, node: fx.Node) -> relax.Expr:
    """The first operand, with an axis of one element where it has none."""
    x = translator.value(node.args[0])
    return x if len(x.ty.shape) else translator.emit(relax.op.reshape(x, [1]))


def _chosen(translator: Any, node: fx.Node, x: relax.Expr, places: relax.Expr, dim: int) -> list[relax.Expr]:
    """Elements of x at places along an axis, and the places, in the shape that torch gives them."""
    results = [translator.emit(relax.op.gather_elements(x, places, axis=dim)), places]
    return results if len(node.meta["val"][0].shape) else [translator.emit(relax.op.reshape(result, [])) for result in results]


def sort(translator: Any, node: fx.Node) -> list[relax.Expr]:
    """The sorted elements along an axis and their places, those of equal ones in order."""
    x, dim = _vector(translator, node), argument(node, 1, "dim", -1)
    places = translator.emit(relax.op.argsort(sort_keys(translator.emit, x), dim, bool(argument(node, 2, "descending", False)), dtype="int64"))
    return _chosen(translator, node, x, places, dim)


def topk(translator: Any, node: fx.Node) -> list[relax.Expr]:
    """The k greatest or least elements along an axis, sorted, and their places."""
    x, count, dim = _vector(translator, node), node.args[1], argument(node, 2, "dim", -1)
    if not isinstance(count, int):
        raise NotImplementedError("a number of elements that is no constant")
    if count == 0:  # to TVM that means all
        raise NotImplementedError("no elements at all")
    places = translator.emit(
        relax.op.topk(
            sort_keys(translator.emit, x), k=count, axis=dim, largest=bool(argument(node, 3, "largest", True)), ret_type="indices", dtype="int64"
        )
    )
    return _chosen(translator, node, x, places, dim)


def extreme(op: Callable[..., relax.Expr], place: Callable[..., relax.Expr]) -> Converter:
    """max.dim, min.dim: the extreme along an axis (NaN where there is one) and its first place."""

    def convert(translator: Any, node: fx.Node) -> list[relax.Expr]:
        x, dim, keep = _vector(translator, node), node.args[1], bool(argument(node, 2, "keepdim", False))
        dtype = str(x.ty.dtype.dtype)
        numbers = operand(translator, x, "uint8" if dtype == "bool" else dtype)
        results = [operand(translator, translator.emit(op(numbers, [dim], keep)), dtype), translator.emit(place(numbers, dim, keep))]
        return [translator.emit(relax.op.reshape(result, [])) if not len(node.meta["val"][0].shape) else result for result in results]

    return convert


CONVERTERS: dict[str, Converter] = {
    "sort.default": sort,
    "sort.stable": sort,
    "topk.default": topk,
    "max.dim": extreme(relax.op.max, relax.op.argmax),
    "min.dim": extreme(relax.op.min, relax.op.argmin),
}
