"""Tuning: search each workload's schedules by measuring, verify every candidate against the default schedule's result, keep what is confirmed to be faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from .cost_model import Candidate, CostModel, Machine
from .database import Database, Record
from .measure import Contestant, Measurement, bench, measure
from .search import GENERATION, Search, identity

#: rounds in which a generation and the default take turns, and those in which a new favourite has to stand up to the default
ROUNDS, CONFIRMING = 5, 15
#: a winner is at least this much faster than the default; less is noise
MARGIN = 0.98


class Task(Protocol):
    """What the tuner needs of a workload; a backend's builder and operands stand behind it."""

    name: str
    calls: int
    candidates: list[Candidate]

    @property
    def workload(self) -> str: ...

    @property
    def machine(self) -> Machine: ...

    def inputs(self, seed: int) -> list[np.ndarray]: ...

    def output(self) -> np.ndarray: ...

    def arguments(self, candidate: Candidate, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]: ...

    def compile(self, candidate: Candidate) -> Callable[..., object]: ...


@dataclass(frozen=True)
class Setting:
    """What a session has in common. trials: candidates to measure per workload; seconds: for all together (None: as long as it takes)."""

    database: Database
    model: CostModel
    target: str
    hardware: str
    threads: int
    versions: Mapping[str, str]
    trials: int = 64
    seconds: float | None = None
    seed: int = 0


@dataclass
class Progress:
    """How far one workload has come. default_us: the default schedule; best: the confirmed winner, with its time and the default's beside it."""

    task: Task
    default: Candidate
    default_us: float = 0.0
    trials: int = 0
    resumed: int = 0
    rejected: int = 0
    best: Candidate | None = None
    best_us: float = 0.0
    beside_us: float = 0.0

    @property
    def speedup(self) -> float:
        return self.beside_us / self.best_us if self.best is not None else 1.0


@dataclass
class Outcome:
    """What a session did, one Progress per workload."""

    progress: list[Progress] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0


def tune(tasks: Sequence[Task], setting: Setting, show: Callable[[Sequence[Progress]], None] = lambda _: None) -> Outcome:
    """Search all workloads, a generation at a time, those that take most of the network's time first. What was found is in the database at any moment:
    the end of the time budget and Ctrl-C only end the search."""
    start = time.monotonic()
    sessions = [_Session(task, setting) for task in _distinct(tasks)]
    sessions.sort(key=lambda session: -session.weight)
    outcome = Outcome([session.progress for session in sessions])

    def more() -> bool:
        return setting.seconds is None or time.monotonic() - start < setting.seconds

    try:
        open_sessions = list(sessions)
        while open_sessions and more():
            for session in list(open_sessions):
                if not more():
                    break
                if not session.generation():
                    open_sessions.remove(session)
                show(outcome.progress)
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.seconds = time.monotonic() - start
    return outcome


def _distinct(tasks: Sequence[Task]) -> list[Task]:
    """One task per workload, the calls of equal ones added up."""
    found: dict[str, Task] = {}
    for task in tasks:
        known = found.get(task.workload)
        found[task.workload] = task if known is None else replace(known, calls=known.calls + task.calls)
    return list(found.values())


