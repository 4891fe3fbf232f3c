"""Pooling over windows: averages in every way of counting, maxima with their places."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from ....dialect.windows import max_pool_indices
from ....tvm import relax
from .shape import argument

_MAX = {1: relax.op.nn.max_pool1d, 2: relax.op.nn.max_pool2d, 3: relax.op.nn.max_pool3d}
_AVERAGE = {1: relax.op.nn.avg_pool1d, 2: relax.op.nn.avg_pool2d, 3: relax.op.nn.avg_pool3d}

_ADAPTIVE = {1: relax.op.nn.adaptive_avg_pool1d, 2: relax.op.nn.adaptive_avg_pool2d, 3: relax.op.nn.adaptive_avg_pool3d}


def per_axis(value: Any, axes: int) -> list[int]:
    """One number for every axis, or one for all of them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(number) for number in (values if len(values) == axes else values * axes)]


def batched(translator: Any, x: relax.Expr, axes: int) -> relax.Expr:
    """x with a batch of one in front where it has none."""
    return x if x.ty.ndim == axes + 2 else translator.emit(relax.op.expand_dims(x, 0))


def unbatched(translator: Any, result: relax.Expr, x: relax.Expr, axes: int) -> relax.Expr:
    """The result without the batch that x did not have."""
    return result if x.ty.ndim == axes + 2 else translator.emit(relax.op.squeeze(result, [0]))


def _average(axes: int) -> Any:
    def average(translator: Any, node: fx.Node) -> relax.Expr:
        """x [N, C, *S] or [C, *S] -> the mean of every window; as the divisor its size within the padding, its size within x, or a number."""
        x = translator.value(node.args[0])
        dtype = str(x.ty.dtype.dtype)
        if not dtype.startswith("float"):
            raise NotImplementedError(f"an average of {dtype}")
        kernel = per_axis(argument(node, 1, "kernel_size"), axes)
        stride = per_axis(argument(node, 2, "stride") or kernel, axes)
        padding = per_axis(argument(node, 3, "padding", 0), axes)
        ceil, include = bool(argument(node, 4, "ceil_mode", False)), bool(argument(node, 5, "count_include_pad", True))
        divisor = argument(node, 6, "divisor_override")
        data = batched(translator, x, axes)
        options = {"pool_size": kernel, "strides": stride}
        if not ceil and divisor is None:
            result = translator.emit(_AVERAGE[axes](data, **options, padding=padding * 2, count_include_pad=include))
            return unbatched(translator, result, x, axes)
        sizes = [getattr(size, "value", None) for size in data.ty.shape][2:]
        if None in sizes:
            raise NotImplementedError("ceil_mode or a divisor over an image whose size is known at run time only")
        places = [_starts(int(size), *geometry, ceil) for size, *geometry in zip(sizes, kernel, stride, padding, strict=True)]
        reach = [int(starts[-1]) + width for starts, width in zip(places, kernel, strict=True)]
        widths = [0, 0, 0, 0]
        for size, before, end in zip(sizes, padding, reach, strict=True):
            widths += [before, max(0, end - int(size))]
        padded = translator.emit(relax.op.nn.pad(data, widths, "constant", 0.0)) if any(widths) else data
        mean = translator.emit(_AVERAGE[axes](padded, **options, count_include_pad=True))
        mean = translator.emit(
            relax.op.strided_slice(mean, list(range(2, axes + 2)), [0] * axes, [len(starts) for starts in places], assume_inbound=True)
        )
        counts = np.float64(divisor) if divisor is not None else _counts(places, [int(size) for size in sizes], kernel, padding, include)
        factor = (np.prod(kernel) / counts).astype(dtype)
        return unbatched(translator, translator.emit(relax.op.multiply(mean, relax.const(factor, dtype))), x, axes)

    return average


def _starts(size: int, width: int, stride: int, padding: int, ceil: bool) -> np.ndarray:
    """First position of every window, in elements of x; one that starts beyond the padding is left out."""
    room = size + 2 * padding - width
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1
    return np.arange(count) * stride - padding


def _counts(places: list[np.ndarray], sizes: list[int], kernel: list[int], padding: list[int], include: bool) -> np.ndarray:
    """Elements of every window: within the padding, or within x alone."""
    counts = np.ones(())
    for starts, size, width, around in zip(places, sizes, kernel, padding, strict=True):
        ends = np.minimum(starts + width, size + around)
        along = ends - starts if include else np.minimum(ends, size) - np.maximum(starts, 0)
        counts = counts[..., None] * along
    return counts


def _maximum(axes: int) -> Any:
    def maximum(translator: Any, node: fx.Node) -> list[relax.Expr]:
        """x [N, C, *S] or [C, *S] -> the maximum of every window, and its place in the image, flattened (int64)."""
        x = translator.value(node.args[0])
        kernel = per_axis(argument(node, 1, "kernel_size"), axes)
        stride = per_axis(argument(node, 2, "stride") or kernel, axes)
        padding, dilation = per_axis(argument(node, 3, "padding", 0), axes), per_axis(argument(node, 4, "dilation", 1), axes)
        data = batched(translator, x, axes)
        options = {
            "pool_size": kernel,
            "strides": stride,
            "padding": padding * 2,
            "dilation": dilation,
            "ceil_mode": bool(argument(node, 5, "ceil_mode")),
        }
        values = translator.emit(_MAX[axes](data, **options))
        results = [values]
        if any(user.args[1] == 1 for user in node.users):
            places = translator.emit(max_pool_indices(data, values, kernel, stride, padding, dilation, False))
            image = translator.symbols.shape(node.args[0].meta["val"].shape[-axes:])  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            area = translator.emit(relax.op.prod(translator.emit(relax.op.shape_to_tensor(relax.ShapeExpr(image)))))
            results.append(translator.emit(relax.op.floor_mod(places, area)))
        return [unbatched(translator, result, x, axes) for result in results]

    return maximum


def _adaptive(axes: int) -> Any:
    def adaptive(translator: Any, node: fx.Node) -> relax.Expr:
        """x [N, C, *S] or [C, *S] -> means over as many nearly equal windows along every axis as asked for."""
        x = translator.value(node.args[0])
        sizes = tuple(translator.out_shape(node)[-axes:])
        result = translator.emit(_ADAPTIVE[axes](batched(translator, x, axes), sizes))
        return unbatched(translator, result, x, axes)

    return adaptive


CONVERTERS = {
    **{f"{name}adaptive_avg_pool{axes}d.default": _adaptive(axes) for axes in _ADAPTIVE for name in ("", "_")},
    **{f"avg_pool{axes}d.default": _average(axes) for axes in _AVERAGE},
    "max_pool2d_with_indices.default": _maximum(2),
    "max_pool3d_with_indices.default": _maximum(3),
}
