"""Interleaved timing: contestants take turns within every round, so that drift of the machine (frequency, neighbours) meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: rest between turns: longer than the idle spinning of the contestants' thread pools, which would slow whoever runs next
REST_SECONDS = 0.02
#: a turn repeats a short call until about this much time has passed
TURN_SECONDS = 0.03


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    def to_dict(self) -> dict[str, Any]:
        return {"median_ms": round(self.median * 1e3, 4), "min_ms": round(self.min * 1e3, 4), "rounds": len(self.samples)}


def interleaved(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 20, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Time every contestant in `rounds` rounds, in rotating order; each turn begins with one call that is not counted (it refills the caches).

    clock: `time.process_time` counts the time of this process' threads alone, for ratios on a machine that others use.
    """
    repeats = {name: _repeats(call, clock) for name, call in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(REST_SECONDS)
            samples[name].append(_time(contestants[name], repeats[name], clock))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _repeats(call: Callable[[], object], clock: Callable[[], float]) -> int:
    call()
    return max(1, min(1000, int(TURN_SECONDS / max(_time(call, 1, clock), 1e-6))))


def _time(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats
