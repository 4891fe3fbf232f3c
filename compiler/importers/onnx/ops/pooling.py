"""Pooling over windows and over whole images, channels first."""

from __future__ import annotations

from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..values import Refusal
from .convolution import spatial_pads

_MAX = {1: relax.op.nn.max_pool1d, 2: relax.op.nn.max_pool2d, 3: relax.op.nn.max_pool3d}
_AVERAGE = {1: relax.op.nn.avg_pool1d, 2: relax.op.nn.avg_pool2d, 3: relax.op.nn.avg_pool3d}


@converter("MaxPool", "AveragePool", "LpPool")
def pool(node: Node) -> relax.Expr:
    data, kernel = node.tensor(0), node.attr("kernel_shape")
    axes = len(kernel)
    if axes not in _MAX:
        raise Refusal(f"{axes} spatial axes; 1 to 3 are supported")
    if any(node.proto.output[1:]):
        raise Refusal("the output 'Indices' is not supported")
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    pads = spatial_pads(node, node.shape(data)[2:], kernel, strides, dilations)
    options = {"pool_size": kernel, "strides": strides, "padding": pads, "dilation": dilations, "ceil_mode": bool(node.attr("ceil_mode", 0))}
    if node.op == "MaxPool":
        return _MAX[axes](data, **options)
    if node.op == "AveragePool":
        return _AVERAGE[axes](data, **options, count_include_pad=bool(node.attr("count_include_pad", 0)))
    return _lp_pool(node, data, options)


def _lp_pool(node: Node, data: relax.Expr, options: dict) -> relax.Expr:
    """(sum |x|^p)^(1/p): the sum is the average over all places, padding included, times their number."""
    order, dtype = float(node.attr("p", 2)), node.dtype(data)
    area = 1
    for width in options["pool_size"]:
        area *= width
    powers = node.emit(relax.op.power(node.emit(relax.op.abs(data)), node.scalar(order, dtype)))
    mean = node.emit(_AVERAGE[len(options["pool_size"])](powers, **options, count_include_pad=True))
    return relax.op.power(node.emit(relax.op.multiply(mean, node.scalar(area, dtype))), node.scalar(1 / order, dtype))


@converter("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> relax.Expr:
    data = node.tensor(0)
    make = relax.op.mean if node.op == "GlobalAveragePool" else relax.op.max
    return make(data, list(range(2, node.rank(data))), keepdims=True)
