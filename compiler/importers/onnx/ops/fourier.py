"""Discrete Fourier transforms, and the matrix of mel filters.

A transform of n = a * b points is a product with matrices of a and b columns between twiddle factors (Cooley and Tukey, 1965), until the factors are small; the matrices
are constants, so the length of a transform must be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np

from ....tvm import relax
from ..load import dtype_name
from ..node import Node
from ..registry import converter, evaluator
from ..symbolic import Dim
from ..values import Host, Refusal, concrete

#: longest transforms of real and of complex signals that are one product, of two and of four times n * n steps; longer ones are split
_DIRECT_REAL, _DIRECT_COMPLEX = 256, 8
#: longest transform of a prime number of points
_LONGEST_PRIME = 4096


@dataclass(frozen=True)
class _Complex:
    """real and imaginary parts of one shape; None stands for zeros."""

    real: relax.Expr
    imaginary: relax.Expr | None = None


@converter("DFT", since=20)
def transform(node: Node) -> relax.Expr:
    """The axis is an input."""
    return _transform(node, node.ints(2)[0] if node.has(2) else -2)


@converter("DFT", since=17)
def transform_along_attribute(node: Node) -> relax.Expr:
    return _transform(node, node.attr("axis", 1))


def _transform(node: Node, axis: int) -> relax.Expr:
    """x [..., n, ..., 1 or 2] -> [..., k, ..., 2], or [..., k, ..., 1] of a one-sided inverse, whose input is the first half of a spectrum."""
    x, inverse, half = node.tensor(0), bool(node.attr("inverse", 0)), bool(node.attr("onesided", 0))
    shape = node.shape(x)
    rank = len(shape)
    axis = node.axis(axis, rank)
    if axis == rank - 1:
        raise Refusal("the last dim holds real and imaginary parts and cannot be transformed")
    have, parts = node.static([shape[axis], shape[-1]], "the axis that is transformed")
    if node.has(1):
        length = node.ints(1)[0]
    else:
        length = 2 * (have - 1) if inverse and half else have
    if length < 1 or parts not in (1, 2):
        raise Refusal(f"a transform of length {length} of elements with {parts} parts")
    order = [*(position for position in range(rank - 1) if position != axis), axis]
    value = _Complex(*(_resized(node, _part(node, x, part, order), have, length // 2 + 1 if inverse and half else length) for part in range(parts)))
    if inverse and half:
        value = _whole_spectrum(node, value, length)
    result = _fourier(node, value, length, inverse)
    if half and not inverse:
        result = _Complex(*(_cut(node, part, length // 2 + 1) for part in _both(node, result)))
    back = [order.index(position) for position in range(rank - 1)]
    outputs = [node.emit(relax.op.permute_dims(part, back)) for part in ([result.real] if inverse and half else _both(node, result))]
    pieces = [node.reshape(part, [*node.shape(part), 1]) for part in outputs]
    return pieces[0] if len(pieces) == 1 else relax.op.concat(pieces, rank - 1)


def _part(node: Node, x: relax.Expr, part: int, order: list[int]) -> relax.Expr:
    """The real or imaginary part, with the axis that is transformed at the end."""
    rank = node.rank(x)
    one = node.emit(relax.op.strided_slice(x, [rank - 1], [part], [part + 1], assume_inbound=True))
    return node.emit(relax.op.permute_dims(node.reshape(one, node.shape(x)[:-1]), order))


def _cut(node: Node, x: relax.Expr, size: int) -> relax.Expr:
    return node.emit(relax.op.strided_slice(x, [node.rank(x) - 1], [0], [size], assume_inbound=True))


def _resized(node: Node, x: relax.Expr, have: int, size: int) -> relax.Expr:
    """The last axis cut, or continued with zeros."""
    if size <= have:
        return x if size == have else _cut(node, x, size)
    zeros = node.emit(relax.op.full([*node.shape(x)[:-1], size - have], node.scalar(0, node.dtype(x)), node.dtype(x)))
    return node.emit(relax.op.concat([x, zeros], node.rank(x) - 1))


def _both(node: Node, value: _Complex) -> list[relax.Expr]:
    zeros = value.imaginary
    if zeros is None:
        zeros = node.emit(relax.op.full(node.shape(value.real), node.scalar(0, node.dtype(value.real)), node.dtype(value.real)))
    return [value.real, zeros]


def _whole_spectrum(node: Node, value: _Complex, length: int) -> _Complex:
    """The spectrum of a real signal from its first half; the imaginary parts of the constant and of the highest frequency do not count."""
    mirrored = node.array(np.minimum(np.arange(length), length - np.arange(length)), "int64")
    axis, dtype = node.rank(value.real) - 1, node.dtype(value.real)
    places = np.arange(length)
    sign = np.where(2 * places == length, 0, np.where(places == 0, 0, np.where(2 * places < length, 1, -1)))
    real = node.emit(relax.op.take(value.real, mirrored, axis, mode="fast"))
    if value.imaginary is None:
        return _Complex(real)
    imaginary = node.emit(relax.op.take(value.imaginary, mirrored, axis, mode="fast"))
    return _Complex(real, node.emit(relax.op.multiply(imaginary, node.array(sign, dtype))))


def _fourier(node: Node, x: _Complex, length: int, inverse: bool) -> _Complex:
    """Over the last axis, which has `length` points."""
    sign = 1 if inverse else -1
    result = _split(node, x, length, sign)
    if not inverse:
        return result
    factor = node.scalar(1 / length, node.dtype(x.real))
    return _Complex(*(node.emit(relax.op.multiply(part, factor)) for part in _both(node, result)))


def _split(node: Node, x: _Complex, length: int, sign: int) -> _Complex:
    direct = _DIRECT_REAL if x.imaginary is None else _DIRECT_COMPLEX
    first = 1 if length <= direct else next(size for size in range(isqrt(length), 0, -1) if length % size == 0)
    if first == 1:
        if length > _LONGEST_PRIME:
            raise Refusal(f"a transform of {length} points, a prime number above {_LONGEST_PRIME}")
        k = np.arange(length)
        return _product(node, x, np.exp(sign * 2j * np.pi * (np.outer(k, k) % length) / length))
    second = length // first
    lead = node.shape(x.real)[:-1]
    count = len(lead)

    def each(value: _Complex, dims: list[Dim], swap: bool) -> _Complex:
        """Reshaped, then the last two dims exchanged if asked for."""
        parts = [node.reshape(part, dims) for part in (value.real, value.imaginary) if part is not None]
        order = [*range(count), count + 1, count]
        return _Complex(*(node.emit(relax.op.permute_dims(part, order)) if swap else part for part in parts))

    # point n = second * i + j, frequency k = r + first * s
    inner = _split(node, each(x, [*lead, first, second], True), first, sign)  # [..., j, r]
    twiddle = np.exp(sign * 2j * np.pi * np.outer(np.arange(second), np.arange(first)) / length)
    turned = _times(node, inner, node.array(twiddle.real, node.dtype(x.real)), node.array(twiddle.imag, node.dtype(x.real)), relax.op.multiply)
    outer = _split(node, each(turned, [*lead, second, first], True), second, sign)  # [..., r, s]
    return each(each(outer, [*lead, first, second], True), [*lead, length], False)


def _product(node: Node, x: _Complex, matrix: np.ndarray) -> _Complex:
    dtype = node.dtype(x.real)
    return _times(node, x, node.array(matrix.real, dtype), node.array(matrix.imag, dtype), relax.op.matmul)


def _times(node: Node, x: _Complex, real: relax.Expr, imaginary: relax.Expr, multiply: Any) -> _Complex:
    emit, op = node.emit, relax.op
    if x.imaginary is None:
        return _Complex(emit(multiply(x.real, real)), emit(multiply(x.real, imaginary)))
    return _Complex(
        emit(op.subtract(emit(multiply(x.real, real)), emit(multiply(x.imaginary, imaginary)))),
        emit(op.add(emit(multiply(x.real, imaginary)), emit(multiply(x.imaginary, real)))),
    )


@converter("STFT", since=17)
def short_time_transform(node: Node) -> relax.Expr:
    """signal [B, L] or [B, L, 1 or 2] -> [B, frames, bins, 2]; the step and the length of a frame must be known at import."""
    signal, step = node.tensor(0), node.ints(1)[0]
    shape = node.shape(signal)
    if len(shape) == 2:
        shape = [*shape, 1]
        signal = node.reshape(signal, shape)
    window = node.tensor(2) if node.has(2) else None
    if node.has(3):
        length = node.ints(3)[0]
    else:
        length = node.static([shape[1]] if window is None else node.shape(window), "the length of a frame")[0]
    parts = node.static(shape[2:], "the number of parts")[0]
    if step < 1 or length < 1 or parts not in (1, 2) or (parts == 2 and node.attr("onesided", 1)):
        raise Refusal(f"frames of length {length} in steps of {step}, of elements with {parts} parts")
    if node.dims.compare(">=", shape[1], length) is False:
        raise Refusal(f"a frame of length {length} of a signal of length {shape[1]}")
    frames = node.dims.maximum(node.dims.simplify(node.dims.floor_divide(node.dims.simplify(shape[1] - length), step) + 1), 0)
    starts = node.emit(relax.op.arange(0, frames, 1, "int64"))
    starts = node.reshape(node.emit(relax.op.multiply(starts, node.scalar(step, "int64"))), [frames, 1])
    places = node.emit(relax.op.add(starts, node.array(np.arange(length), "int64")))

    def framed(part: int) -> relax.Expr:
        one = node.reshape(node.emit(relax.op.strided_slice(signal, [2], [part], [part + 1], assume_inbound=True)), shape[:2])
        cut = node.emit(relax.op.take(one, places, 1, mode="fast"))
        return cut if window is None else node.emit(relax.op.multiply(cut, window))

    result = _fourier(node, _Complex(*(framed(part) for part in range(parts))), length, False)
    values = _both(node, result)
    if node.attr("onesided", 1):
        values = [_cut(node, value, length // 2 + 1) for value in values]
    return relax.op.concat([node.reshape(value, [*node.shape(value), 1]) for value in values], 3)


@evaluator("MelWeightMatrix", since=17)
def mel_weights(node: Node) -> Host:
    """[dft_length // 2 + 1, bins]: triangles between neighbouring frequencies that are equally far apart on the mel scale, rounded down to bins of the transform."""
    bins, length, rate, low, high = (node.constant(index).reshape(()).item() for index in range(5))
    edges = np.linspace(*(2595 * np.log10(1 + hertz / 700) for hertz in (low, high)), bins + 3)[:-1]
    places = np.floor((length + 1) * (700 * (10 ** (edges / 2595) - 1)) / rate).astype(np.int64)
    weights, rows = np.zeros((length // 2 + 1, bins)), np.arange(length // 2 + 1)
    if places.min() < 0 or places.max() >= len(rows):
        raise Refusal(f"frequencies of {low} to {high} Hz lie outside of a transform of {length} points at {rate} Hz")
    for column, (left, centre, right) in enumerate(zip(places, places[1:], places[2:], strict=False)):
        rising = (rows >= left) & (rows <= centre) if centre > left else rows == centre
        weights[rising, column] = (rows[rising] - left) / (centre - left) if centre > left else 1
        falling = (rows >= centre) & (rows < right)
        weights[falling, column] = (right - rows[falling]) / max(right - centre, 1)
    return concrete(weights, dtype_name(node.attr("output_datatype", 1)))


@converter("MelWeightMatrix", since=17)
def mel_weights_at_run_time(node: Node) -> Host:
    raise Refusal("its inputs must be known at import")
