"""Views, slices and broadcasts. Target shapes are torch's own, so sizes in the arguments (-1, symbolic) are never interpreted again."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ....tvm import relax, tirx, tvm
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


def repeat(translator: Any, node: fx.Node) -> relax.Expr:
    """x repeated along each axis, new axes in front: every axis gets one beside it that is broadcast and merged again."""
    x, shape, counts = translator.value(node.args[0]), translator.out_shape(node), translator.value(node.args[1])
    sizes = [1] * (len(shape) - len(x.ty.shape)) + list(x.ty.shape)
    pairs = [(1, size) for size in sizes], [(count, size) for count, size in zip(counts, sizes, strict=True)]
    narrow, wide = ([size for pair in axes for size in pair] for axes in pairs)
    if same_shape(narrow, wide):
        return translator.emit(relax.op.reshape(x, shape))
    spread = translator.emit(relax.op.broadcast_to(translator.emit(relax.op.reshape(x, narrow)), wide))
    return translator.emit(relax.op.reshape(spread, shape))


def _axis(node: fx.Node, ndim: int) -> int:
    axis = argument(node, 1, "dim", 0)
    return axis + ndim if axis < 0 else axis


def _bound(translator: Any, argument: Any, size: Any) -> Any:
    """A slice bound made non-negative; 0 where there is none. The sign of a symbolic one is torch's knowledge of its range."""
    value, given = translator.value(argument), argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if value is None:
        return 0
    if isinstance(value, int):
        return size + value if value < 0 else value
    if not tvm.ir.is_prim_expr(value):
        raise NotImplementedError("a position that depends on the data and may be negative; torch._check(position >= 0) says that it is not")
    if statically_known_true(given < 0):
        return size + value
    if not statically_known_true(given >= 0):
        raise NotImplementedError(f"position {given} may be negative or not")
    return value


def _size(value: Any) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def slice_(translator: Any, node: fx.Node) -> relax.Expr:
    """x[start:end:step] along one axis; the length of the result is torch's, which has clamped the bounds already."""
    x, step = translator.value(node.args[0]), argument(node, 4, "step", 1)
    axis = _axis(node, len(x.ty.shape))
    size = x.ty.shape[axis]
    if translator.symbols.depends_on_data(node.meta["val"].shape[axis]):
        last = argument(node, 3, "end")
        start = tirx.min(_size(_bound(translator, argument(node, 2, "start"), size)), size)
        end = size if last is None else tirx.min(_size(_bound(translator, last, size)), size)
        end = tirx.max(end, start)
        translator.symbols.counted(node.meta["val"].shape[axis])  # what the result's size will be
        return translator.emit(relax.op.strided_slice(x, [axis], [start], [end], [step], assume_inbound=True))
    shape = translator.out_shape(node)
    if step == 1 and same_shape([size], [shape[axis]]):
        return x
    start = _bound(translator, argument(node, 2, "start"), size)
    if isinstance(start, int) and isinstance(size, tirx.IntImm):
        start = max(0, min(start, int(size)))
    stop = start + shape[axis] * step
    if isinstance(stop, int) and isinstance(size, tirx.IntImm):
        stop = min(stop, int(size))
    return translator.emit(relax.op.strided_slice(x, [axis], [start], [stop], [step], assume_inbound=True))


def slice_scatter(translator: Any, node: fx.Node) -> relax.Expr:
    """x with source in place of x[start:end:step] along one axis: the rest of x around it, or a choice element by element where steps skip some."""
    x, source = translator.value(node.args[:2])
    axis, step = argument(node, 2, "dim", 0), argument(node, 5, "step", 1)
    axis += len(x.ty.shape) if axis < 0 else 0
    size, length = x.ty.shape[axis], source.ty.shape[axis]
    start = _bound(translator, argument(node, 3, "start"), size)
    if isinstance(start, int) and isinstance(size, tirx.IntImm):
        start = max(0, min(start, int(size)))
    emit, op = translator.emit, relax.op
    if step == 1:
        before = [] if same_shape([start], [0]) else [emit(op.strided_slice(x, [axis], [0], [start], [1], assume_inbound=True))]
        rest = same_shape([start + length], [size])
        after = [] if rest else [emit(op.strided_slice(x, [axis], [start + length], [size], [1], assume_inbound=True))]
        return source if not before and not after else emit(op.concat([*before, source, *after], axis=axis))
    if not all(isinstance(value, (int, tirx.IntImm)) for value in (start, size, length)):
        raise NotImplementedError("a slice of symbolic length with steps is not replaced")
    places = np.full(int(size), -1)
    places[int(start) :: step][: int(length)] = np.arange(int(length))
    hit = relax.const((places >= 0).reshape([-1] + [1] * (len(x.ty.shape) - axis - 1)), "bool")
    return emit(op.where(hit, emit(op.take(source, relax.const(np.maximum(places, 0), "int64"), axis, mode="fast")), x))


