"""Conv and ConvTranspose of one to three spatial axes, channels first."""

from __future__ import annotations

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal

_CONV = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}
_TRANSPOSED = {1: relax.op.nn.conv1d_transpose, 2: relax.op.nn.conv2d_transpose, 3: relax.op.nn.conv3d_transpose}


def spatial_pads(node: Node, sizes: list[Dim], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """All begins, then all ends; `auto_pad` is resolved from the sizes."""
    mode = node.attr("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return node.attr("pads") or [0] * (2 * len(kernel))
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    begins, ends = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = dilation * (width - 1)
        if stride == 1:
            total = reach
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
        else:
            raise Refusal(f"auto_pad {mode} with stride {stride} needs a static size, but the dim is {size}: pin it with a fixed shape")
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


def padded(
    node: Node, data: relax.Expr, kernel: list[int], strides: list[int], dilations: list[int], fill: float = 0.0
) -> tuple[relax.Expr, list[int], list[Dim] | None]:
    """The data, the padding that is left to the operator, and the spatial sizes of its result where they are known beforehand.

    What `auto_pad` asks for may depend on sizes that are only known at run time (a stride over a dynamic dim): elements of `fill` are put around the data then.
    """
    shape = node.shape(data)
    mode = node.attr("auto_pad", "NOTSET")
    if not mode.startswith("SAME") or all(stride == 1 or isinstance(size, int) for size, stride in zip(shape[2:], strides, strict=True)):
        return data, spatial_pads(node, shape[2:], kernel, strides, dilations), None
    results: list[Dim] = []
    for axis, (width, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
        size = shape[axis]
        results.append(node.dims.ceil_divide(size, stride))
        total = node.dims.maximum(node.dims.simplify((results[-1] - 1) * stride + dilation * (width - 1) + 1 - size), 0)
        small = node.dims.floor_divide(total, 2)
        large = node.dims.simplify(total - small)
        before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
        parts = [_filled(node, data, axis, before, fill), data, _filled(node, data, axis, after, fill)]
        parts = [part for part in parts if part is not None]
        data = node.emit(relax.op.concat(parts, axis)) if len(parts) > 1 else data
    around = [dim if isinstance(dim, int) else node.dims.fresh(node.hint) for dim in node.shape(data)[2:]]
    data = node.builder.match_cast(data, relax.TensorType([*shape[:2], *around], node.dtype(data)), name_hint=node.hint)
    return data, [0] * (2 * len(kernel)), results


def _filled(node: Node, data: relax.Expr, axis: int, size: Dim, fill: float) -> relax.Expr | None:
    shape = node.shape(data)
    dtype = node.dtype(data)
    return (
        None
        if isinstance(size, int) and size == 0
        else node.emit(relax.op.full([*shape[:axis], size, *shape[axis + 1 :]], node.scalar(fill, dtype), dtype))
    )


def sized(node: Node, result: relax.Expr, sizes: list[Dim] | None) -> relax.Expr:
    """The result of an operator on what `padded` gave, with the spatial sizes that it said."""
    if sizes is None:
        return result
    result = node.emit(result)
    return node.cast_shape(result, [*node.shape(result)[:2], *sizes])


@converter("Conv")
def conv(node: Node) -> relax.Expr:
    """data [N, C, *spatial], weight [O, C/groups, *kernel]"""
    data, weight = node.tensor(0), node.tensor(1)
    weight, kernel = _kernel(node, weight)
    axes = _spatial_axes(kernel)
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    groups = node.attr("group", 1)
    data = _fix_channels(node, data, node.shape(weight)[1] * groups)
    data, pads, sizes = padded(node, data, kernel, strides, dilations)
    result = _CONV[axes](data, weight, strides=strides, padding=pads, dilation=dilations, groups=groups)
    return _add_bias(node, sized(node, result, sizes), axes + 2)


@converter("ConvTranspose")
def conv_transpose(node: Node) -> relax.Expr:
    """data [N, C, *spatial], weight [C, O/groups, *kernel]"""
    data, weight = node.tensor(0), node.tensor(1)
    data = _fix_channels(node, data, node.shape(weight)[0])
    weight, kernel = _kernel(node, weight)
    shape = node.shape(data)
    axes = _spatial_axes(kernel)
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    extra = node.attr("output_padding") or [0] * axes
    mode, wanted = node.attr("auto_pad", "NOTSET"), node.attr("output_shape")
    pads = node.attr("pads") or [0] * (2 * axes)
    if wanted or mode.startswith("SAME"):
        sizes = shape[2:]
        wanted = wanted or [node.dims.simplify(size * stride) for size, stride in zip(sizes, strides, strict=True)]
        totals = node.static(
            (
                node.dims.simplify(stride * (size - 1) + more + dilation * (width - 1) + 1 - want)
                for size, stride, more, dilation, width, want in zip(sizes, strides, extra, dilations, kernel, wanted[-axes:], strict=True)
            ),
            "the padding that output_shape or auto_pad asks for",
        )
        if not node.attr("output_shape") and min(totals) < 0:
            raise Refusal(
                f"auto_pad {mode} with a kernel that does not reach over its strides: ONNX and ONNX Runtime disagree about the size; give output_shape"
            )
        extra = [more - min(total, 0) for more, total in zip(extra, totals, strict=True)]
        totals = [max(total, 0) for total in totals]
        halves, rest = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = halves + rest if mode == "SAME_UPPER" else rest + halves
    elif mode == "VALID":
        pads = [0] * (2 * axes)
    behind = [0] * axes
    for axis, stride in enumerate(strides):
        if extra[axis] >= stride:  # it takes back what is cut off at the end; zeros, which nothing reaches, follow
            behind[axis] = max(extra[axis] - pads[axes + axis], 0)
            pads[axes + axis] = max(pads[axes + axis] - extra[axis], 0)
            extra[axis] = 0
    result = _TRANSPOSED[axes](data, weight, strides=strides, padding=pads, output_padding=extra, dilation=dilations, groups=node.attr("group", 1))
    if any(behind):
        result = relax.op.nn.pad(node.emit(result), [0, 0, 0, 0, *(width for more in behind for width in (0, more))], "constant", 0.0)
    return _add_bias(node, result, axes + 2)


def _kernel(node: Node, weight: relax.Expr) -> tuple[relax.Expr, list[int]]:
    """The weight and its spatial sizes, which may come from the attribute `kernel_shape`."""
    given = node.attr("kernel_shape") or []
    if given and len(given) != node.rank(weight) - 2:
        raise Refusal(f"kernel_shape {given} of a weight of shape {node.shape(weight)}")
    for axis, width in enumerate(given, 2):
        weight = node.with_dim(weight, axis, width)
    return weight, node.static(node.shape(weight)[2:], "the kernel's size")


def _fix_channels(node: Node, data: relax.Expr, channels: Dim) -> relax.Expr:
    """The weight decides a dynamic channel dim; checked at run time."""
    shape = node.shape(data)
    return data if isinstance(shape[1], int) or not isinstance(channels, int) else node.cast_shape(data, [shape[0], channels, *shape[2:]])


def _spatial_axes(kernel: list[int]) -> int:
    if len(kernel) not in _CONV:
        raise Refusal(f"{len(kernel)} spatial axes; 1 to 3 are supported")
    return len(kernel)


def _add_bias(node: Node, result: relax.Expr, rank: int) -> relax.Expr:
    return relax.op.add(node.emit(result), node.per_channel(2, rank)) if node.has(2) else result
