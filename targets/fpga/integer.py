"""The integer arithmetic of every stage, defined once: numpy here, C++ in library/tc_hls.h, SystemVerilog in library/tc_mvau.sv, bit for bit the same.

A tensor is u8 with one (scale, zero) pair: real = scale * (q - zero). Every division by a scale is a multiplication by a 17-bit integer, an addition of
half a unit and an arithmetic shift (round half up): Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, 2018; softmax and layer norm follow Kim et al., I-BERT, 2021, with tables in place of its polynomials.
"""

from __future__ import annotations

import math

import numpy as np

#: bits of a requantising multiplier: unsigned 17 bits are one signed 18-bit port of a DSP48
MULTIPLIER_BITS = 17
#: fraction bits of a normalised value in layer norm
NORM_BITS = 12
#: the largest entry of softmax's table of exponentials
EXP_ONE = 65535
#: fraction bits of softmax's reciprocal
RECIPROCAL_BITS = 30


def fixed_point(scales: np.ndarray, bits: int = MULTIPLIER_BITS) -> tuple[np.ndarray, int]:
    """Integers m and one shift with m / 2^shift = scales, the largest m below 2^bits. scales: positive; raises ValueError when they cannot be held."""
    scales = np.asarray(scales, np.float64)
    largest = float(np.abs(scales).max())
    if not math.isfinite(largest) or largest <= 0:
        raise ValueError(f"scale {largest}")
    shift = bits - math.frexp(largest)[1]
    multipliers = np.round(np.ldexp(scales, shift)).astype(np.int64)
    if np.abs(multipliers).max() >= 1 << bits:  # rounded up to the next power of two
        shift -= 1
        multipliers = np.round(np.ldexp(scales, shift)).astype(np.int64)
    if not 1 <= shift <= 46:
        raise ValueError(f"scale {largest:g} is outside of what a shift of 1..46 bits expresses")
    return multipliers, shift


def rounded_shift(value: np.ndarray, shift: int) -> np.ndarray:
    """value / 2^shift, half up."""
    return (value + (1 << (shift - 1))) >> shift


def requantise(acc: np.ndarray, multiplier: np.ndarray | int, shift: int, zero: int, low: int = 0, high: int = 255) -> np.ndarray:
    """u8 of an accumulator: clip(round(acc * multiplier / 2^shift) + zero, low, high)."""
    return np.clip(rounded_shift(acc.astype(np.int64) * multiplier, shift) + zero, low, high)


def exp_table(scale: float) -> np.ndarray:
    """E[d] = exp(-scale * d) as 16-bit fractions, d = max - x in 0..255."""
    return np.round(np.exp(-scale * np.arange(256)) * EXP_ONE).astype(np.int64)


def softmax(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """x: [rows, T] u8 -> probabilities [rows, T] u8 with scale 1/255 and zero 0."""
    e = table[x.max(axis=1, keepdims=True) - x]
    reciprocal = (255 << RECIPROCAL_BITS) // e.sum(axis=1, keepdims=True)
    return np.minimum(rounded_shift(e * reciprocal, RECIPROCAL_BITS), 255)


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: int, shift: int, zero: int) -> np.ndarray:
    """x: [rows, D] u8 -> u8. With c = D x - sum(x) and V = D sum(x^2) - sum(x)^2 + epsilon, c / sqrt(V) is the normalised value; its reciprocal root
    is taken once a row, from an integer square root of V with 2 * k more bits, where k makes V as long as 56 bits allow (k from the row's V).
    """
    d = x.shape[1]
    x = x.astype(np.int64)
    total = x.sum(axis=1)
    variance = d * (x * x).sum(axis=1) - total * total + epsilon
    centred = d * x - total[:, None]
    rows = np.empty_like(x)
    for row, value in enumerate(variance.tolist()):
        root, k = scaled_root(value)
        # centred / root has 2^-k too much: 2^(NORM_BITS + k) / root, in 40 bits of fraction
        reciprocal = (1 << 40) // root
        rows[row] = rounded_shift(centred[row] * reciprocal, 40 - NORM_BITS - k)
    return np.clip(rounded_shift(rows * gamma + beta, shift) + zero, 0, 255)


def scaled_root(value: int) -> tuple[int, int]:
    """(isqrt(value << 2k), k) with the largest k <= 12 that keeps value << 2k below 2^48."""
    k = min(12, max(0, (48 - value.bit_length()) // 2))
    return math.isqrt(value << 2 * k), k
