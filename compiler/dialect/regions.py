"""`tcompile.roi_align` and `tcompile.roi_max`: regions of images, pooled to one size each, as in ONNX's RoiAlign and MaxRoiPool."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..tvm import operator_attrs, register_operator, relax, te, tirx


def roi_align(
    x: relax.Expr,
    starts: relax.Expr,
    bins: relax.Expr,
    counts: relax.Expr,
    images: relax.Expr,
    size: tuple[int, int],
    most: tuple[Any, Any],
    maximum: bool,
) -> relax.Call:
    """x: [N, C, H, W], starts and bins: [R, 2] (y, x) of its type, counts: [R, 2] int64, images: [R] int64 in 0..N-1 -> [R, C, *size].

    Bin p of region r spans `bins` elements from starts + p * bins; counts places along each axis of it, evenly apart, are read bilinearly, 0 more than one element outside.
    They are averaged; maximum: their greatest weighted corner is taken, as in ONNX's reference. most: no count is greater.
    """
    return relax.Call(ALIGN, [x, starts, bins, counts, images, relax.ShapeExpr([*size, *most])], operator_attrs(maximum=maximum))


def roi_max(x: relax.Expr, firsts: relax.Expr, lasts: relax.Expr, images: relax.Expr, size: tuple[int, int], most: tuple[Any, Any]) -> relax.Call:
    """x: [N, C, H, W], firsts: [R, 2, P] and lasts: [R, 2, P] int64, images: [R] int64 in 0..N-1 -> [R, C, *size]: the maxima of bins, 0 for those without elements.

    Bin (p, q) of region r spans rows firsts[r, 0, p]..lasts[r, 0, p] - 1 and columns firsts[r, 1, q]..lasts[r, 1, q] - 1, all inside. P: the greater of `size`. most: no bin
    spans more along an axis.
    """
    return relax.Call(MAXIMUM, [x, firsts, lasts, images, relax.ShapeExpr([*size, *most])], operator_attrs())


def _infer(builder: Any, call: Any) -> Any:
    x, images, (height, width, *_) = call.args[0].ty, call.args[-2].ty, call.args[-1].values
    return relax.TensorType([images.shape[0], x.shape[1], height, width], x.dtype)


def _places(starts: Any, bins: Any, counts: Any, extent: Any, size: Any, most: Any, axis: int) -> Any:
    """[R, size, most]: where the reads are along an axis, -1 for none."""
    dtype = str(starts.dtype)
    half, one, zero = (tirx.const(value, dtype) for value in (0.5, 1, 0))

    def place(r: Any, p: Any, g: Any) -> Any:
        at = (
            starts[r, axis]
            + tirx.Cast(dtype, p) * bins[r, axis]
            + (tirx.Cast(dtype, g) + half) * bins[r, axis] / tirx.Cast(dtype, tirx.max(counts[r, axis], 1))
        )
        reads = tirx.all(g < counts[r, axis], at >= -one, at <= tirx.Cast(dtype, extent))
        return tirx.Select(reads, tirx.min(tirx.max(at, zero), tirx.Cast(dtype, extent) - one), -one)

    return te.compute((starts.shape[0], size, most), place, name="places")


def _corners(x: Any, image: Any, c: Any, y: Any, z: Any) -> list[Any]:
    """The four elements around a place, times their weights."""
    height, width = list(x.shape)[2:]
    one = tirx.const(1, x.dtype)
    top, left = tirx.Cast("int64", y), tirx.Cast("int64", z)
    down, right = y - tirx.Cast(x.dtype, top), z - tirx.Cast(x.dtype, left)
    bottom, far = tirx.min(top + 1, height - 1), tirx.min(left + 1, width - 1)
    return [
        (one - down) * (one - right) * x[image, c, top, left],
        (one - down) * right * x[image, c, top, far],
        down * (one - right) * x[image, c, bottom, left],
        down * right * x[image, c, bottom, far],
    ]


def _pooled(x: Any, rows: Any, columns: Any, counts: Any, images: Any, maximum: bool) -> Any:
    gy, gx = te.reduce_axis((0, rows.shape[2]), "gy"), te.reduce_axis((0, columns.shape[2]), "gx")
    zero = tirx.const(0, x.dtype)

    def element(r: Any, c: Any, p: Any, q: Any) -> Any:
        y, z = rows[r, p, gy], columns[r, q, gx]
        a, b, d, e = _corners(x, images[r], c, y, z)
        value = tirx.if_then_else(tirx.And(y >= zero, z >= zero), tirx.max(tirx.max(a, b), tirx.max(d, e)) if maximum else a + b + d + e, zero)
        if not maximum:
            return te.sum(value, axis=[gy, gx])
        return te.max(tirx.if_then_else(tirx.And(gy < counts[r, 0], gx < counts[r, 1]), value, te.min_value(x.dtype)), axis=[gy, gx])

    return te.compute((images.shape[0], x.shape[1], rows.shape[1], columns.shape[1]), element, name="roi_align")


def _finished(sums: Any, counts: Any, maximum: bool) -> Any:
    def element(r: Any, c: Any, p: Any, q: Any) -> Any:
        count = counts[r, 0] * counts[r, 1]
        if maximum:
            return tirx.Select(count > 0, sums[r, c, p, q], tirx.const(0, sums.dtype))
        return sums[r, c, p, q] / tirx.Cast(sums.dtype, tirx.max(count, 1))

    return te.compute(sums.shape, element, name="roi_align")


def _legalize_align(builder: Any, call: Any) -> Any:
    x, starts, bins, counts, images, dims = call.args
    tables = []
    for axis in (0, 1):
        extent, size, most = x.ty.shape[2 + axis], dims.values[axis], dims.values[2 + axis]
        tables.append(builder.emit_te(partial(_places, axis=axis), starts, bins, counts, extent, size, most, primfunc_name_hint="roi_places"))
    maximum = bool(call.attrs["maximum"])
    sums = builder.emit_te(partial(_pooled, maximum=maximum), x, *tables, counts, images, primfunc_name_hint="roi_align")
    return builder.call_te(partial(_finished, maximum=maximum), sums, counts, primfunc_name_hint="roi_align")


def _greatest(x: Any, firsts: Any, lasts: Any, images: Any, size: list[Any], most: list[Any]) -> Any:
    gy, gx = te.reduce_axis((0, most[0]), "gy"), te.reduce_axis((0, most[1]), "gx")

    def element(r: Any, c: Any, p: Any, q: Any) -> Any:
        row, column = firsts[r, 0, p] + gy, firsts[r, 1, q] + gx
        inside = tirx.And(row < lasts[r, 0, p], column < lasts[r, 1, q])
        return te.max(tirx.if_then_else(inside, x[images[r], c, row, column], te.min_value(x.dtype)), axis=[gy, gx])

    return te.compute((images.shape[0], x.shape[1], *size), element, name="roi_max")


def _filled(greatest: Any, firsts: Any, lasts: Any) -> Any:
    def element(r: Any, c: Any, p: Any, q: Any) -> Any:
        some = tirx.And(lasts[r, 0, p] > firsts[r, 0, p], lasts[r, 1, q] > firsts[r, 1, q])
        return tirx.Select(some, greatest[r, c, p, q], tirx.const(0, greatest.dtype))

    return te.compute(greatest.shape, element, name="roi_max")


def _legalize_max(builder: Any, call: Any) -> Any:
    x, firsts, lasts, images, dims = call.args
    greatest = builder.emit_te(_greatest, x, firsts, lasts, images, list(dims.values)[:2], list(dims.values)[2:], primfunc_name_hint="roi_max")
    return builder.call_te(_filled, greatest, firsts, lasts, primfunc_name_hint="roi_max")


ALIGN = register_operator("tcompile.roi_align", ("x", "starts", "bins", "counts", "images", "sizes"), _infer, _legalize_align)
MAXIMUM = register_operator("tcompile.roi_max", ("x", "firsts", "lasts", "images", "sizes"), _infer, _legalize_max)
