"""Normalisations and softmax."""

from __future__ import annotations

import numpy as np

from ....tvm import relax
from ..node import Node
from ..precision import round_step
from ..registry import converter
from ..values import Host, Refusal


@converter("BatchNormalization")
def batch_normalization(node: Node) -> tuple[relax.Expr, ...]:
    """Inference: x * scale + shift per channel, both folded at import when the statistics are constants; training: with the batch's own statistics."""
    x = node.tensor(0)
    rank, dtype, epsilon = node.rank(x), node.dtype(x), node.attr("epsilon")
    if not node.attr("spatial", 1) and rank > 2:
        raise Refusal("statistics per activation (spatial=0) are not supported")
    if _trains(node):
        return _batch_normalization_training(node, x, rank)
    hosts = [node.maybe_host(index) for index in (1, 2, 3, 4)]
    if all(isinstance(host, Host) and not host.symbolic for host in hosts):
        gamma, beta, mean, variance = (host.array.astype(np.float64).reshape(-1, *[1] * (rank - 2)) for host in hosts if host is not None)
        factor = gamma / np.sqrt(variance + epsilon)
        scale, shift = node.array(factor, dtype), node.array(beta - mean * factor, dtype)
    else:
        gamma, beta, mean, variance = (node.per_channel(index, rank) for index in (1, 2, 3, 4))
        deviation = node.emit(relax.op.sqrt(node.emit(relax.op.add(variance, node.scalar(epsilon, node.dtype(variance))))))
        scale = node.emit(relax.op.divide(gamma, deviation))
        shift = node.emit(relax.op.subtract(beta, node.emit(relax.op.multiply(mean, scale))))
    x, scale, shift = node.align(x, scale, shift)
    return (relax.op.add(node.emit(relax.op.multiply(x, scale)), shift),)


def _trains(node: Node) -> bool:
    if node.opset < 7:
        return not node.attr("is_test", 0)
    return bool(node.attr("training_mode", 0)) if node.opset >= 14 else any(node.proto.output[1:])


def _batch_normalization_training(node: Node, x: relax.Expr, rank: int) -> tuple[relax.Expr, ...]:
    """Y, the running mean and variance: `momentum` parts of the old and 1 - momentum of the batch's, whose variance is divided by the count.

    Before opset 14 two more outputs: the batch's own mean and variance.
    """
    axes = [axis for axis in range(rank) if axis != 1]
    mean = node.emit(relax.op.mean(x, axes, keepdims=True))
    centred = node.emit(relax.op.subtract(x, mean))
    variance = node.emit(relax.op.mean(node.emit(relax.op.multiply(centred, centred)), axes, keepdims=True))
    inverse = node.emit(relax.op.rsqrt(node.emit(relax.op.add(variance, node.scalar(node.attr("epsilon"), node.dtype(x))))))
    y = _scale_and_shift(node, node.emit(relax.op.multiply(centred, inverse)), rank)
    channels = [node.shape(x)[1]]
    saved = [node.reshape(value, channels) for value in (mean, variance)]

    def running(index: int, batch: relax.Expr) -> relax.Expr:
        old = node.tensor(index)
        dtype, momentum = node.dtype(old), node.attr("momentum")
        batch = batch if node.dtype(batch) == dtype else node.emit(relax.op.astype(batch, dtype))
        old, batch = node.align(old, batch)
        kept = node.emit(relax.op.multiply(old, node.scalar(momentum, dtype)))
        return node.emit(relax.op.add(kept, node.emit(relax.op.multiply(batch, node.scalar(1 - momentum, dtype)))))

    results = (node.emit(y), running(3, saved[0]), running(4, saved[1]))
    return results if node.opset >= 14 else (*results, *saved)


