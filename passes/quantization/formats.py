"""Number formats as values: how real numbers become codes, how codes are packed, and what that costs. The numpy reference for every kernel.

A code is an integer, or a number of few bits; value = (code - zero) * scale. Rounding is to the nearest, ties to even, as in ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...compiler.dialect.weight_only import middle, packed_codes, rows_of, unpacked
from ...compiler.element_types import FLOAT8, FLOAT8_MAX, numpy_dtype

#: scales below this have no reciprocal in float32
TINY = 1e-37
#: parts of a group's range that `encode_best` tries
SHRINKS = (1.0, 0.93, 0.86, 0.79)
#: and those that three bits and fewer want beside them
MORE_SHRINKS = (0.72, 0.65, 0.58, 0.51, 0.44)
#: columns that `encode_best` takes at once
COLUMNS = 128


@dataclass(frozen=True)
class Encoded:
    """Codes with what turns them back into numbers. codes: integers, or numbers of float8_e4m3fn, of the array's shape; scale, zero: broadcast against the codes, `zero` 0 where symmetric."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def decode(self) -> np.ndarray:
        """The values, float32."""
        return ((self.codes.astype(np.float32) - self.zero.astype(np.float32)) * self.scale).astype(np.float32)


@dataclass(frozen=True)
class Affine:
    """The range of one tensor: u8 codes, value = (code - zero) * scale; zero is a code, so 0.0 is exact (what padding needs)."""

    scale: float
    zero: int

    @staticmethod
    def of_range(low: float, high: float) -> Affine:
        """The codes 0..255 over [low, high], which is widened to contain 0."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32((high - low) / 255))
        if scale < TINY:
            scale = 1.0
        return Affine(scale, int(np.clip(np.rint(-low / scale), 0, 255)))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """u8 codes; out-of-range values saturate."""
        return np.clip(np.rint(x.astype(np.float32) * np.float32(1 / self.scale)) + self.zero, 0, 255).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)


@dataclass(frozen=True)
class Int8:
    """int8, symmetric, codes -127..127. axis: one scale per slice along it (the output channels of a weight); None: one for the whole tensor."""

    axis: int | None = None

    def encode(self, x: np.ndarray, least: np.ndarray | float = 0.0) -> Encoded:
        """least: scales, that broadcast against x, below which none goes."""
        scale = np.maximum(_positive(_top(x, self.axis) / np.float32(127)), np.float32(least))
        codes = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
        return Encoded(codes, scale, np.zeros_like(scale, np.int32))

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Codes and float32 scales."""
        return int(np.prod(shape)) + 4 * (1 if self.axis is None else shape[self.axis])

    def pack(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.int8)

    def unpack(self, packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return packed.reshape(shape)


def scale_for_16_bits(weight: np.ndarray) -> np.ndarray:
    """[.., K, N] -> [N], the scales by which int8 codes are such that sums of their products with u8 fit 16 bits.

    The sums are those of four k of eight, 0, 1, 4, 5 and 2, 3, 6, 7, unless that would cost more than a bit, and then of two consecutive k: weights of one sign add up to 128 at most
    (their rounding is allowed for), since 128 * 255 < 2^15."""
    k, n = weight.shape[-2:]
    rows = np.pad(weight.reshape(-1, k, n).astype(np.float32), ((0, 0), (0, -k % 8), (0, 0))).reshape(-1, 2, 2, 2, n)
    pairs = [np.maximum(sign * rows, 0).sum(axis=3) for sign in (1, -1)]
    of_two = np.maximum(*(part.max(axis=(0, 1, 2)) for part in pairs)) / np.float32(127)
    of_four = np.maximum(*(part.sum(axis=1).max(axis=(0, 1)) for part in pairs)) / np.float32(126)
    best = _positive(np.abs(rows).max(axis=(0, 1, 2, 3)) / np.float32(127))
    return np.maximum(best, of_four if float(np.mean(of_four / best)) <= 2 else of_two)


def float8(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest numbers of float8_e4m3fn; what is larger than all of them, infinities too, becomes the largest one, NaN stays NaN."""
    limit = np.float32(FLOAT8_MAX)
    return np.clip(x.astype(np.float32), -limit, limit).astype(numpy_dtype(FLOAT8))


@dataclass(frozen=True)
class Float8:
    """float8_e4m3fn (4 bits of exponent, 3 of mantissa, no infinity; Micikevicius et al., "FP8 Formats for Deep Learning", 2022) times a scale, by which the largest
    number of a slice is the largest one of the format. axis: as of `Int8`."""

    axis: int | None = None

    def encode(self, x: np.ndarray) -> Encoded:
        scale = np.maximum(_top(x, self.axis) * np.float32(1 / FLOAT8_MAX), np.float32(TINY))
        return Encoded(float8(x / scale), scale, np.zeros_like(scale, np.int32))


@dataclass(frozen=True)
class ScaledFloat8:
    """The range of one tensor: float8_e4m3fn times a scale. zero: of its codes, as of `Affine`."""

    scale: float
    zero: int = 0

    @staticmethod
    def of_range(low: float, high: float) -> ScaledFloat8:
        """The farther end of [low, high] is the largest number."""
        scale = float(np.float32(max(abs(low), abs(high)) / FLOAT8_MAX))
        return ScaledFloat8(scale if scale >= TINY else 1.0)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Numbers of float8_e4m3fn; out-of-range values saturate."""
        return float8(x.astype(np.float32) * np.float32(1 / self.scale))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class SlicedFloat8:
    """float8_e4m3fn with a scale, as that of `Float8`, for every slice of a tensor, found while the model runs. axes: those that a slice has whole."""

    axes: tuple[int, ...] = (-1,)

    def encode(self, rows: np.ndarray) -> Encoded:
        """rows: [R, K], each taken for a slice."""
        return Float8(axis=0).encode(rows)

    def decode(self, encoded: Encoded) -> np.ndarray:
        return encoded.decode()


#: how codes cover a range that was observed; how they cover an activation
Range = Affine | ScaledFloat8
Covering = Range | SlicedFloat8


@dataclass(frozen=True)
class GroupedInt:
    """intN for weights [K, N]: groups of `group` consecutive k of one column share a scale (float32), and a zero code when not symmetric.

    bits: 1..8. Codes are unsigned, 0..2^bits - 1; the zero of a symmetric group is 2^(bits-1), its range that of the codes 1..2^bits - 1. One bit, symmetric, is a sign (the zero is
    1/2) times the mean magnitude, which has the least squared error (Rastegari et al., "XNOR-Net", 2016). K is padded with codes of value 0 to whole groups, signs with any. Packed as
    `compiler.dialect.weight_only` says: every column is a string of bits, lowest first, padded to whole bytes.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.group < 1:
            raise ValueError(f"GroupedInt: bits must be 1..8 and group at least 1, not {self.bits} and {self.group}")

    def groups(self, k: int) -> int:
        return -(-k // self.group)

    @property
    def middle(self) -> int:
        """The zero code of a symmetric group of two bits or more."""
        return 1 << (self.bits - 1)

    @property
    def signs(self) -> bool:
        return self.symmetric and self.bits == 1

    def encode(self, w: np.ndarray) -> Encoded:
        """w: [K, N] -> codes uint8 [Kp, N], scale and zero [groups, N] as `Encoded` of shape [groups, group, N] seen through `decode`."""
        k, n = w.shape
        grouped = np.zeros((self.groups(k) * self.group, n), np.float32)
        grouped[:k] = w
        grouped = grouped.reshape(-1, self.group, n)
        top = (1 << self.bits) - 1
        if self.signs:
            counts = np.full((len(grouped), 1, 1), self.group, np.float32)
            counts[-1] -= len(grouped) * self.group - k
            scale = _positive(np.float32(2) * np.abs(grouped).sum(axis=1, keepdims=True) / counts)
            return Encoded((grouped >= 0).astype(np.uint8), scale, np.full(scale.shape, middle(1), np.float32))
        if self.symmetric:
            scale = _positive(np.abs(grouped).max(axis=1, keepdims=True) / np.float32(self.middle - 1))
            zero = np.full(scale.shape, self.middle, np.int32)
        else:
            low, high = np.minimum(grouped.min(axis=1, keepdims=True), 0), np.maximum(grouped.max(axis=1, keepdims=True), 0)
            scale = _positive((high - low) / np.float32(top))
            zero = np.clip(np.rint(-low / scale), 0, top).astype(np.int32)
        codes = np.clip(np.rint(grouped / scale) + zero, 0, top).astype(np.uint8)
        return Encoded(codes, scale, zero)

    def encode_best(self, w: np.ndarray) -> Encoded:
        """As `encode`, with the scale of each group that has the least squared error among SHRINKS of the range, which cut off the largest weights; a symmetric group may
        also put its largest weight on the one code more that its side of zero has (the scale is negative where that is the upper side)."""
        if w.shape[1] > COLUMNS:  # a block of columns at a time stays in the cache
            parts = [self.encode_best(w[:, start : start + COLUMNS]) for start in range(0, w.shape[1], COLUMNS)]
            return Encoded(*(np.concatenate([getattr(part, name) for part in parts], axis=2) for name in ("codes", "scale", "zero")))
        best = self.encode(w)
        if self.signs:
            return best
        grouped = np.zeros((best.codes.shape[0] * self.group, w.shape[1]), np.float32)
        grouped[: len(w)] = w
        grouped = grouped.reshape(best.codes.shape)
        bases = [best.scale]
        if self.symmetric:
            largest = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=1, keepdims=True), axis=1)
            bases.append(np.where(np.abs(largest) >= TINY * self.middle, largest / np.float32(-self.middle), best.scale).astype(np.float32))
        codes, scale, error = best.codes, best.scale, _squared_error(grouped, best.codes, best.scale, best.zero)
        for base in bases:
            for shrink in SHRINKS if self.bits > 3 else (*SHRINKS, *MORE_SHRINKS):
                tried = _usable(base * np.float32(shrink))
                now = np.clip(np.rint(grouped / tried) + best.zero, 0, (1 << self.bits) - 1).astype(np.uint8)
                found = _squared_error(grouped, now, tried, best.zero)
                better = found < error
                error, scale, codes = np.where(better, found, error), np.where(better, tried, scale), np.where(better, now, codes)
        return Encoded(codes, scale.astype(np.float32), best.zero)

    def decode(self, encoded: Encoded, k: int) -> np.ndarray:
        """The weights [K, N]."""
        return encoded.decode().reshape(-1, encoded.codes.shape[2])[:k]

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """codes: [groups, group, N] or [Kp, N] -> uint8 [bytes, N]."""
        return packed_codes(codes.reshape(-1, codes.shape[-1]).astype(np.uint8), self.bits)

    def unpack(self, packed: np.ndarray, k: int) -> np.ndarray:
        """uint8 [bytes, N] -> codes [Kp, N] for K weights per column."""
        return unpacked(packed, self.groups(k) * self.group, self.bits)

    def size_bytes(self, k: int, n: int) -> int:
        """Packed codes, scales, and zeros (a byte each) where there are any."""
        return n * (rows_of(self.groups(k) * self.group, self.bits) + self.groups(k) * (4 if self.symmetric else 5))


def _squared_error(values: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Per group [G, 1, N]."""
    return np.square((codes.astype(np.float32) - zero.astype(np.float32)) * scale - values).sum(axis=1, keepdims=True)


def _usable(scale: np.ndarray) -> np.ndarray:
    return np.where(np.abs(scale) >= TINY, scale, 1.0).astype(np.float32)


def _top(x: np.ndarray, axis: int | None) -> np.ndarray:
    """The largest magnitude of every slice along an axis, or of all, with the dims kept."""
    axes = tuple(position for position in range(x.ndim) if axis is None or position != axis % x.ndim)
    return np.abs(x).max(axis=axes, keepdims=True, initial=0.0).astype(np.float32)


def _positive(scale: np.ndarray) -> np.ndarray:
    """Scales of slices of zeros, or so small that a code would not be finite, are 1."""
    return np.where(scale >= TINY, scale, 1.0).astype(np.float32)
