"""The matrices of Winograd's minimal filtering F(m, 3) and vector code for the transforms.

y = A^T [(G g) * (B^T d)] gives m outputs of a 3-tap filter from m + 2 inputs with m + 2 products instead of 3 m (Winograd, "Arithmetic Complexity of
Computations", 1980; for convolution networks Lavin and Gray, 2015). Built by Cook and Toom's construction from m + 1 points and infinity. The points decide the rounding error: {0, +-3/4, +-3/2}
costs F(4, 3) about twice the error of the direct sum, where the customary {0, +-1, +-2} costs eight times it (tests/test_cpu_winograd.py measures both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import numpy as np

from ...compiler.tvm import T
from .dot import fma, splat

#: interpolation points by outputs per tile side; the point at infinity is implied
POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


@dataclass(frozen=True)
class Transforms:
    """output: A^T [m, m + 2], filter: G [m + 2, 3], input: B^T [m + 2, m + 2], all float64."""

    output: np.ndarray
    filter: np.ndarray
    input: np.ndarray


@cache
def transforms(m: int) -> Transforms:
    """The matrices of F(m, 3)."""
    return from_points(POINTS[m])


def from_points(points: Sequence[float]) -> Transforms:
    """The matrices for m + 1 finite points and infinity."""
    size, m = len(points) + 1, len(points) - 1
    output, kernel, data = np.zeros((m, size)), np.zeros((size, 3)), np.zeros((size, size))
    for j, point in enumerate(points):
        others = [other for k, other in enumerate(points) if k != j]
        output[:, j] = point ** np.arange(m)
        kernel[j] = point ** np.arange(3) / np.prod([point - other for other in others])
        data[j, : size - 1] = np.poly(others)[::-1]
    output[m - 1, -1] = kernel[-1, 2] = 1.0
    data[-1] = np.poly(points)[::-1]
    return Transforms(output, kernel, data)


def transform_weights(weight: np.ndarray, m: int) -> np.ndarray:
    """[3, 3, Ci, Co] -> [(m + 2)^2, Ci, Co] = G g G^T, computed in float64, term by term: equal inputs give equal bytes whatever BLAS does."""
    g, wide = transforms(m).filter, weight.astype(np.float64)

    def combine(row: np.ndarray, slices: np.ndarray) -> np.ndarray:
        return reduce(np.add, (factor * part for factor, part in zip(row, slices, strict=True)))

    rows = [combine(row, wide) for row in g]
    tiles = [combine(row, column) for column in rows for row in g]
    return np.stack([tile.astype(weight.dtype) for tile in tiles])


def times_vector(matrix: np.ndarray, values: Sequence[Any], lanes: int) -> list[Any]:
    """Emit matrix @ values for vectors of float32. Points come in pairs +-p, so rows and columns do too: what a pair shares is computed once."""
    partner = _paired_columns(matrix)
    if partner:
        sums = {j: T.bind(values[j] + values[k]) for j, k in partner.items()}
        differences = {j: T.bind(values[j] - values[k]) for j, k in partner.items()}
        result = []
        for row in matrix:
            terms = [(row[j], (sums if row[j] == row[k] else differences)[j]) for j, k in partner.items() if row[j]]
            terms += [(row[j], values[j]) for j in range(len(values)) if j not in partner and j not in partner.values() and row[j]]
            result.append(T.bind(_combination(terms, lanes)))
        return result
    result = [None] * len(matrix)
    for i, row in enumerate(matrix):
        if result[i] is not None:
            continue
        k = next((k for k in range(i + 1, len(matrix)) if np.array_equal(np.abs(matrix[k]), np.abs(row)) and np.any(row)), None)
        if k is None:
            result[i] = T.bind(_combination([(value, values[j]) for j, value in enumerate(row) if value], lanes))
            continue
        same = T.bind(_combination([(row[j], values[j]) for j in range(len(row)) if row[j] and row[j] == matrix[k][j]], lanes))
        opposite = T.bind(_combination([(row[j], values[j]) for j in range(len(row)) if row[j] and row[j] != matrix[k][j]], lanes))
        result[i], result[k] = T.bind(same + opposite), T.bind(same - opposite)
    return result


def _paired_columns(matrix: np.ndarray) -> dict[int, int]:
    """Columns j, k that agree up to the sign of each entry, as {j: k}; all columns of the points +-p of an output transform."""
    found: dict[int, int] = {}
    if len(matrix) == matrix.shape[1]:  # an input transform: its rows are the ones that pair
        return found
    for j in range(matrix.shape[1]):
        for k in range(j + 1, matrix.shape[1]):
            if k not in found.values() and j not in found.values() and np.array_equal(np.abs(matrix[:, j]), np.abs(matrix[:, k])):
                found[j] = k
    return found


def _combination(terms: Sequence[tuple[float, Any]], lanes: int) -> Any:
    """Sum of coefficient * vector; coefficients of one cost nothing."""
    terms = sorted(terms, key=lambda term: term[0] != 1.0)
    factor, total = terms[0]
    if factor != 1.0:
        total = total * splat(T.float32(factor), lanes)
    for factor, value in terms[1:]:
        total = total + value if factor == 1.0 else total - value if factor == -1.0 else fma(value, splat(T.float32(factor), lanes), total, lanes)
    return total
