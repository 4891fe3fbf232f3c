"""Observers: from the values that a tensor takes on calibration data to the range that its codes cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...compiler.errors import UsageError
from .formats import Affine, Range

OBSERVERS = ("minmax", "percentile", "mse")
#: values kept of one tensor, over all samples
KEPT = 1 << 18


@dataclass
class Statistics:
    """What is remembered of a tensor: per channel the extremes over all data, and a sample of whole rows. rows: [R, C]."""

    low: np.ndarray
    high: np.ndarray
    rows: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def of(values: np.ndarray, keep: int, generator: np.random.Generator) -> Statistics:
        """values: [R, C], of which at most `keep` numbers are remembered as whole rows."""
        count = min(len(values), max(1, keep // values.shape[1]))
        chosen = values if count == len(values) else values[np.sort(generator.choice(len(values), count, replace=False))]
        return Statistics(values.min(axis=0), values.max(axis=0), [chosen.astype(np.float32)])

    def joined(self, other: Statistics) -> Statistics:
        return Statistics(np.minimum(self.low, other.low), np.maximum(self.high, other.high), self.rows + other.rows)

    def scaled(self, factor: np.ndarray) -> Statistics:
        """The statistics of the tensor times a positive factor per channel."""
        return Statistics(self.low * factor, self.high * factor, [rows * factor for rows in self.rows])

    @property
    def sample(self) -> np.ndarray:
        return np.concatenate(self.rows)

    @property
    def top(self) -> np.ndarray:
        """Largest magnitude per channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def chosen_range(kind: str, many: list[Statistics], percentile: float = 99.99, covering: Callable[[float, float], Range] = Affine.of_range) -> Range:
    """The range of a tensor that was seen through several views. covering: the codes over a range.

    minmax: all that was seen. percentile: all but the outer 100 - percentile per cent on either side of the sample. mse: the part of the range with the least mean squared error of
    the sample (Banner et al., "Post training 4-bit quantization", 2019, by search instead of a model of the distribution).
    """
    low, high = min(float(s.low.min()) for s in many), max(float(s.high.max()) for s in many)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UsageError("quantize: the model gives NaN or infinity on the calibration data; take such samples out, or leave it unquantized")
    if kind == "minmax":
        return covering(low, high)
    sample = np.concatenate([s.sample.reshape(-1) for s in many])
    if kind == "percentile":
        return covering(float(np.percentile(sample, 100 - percentile)), float(np.percentile(sample, percentile)))
    if sample.size > 1 << 16:
        sample = sample[:: -(-sample.size // (1 << 16))]
    bounds = [low, high]
    # one end after the other, the farther one first: its outliers cost all the others their precision
    for end in sorted((0, 1), key=lambda index: -abs(bounds[index])):
        tried = [bounds[end] * (1 - step / 40) for step in range(36)]
        errors = []
        for value in tried:
            tried_range = covering(*((value, bounds[1]) if end == 0 else (bounds[0], value)))
            errors.append(float(np.mean((tried_range.decode(tried_range.encode(sample)) - sample) ** 2)))
        bounds[end] = tried[int(np.argmin(errors))]
    return covering(*bounds)
