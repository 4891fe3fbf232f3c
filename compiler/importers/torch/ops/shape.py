"""Views, slices and broadcasts. Target shapes are torch's own, so sizes in the arguments (-1, symbolic) are never interpreted again."""

from __future__ import annotations

from typing import Any

from torch import fx

from ....tvm import relax, tirx
from ..symbols import same_shape


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def identity(translator: Any, node: fx.Node) -> relax.Expr:
    """clone, alias, detach, ...: values are immutable here."""
    return translator.value(node.args[0])


def to_dtype(translator: Any, node: fx.Node) -> relax.Expr:
    x, dtype = translator.value(node.args[0]), translator.out_dtype(node)
    return x if str(x.ty.dtype.dtype) == dtype else translator.emit(relax.op.astype(x, dtype))


def reshape(translator: Any, node: fx.Node) -> relax.Expr:
    x, shape = translator.value(node.args[0]), translator.out_shape(node)
    return x if same_shape(x.ty.shape, shape) else translator.emit(relax.op.reshape(x, shape))


def expand(translator: Any, node: fx.Node) -> relax.Expr:
    x, shape = translator.value(node.args[0]), translator.out_shape(node)
    return x if same_shape(x.ty.shape, shape) else translator.emit(relax.op.broadcast_to(x, shape))


def _axis(node: fx.Node, ndim: int) -> int:
    axis = argument(node, 1, "dim", 0)
    return axis + ndim if axis < 0 else axis


def _bound(value: Any, size: Any) -> Any:
    """A slice bound made non-negative."""
    if isinstance(value, int):
        return size + value if value < 0 else value
    return value


def slice_(translator: Any, node: fx.Node) -> relax.Expr:
    """x[start:end:step] along one axis; the length of the result is torch's, which has clamped the bounds already."""
    x, shape = translator.value(node.args[0]), translator.out_shape(node)
    axis, step = _axis(node, len(shape)), argument(node, 4, "step", 1)
    size = x.ty.shape[axis]
    if step == 1 and same_shape([size], [shape[axis]]):
        return x
    start = _bound(translator.value(argument(node, 2, "start")) or 0, size)
    if isinstance(start, int) and isinstance(size, tirx.IntImm):
        start = max(0, min(start, int(size)))
    stop = start + shape[axis] * step
    if isinstance(stop, int) and isinstance(size, tirx.IntImm):
        stop = min(stop, int(size))
    return translator.emit(relax.op.strided_slice(x, [axis], [start], [stop], [step], assume_inbound=True))


def select(translator: Any, node: fx.Node) -> relax.Expr:
    """x[..., index, ...]: a slice of one, reshaped, so that it stays a view and never a gather."""
    x = translator.value(node.args[0])
    axis = _axis(node, len(x.ty.shape))
    index = _bound(translator.value(node.args[2]), x.ty.shape[axis])
    piece = translator.emit(relax.op.strided_slice(x, [axis], [index], [index + 1], [1], assume_inbound=True))
    return translator.emit(relax.op.reshape(piece, translator.out_shape(node)))


def split(translator: Any, node: fx.Node) -> list[relax.Expr]:
    """split, split_with_sizes, chunk: one slice per piece; getitem picks from the list."""
    x = translator.value(node.args[0])
    axis = argument(node, 2, "dim", 0)
    axis += len(x.ty.shape) if axis < 0 else 0
    pieces, start = [], 0
    for value in node.meta["val"]:
        stop = start + translator.symbols.size(value.shape[axis])
        pieces.append(translator.emit(relax.op.strided_slice(x, [axis], [start], [stop], [1], assume_inbound=True)))
        start = stop
    return pieces


def unbind(translator: Any, node: fx.Node) -> list[relax.Expr]:
    x = translator.value(node.args[0])
    axis = _axis(node, len(x.ty.shape))
    pieces = []
    for index, value in enumerate(node.meta["val"]):
        piece = translator.emit(relax.op.strided_slice(x, [axis], [index], [index + 1], [1], assume_inbound=True))
        pieces.append(translator.emit(relax.op.reshape(piece, translator.symbols.shape(value.shape))))
    return pieces


def getitem(translator: Any, node: fx.Node) -> relax.Expr:
    """One of several results; converters of norms and pools give only the first, the one that inference uses."""
    values, index = translator.value(node.args[0]), node.args[1]
    if isinstance(values, (list, tuple)):
        return values[index]
    if isinstance(values.ty, relax.TupleType):
        return translator.emit(relax.TupleGetItem(values, index))
    if index != 0:
        raise NotImplementedError(f"result {index} of '{node.args[0]}' is not computed")
    return values


_RESHAPES = (
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "unflatten.int",
    "reshape_as.default",
    "unsqueeze.default",
)
_SQUEEZES = ("squeeze.default", "squeeze.dim", "squeeze.dims")
_IDENTITIES = ("clone.default", "alias.default", "detach.default", "contiguous.default", "lift_fresh_copy.default", "dropout.default")
CONVERTERS = {
    **{name: reshape for name in (*_RESHAPES, *_SQUEEZES)},
    **{name: identity for name in _IDENTITIES},
    **{name: expand for name in ("expand.default", "expand_as.default", "broadcast_to.default")},
    **{name: to_dtype for name in ("_to_copy.default", "to.dtype", "to.dtype_layout", "type_as.default")},
    **{name: split for name in ("split.Tensor", "split_with_sizes.default", "chunk.default")},
    "slice.Tensor": slice_,
    "select.int": select,
    "unbind.int": unbind,
    "getitem": getitem,
}
