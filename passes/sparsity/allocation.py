"""How many zeros each layer gets: the same share everywhere, or so that a latency is met with the least loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...compiler.errors import UsageError
from ...targets.base import Target
from .patterns import Blocks, Pattern

#: levels that a layer may get
LEVELS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
#: what a stored weight costs beside one of a dense matrix: whole vectors of outputs keep the pace of a dense kernel, single weights read their operand from L2
_BLOCK_COST, _SINGLE_COST = 1.05, 2.1
#: rows of the activations where their number is known at run time only
ROWS = 128


@dataclass(frozen=True)
class Layer:
    """M x K x N of one product; lost: share of its saliency that goes at each of LEVELS."""

    m: int
    k: int
    n: int
    lost: tuple[float, ...] = ()


def predicted_us(layer: Layer, pattern: Pattern, level: float, target: Target, *, integer: bool = False) -> float:
    """Microseconds of a product, sparse or dense, whichever is less: arithmetic at 0.85 of the peak of all cores, or the weights from memory."""
    work = 2e-3 * layer.m * layer.k * layer.n / (0.85 * target.peak_gflops("int8" if integer else "float32") * target.cores)
    size = 1.0 if integer else 4.0
    traffic = size * layer.k * layer.n / (target.bandwidth_gbs * 1e3)
    dense = max(work, traffic)
    vectors = isinstance(pattern, Blocks) and pattern.c % 16 == 0
    cost, index = (_BLOCK_COST, 1.0 / 16) if vectors else (_SINGLE_COST, 1.0)
    kept = 1.0 - level
    return min(dense, max(work * kept * cost, traffic * kept * (1 + index)))


def allocate(layers: Sequence[Layer], pattern: Pattern, target: Target, budget_us: float | None) -> list[float]:
    """A level per layer: the total of predicted times at most `budget_us` (None: what the pattern's level gives everywhere), the sum of lost shares least.

    A multiple-choice knapsack, solved as an integer program. UsageError where even the highest level is too slow.
    """
    levels = [level for level in sorted({*LEVELS, pattern.level})]
    times = np.array([[predicted_us(layer, pattern, level, target) for level in levels] for layer in layers])
    lost = np.array([np.interp(levels, LEVELS, layer.lost) for layer in layers])
    if budget_us is None:
        budget_us = float(times[:, levels.index(pattern.level)].sum())
    if times.min(axis=1).sum() > budget_us:
        raise UsageError(
            f"sparsify: no levels meet {budget_us:.0f} us: at {max(levels):g} everywhere the products alone are predicted to take {times.min(axis=1).sum():.0f} us"
        )
    count, choices = times.shape
    one_each = np.kron(np.eye(count), np.ones(choices))
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which compilations without sparsity should not wait for

    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(times.reshape(1, -1), -np.inf, budget_us * (1 + 1e-9))]
    found = milp(
        lost.reshape(-1),
        integrality=np.ones(count * choices),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": 20, "mip_rel_gap": 1e-3},
    )
    if found.x is None:
        raise UsageError(f'sparsify: the allocation of levels found no answer ({found.message}); use allocation = "uniform"')
    return [levels[index] for index in found.x.reshape(count, choices).argmax(axis=1)]
