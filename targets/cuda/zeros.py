"""Zeros of constant weights that templates may leave out, told by the values: it does not matter who pruned them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import sparse
from .kernel import HALF

#: granularity of `Zeros.tiles`: what the tiles of every template are multiples of, in k and in columns
K, COLUMNS = 16, 32


@dataclass(frozen=True)
class Zeros:
    """two_of_four: see sparse.py. tiles: bool [ceil(K / 16), ceil(N / 32)] as bytes, whether a tile of weights [K, N] has a number that is not zero; shape: of it."""

    two_of_four: bool
    shape: tuple[int, int]
    tiles: bytes

    def kept(self, k: int, columns: int, taps: int = 1) -> np.ndarray:
        """bool [taps * ceil(K / taps / k), ceil(N / columns)] of larger tiles, multiples of the granularity; no tile spans two of several taps."""
        found = np.frombuffer(self.tiles, bool).reshape(self.shape)
        return np.concatenate([merged(each, k // K, columns // COLUMNS) for each in np.split(found, taps)])


def zeros_of(weight: np.ndarray) -> Zeros | None:
    """Of weights [..., K, N] of one matrix, or of a convolution's taps [height, width, channels, N]; None where nothing can be left out, and for float8."""
    if weight.ndim < 2 or not weight.size or weight.dtype.name not in (*HALF, "float32", "int8"):
        return None
    pattern = sparse.two_of_four(weight)
    tiles = occupied(weight)
    return Zeros(pattern, tiles.shape, tiles.tobytes()) if pattern or not tiles.all() else None


def occupied(weight: np.ndarray) -> np.ndarray:
    """bool [ceil(K / 16), ceil(N / 32)]: whether a tile of [..., K, N], K what all but the last dim make, has a number that is not zero (of either sign)."""
    matrix = weight.reshape(-1, weight.shape[-1])
    if matrix.dtype.name in HALF:
        matrix = matrix.view(np.uint16) & 0x7FFF
    if (corners := matrix[::K, ::COLUMNS] != 0).all():  # of dense weights that says it all
        return corners
    return merged(matrix != 0, K, COLUMNS)


def merged(flags: np.ndarray, k: int, columns: int) -> np.ndarray:
    """Whether any is set in each tile of k x columns of [K, N]; those at the ends may be smaller."""
    rows = np.logical_or.reduceat(flags, np.arange(0, flags.shape[0], k), axis=0)
    return np.logical_or.reduceat(rows, np.arange(0, flags.shape[1], columns), axis=1)
