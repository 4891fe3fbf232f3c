"""The learned cost model: features, schema, training, and what it chooses."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tcompile.autotune.features as features
import tcompile.autotune.training as training
from tcompile.autotune.corpus import CORPUS, sample
from tcompile.autotune.corpus_workloads import convolution, gemm
from tcompile.autotune.cost_model import AnalyticModel, Candidate, KernelFeatures
from tcompile.autotune.learned import PRETRAINED, LearnedModel, default_model, family
from tcompile.autotune.measure import Measurement, steady
from tcompile.autotune.tir_features import tir_features
from tcompile.compiler.errors import UsageError
from tcompile.compiler.tvm import IRBuilder, T
from tcompile.targets.base import Target
from tcompile.targets.cpu.gemm_schedules import GemmSchedule
from tcompile.targets.cpu.tasks import tasks
from tcompile.targets.cpu.template import machine

ROOT = Path(__file__).resolve().parent.parent
AVX512 = Target.parse("cpu:skylake-avx512")


def task(module, target=AVX512):
    (found,) = tasks(module, target)
    return found


def pick(found, **schedule):
    return next(c for c in found.candidates if c.template == "gemm" and all(getattr(c.schedule, name) == value for name, value in schedule.items()))


def test_tir_features_of_a_nest_that_can_be_counted_by_hand():
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        a = T.arg("a", T.buffer((8, 1024), "float32"))
        b = T.arg("b", T.buffer((8, 1024), "float32"))
        with T.parallel(T.int64(8)) as i:
            with T.If(i < T.int64(2)):
                with T.Then(), T.serial(T.int64(10)) as j:
                    T.buffer_store(b, a[i, j] * T.float32(2), [i, j])
                with T.Else(), T.serial(T.int64(64)) as k:
                    ramp = T.ramp(k * T.int64(16), T.int64(1), 16)
                    T.buffer_store(b, a[i, ramp] + T.broadcast(T.float32(1), 16), [i, ramp])
    found = tir_features(builder.get())
    assert found.parallel == 8 and found.depth == 2 and found.parameter_bytes == 2 * 4 * 8 * 1024
    assert found.scalar_loads == found.scalar_stores == 2 * 10  # an eighth of the tasks each, two of eight in all
    assert found.vector_loads == found.vector_stores == 6 * 64
    assert found.arithmetic == 2 * 10 + 6 * 64
    assert found.hot_trips == 64 and found.hot_vector_stride == 64


def test_features_of_a_gemm_say_what_its_inner_loop_does():
    found = task(gemm(64, 256, 96))
    candidate = pick(found, mr=8, nv=3, mc=0)
    tir = tir_features(candidate.kernel.func)
    assert tir.multiply_adds == 64 * 256 * 96 / 16
    assert (tir.hot_multiply_adds, tir.hot_vector_loads, tir.hot_scalar_loads) == (24, 3, 8)
    assert tir.hot_row_stride == 4 * 256 and tir.hot_vector_stride == 4 * 48 and tir.parallel == 2


@pytest.mark.parametrize("module", [gemm(33, 70, 50, "sigmoid"), convolution((1, 12, 12, 16), 24, (3, 3), (1, 1), (1, 1, 1, 1))])
def test_rows_are_deterministic_finite_where_known_and_named(module):
    found = task(module)
    for candidate in found.candidates[:: max(1, len(found.candidates) // 5)]:
        row = features.row(candidate, machine(AVX512))
        again = features.row(replace(candidate), machine(AVX512))
        assert len(row) == len(features.NAMES)
        np.testing.assert_array_equal(row, again)
        missing = {name.partition(".")[0] for name, value in zip(features.NAMES, row, strict=True) if np.isnan(value)}
        assert missing <= {"schedule"}  # a template lacks the knobs of the others


def test_predictions_do_not_depend_on_order_or_company():
    model, found = default_model(), task(gemm(128, 128, 256))
    chosen = found.candidates[::20]
    predicted = model.predict(chosen, machine(AVX512))
    shuffled = list(range(len(chosen)))
    random.Random(1).shuffle(shuffled)
    again = model.predict([chosen[index] for index in shuffled], machine(AVX512))
    assert [predicted[index] for index in shuffled] == again
    assert model.predict(chosen[:1], machine(AVX512)) == predicted[:1]


def test_the_shipped_model_was_trained_on_the_shipped_corpus():
    model = LearnedModel.load(PRETRAINED)
    corpus = training.read_corpus(CORPUS)
    trained_on = model.schema.trained_on
    assert trained_on["points"] == sum(len(entry.rows) for entry in corpus) >= 3000
    assert trained_on["workloads"] == len({entry.workload for entry in corpus}) >= 60
    for entry in corpus[:5]:
        predicted = entry.analytic_us * np.exp2(model.full.inplace_predict(entry.rows))
        assert np.median(np.abs(predicted / entry.measured_us - 1)) < 0.2


def test_training_is_deterministic_and_beats_the_analytic_model_on_held_out_workloads():
    corpus = training.read_corpus(CORPUS)
    few = [entry for entry in corpus if entry.machine == "znver4" and entry.threads == 1]
    first, second = (bytes(training.train(few[:40], len(features.NAMES), rounds=5).save_raw("ubj")) for _ in range(2))
    assert first == second
    splits = training.folds(corpus)
    for train, held in splits:
        assert not {entry.workload for entry in train} & {entry.workload for entry in held}
    train, held = splits[0]
    trees = training.train(train, len(features.CLOSED_NAMES), rounds=60)

    def reached(entry, score):
        return entry.measured_us.min() / entry.measured_us[int(np.argmin(score))]

    columns = len(features.CLOSED_NAMES)
    learned = [np.log2(entry.analytic_us) + trees.inplace_predict(entry.rows[:, :columns]) - np.log2(entry.measured_us) for entry in held]
    analytic = [np.log2(entry.analytic_us / entry.measured_us) for entry in held]
    assert np.median(np.abs(np.concatenate(learned))) < 0.5 * np.median(np.abs(np.concatenate(analytic)))


@pytest.mark.parametrize("damage", ["names", "version", "trees", "missing", "schema"])
def test_a_model_of_another_schema_is_refused(damage, tmp_path):
    for file in PRETRAINED.glob("cpu*"):
        shutil.copy(file, tmp_path)
    schema = json.loads((tmp_path / "cpu.json").read_text())
    if damage == "names":
        schema["names"][0], schema["names"][1] = schema["names"][1], schema["names"][0]
    elif damage == "version":
        schema["version"] += 1
    elif damage == "trees":
        (tmp_path / "cpu-full.ubj").write_bytes((tmp_path / "cpu-closed.ubj").read_bytes())
    elif damage == "missing":
        (tmp_path / "cpu-full.ubj").unlink()
    (tmp_path / "cpu.json").write_text("{}" if damage == "schema" else json.dumps(schema))
    with pytest.raises(UsageError, match="cpu"):
        LearnedModel.load(tmp_path)


def test_choice_is_among_the_leaders_and_families_unknown_to_the_model_are_judged_analytically():
    model, found = default_model(), task(gemm(128, 512, 512))
    best, predicted = model.choose(found.candidates, machine(AVX512))
    assert family(best) in model.schema.families and predicted > 0
    made = []

    def other(us):
        def emit():
            made.append(us)
            raise AssertionError("a family that the model does not know is never emitted to be judged")

        return Candidate("other", None, GemmSchedule(1, 1, 1, 0), KernelFeatures(fma_cycles=us * 1e3, tasks=1), emit)

    slow, fast = other(1e6), other(1e-3)
    assert model.choose([*found.candidates, slow], machine(AVX512))[0] is best
    assert model.choose([*found.candidates, fast], machine(AVX512))[0] is fast
    assert model.choose([slow, fast], machine(AVX512)) == AnalyticModel().choose([slow, fast], machine(AVX512))
    assert made == []


def test_samples_of_the_corpus_are_seeded_and_distinct():
    found = task(gemm(64, 256, 256))
    first, second = (sample(found.candidates, AVX512, 20, "a") for _ in range(2))
    assert [c.schedule for c in first] == [c.schedule for c in second] and len({str(c.schedule) for c in first}) == 20
    assert [c.schedule for c in first] != [c.schedule for c in sample(found.candidates, AVX512, 20, "b")]


def test_the_example_of_the_docs(capsys):
    page = (ROOT / "docs" / "cost-model.md").read_text()
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["analytic", "learned"] and all("GemmSchedule(mr=" in line for line in lines)


def test_times_of_turns_on_a_machine_that_changes_its_speed():
    """Rounds of half the speed, one of them cut short by a disturbance of one contestant: shares of a round are what counts."""
    speed = np.array([1.0, 2.0, 2.0, 1.0, 2.0])
    samples = np.outer([10.0, 12.0, 20.0], speed)
    samples[0, 3] = 500.0
    np.testing.assert_allclose(steady([Measurement(tuple(row)) for row in samples]), [10.0, 12.0, 20.0])
