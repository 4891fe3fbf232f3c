"""Patterns of zeros as values: which weights of a matrix W [K, N] may go together, K being the dim that a product sums over and N its outputs.

A pattern is told how much every weight matters (`scores` [K, N], none negative) and which share of them is to go (`level`), and answers with what stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...compiler.errors import UsageError

#: what `parse` takes, for messages
EXPECTED = "0.9 or unstructured:0.9, 2:4, block:0.8 or block4x16:0.8 (4 consecutive inputs of 16 outputs), none"


@dataclass(frozen=True)
class Pattern:
    """level: share of the weights that becomes zero, in [0, 1). fixed: the pattern itself says how many, so no other level may be asked for."""

    fixed: ClassVar[bool] = False
    level: float

    def __post_init__(self) -> None:
        if not 0 <= self.level < 1:
            raise UsageError(f"sparsity level must be at least 0 and below 1, not {self.level:g}")

    def mask(self, scores: np.ndarray, level: float, *, per_output: bool = False) -> np.ndarray:
        """bool [K, N]: which weights stay. per_output: every output loses its share by itself, where the pattern can do so."""
        raise NotImplementedError

    def check(self, weight: np.ndarray) -> bool:
        """Whether the zeros of [K, N] are of this pattern, at its level at least."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Single weights, anywhere. Han et al., "Learning both Weights and Connections", 2015."""

    def __str__(self) -> str:
        return f"unstructured:{self.level:g}"

    def mask(self, scores: np.ndarray, level: float, *, per_output: bool = False) -> np.ndarray:
        if not per_output:
            return _best(scores.reshape(1, -1), level).reshape(scores.shape)
        return _best(np.ascontiguousarray(scores.T), level).T

    def check(self, weight: np.ndarray) -> bool:
        return int(np.count_nonzero(weight)) <= weight.size - round(self.level * weight.size)


@dataclass(frozen=True)
class NofM(Pattern):
    """At most n nonzero weights in every m consecutive inputs of an output ("2:4" is what Ampere's tensor cores take; Mishra et al., 2021).

    Inputs left over at the end form a shorter run that keeps at most n as well.
    """

    fixed: ClassVar[bool] = True
    level: float = 0.0
    n: int = 2
    m: int = 4

    @staticmethod
    def of(n: int, m: int) -> NofM:
        if not 1 <= n <= m:
            raise UsageError(f"sparsity {n}:{m}: N must be at least 1 and at most M")
        return NofM(1 - n / m, n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def mask(self, scores: np.ndarray, level: float, *, per_output: bool = False) -> np.ndarray:
        k, n = scores.shape
        if level == 0:
            return np.ones((k, n), bool)
        runs = -(-k // self.m)
        padded = np.full((runs * self.m, n), -1.0, np.float32)
        padded[:k] = scores
        order = np.argsort(-padded.reshape(runs, self.m, n), axis=1, kind="stable")
        rank = np.argsort(order, axis=1, kind="stable")
        return (rank < self.n).reshape(-1, n)[:k]

    def check(self, weight: np.ndarray) -> bool:
        k, n = weight.shape
        padded = np.zeros((-(-k // self.m) * self.m, n), bool)
        padded[:k] = weight != 0
        return bool((padded.reshape(-1, self.m, n).sum(axis=1) <= self.n).all())


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of r consecutive inputs by c consecutive outputs go as a whole; those at the edges may be smaller. 4 x 16 is one `vpdpbusd` of bytes, or 4 vectors of floats.

    The weakest blocks by the sum of their scores' squares go, over the whole matrix.
    """

    r: int = 4
    c: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or self.c < 1:
            raise UsageError(f"sparsity block{self.r}x{self.c}: a block has at least one row and one column")

    def __str__(self) -> str:
        return f"block{self.r}x{self.c}:{self.level:g}"

    def mask(self, scores: np.ndarray, level: float, *, per_output: bool = False) -> np.ndarray:
        k, n = scores.shape
        kept = _best(self._sums(np.square(scores, dtype=np.float32)).reshape(1, -1), level).reshape(-(-k // self.r), -(-n // self.c))
        return kept.repeat(self.r, axis=0)[:k].repeat(self.c, axis=1)[:, :n]

    def check(self, weight: np.ndarray) -> bool:
        full = self._sums((weight != 0).astype(np.float32)) > 0
        return int(np.count_nonzero(full)) <= full.size - round(self.level * full.size)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """[ceil(K / r), ceil(N / c)] sums over the blocks."""
        k, n = values.shape
        return np.add.reduceat(np.add.reduceat(values, np.arange(0, k, self.r), axis=0), np.arange(0, n, self.c), axis=1)


def _best(scores: np.ndarray, level: float) -> np.ndarray:
    """bool [rows, count]: the largest scores of every row, all but round(level * count); the first ones where scores are equal."""
    rows, count = scores.shape
    gone = round(level * count)
    kept = np.ones((rows, count), bool)
    if gone:
        order = np.argsort(scores, axis=1, kind="stable") if count < 1 << 16 else np.argpartition(scores, gone - 1, axis=1)
        np.put_along_axis(kept, order[:, :gone], False, axis=1)
    return kept


_BLOCK = re.compile(r"block(?:(\d+)x(\d+))?:(.+)")
_RATIO = re.compile(r"(\d+):(\d+)")


def parse(text: str | float) -> Pattern:
    """The pattern that a flag or recipe names; UsageError says what would be right."""
    text = str(text).strip().lower()
    if text in ("none", "dense"):
        return Unstructured(0.0)
    if match := _RATIO.fullmatch(text):
        return NofM.of(int(match[1]), int(match[2]))
    if match := _BLOCK.fullmatch(text):
        return Blocks(_level(match[3], text), int(match[1] or 4), int(match[2] or 16))
    return Unstructured(_level(text.removeprefix("unstructured:"), text))


def _level(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise UsageError(f"unknown sparsity '{text}': expected {EXPECTED}") from None
