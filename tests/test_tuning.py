"""Tuning: the database, the search, what the tuner accepts, and the whole way from a model to a tuned artifact."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tcompile
import tcompile.autotune.tuner as tuner
from onnx_models import saved_mlp
from tcompile.autotune.cost_model import AnalyticModel, Candidate, KernelFeatures, Machine
from tcompile.autotune.database import Database, Record
from tcompile.autotune.measure import Measurement
from tcompile.autotune.search import GENERATION, Search, identity, run
from tcompile.autotune.tuner import Setting, TunedModel, agrees, tune
from tcompile.compiler.errors import UsageError
from tcompile.compiler.tuning import parse_budget

MACHINE = Machine(frequency_ghz=2.0, cores=1, dram_gbs=10.0)


@dataclass(frozen=True)
class Schedule:
    a: int
    b: int
    c: bool


@dataclass(frozen=True)
class Workload:
    size: int


def space(template="t"):
    """512 schedules; the analytic model likes small a, which says nothing about the truth."""
    return [
        Candidate(template, Workload(1), Schedule(a, b, c), KernelFeatures(fma_cycles=1000.0 + a, tasks=1), lambda: None)
        for a in range(16)
        for b in range(16)
        for c in (False, True)
    ]


def truth(candidate):
    s = candidate.schedule
    return 10.0 + (s.a - 11) ** 2 + (s.b - 5) ** 2 + (0 if s.c else 20)


def test_search_finds_a_known_optimum_and_beats_random_choice():
    candidates = space()
    found, drawn = [], []
    for seed in range(5):
        search = Search(candidates, AnalyticModel().predict(candidates, MACHINE), seed)
        run(search, lambda group: [truth(c) for c in group], trials=80)
        assert len(search.measured) == 80
        found.append(search.best()[1])
        drawn.append(min(truth(candidates[i]) for i in np.random.default_rng(seed).choice(len(candidates), 80, replace=False)))
    assert np.median(found) <= 11.0 and np.mean(found) < np.mean(drawn)


def test_search_is_seeded_never_repeats_and_ends_with_the_space():
    candidates = space()[:40]

    def order(seed):
        search, asked = Search(candidates, list(range(40)), seed), []
        run(search, lambda group: asked.extend(map(identity, group)) or [truth(c) if c.schedule.b % 3 else None for c in group], trials=1000)
        assert search.exhausted
        return asked

    first = order(0)
    assert first == order(0) and len(set(first)) == len(first) == 40
    assert first[:GENERATION] == [identity(c) for c in candidates[:GENERATION]], "the model's favourites come first"


def record(**changes):
    values = dict(workload="w", template="t", schedule="s", target="cpu:host", hardware="h", threads=1, versions={"tcompile": "0"}, seed=0)
    return Record(**(values | dict(status="winner", samples_us=(1.0, 1.1), default_us=(2.0, 2.2)) | changes))


def test_database_keeps_everything_and_gives_the_best_confirmed_winner(tmp_path):
    path = tmp_path / "t.db"
    entries = [
        record(schedule="slow", samples_us=(1.9,)),
        record(schedule="fast"),
        record(schedule="unconfirmed", status="measured", samples_us=(0.1,)),
        record(schedule="wrong", status="wrong", samples_us=(), default_us=()),
        record(schedule="overturned", samples_us=(0.2,)),
        record(schedule="overturned", samples_us=(2.5,), status="slower"),
        record(schedule="elsewhere", hardware="other", samples_us=(0.1,)),
        record(schedule="two", threads=2, samples_us=(0.1,)),
    ]
    for entry in entries:
        Database(path).append(entry)
    database = Database(path, create=False)
    assert database.records() == entries
    assert database.best("w", hardware="h", threads=1).schedule == "fast"
    assert database.best("w", hardware="h", threads=2).schedule == "two"
    assert database.best("other", hardware="h", threads=1) is None


def test_files_that_are_no_database_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such tuning database"):
        Database(tmp_path / "none.db", create=False)
    (tmp_path / "text.db").write_text("no database, but longer than the header of one " * 10)
    with pytest.raises(UsageError, match="not a tuning database"):
        Database(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table t (x)")
    other.commit()
    with pytest.raises(UsageError, match="not a tuning database"):
        Database(tmp_path / "other.db")
    Database(tmp_path / "newer.db")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("pragma user_version = 2")
    newer.commit()
    with pytest.raises(UsageError, match="format 2"):
        Database(tmp_path / "newer.db")
    with pytest.raises(UsageError, match="folder"):
        Database(tmp_path / "nowhere" / "t.db")


class FakeTask:
    """A workload whose kernels are Python functions: `times` says how long each schedule takes, `faulty` what is wrong with it."""

    name, calls, machine = "fake", 3, MACHINE

    def __init__(self, times, faulty=None):
        self.times, self.faulty = times, faulty or {}
        self.candidates = [
            Candidate("t", Workload(2), Schedule(i, 0, True), KernelFeatures(fma_cycles=1e3 + i), lambda: None) for i in range(len(times))
        ]
        self.built = []

    workload = "fake workload"

    def inputs(self, seed):
        return [np.random.default_rng(seed).standard_normal(64).astype("float32")]

    def output(self):
        return np.zeros(64, "float32")

    def arguments(self, candidate, inputs):
        return list(inputs), [False]

    def compile(self, candidate):
        index = candidate.schedule.a
        self.built.append(index)
        if self.faulty.get(index) == "broken":
            raise RuntimeError("LLVM says no")

        def kernel(x, y):
            np.from_dlpack(y)[...] = np.from_dlpack(x) * (2.001 if self.faulty.get(index) == "wrong" else 2)

        kernel.time_us = self.times[index]
        return kernel


@pytest.fixture
def clock(monkeypatch):
    """Kernels of a FakeTask take exactly the time that it says."""
    monkeypatch.setattr(tuner, "measure", lambda entries, *, threads, rounds: [Measurement((entry.function.time_us,) * rounds) for entry in entries])


def setting(path, **changes):
    values = dict(database=Database(path), model=AnalyticModel(), target="cpu:host", hardware="h", threads=1, versions={"tcompile": "0"}, trials=12)
    return Setting(**(values | changes))


def test_winner_is_confirmed_and_slower_wrong_and_broken_ones_are_rejected(tmp_path, clock):
    task = FakeTask([2000.0, 3000.0, 200.0, 1000.0, 100.0, 2500.0], {2: "wrong", 4: "broken"})
    outcome = tune([task], setting(tmp_path / "t.db"))
    (progress,) = outcome.progress
    assert progress.best.schedule.a == 3 and progress.speedup == 2.0 and progress.rejected == 2
    status = {}
    for entry in Database(tmp_path / "t.db").records():
        status.setdefault(entry.schedule, []).append(entry.status)
    by_index = {index: status.get(str(Schedule(index, 0, True))) for index in range(6)}
    assert by_index == {0: None, 1: ["measured"], 2: ["wrong"], 3: ["measured", "winner"], 4: ["failed"], 5: ["measured"]}
    chosen, predicted = TunedModel(Database(tmp_path / "t.db"), AnalyticModel(), hardware="h", threads=1).choose(task.candidates, MACHINE)
    assert chosen is task.candidates[0], "the key of the database is the candidates' own workload, not the fake one's"


def test_a_default_that_nothing_beats_is_kept(tmp_path, clock):
    task = FakeTask([1000.0, 1500.0, 2000.0, 1200.0])
    outcome = tune([task], setting(tmp_path / "t.db"))
    assert outcome.progress[0].best is None and outcome.progress[0].speedup == 1.0
    assert Database(tmp_path / "t.db").best("fake workload", hardware="h", threads=1) is None


def test_a_favourite_that_does_not_stand_up_to_the_default_is_rejected(tmp_path, clock, monkeypatch):
    """The generation's measurement flatters a candidate (noise); beside the default, in more rounds, it is slower."""
    task = FakeTask([1000.0, 1200.0])
    honest = tuner.measure

    def flattering(contestants, *, threads, rounds):
        found = honest(contestants, threads=threads, rounds=rounds)
        return found if rounds == tuner.CONFIRMING else [replace(found[0], samples=(1.0,)), *found[1:]]

    monkeypatch.setattr(tuner, "measure", flattering)
    outcome = tune([task], setting(tmp_path / "t.db"))
    assert outcome.progress[0].best is None
    assert [entry.status for entry in Database(tmp_path / "t.db").records()] == ["measured", "slower"]