class _Session:
    """The search of one workload."""

    def __init__(self, task: Task, setting: Setting):
        self.task, self.setting = task, setting
        default, predicted = setting.model.choose(task.candidates, task.machine)
        self.progress = Progress(task, default)
        self.weight = predicted * max(1, task.calls)
        self.search: Search | None = None

    def generation(self) -> bool:
        """Measure one generation; False when nothing is left to do."""
        if self.search is None:
            self._begin()
        assert self.search is not None
        left = self.setting.trials - self.progress.trials - self.progress.resumed
        chosen = self.search.propose(min(GENERATION, left)) if left > 0 else []
        if not chosen:
            return False
        self._measure(chosen)
        return True

    def _begin(self) -> None:
        """Build the default, take its result as the reference, and read what earlier sessions found."""
        task, setting, progress = self.task, self.setting, self.progress
        predicted = setting.model.shortlist(task.candidates, task.machine)
        self.search = Search(task.candidates, predicted, setting.seed)
        self.inputs = task.inputs(setting.seed)
        self.default = self._build(progress.default)
        self.reference = self._run(self.default)
        self.search.record(progress.default, 1.0)
        known = {identity(candidate): candidate for candidate in task.candidates}
        for record in setting.database.records(task.workload, hardware=setting.hardware, threads=setting.threads):
            candidate = known.get((record.template, record.schedule))
            if candidate is None or identity(candidate) == identity(progress.default):
                continue
            fresh = identity(candidate) not in self.search.measured
            progress.resumed += fresh
            usable = record.samples_us and record.default_us and record.status not in ("wrong", "failed")
            self.search.record(candidate, record.median_us / statistics.median(record.default_us) if usable else None)
        winner = setting.database.best(task.workload, hardware=setting.hardware, threads=setting.threads)
        if winner is not None and (winner.template, winner.schedule) in known:
            progress.best = known[winner.template, winner.schedule]
            progress.best_us, progress.beside_us = winner.median_us, statistics.median(winner.default_us)

    def _build(self, candidate: Candidate) -> Contestant:
        arguments, constant = self.task.arguments(candidate, self.inputs)
        return bench(self.task.compile(candidate), arguments, constant, self.task.output())

    def _run(self, contestant: Contestant) -> np.ndarray:
        contestant.output[...] = 0
        contestant.run(1)
        return contestant.output.copy()

    def _measure(self, chosen: Sequence[Candidate]) -> None:
        progress, search = self.progress, self.search
        assert search is not None
        built: list[tuple[Candidate, Contestant]] = []
        for candidate in chosen:
            progress.trials += 1
            try:
                contestant = self._build(candidate)
                result = self._run(contestant)
            except Exception as error:  # whatever TVM and LLVM raise
                self._reject(candidate, "failed", f"{type(error).__name__}")
                continue
            if agrees(result, self.reference):
                built.append((candidate, contestant))
            else:
                self._reject(candidate, "wrong", "")
        if not built:
            return
        *times, default = measure([*(contestant for _, contestant in built), self.default], threads=self.setting.threads, rounds=ROUNDS)
        progress.default_us = default.median_us
        for (candidate, _), found in zip(built, times, strict=True):
            self._record(candidate, "measured", found, default)
            search.record(candidate, found.median_us / default.median_us)
        index = min(range(len(built)), key=lambda position: times[position].median_us)
        rival = 1.0 / progress.speedup
        if times[index].median_us / default.median_us < MARGIN * rival:
            self._confirm(*built[index])

    def _confirm(self, candidate: Candidate, contestant: Contestant) -> None:
        """Measure a new favourite beside the default, in more rounds, and keep it only where it stays ahead."""
        progress = self.progress
        found, default = measure([contestant, self.default], threads=self.setting.threads, rounds=CONFIRMING)
        faster = found.median_us < MARGIN * default.median_us and found.median_us / default.median_us < 1.0 / progress.speedup
        self._record(candidate, "winner" if faster else "slower", found, default)
        if self.search is not None:
            self.search.record(candidate, found.median_us / default.median_us)
        if faster:
            progress.best, progress.best_us, progress.beside_us = candidate, found.median_us, default.median_us

    def _reject(self, candidate: Candidate, status: str, note: str) -> None:
        assert self.search is not None
        self.progress.rejected += 1
        self.search.record(candidate, None)
        self._record(candidate, status, Measurement(()), Measurement(()), note)

    def _record(self, candidate: Candidate, status: str, found: Measurement, default: Measurement, note: str = "") -> None:
        setting = self.setting
        versions = dict(setting.versions) | ({"error": note} if note else {})
        rounded = [tuple(round(sample, 3) for sample in times.samples) for times in (found, default)]
        setting.database.append(
            Record(
                *(self.task.workload, candidate.template, str(candidate.schedule), setting.target, setting.hardware, setting.threads),
                *(versions, setting.seed, status, rounded[0], rounded[1]),
            )
        )


def agrees(result: np.ndarray, reference: np.ndarray) -> bool:
    """Whether two schedules computed the same: integers exactly, floats within the order of summation (1e-4 relative, 1e-5 of the range)."""
    if result.dtype.kind != "f":
        return bool(np.array_equal(result, reference))
    scale = float(np.nanmax(np.abs(reference), initial=0.0))
    return bool(np.allclose(result, reference, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))


class TunedModel:
    """A cost model that takes a tuning database's winner where it has one, and asks another model otherwise."""

    name = "tuned"

    def __init__(self, database: Database, fallback: CostModel, *, hardware: str, threads: int):
        self.database, self.fallback, self.hardware, self.threads = database, fallback, hardware, threads

    def predict(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        return self.fallback.predict(candidates, machine)

    def shortlist(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        return self.fallback.shortlist(candidates, machine)

    def choose(self, candidates: Sequence[Candidate], machine: Machine) -> tuple[Candidate, float]:
        winner = self.database.best(workload_key(candidates), hardware=self.hardware, threads=self.threads)
        if winner is not None:
            for candidate in candidates:
                if identity(candidate) == (winner.template, winner.schedule):
                    return candidate, winner.median_us
        return self.fallback.choose(candidates, machine)


def workload_key(candidates: Sequence[Candidate]) -> str:
    """Key of a workload in the database: those of all templates that compete for it, in a fixed order."""
    return "; ".join(sorted({f"{candidate.template} {candidate.workload!r}" for candidate in candidates}))


def summary(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values, for JSON."""
    rows = []
    for entry in outcome.progress:
        row = {"kernel": entry.task.name, "calls": entry.task.calls, "trials": entry.trials, "resumed": entry.resumed, "rejected": entry.rejected}
        row |= {"default": f"{entry.default.template} {entry.default.schedule}", "default_us": round(entry.beside_us or entry.default_us, 2)}
        if entry.best is not None:
            row |= {"best": f"{entry.best.template} {entry.best.schedule}", "best_us": round(entry.best_us, 2)}
        rows.append(row | {"speedup": round(entry.speedup, 3)})
    return {"kernels": rows, "seconds": round(outcome.seconds, 1), "interrupted": outcome.interrupted}