@converter("LayerNormalization", since=17)
def layer_normalization(node: Node) -> tuple[relax.Expr, ...]:
    x = node.tensor(0)
    shape, epsilon = node.shape(x), node.attr("epsilon")
    axes = list(range(node.axis(node.attr("axis", -1), len(shape)), len(shape)))
    gamma = node.tensor(1)
    tail = [shape[axis] for axis in axes]
    exact = len(node.shape(gamma)) == len(tail) and all(node.dims.equal(a, b) for a, b in zip(node.shape(gamma), tail, strict=True))
    if exact and not any(node.proto.output[1:]):
        beta = node.tensor(2) if node.has(2) else node.array(np.zeros(node.static(tail, "the normalised shape")), node.dtype(gamma))
        return (relax.op.nn.layer_norm(x, gamma, beta, axes, epsilon),)
    mean = node.emit(relax.op.mean(x, axes, keepdims=True))
    centred = node.emit(relax.op.subtract(x, mean))
    variance = node.emit(relax.op.mean(node.emit(relax.op.multiply(centred, centred)), axes, keepdims=True))
    inverse = node.emit(relax.op.rsqrt(node.emit(relax.op.add(variance, node.scalar(epsilon, node.dtype(x))))))
    scaled = node.emit(relax.op.multiply(*node.align(node.emit(relax.op.multiply(centred, inverse)), gamma)))
    return (relax.op.add(*node.align(scaled, node.tensor(2))) if node.has(2) else scaled), mean, inverse


@converter("RMSNormalization", since=23)
@converter("SimplifiedLayerNormalization")
def rms_normalization(node: Node) -> tuple[relax.Expr, ...]:
    """SimplifiedLayerNormalization, ONNX Runtime's, may give 1 / rms too."""
    x = node.tensor(0)
    rank, epsilon = node.rank(x), node.attr("epsilon", 1e-5)
    axes = list(range(node.axis(node.attr("axis", -1), rank), rank))
    normal = relax.op.nn.rms_norm(x, node.tensor(1), axes, epsilon)
    return (normal, inverse_rms(node, x, axes, epsilon)) if any(node.proto.output[1:]) else (normal,)


def inverse_rms(node: Node, x: relax.Expr, axes: list[int], epsilon: float) -> relax.Expr:
    """1 / sqrt(mean(x^2) + epsilon) over `axes`, which stay as ones; bound."""
    mean = node.emit(relax.op.mean(node.emit(relax.op.multiply(x, x)), axes, keepdims=True))
    return node.emit(relax.op.rsqrt(node.emit(relax.op.add(mean, node.scalar(epsilon, node.dtype(x))))))


@converter("InstanceNormalization")
def instance_normalization(node: Node) -> relax.Expr:
    x = node.tensor(0)
    rank = node.rank(x)
    return _scale_and_shift(node, _standardize(node, x, list(range(2, rank))), rank)


@converter("GroupNormalization", since=21)
def group_normalization(node: Node) -> relax.Expr:
    """x [N, C, *spatial], groups of channels are standardised together; scale and bias are per channel."""
    x = node.tensor(0)
    shape, groups = node.shape(x), node.attr("num_groups")
    parts = node.reshape(x, [shape[0], groups, node.dims.floor_divide(shape[1], groups), *shape[2:]])
    standard = node.reshape(_standardize(node, parts, list(range(2, len(shape) + 1))), shape)
    return _scale_and_shift(node, standard, len(shape))


def _standardize(node: Node, x: relax.Expr, axes: list[int]) -> relax.Expr:
    """(x - mean) / sqrt(variance + epsilon)"""
    centred = node.emit(relax.op.subtract(x, node.emit(relax.op.mean(x, axes, keepdims=True))))
    variance = node.emit(relax.op.mean(node.emit(relax.op.multiply(centred, centred)), axes, keepdims=True))
    return node.emit(
        relax.op.multiply(centred, node.emit(relax.op.rsqrt(node.emit(relax.op.add(variance, node.scalar(node.attr("epsilon"), node.dtype(x)))))))
    )