def test_a_second_session_resumes(tmp_path, clock):
    times = [1000.0, 900.0, 500.0] + [1500.0] * 17
    first, second = FakeTask(times), FakeTask(times)
    tune([first], setting(tmp_path / "t.db", trials=8))
    outcome = tune([second], setting(tmp_path / "t.db", trials=12))
    (progress,) = outcome.progress
    assert (progress.resumed, progress.trials) == (8, 4) and progress.best.schedule.a == 2
    assert not set(second.built[1:]) & set(first.built), "nothing but the default is built again"
    third = FakeTask(times)
    assert tune([third], setting(tmp_path / "t.db", trials=12)).progress[0].trials == 0


def test_ctrl_c_and_the_budget_keep_what_was_found(tmp_path, clock, monkeypatch):
    times = [1000.0, 400.0] + [1500.0] * 40

    def interrupt(progress):
        raise KeyboardInterrupt

    outcome = tune([FakeTask(times)], setting(tmp_path / "t.db", trials=40), interrupt)
    assert outcome.interrupted and outcome.progress[0].best.schedule.a == 1
    assert Database(tmp_path / "t.db").best("fake workload", hardware="h", threads=1) is not None
    now = [0.0]
    monkeypatch.setattr(tuner, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def a_second_later(progress):
        now[0] += 1

    outcome = tune([FakeTask(times)], setting(tmp_path / "u.db", trials=40, seconds=0.5), a_second_later)
    assert not outcome.interrupted and outcome.progress[0].trials == 8


def test_results_agree_within_the_order_of_summation_only():
    x = np.random.default_rng(0).standard_normal(1000).astype("float32")
    assert agrees(x + np.float32(1e-6), x) and not agrees(x + np.float32(1e-3), x)
    spoiled = x.copy()
    spoiled[17] = np.nan
    assert not agrees(spoiled, x) and agrees(spoiled, spoiled)
    assert agrees(np.arange(3), np.arange(3)) and not agrees(np.arange(3) + [0, 0, 1], np.arange(3))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), (None, None)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "ten", "-5", "5d"])
