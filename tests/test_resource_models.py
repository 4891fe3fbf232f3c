"""The learned models of what designs take: points, training, schema, predictions, and what the CUDA template makes of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tcompile.autotune import resource_training
from tcompile.autotune.learned import PRETRAINED, default_model
from tcompile.autotune.resources import QUANTITIES, LearnedResources, read_points, write_points
from tcompile.compiler.errors import UsageError
from tcompile.targets.base import Target
from tcompile.targets.cuda import schedule
from tcompile.targets.cuda.schedule import GemmShape, best_tile, fitting, register_limit, space
from tcompile.targets.fpga import measure, resources
from tcompile.targets.fpga.cost import Folding

KINDS = sorted(QUANTITIES)
POINTS = {kind: read_points(resource_training.points_file(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_points_give_the_shipped_trees(kind):
    model = default_model(kind)
    assert isinstance(model, LearnedResources) and set(model.boosters) == set(model.schema.digest)
    for quantity, digest in model.schema.digest.items():
        trained = bytes(resource_training.train(POINTS[kind], quantity).save_raw("ubj"))
        assert resource_training.hashlib.sha256(trained).hexdigest() == digest
    assert {name for name, found in model.schema.quantities.items() if found["answers"] == "learned"} == set(model.boosters)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_known_points_are_within_the_held_out_error(kind):
    model, points = default_model(kind), POINTS[kind]
    predicted = model.predict([point.design for point in points])
    alone = model.predict([points[3].design])
    assert alone == [predicted[3]] and set(alone[0]) == set(QUANTITIES[kind])
    for quantity, found in model.schema.quantities.items():
        errors = [abs(has[quantity] / point.measured[quantity] - 1) for has, point in zip(predicted, points, strict=True)]
        stated = found[found["answers"]]
        assert np.mean(errors) <= stated["mean"] + 1e-4  # points that were trained on are predicted no worse than held-out ones


def test_what_answers_is_the_better_one_of_the_held_out_workloads():
    found = resource_training.evaluate(POINTS["fpga"])
    assert json.loads(json.dumps(found)) == default_model("fpga").schema.quantities
    for entry in found.values():
        better = min(("modelled", "learned"), key=lambda name: entry[name]["mean"])
        assert entry["answers"] == better or abs(entry["modelled"]["mean"] - entry["learned"]["mean"]) <= resource_training.LEAST_GAIN


def test_no_point_of_a_held_out_workload_is_trained_on(monkeypatch):
    seen = []
    real = resource_training.train
    monkeypatch.setattr(resource_training, "train", lambda points, quantity: seen.append({p.workload for p in points}) or real(points, quantity))
    resource_training.held_out(POINTS["fpga"], "lut")
    every = {point.workload for point in POINTS["fpga"]}
    assert len(seen) == len(every) and {frozenset(every - names) for names in seen} == {frozenset([name]) for name in every}


def test_points_survive_their_file(tmp_path):
    points = POINTS["fpga"]
    write_points(
        tmp_path / "p.jsonl.gz", {}, [{"workload": p.workload, "schedule": p.schedule, "design": p.design, "measured": p.measured} for p in points]
    )
    assert read_points(tmp_path / "p.jsonl.gz") == points


def test_other_features_versions_targets_and_files_are_refused(tmp_path):
    model, design = default_model("cuda"), POINTS["cuda"][0].design
    with pytest.raises(UsageError, match="other features than this tcompile computes .colour"):
        model.predict([replace(design, numbers={**design.numbers, "colour": 1.0})])
    with pytest.raises(UsageError, match="their order"):
        model.predict([replace(design, numbers=dict(reversed(design.numbers.items())))])
    with pytest.raises(UsageError, match="a design for fpga"):
        model.predict([POINTS["fpga"][0].design])
    for file in PRETRAINED.glob("cuda*"):
        shutil.copy(file, tmp_path)
    schema = json.loads((tmp_path / "cuda.json").read_text())
    (tmp_path / "cuda.json").write_text(json.dumps(schema | {"version": 0}))
    with pytest.raises(UsageError, match="features of version 0"):
        LearnedResources.load(tmp_path, "cuda")
    (tmp_path / "cuda.json").write_text(json.dumps(schema))
    (tmp_path / "cuda-shared_bytes.ubj").write_bytes(b"other trees")
    with pytest.raises(UsageError, match="does not belong to its schema"):
        LearnedResources.load(tmp_path, "cuda")


def test_an_fpga_stage_is_the_design_that_was_measured():
    config = measure.CONFIGS[11]  # 2:4
    known = resources.design(measure.stage_of(config), Folding(config.pe, config.simd))
    (point,) = [p for p in POINTS["fpga"] if p.workload == "64 -> 32, 2:4" and p.schedule == f"pe {config.pe}, simd {config.simd}"]
    assert known.numbers == pytest.approx(point.design.numbers, rel=1e-4) and list(known.numbers) == list(point.design.numbers)
    assert known.modelled == pytest.approx(point.design.modelled, rel=1e-3)
    assert default_model("fpga").predict([known])[0]["cycles"] == pytest.approx(point.measured["cycles"])


def test_the_tile_choice_rejects_what_is_predicted_to_spill():
    target, shape = Target.parse("cuda:sm_80"), GemmShape(1, 33, 333, 257, 1, 1)
    kept = fitting(shape, space(target), target, "Fp32")
    assert 0 < len(kept) < len(space(target))
    spilled = {point.schedule.partition(", Fp32, sm_80")[0] for point in POINTS["cuda"] if _spills(point, "gemm 1x33x333x257", "Fp32, sm_80")}
    assert spilled and not spilled & {str(tile) for tile in kept}
    assert best_tile(shape, target, "Fp32") in kept
    aligned = fitting(replace(shape, k=768, n=768, va=4, vb=4), space(target), target, "Fp32")
    assert len(aligned) > len(kept)


def _spills(point, workload, end):
    return point.workload == workload and point.schedule.endswith(end) and point.measured["stack_bytes"] > 64 and _in_space(point.schedule)


def _in_space(text):
    numbers = tuple(map(int, re.findall(r"(\d+)x(\d+)x32, (\d+)x(\d+) warps, (\d+) stages", text)[0]))
    return schedule.TileSchedule(*numbers) in space(Target.parse("cuda:sm_80"))


def test_register_limits_follow_the_block():
    assert [register_limit(schedule.TileSchedule(128, 128, *warps, 3)) for warps in ((4, 4), (2, 4), (2, 2))] == [128, 255, 255]