def _scale_and_shift(node: Node, x: relax.Expr, rank: int) -> relax.Expr:
    x, scale, shift = node.align(x, node.per_channel(1, rank), node.per_channel(2, rank))
    return relax.op.add(node.emit(relax.op.multiply(x, scale)), shift)


@converter("LpNormalization")
def lp_normalization(node: Node) -> relax.Expr:
    x = node.tensor(0)
    axis = node.axis(node.attr("axis"), node.rank(x))
    if node.attr("p") == 1:
        norm = node.emit(relax.op.sum(node.emit(relax.op.abs(x)), axis, keepdims=True))
    else:
        norm = node.emit(relax.op.sqrt(node.emit(relax.op.sum(node.emit(relax.op.multiply(x, x)), axis, keepdims=True))))
    zero = node.scalar(0, node.dtype(x))
    return relax.op.where(node.emit(relax.op.equal(norm, zero)), zero, node.emit(relax.op.divide(x, norm)))


@converter("Softmax", "LogSoftmax", since=13)
def softmax(node: Node) -> relax.Expr:
    x = node.tensor(0)
    return softmax_along(node, x, node.axis(node.attr("axis", -1), node.rank(x)))


@converter("Softmax", "LogSoftmax")
def softmax_flattened(node: Node) -> relax.Expr:
    """Before opset 13: over all axes from `axis` on, taken together."""
    x = node.tensor(0)
    shape = node.shape(x)
    axis = node.axis(node.attr("axis", 1), len(shape))
    if axis == len(shape) - 1:
        return softmax_along(node, x, axis)
    flat = node.reshape(x, [node.dims.product(shape[:axis]), node.dims.product(shape[axis:])])
    return node.reshape(softmax_along(node, flat, 1), shape)


def softmax_along(node: Node, x: relax.Expr, axis: int) -> relax.Expr:
    """The softmax, or the logarithm of it for a LogSoftmax, along one axis; every step is rounded to the graph's type where that is narrow. Bound."""
    logarithm = node.op == "LogSoftmax"
    if node.narrow is None or node.dtype(x) != "float32":
        return node.emit((relax.op.nn.log_softmax if logarithm else relax.op.nn.softmax)(x, axis))

    def step(result: relax.Expr) -> relax.Expr:
        return round_step(node, node.emit(result))

    centred = step(relax.op.subtract(x, node.emit(relax.op.max(x, axis, keepdims=True))))
    grown = step(relax.op.exp(centred))
    total = step(relax.op.sum(grown, axis, keepdims=True))
    return step(relax.op.subtract(centred, step(relax.op.log(total)))) if logarithm else step(relax.op.divide(grown, total))


@converter("Hardmax", since=13)
def hardmax(node: Node) -> relax.Expr:
    """One at the first maximum along the axis, zero elsewhere."""
    return _hardmax(node, node.tensor(0), node.attr("axis", -1))


@converter("Hardmax")
def hardmax_flattened(node: Node) -> relax.Expr:
    """Before opset 13: over all axes from `axis` on, taken together."""
    x = node.tensor(0)
    shape = node.shape(x)
    axis = node.axis(node.attr("axis", 1), len(shape))
    flat = node.reshape(x, [node.dims.product(shape[:axis]), node.dims.product(shape[axis:])])
    return node.reshape(node.emit(_hardmax(node, flat, 1)), shape)


def _hardmax(node: Node, x: relax.Expr, axis: int) -> relax.Expr:
    shape = node.shape(x)
    axis = node.axis(axis, len(shape))
    first = node.emit(relax.op.argmax(x, axis, True))
    places = node.emit(relax.op.arange(0, shape[axis], 1, "int64"))
    places = node.reshape(places, [shape[axis] if position == axis else 1 for position in range(len(shape))])
    return relax.op.astype(node.emit(relax.op.equal(places, first)), node.dtype(x))
