"""Operators on windows that slide over images: where a maximum was, and windows added up to an image.

`tcompile.max_pool_indices`    the places of the maxima of a MaxPool
`tcompile.col2im`              columns of windows added up where they overlap
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

from ..tvm import operator_attrs, register_operator, relax, te, tirx


def max_pool_indices(
    x: relax.Expr, y: relax.Expr, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], first_fastest: bool
) -> relax.Call:
    """x: [N, C, *S], y: [N, C, *O], the maxima of its windows -> [N, C, *O] int64: the place in x, flattened, of the first element of the window that is the maximum.

    pads: those before the first element, per axis. first_fastest: elements of an image are counted with its first axis fastest, not its last (ONNX's storage_order).
    A window without elements gives the place -1 within its image.
    """
    attrs = operator_attrs(
        kernel=_spell(kernel), strides=_spell(strides), pads=_spell(pads), dilations=_spell(dilations), first_fastest=first_fastest
    )
    return relax.Call(INDICES, [x, y], attrs)


def col2im(
    columns: relax.Expr, image: Sequence[Any], block: Sequence[Any], strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]
) -> relax.Call:
    """columns: [N, C * prod(block), L] -> [N, C, *image]: every element is the sum of those of the windows that hold it.

    L is the number of places of a window of `block` elements, `dilations` apart, in steps of `strides`, in the image with `pads` (all begins, then all ends) around it.
    """
    attrs = operator_attrs(strides=_spell(strides), pads=_spell(pads), dilations=_spell(dilations))
    return relax.Call(COL2IM, [columns, relax.ShapeExpr([*image, *block])], attrs)


def steps(size: Any, block: Any, stride: int, before: int, after: int, dilation: int) -> Any:
    """How many places a window has along an axis."""
    return (size + (before + after) - dilation * (block - 1) - 1) // stride + 1


def _spell(values: Sequence[int]) -> str:
    return " ".join(str(int(value)) for value in values)


def _ints(call: Any, name: str) -> list[int]:
    return [int(value) for value in str(call.attrs[name]).split()]


def _product(values: Sequence[Any]) -> Any:
    return reduce(lambda a, b: a * b, values, 1)


def _flat(index: Sequence[Any], sizes: Sequence[Any]) -> Any:
    """The place in an array of `sizes`, flattened with the last axis fastest."""
    return reduce(lambda place, pair: place * pair[1] + pair[0], zip(index, sizes, strict=True), tirx.IntImm("int64", 0))


def _infer_indices(builder: Any, call: Any) -> Any:
    return relax.TensorType(call.args[1].ty.shape, "int64")


def _firsts(x: Any, y: Any, kernel: list[int], strides: list[int], pads: list[int], dilations: list[int]) -> Any:
    """[N, C, *O] int64: the first place within the image, -1 for none."""
    sizes = list(x.shape)[2:]
    taps = [te.reduce_axis((0, width), f"k{axis}") for axis, width in enumerate(kernel)]
    none = _product(sizes) + tirx.IntImm("int64", 0)

    def first(n: Any, c: Any, *places: Any) -> Any:
        at = [place * stride + tap * dilation - pad for place, tap, stride, dilation, pad in zip(places, taps, strides, dilations, pads, strict=True)]
        inside = tirx.all(*(index >= 0 for index in at), *(index < size for index, size in zip(at, sizes, strict=True)))
        value, most = x[(n, c, *at)], y[(n, c, *places)]
        same = value == most
        if str(x.dtype).startswith("float"):
            same = tirx.Or(same, tirx.And(tirx.NE(value, value), tirx.NE(most, most)))
        return te.min(tirx.if_then_else(inside, tirx.if_then_else(same, _flat(at, sizes), none), none), axis=taps)

    return te.compute(y.shape, first, name="firsts")


def _whole_places(firsts: Any, sizes: list[Any], channels: Any, first_fastest: bool) -> Any:
    area = _product(sizes)

    def place(n: Any, c: Any, *places: Any) -> Any:
        found = firsts[(n, c, *places)]
        within = found
        if first_fastest:
            index, rest = [], found
            for size in reversed(sizes):
                index.append(tirx.floormod(rest, size))
                rest = tirx.floordiv(rest, size)
            within = _flat(index, sizes[::-1])
        return tirx.Select(found < area, (n * channels + c) * area + within, tirx.IntImm("int64", -1))

    return te.compute(firsts.shape, place, name="places")


def _legalize_indices(builder: Any, call: Any) -> Any:
    x, y = call.args
    options = {name: _ints(call, name) for name in ("kernel", "strides", "pads", "dilations")}
    firsts = builder.emit_te(partial(_firsts, **options), x, y, primfunc_name_hint="max_pool_indices")
    _, channels, *sizes = x.ty.shape
    return builder.call_te(
        partial(_whole_places, first_fastest=bool(call.attrs["first_fastest"])), firsts, sizes, channels, primfunc_name_hint="max_pool_indices"
    )


def _infer_col2im(builder: Any, call: Any) -> Any:
    columns, dims = call.args[0].ty, list(call.args[1].values)
    image, block = dims[: len(dims) // 2], dims[len(dims) // 2 :]
    return relax.TensorType([columns.shape[0], tirx.floordiv(columns.shape[1], _product(block)), *image], columns.dtype)


def _image(columns: Any, image: list[Any], block: list[Any], strides: list[int], pads: list[int], dilations: list[int]) -> Any:
    before, after = pads[: len(image)], pads[len(image) :]
    counts = [steps(*axis) for axis in zip(image, block, strides, before, after, dilations, strict=True)]
    taps = [te.reduce_axis((0, width), f"k{axis}") for axis, width in enumerate(block)]
    area = _product(block)

    def element(n: Any, c: Any, *places: Any) -> Any:
        offsets = [place + pad - tap * dilation for place, pad, tap, dilation in zip(places, before, taps, dilations, strict=True)]
        at = [tirx.floordiv(offset, stride) for offset, stride in zip(offsets, strides, strict=True)]
        hit = [tirx.floormod(offset, stride) == 0 for offset, stride in zip(offsets, strides, strict=True)]
        inside = tirx.all(*hit, *(index >= 0 for index in at), *(index < count for index, count in zip(at, counts, strict=True)))
        value = columns[n, c * area + _flat(taps, block), _flat(at, counts)]
        return te.sum(tirx.if_then_else(inside, value, tirx.const(0, columns.dtype)), axis=taps)

    return te.compute([columns.shape[0], tirx.floordiv(columns.shape[1], area), *image], element, name="col2im")


def _legalize_col2im(builder: Any, call: Any) -> Any:
    dims = list(call.args[1].values)
    half = len(dims) // 2
    options = {name: _ints(call, name) for name in ("strides", "pads", "dilations")}
    return builder.call_te(partial(_image, **options), call.args[0], dims[:half], dims[half:], primfunc_name_hint="col2im")


INDICES = register_operator("tcompile.max_pool_indices", ("x", "y"), _infer_indices, _legalize_indices)
COL2IM = register_operator("tcompile.col2im", ("columns", "sizes"), _infer_col2im, _legalize_col2im)