def test_budgets_that_make_no_sense(text):
    with pytest.raises(UsageError, match="time budget"):
        parse_budget(text)


def test_from_model_to_tuned_artifact(tmp_path):
    path, database = saved_mlp(tmp_path, rows=48, width=64), tmp_path / "t.db"
    plain = tcompile.compile(path)
    x = np.random.default_rng(0).standard_normal((48, 4)).astype("float32")
    tuned = tcompile.compile(path, tune_trials=6, tuning_db=database)
    np.testing.assert_allclose(tuned(x), plain(x), rtol=1e-4, atol=1e-5)
    records = Database(database).records()
    assert len({entry.schedule for entry in records}) == 6 and all(entry.status in ("measured", "winner", "slower") for entry in records)
    assert all(entry.versions["apache-tvm"] and len(entry.samples_us) >= 5 and entry.hardware for entry in records)
    best = next(entry for entry in records if "mr=" in entry.schedule)
    # a winner by decree: compilations take it whatever the model predicts, and whatever has won among the trials
    Database(database).append(replace(best, status="winner", samples_us=(1000.0,), default_us=(1e6,)))
    again = tcompile.compile(path, tuning_db=database)
    (row,) = (row for row in again.report()["kernels"] if row["template"] == "gemm")
    assert row["schedule"] == best.schedule and row["cost_model"] == "tuned"
    np.testing.assert_allclose(again(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_example_of_the_docs(tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs" / "tuning.md").read_text()
    saved_mlp(tmp_path, rows=48, width=64)
    code = page.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line for line in page.partition("```sh\n")[2].partition("```")[0].splitlines() if line.startswith("tcompile")]
    for command in commands:
        words = command.partition("#")[0].split()[1:]
        done = subprocess.run(
            [sys.executable, "-m", "tcompile", *words, *(["--json"] if words[0] == "tune" else [])], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if words[0] == "tune":
            assert json.loads(done.stdout)["kernels"][0]["resumed"] > 0
