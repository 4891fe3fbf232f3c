"""Sparse weights: what their zeros allow, and the compressed streams that the sparse kernels read.

A weight stays an ordinary [K, N] array with zeros in it until a kernel is chosen; nothing marks it, so zeros that a model brought along count as well as those a pass made.

blocks:   the weight is cut into column panels of `nr` outputs and every panel into groups of `r` consecutive k. Of each panel the groups that are not all zero are
          stored: values [groups, r * nr] (as words of the dot product), the first k of each (indices [groups]), and where each panel begins (pointers [panels + 1]).
columns:  of each output the nonzero weights, or quads of 4 consecutive k, are stored in the same manner: compressed sparse columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .dot import F32, Dot

#: share of nonzero weights above which no sparse kernel is worth a look
DENSE = 0.7
#: share of nonzeros between two classes of call sites: sites of one class share a kernel and its schedule
_CLASSES = (DENSE, 0.42, 0.32, 0.22, 0.14, 0.07, 0.03)


class Constants(frozenset[int]):
    """Positions of the parameters that hold a constant at every call site, with the arrays themselves: position -> one per call site (equal ones once)."""

    values: Mapping[int, tuple[np.ndarray, ...]]

    @staticmethod
    def of(values: Mapping[int, Iterable[np.ndarray]]) -> Constants:
        made = Constants(values)
        made.values = {position: tuple(arrays) for position, arrays in values.items()}
        return made


@dataclass(frozen=True)
class Stream:
    """A compressed weight. values: [count, width] words; indices: [count] int32, first k of each; pointers: [panels + 1] int32."""

    values: np.ndarray
    indices: np.ndarray
    pointers: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.values, self.indices, self.pointers


def group_mask(weight: np.ndarray, r: int, c: int) -> np.ndarray:
    """[K, N] -> bool [ceil(N / c), ceil(K / r)]: which groups of r consecutive k by c outputs hold anything but zeros."""
    k, n = weight.shape
    nonzero = np.zeros((-(-k // r) * r, -(-n // c) * c), bool)
    np.not_equal(weight, 0, out=nonzero[:k, :n])
    return np.asarray(nonzero.reshape(-1, r, nonzero.shape[1] // c, c).any(axis=(1, 3))).T


def compress(weight: np.ndarray, r: int, c: int, dot: Dot = F32) -> Stream:
    """The stream of [K, N] in groups of r consecutive k by c outputs, values as words of `dot`: [count, r / group * c], lanes innermost.

    r is a multiple of the dot's group. K and N are padded with zeros. A weight of only zeros keeps one group, so that no buffer is empty; no pointer leads to it.
    """
    k, n = weight.shape
    mask = group_mask(weight, r, c)
    panels, steps = mask.shape
    padded = np.zeros((steps * r, panels * c), weight.dtype)
    padded[:k, :n] = weight
    panel, step = np.nonzero(mask)
    groups = padded.reshape(steps, r // dot.group, dot.group, panels, c)[step, :, :, panel]
    values = dot.pack_words(groups).reshape(len(step), r // dot.group * c)
    pointers = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    indices = (step * r).astype(np.int32)
    if not len(step):
        values, indices = np.zeros((1, r // dot.group * c), values.dtype), np.zeros(1, np.int32)
    return Stream(np.ascontiguousarray(values), indices, pointers)


def density_class(weight: np.ndarray) -> int:
    """0 for a weight that counts as dense, higher numbers for emptier ones."""
    if weight.ndim != 2 or weight.size < 256 or weight.dtype not in (np.float32, np.int8):
        return 0
    share = np.count_nonzero(weight) / weight.size
    return sum(1 for bound in _CLASSES if share <= bound)
