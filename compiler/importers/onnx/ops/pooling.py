"""Pooling over windows and over whole images, channels first."""

from __future__ import annotations

import numpy as np

from ....dialect.windows import max_pool_indices
from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Refusal, Value
from .convolution import padded, sized

_MAX = {1: relax.op.nn.max_pool1d, 2: relax.op.nn.max_pool2d, 3: relax.op.nn.max_pool3d}
_AVERAGE = {1: relax.op.nn.avg_pool1d, 2: relax.op.nn.avg_pool2d, 3: relax.op.nn.avg_pool3d}


@converter("MaxPool", "AveragePool", "LpPool")
def pool(node: Node) -> Value | tuple[Value, ...]:
    data, kernel = node.tensor(0), node.attr("kernel_shape")
    axes = len(kernel)
    if axes not in _MAX:
        raise Refusal(f"{axes} spatial axes; 1 to 3 are supported")
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    whole, averages = data, node.op == "AveragePool" and not node.attr("count_include_pad", 0)
    data, pads, sizes = padded(node, data, kernel, strides, dilations, _lowest(node.dtype(data)) if node.op == "MaxPool" else 0.0)
    options = {"pool_size": kernel, "strides": strides, "padding": pads, "dilation": dilations, "ceil_mode": bool(node.attr("ceil_mode", 0))}
    if node.op == "MaxPool":
        result = sized(node, node.emit(_MAX[axes](data, **options)), sizes)
        if not any(node.proto.output[1:]):
            return result
        if sizes is not None:
            raise Refusal("the output 'Indices' with an auto_pad that depends on a dynamic dim is not supported: pin it with a fixed shape")
        return result, max_pool_indices(data, result, kernel, strides, pads[:axes], dilations, bool(node.attr("storage_order", 0)))
    if node.op == "LpPool":
        return sized(node, _lp_pool(node, data, options), sizes)
    result = _AVERAGE[axes](data, **options, count_include_pad=not averages or sizes is not None)
    if sizes is None or not averages:
        return sized(node, result, sizes)
    # the share of each window that is not padding
    ones = node.emit(relax.op.full([1, 1, *node.shape(whole)[2:]], node.scalar(1, node.dtype(data)), node.dtype(data)))
    inside = node.emit(_AVERAGE[axes](padded(node, ones, kernel, strides, dilations)[0], **options, count_include_pad=True))
    return relax.op.divide(sized(node, result, sizes), sized(node, inside, sizes))


def _lowest(dtype: str) -> float:
    return float(np.finfo(dtype).min if dtype.startswith("float") else np.iinfo(dtype).min)


def _lp_pool(node: Node, data: relax.Expr, options: dict) -> relax.Expr:
    """(sum |x|^p)^(1/p): the sum is the average over all places, padding included, times their number."""
    order, dtype = float(node.attr("p", 2)), node.dtype(data)
    area = 1
    for width in options["pool_size"]:
        area *= width
    powers = node.emit(relax.op.power(node.emit(relax.op.abs(data)), node.scalar(order, dtype)))
    mean = _whole_average(node, powers, options)
    return relax.op.power(node.emit(relax.op.multiply(mean, node.scalar(area, dtype))), node.scalar(1 / order, dtype))


def _whole_average(node: Node, data: relax.Expr, options: dict) -> relax.Expr:
    """The average of windows with zeros where they reach outside, also those that only ceil_mode lets begin: their part beyond the padding is padded too."""
    axes = len(options["pool_size"])
    average = _AVERAGE[axes]
    result = node.emit(average(data, **options, count_include_pad=True))
    if not options["ceil_mode"]:
        return result
    sizes, counts = node.static(node.shape(data)[2:], "an image with ceil_mode"), node.static(node.shape(result)[2:], "an image with ceil_mode")
    before, after = options["padding"][:axes], list(options["padding"][axes:])
    for axis, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        reach = (count - 1) * options["strides"][axis] + options["dilation"][axis] * (options["pool_size"][axis] - 1) + 1
        after[axis] = max(after[axis], reach - size - before[axis])
    widths = [0, 0, 0, 0, *(width for pair in zip(before, after, strict=True) for width in pair)]
    padded = node.emit(relax.op.nn.pad(data, widths, "constant", 0.0))
    # a stride can leave room for one more window than there are: it is cut off
    whole = node.emit(average(padded, **{**options, "padding": [0] * (2 * axes), "ceil_mode": False}, count_include_pad=True))
    return node.emit(relax.op.strided_slice(whole, list(range(2, axes + 2)), [0] * axes, counts, assume_inbound=True))


@converter("GlobalLpPool", since=2)
def global_lp_pool(node: Node) -> relax.Expr:
    """(sum |x|^p)^(1/p)"""
    data = node.tensor(0)
    order, dtype = float(node.attr("p", 2)), node.dtype(data)
    powers = node.emit(relax.op.power(node.emit(relax.op.abs(data)), node.scalar(order, dtype)))
    total = node.emit(relax.op.sum(powers, list(range(2, node.rank(data))), keepdims=True))
    return relax.op.power(total, node.scalar(1 / order, dtype))


@converter("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> relax.Expr:
    data = node.tensor(0)
    make = relax.op.mean if node.op == "GlobalAveragePool" else relax.op.max
    return make(data, list(range(2, node.rank(data))), keepdims=True)
