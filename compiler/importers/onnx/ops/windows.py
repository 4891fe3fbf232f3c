"""Windows over images beyond pooling and convolution: MaxUnpool, Col2Im, LRN."""

from __future__ import annotations

from ....dialect.windows import col2im, steps
from ....tvm import relax
from ..node import Node
from ..registry import converter
from ..symbolic import Dim
from ..values import Refusal
from ..vectors import Vector, from_the_front


@converter("MaxUnpool", since=9)
def max_unpool(node: Node) -> relax.Expr:
    """x [N, C, *S] and the places of its elements in the result, flattened; zeros elsewhere."""
    x, places = node.tensor(0), node.to_tensor(from_the_front(node, node.value(1)))
    shape, kernel = node.shape(x), node.attr("kernel_shape")
    axes = len(kernel)
    strides, pads = node.attr("strides") or [1] * axes, node.attr("pads") or [0] * (2 * axes)
    sizes: list[Dim] = [
        node.dims.simplify((size - 1) * stride - before - after + width)
        for size, stride, width, before, after in zip(shape[2:], strides, kernel, pads[:axes], pads[axes:], strict=True)
    ]
    result = [*shape[:2], *sizes]
    if node.has(2):
        if node.at_run_time(2):
            raise Refusal(
                "output_shape is computed at run time; where it differs from the size that follows from the kernel, ONNX and ONNX Runtime read indices differently"
            )
        wanted = node.sizes(2)
        if len(wanted) != len(result) or not all(node.dims.equal(a, b) for a, b in zip(wanted, result, strict=True)):
            raise Refusal(
                f"output_shape {wanted} differs from {result}, which follows from the kernel: ONNX and ONNX Runtime read indices differently then"
            )
    count, total = node.dims.product(shape), node.dims.product(result)
    if not all(node.dims.equal(a, b) for a, b in zip(shape, node.shape(places), strict=True)):
        places = node.cast_shape(places, shape)
    zeros = node.emit(relax.op.zeros([total], node.dtype(x)))
    filled = node.emit(relax.op.scatter_elements(zeros, node.reshape(places, [count]), node.reshape(x, [count]), 0))
    return node.reshape(filled, result)


@converter("Col2Im", since=18)
def columns_to_image(node: Node) -> relax.Expr:
    """columns [N, C * prod(block), L]"""
    columns, image = node.tensor(0), node.sizes(1)
    if node.at_run_time(2):
        widths = Vector.of(node, 2)
        block = (widths < 1).where(-1, widths).dims()
    else:
        block = node.sizes(2)
    axes = len(image)
    strides, dilations = node.attr("strides") or [1] * axes, node.attr("dilations") or [1] * axes
    pads = node.attr("pads") or [0] * (2 * axes)
    if not len(block) == len(strides) == len(dilations) == axes == len(pads) // 2 or axes < 1:
        raise Refusal(f"block_shape {block}, strides {strides}, dilations {dilations} and pads {pads} of an image with {axes} axes")
    counts = [
        node.dims.simplify(steps(size, width, stride, before, after, dilation))
        for size, width, stride, before, after, dilation in zip(image, block, strides, pads[:axes], pads[axes:], dilations, strict=True)
    ]
    batch, depth, length = node.shape(columns)
    area = node.dims.product(block)
    if area == 0:
        raise Refusal("a block without elements")
    whole = node.dims.simplify(node.dims.floor_divide(depth, area) * area)
    wanted = [batch, whole, node.dims.product(counts)]
    for have, want in zip((depth, length), wanted[1:], strict=True):
        if isinstance(have, int) and isinstance(want, int) and have != want:
            raise Refusal(f"columns of shape {node.shape(columns)}, expected {wanted}")
    if not all(node.dims.equal(a, b) for a, b in zip(node.shape(columns), wanted, strict=True)):
        columns = node.cast_shape(columns, wanted)
    return col2im(columns, image, block, strides, pads, dilations)


@converter("LRN")
def local_response_normalization(node: Node) -> relax.Expr:
    """x / (bias + alpha / size * sum of squares over `size` channels around) ^ beta"""
    x, emit = node.tensor(0), node.emit
    shape, size, dtype = node.shape(x), node.attr("size"), node.dtype(node.tensor(0))
    rows = node.reshape(x, [shape[0], 1, shape[1], node.dims.product(shape[2:])])
    squares = emit(relax.op.multiply(rows, rows))
    pads = [(size - 1) // 2, 0, size // 2, 0]
    means = emit(relax.op.nn.avg_pool2d(squares, [size, 1], padding=pads, count_include_pad=True))
    scaled = emit(relax.op.multiply(node.scalar(node.attr("alpha"), dtype), means))
    base = emit(relax.op.add(node.scalar(node.attr("bias"), dtype), scaled))
    return node.reshape(emit(relax.op.divide(rows, emit(relax.op.power(base, node.scalar(node.attr("beta"), dtype))))), shape)
