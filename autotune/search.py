"""Evolutionary search over the schedules of one workload: the cost model's favourites first, then children of the fastest measured.

The space is a list of legal schedules (several templates' together), so mutation and crossover work on the fields of the schedules and land on the nearest legal
one: whatever they make exists. Regularised evolution in small generations (after Real et al., "Regularized evolution", 2019), seeded and deterministic given the measurements.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from .cost_model import Candidate

#: candidates per generation, and how many of the fastest become parents
GENERATION, PARENTS = 8, 4
#: shares of a generation: the model's next favourites, schedules drawn at random, crossover of two parents; the rest is mutation of one
FAVOURITES, DRAWN, CROSSED = 0.25, 0.15, 0.25


def identity(candidate: Candidate) -> tuple[str, str]:
    """What makes a candidate the same in another process: template and printed schedule."""
    return candidate.template, str(candidate.schedule)


@dataclass
class Search:
    """The state of one search. predicted: the cost model's latency of each candidate; measured: what the candidates took, by identity, None where they failed."""

    candidates: Sequence[Candidate]
    predicted: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.measured: dict[tuple[str, str], float | None] = {}
        self._order = sorted(range(len(self.candidates)), key=self.predicted.__getitem__)
        self._by_identity = {identity(candidate): index for index, candidate in enumerate(self.candidates)}
        self._genes = [_genes(candidate) for candidate in self.candidates]

    def record(self, candidate: Candidate, time_us: float | None) -> None:
        """Tell the search what a candidate took; None: it cannot be used."""
        self.measured[identity(candidate)] = time_us

    @property
    def exhausted(self) -> bool:
        return all(key in self.measured for key in self._by_identity)

    def best(self) -> tuple[Candidate, float] | None:
        """The fastest candidate so far."""
        known = [(time, key) for key, time in self.measured.items() if time is not None and key in self._by_identity]
        if not known:
            return None
        time, key = min(known)
        return self.candidates[self._by_identity[key]], time

    def propose(self, count: int = GENERATION) -> list[Candidate]:
        """The next candidates to measure, none of them measured before; fewer at the end of the space."""
        taken = {self._by_identity[key] for key in self.measured if key in self._by_identity}
        chosen: list[int] = []

        def add(index: int | None) -> None:
            if index is not None and index not in taken:
                taken.add(index)
                chosen.append(index)

        parents = self._parents()
        favourites = count if len(parents) < 2 else max(1, round(count * FAVOURITES))
        for index in self._order:
            if len(chosen) >= favourites:
                break
            add(index)
        attempts = 0
        while len(chosen) < count and attempts < 20 * count and parents:
            attempts += 1
            if self._random.random() < DRAWN:
                add(self._random.randrange(len(self.candidates)))
                continue
            one = self._random.choice(parents)
            if self._random.random() < CROSSED:
                add(self._nearest(self._cross(one, self._random.choice(parents)), taken))
            else:
                add(self._nearest(self._mutate(one), taken))
        for index in self._order:
            if len(chosen) >= count:
                break
            add(index)
        return [self.candidates[index] for index in chosen]

    def _parents(self) -> list[int]:
        known = sorted((time, self._by_identity[key]) for key, time in self.measured.items() if time is not None and key in self._by_identity)
        return [index for _, index in known[:PARENTS]]

    def _mutate(self, index: int) -> dict[str, Any]:
        """One or two fields take another value of those they have in the template's space, a near one more often than not."""
        genes = dict(self._genes[index])
        for name in self._random.sample(sorted(genes), 1 if self._random.random() < 0.6 else 2):
            pool = [g for g in self._genes if g["template"] == genes["template"]] if name != "template" else self._genes
            values = sorted({g[name] for g in pool if name in g}, key=lambda value: (isinstance(value, str), value))
            place = values.index(genes[name])
            near, others = values[max(0, place - 2) : place] + values[place + 1 : place + 3], values[:place] + values[place + 1 :]
            if others:
                genes[name] = self._random.choice(near if self._random.random() < 0.6 else others)
        return genes

    def _cross(self, one: int, other: int) -> dict[str, Any]:
        """Every field from one parent or the other; the template comes from the first."""
        a, b = self._genes[one], self._genes[other]
        return {name: b.get(name, value) if name != "template" and self._random.random() < 0.5 else value for name, value in a.items()}

    def _nearest(self, genes: dict[str, Any], taken: set[int]) -> int | None:
        """The candidate not taken yet that shares most fields, numbers as near as possible, the better predicted one of equals."""
        best: tuple[float, float, int] | None = None
        for index, other in enumerate(self._genes):
            if index in taken or other["template"] != genes["template"]:
                continue
            distance = sum(_distance(value, other.get(name)) for name, value in genes.items())
            entry = (distance, self.predicted[index], index)
            if best is None or entry < best:
                best = entry
        return None if best is None else best[2]


def _genes(candidate: Candidate) -> dict[str, Any]:
    schedule = candidate.schedule
    values = {entry.name: getattr(schedule, entry.name) for entry in fields(schedule)} if is_dataclass(schedule) else {"schedule": schedule}
    return {"template": candidate.template, **values}


def _distance(a: Hashable, b: Hashable) -> float:
    if a == b:
        return 0.0
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool):
        return 0.5 + 0.5 * abs(a - b) / max(abs(a), abs(b), 1)
    return 1.0


def run(
    search: Search, measure: Callable[[Sequence[Candidate]], Sequence[float | None]], trials: int, more: Callable[[], bool] = lambda: True
) -> None:
    """Measure generation after generation until `trials` candidates were measured, the space ends, or `more()` says no."""
    spent = 0
    while spent < trials and more() and not search.exhausted:
        generation = search.propose(min(GENERATION, trials - spent))
        if not generation:
            return
        for candidate, time in zip(generation, measure(generation), strict=True):
            search.record(candidate, time)
        spent += len(generation)