def cat(translator: Any, node: fx.Node) -> relax.Expr:
    """Tensors one behind the other along an axis, in the result's dtype; a vector without elements may stand among tensors of any rank."""
    dtype, parts = translator.out_dtype(node), translator.value(node.args[0])
    rank = len(node.meta["val"].shape)
    parts = [part for part in parts if len(part.ty.shape) == rank]
    parts = [part if str(part.ty.dtype.dtype) == dtype else translator.emit(relax.op.astype(part, dtype)) for part in parts]
    return parts[0] if len(parts) == 1 else translator.emit(relax.op.concat(parts, _axis(node, rank)))


def as_strided(translator: Any, node: fx.Node) -> relax.Expr:
    """The elements at offset + sum(index * stride) of the memory of x, which must be all of that memory, without gaps.

    Sizes that are symbols are for views that change nothing but the strides of axes of one element.
    """
    x, shape = translator.value(node.args[0]), translator.out_shape(node)
    given, strides = node.args[0].meta["val"], translator.value(node.args[2])  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    offset = argument(node, 3, "storage_offset")
    offset = given.storage_offset() if offset is None else offset
    sizes, steps = translator.symbols.shape(given.shape), translator.symbols.shape(given.stride())
    same = same_shape([*shape, offset], [*sizes, given.storage_offset()])
    if same and all(same_shape([size], [1]) or same_shape([old], [new]) for size, old, new in zip(shape, steps, strides, strict=True)):
        return x
    if not all(isinstance(value, int) for value in [*shape, *strides, *sizes, *steps, offset]):  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        raise NotImplementedError("strides of symbolic sizes")
    order = sorted((axis for axis in range(len(sizes)) if sizes[axis] != 1), key=lambda axis: -steps[axis])
    dense = all(steps[axis] == np.prod([sizes[after] for after in order[at + 1 :]], dtype=int) for at, axis in enumerate(order))
    places = offset + sum(np.indices(shape)[axis] * strides[axis] for axis in range(len(shape)))  # pyright: ignore[reportOptionalSubscript, reportIndexIssue, reportArgumentType, reportCallIssue]
    places = np.asarray(places, "int64")
    if given.storage_offset() or not dense or (places.size and (places.min() < 0 or places.max() >= given.numel())):
        raise NotImplementedError("a view of memory beyond the tensor's own elements")
    order += [axis for axis in range(len(sizes)) if axis not in order]
    flat = x if order == sorted(order) else translator.emit(relax.op.permute_dims(x, order))
    flat = translator.emit(relax.op.reshape(flat, [-1]))
    return translator.emit(relax.op.reshape(translator.emit(relax.op.take(flat, relax.const(places.reshape(-1)), 0, mode="fast")), shape))


def select(translator: Any, node: fx.Node) -> relax.Expr:
    """x[..., index, ...]: a slice of one, reshaped, so that it stays a view and never a gather."""
    x = translator.value(node.args[0])
    axis = _axis(node, len(x.ty.shape))
    index = _bound(translator, node.args[2], x.ty.shape[axis])
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


def constant_pad(translator: Any, node: fx.Node) -> relax.Expr:
    """constant_pad_nd(x, [before, after of the last axis, of the last but one, ...], value); what is negative cuts elements off."""
    x, given = translator.value(node.args[0]), list(translator.value(node.args[1]))
    rank, dtype = len(x.ty.shape), str(x.ty.dtype.dtype)
    if not all(isinstance(width, int) for width in given):
        raise NotImplementedError("padding whose width is known at run time only")
    widths = [(0, 0)] * (rank - len(given) // 2) + list(zip(given[::2], given[1::2], strict=True))[::-1]
    emit, op = translator.emit, relax.op
    cut = [axis for axis, pair in enumerate(widths) if min(pair) < 0]
    if cut:
        starts = [max(0, -widths[axis][0]) for axis in cut]
        ends = [x.ty.shape[axis] - max(0, -widths[axis][1]) for axis in cut]
        x = emit(op.strided_slice(x, cut, starts, ends, [1] * len(cut), assume_inbound=True))
    positive = [max(0, width) for pair in widths for width in pair]
    if not any(positive):
        return x
    value = argument(node, 2, "value", 0)
    if dtype == "bool":
        return emit(op.astype(emit(op.nn.pad(emit(op.astype(x, "uint8")), positive, "constant", int(bool(value)))), "bool"))
    return emit(op.nn.pad(x, positive, "constant", value if dtype.startswith("float") else int(value)))


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
    "cat.default": cat,
    "as_strided.default": as_strided,
    "constant_pad_nd.default": constant_pad,
    "repeat.default": repeat,
    "slice.Tensor": slice_,
    "slice_scatter.default": slice_scatter,
    "select.int": select,
    "unbind.int": unbind,
    "getitem": getitem,
}
