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


@converter("Conv")
def conv(node: Node) -> relax.Expr:
    """data [N, C, *spatial], weight [O, C/groups, *kernel]"""
    data, weight = node.tensor(0), node.tensor(1)
    shape, kernel = node.shape(data), node.static(node.shape(weight)[2:], "the kernel's size")
    axes = _spatial_axes(kernel)
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    pads = spatial_pads(node, shape[2:], kernel, strides, dilations)
    groups = node.attr("group", 1)
    data = _fix_channels(node, data, node.shape(weight)[1] * groups)
    result = _CONV[axes](data, weight, strides=strides, padding=pads, dilation=dilations, groups=groups)
    return _add_bias(node, result, axes + 2)


@converter("ConvTranspose")
def conv_transpose(node: Node) -> relax.Expr:
    """data [N, C, *spatial], weight [C, O/groups, *kernel]"""
    data, weight = node.tensor(0), node.tensor(1)
    data = _fix_channels(node, data, node.shape(weight)[0])
    shape, kernel = node.shape(data), node.static(node.shape(weight)[2:], "the kernel's size")
    axes = _spatial_axes(kernel)
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    extra = node.attr("output_padding") or [0] * axes
    mode, wanted = node.attr("auto_pad", "NOTSET"), node.attr("output_shape")
    pads = node.attr("pads") or [0] * (2 * axes)
    if wanted or mode.startswith("SAME"):
        sizes = node.static(shape[2:], "the size of an input with output_shape or auto_pad")
        wanted = wanted or [size * stride for size, stride in zip(sizes, strides, strict=True)]
        totals = [
            stride * (size - 1) + more + dilation * (width - 1) + 1 - want
            for size, stride, more, dilation, width, want in zip(sizes, strides, extra, dilations, kernel, wanted[-axes:], strict=True)
        ]
        extra = [more - min(total, 0) for more, total in zip(extra, totals, strict=True)]
        totals = [max(total, 0) for total in totals]
        halves, rest = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = halves + rest if mode == "SAME_UPPER" else rest + halves
    padded = [more >= stride for more, stride in zip(extra, strides, strict=True)]
    if any(padded):
        raise Refusal(f"output_padding {extra} must be smaller than the strides {strides}")
    result = _TRANSPOSED[axes](data, weight, strides=strides, padding=pads, output_padding=extra, dilation=dilations, groups=node.attr("group", 1))
    return _add_bias(node, result, axes + 2)


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
