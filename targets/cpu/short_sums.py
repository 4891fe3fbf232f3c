"""How many products of u8 x s8 fit the 16 bits in which `vpmaddubsw` adds pairs of them, for these very weights: what makes it exact where VNNI is missing.

`vpmaddubsw` saturates: 255 * 127 twice is more than 32767. But the weights are known: a sum of products with any u8 stays in 16 bits if the positive weights in it add up to 128 at most,
and the negative ones to -128 at least. Where that holds for all pairs, `vpmaddubsw` is exact; where it holds for a pair of one word and that of the next word together, the two are added in
16 bits before they are widened, which saves a multiplication of every four.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from ..common.fused import Fused
from .dot import PAIRS, QUADS, WIDE

#: weights of one sign that go into 16 bits: 128 * 255 < 32768
_MOST = 128
#: weights that are looked at before the next ones: most arrays that do not fit say so early
_BLOCK = 1 << 20

W = TypeVar("W", bound=Any)


def products_in_16_bits(weights: Iterable[np.ndarray], aligned: bool = True) -> int:
    """weights: int8 [.., K, N] each. 4: consecutive pairs of k, and those four apart with them, fit; 2: pairs do; 1: neither. aligned: sums begin at multiples of eight k."""
    return min((_of(np.asarray(array), aligned) for array in weights), default=1)


def _of(weights: np.ndarray, aligned: bool) -> int:
    largest = int(np.abs(weights.astype(np.int16)).max(initial=0))
    if 4 * largest <= _MOST:
        return 4
    if not aligned:
        return 2 if 2 * largest <= _MOST else 1
    k, n = weights.shape[-2:]
    flat = weights.reshape(-1, k, n)
    step = max(1, _BLOCK // max(1, n) // 8) * 8
    fit = 4
    for matrix in flat:
        for start in range(0, k, step):
            part = matrix[start : start + step].astype(np.int16)
            part = np.pad(part, ((0, -len(part) % 8), (0, 0))).reshape(-1, 2, 2, 2, n)
            for signed in (np.maximum(part, 0), np.maximum(-part, 0)):
                pairs = signed.sum(axis=3)
                if pairs.max(initial=0) > _MOST:
                    return 1
                if fit == 4 and pairs.sum(axis=1).max(initial=0) > _MOST:
                    fit = 2
    return fit


def fitting(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [K, N] as a sum of two: one in which all pairs fit, and what is left, zero but for the larger code of every pair that does not. Pairs of what is left fit, too."""
    k, n = weight.shape
    pairs = np.zeros((-(-k // 2), 2, n), np.int16)
    pairs.reshape(-1, n)[:k] = weight
    rest = np.zeros_like(pairs)
    sums = pairs.sum(axis=1)
    for sign, excess in ((1, sums - _MOST), (-1, -sums - _MOST)):
        panel, column = np.nonzero((excess > 0) & (sign * pairs >= 0).all(axis=1))
        larger = np.argmax(sign * pairs[panel, :, column], axis=1)
        rest[panel, larger, column] = sign * excess[panel, column]
    # a single code of -128 is what fits, two are one of them and a rest
    return tuple(array.reshape(-1, n)[:k].astype(np.int8) for array in (pairs - rest, rest))  # pyright: ignore[reportReturnType]


def with_sums(workload: W, fused: Fused, constants: frozenset[int], group_of_k: int = 0) -> W:
    """The workload of a u8 x s8 product with the kind that its weights allow. group_of_k: consecutive k of a convolution's taps, whose words may begin anywhere if they are no multiple of eight."""
    values = getattr(constants, "values", {})
    position = fused.param_index(fused.inputs[1])
    if workload.kind != "u8s8":
        return workload
    fit = products_in_16_bits(values[position], aligned=group_of_k % 8 == 0) if position in values else 1
    return replace(workload, kind={1: WIDE.kind, 2: PAIRS.kind, 4: QUADS.kind}[fit])
