"""Records of GPU timings and the latency model trained on them, on a simulated device; what the harness checks before it records."""

from __future__ import annotations

import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tcompile.autotune import gpu_records, latency
from tcompile.compiler.errors import UsageError
from tcompile.targets.base import Target
from tcompile.targets.cuda import schedule, schedule_hopper
from tcompile.targets.cuda.emulate import Emulation

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_record_cases as cases
import gpu_records as command

TARGET = Target.parse("cuda:sm_90a")


def rehearse(monkeypatch, folder, *arguments):
    files = ["--records", str(folder / "records.jsonl.gz"), "--model", str(folder)]
    monkeypatch.setattr(sys, "argv", ["gpu_records.py", *arguments, "--rehearse", *files])
    command.main()


def shapes(count):
    """Products that are not among the recorded ones."""
    generator = random.Random(99)
    return [schedule.GemmShape(1, *(int(2 ** generator.uniform(*bounds)) for bounds in ((3, 12), (7, 11), (6, 12)))) for _ in range(count)]


def taken(shape, device):
    """Microseconds on the simulated device of the tiles that are chosen, by family."""
    found = {}
    for family, tile, cycles in (
        ("gemm", schedule.best_tile(shape, TARGET, "Bf16x2", shares=True), lambda tile: schedule.predicted_cycles(shape, tile, TARGET, "Bf16x2")),
        ("gemm hopper", schedule_hopper.best_tile(shape, TARGET, "Bf16x2"), lambda tile: schedule_hopper.predicted_cycles(shape, tile, TARGET)),
    ):
        with latency.listing() as seen:
            cycles(tile)
        (timing,) = seen.values()
        found[family] = np.log(device.microseconds(timing))
    return found


@pytest.mark.slow
def test_a_rehearsal_ends_in_a_model_that_ranks_better_on_workloads_that_it_has_not_seen(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cuda latency: begin -->\n<!-- cuda latency: end -->\nafter\n")
    rehearse(monkeypatch, tmp_path, "product bfloat16*", "product float16*", "--random", "24", "--schedules", "8", "--docs", str(page))
    text = capsys.readouterr().out
    assert "| gemm hopper |" in text and text.splitlines()[-8] in page.read_text()
    schema = json.loads((tmp_path / "cuda-latency-sm_90a.json").read_text())
    for family in ("gemm", "all"):
        found = schema["quantities"][family]
        assert found["answers"] == "learned" and found["learned"]["reached"] > found["modelled"]["reached"]
        assert found["learned"]["error"] < found["modelled"]["error"]
    assert schema["quantities"]["gemm 2:4"]["answers"] == "modelled"  # timed on one workload
    device, held = command.Simulated(), shapes(30)
    before = [taken(shape, device) for shape in held]
    model = latency.LatencyModel.load(tmp_path, "sm_90a")
    monkeypatch.setattr(latency, "latency_model", lambda arch: model if arch == "sm_90a" else None)
    after = [taken(shape, device) for shape in held]
    gains = {family: np.mean([old[family] - new[family] for old, new in zip(before, after, strict=True)]) for family in before[0]}
    assert gains["gemm"] > 0.02 and gains["gemm hopper"] > 0, gains
    tile = schedule.TileSchedule(64, 64, 2, 2, 3)
    with latency.listing():  # what the formulas say; sm_80 has no model
        modelled = [schedule.predicted_cycles(held[0], tile, target, "Bf16") for target in (TARGET, Target.parse("cuda:sm_80"))]
    assert schedule.predicted_cycles(held[0], tile, TARGET, "Bf16") != modelled[0]
    assert schedule.predicted_cycles(held[0], tile, Target.parse("cuda:sm_80"), "Bf16") == modelled[1]
    # a second visit times nothing twice, and begins nothing when its time is over
    count = len(gpu_records.read(tmp_path / "records.jsonl.gz"))
    monkeypatch.setattr(gpu_records, "ROUNDS", 2)
    rehearse(monkeypatch, tmp_path, "product bfloat16*", "--random", "0", "--seconds", "1e9")
    assert len(gpu_records.read(tmp_path / "records.jsonl.gz")) == count
    rehearse(monkeypatch, tmp_path, "product fp32*", "--seconds", "0")
    assert len(gpu_records.read(tmp_path / "records.jsonl.gz")) == count and "0 seconds are over" in capsys.readouterr().out


def entry(name, family="gemm", factor=2.0):
    timings = [
        latency.Timing(family, f"s{number}", (0.0, float(number), *[float("nan")] * (len(latency.NAMES) - 2)), 100.0 * number) for number in (1, 2)
    ]
    return gpu_records.record(name, "net", "sm_80", 1.41, {"name": "A100"}, [(timing, factor * timing.cycles, timing.cycles) for timing in timings])


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    assert gpu_records.append(path, [entry("one")]) == 1 and gpu_records.append(path, [entry("two"), entry("one")]) == 3
    found = gpu_records.read(path)
    assert [sample.workload for sample in found] == ["one", "two", "one"]
    sample = found[0]
    assert sample.machine == "sm_80" and sample.schedules == ("s1", "s2") and sample.templates == ("gemm", "gemm")
    np.testing.assert_allclose(sample.measured_us, [100, 200])
    np.testing.assert_allclose(sample.analytic_us, [100 / 1410, 200 / 1410], rtol=1e-4)
    assert sample.rows.shape == (2, len(latency.NAMES)) and np.isnan(sample.rows[0, 2]) and sample.rows[1, 1] == 2
    written = path.read_bytes()
    again = tmp_path / "again.jsonl.gz"
    gpu_records.append(again, [entry("one"), entry("two"), entry("one")])
    assert again.read_bytes() == written
    assert json.loads(gzip.decompress(written).splitlines()[1])["run"] == {"name": "A100"}


def test_foreign_records_and_models_are_refused_by_name(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    for header, reason in (
        ({"version": 99, "names": list(latency.NAMES)}, "version 99"),
        ({"version": latency.VERSION, "names": ["m"]}, "other features"),
        ({"kind": "cuda"}, "no records"),
    ):
        path.write_bytes(gzip.compress(json.dumps(header).encode()))
        for use in (gpu_records.read, lambda path: gpu_records.append(path, [entry("one")])):
            with pytest.raises(UsageError, match=reason) as refused:
                use(path)
            assert str(path) in str(refused.value)
    path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=str(path)):
        gpu_records.read(path)
    path.unlink()
    gpu_records.append(path, [entry(f"w{number}") for number in range(7)])
    with pytest.raises(UsageError, match="7 workloads were timed on sm_80"):
        gpu_records.publish(gpu_records.read(path), "sm_80", tmp_path)
    gpu_records.append(path, [entry("w7")])
    gpu_records.publish(gpu_records.read(path), "sm_80", tmp_path)
    model = latency.LatencyModel.load(tmp_path, "sm_80")
    row = (0.0, 1.0, *[float("nan")] * (len(latency.NAMES) - 2))
    assert (
        model.ratio("gemm", row) == model.ratio("depthwise", row) == pytest.approx(np.log2(1410), abs=1e-3)
    )  # one ratio for all: nothing for trees to know
    schema = tmp_path / "cuda-latency-sm_80.json"
    (tmp_path / "cuda-latency-sm_86.json").write_text(schema.read_text())
    with pytest.raises(UsageError, match="kernels of sm_80, not of sm_86"):
        latency.LatencyModel.load(tmp_path, "sm_86")
    schema.write_text(schema.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(UsageError, match="version 7"):
        latency.LatencyModel.load(tmp_path, "sm_80")
    assert latency.latency_model("sm_80", tmp_path / "absent") is None


@pytest.mark.parametrize(
    "workload",
    [
        cases.product("", 96, 64, 80, "bfloat16"),
        pytest.param(cases.few_bits("", 3, 64, 40, 8, "bf16"), marks=pytest.mark.networks),
        pytest.param(cases.convolution("", 9, 24, 24, 3, 1, "fp32", 1, 24), marks=pytest.mark.networks),
        pytest.param(cases.convolution("", 14, 64, 64, 3, 1, "bfloat16"), marks=pytest.mark.networks),
        pytest.param(cases.attention("", 4, 4, 512, 512, 64, True, "bfloat16"), marks=pytest.mark.networks),
        pytest.param(cases.experts("", 64, 32, 48, 4), marks=pytest.mark.networks),
        pytest.param(cases.zeros("", 4096, 768, 3072, "block64x128:0.5"), marks=pytest.mark.networks),
        pytest.param(cases.zeros("", 128, 768, 3072, "2:4"), marks=pytest.mark.networks),
    ],
    ids=lambda workload: workload.name,
)
def test_every_schedule_that_is_thought_of_can_be_had(workload):
    generator, found = random.Random(0), command.candidates(workload, TARGET)
    for family in sorted({timing.family for timing in found}):
        own = [timing for timing in found if timing.family == family]
        for timing in generator.sample(own, min(2, len(own))):
            assert command.forced(workload, TARGET, timing) is not None, timing


class Emulated(command.Device):
    """The harness without a GPU: artifacts run by the emulation, times by the clock."""

    device, arch, folder = torch.device("cpu"), TARGET, None
    captured, times = gpu.Rehearsal.captured, gpu.Rehearsal.times

    def __init__(self):
        pass

    def compiled(self, workload, timings):
        return [(timing, command.forced(workload, self.arch, timing)) for timing in timings]


class Runs:
    def __init__(self, made):
        self._model = Emulation(made.sources, made.weights, made.inputs, made.outputs, made.report["memory"]["workspace_bytes"])

    def __call__(self, *inputs):
        arrays = [
            value.view(torch.int16).numpy().view(cases.numpy_dtype("bfloat16")) if value.dtype == torch.bfloat16 else value.numpy()
            for value in inputs
        ]
        return torch.from_numpy(np.asarray(self._model(*arrays)[0]))

    def check(self):
        assert self._model.error == 0


def test_wrong_results_are_named_and_not_recorded(monkeypatch):
    monkeypatch.setattr(command, "CompiledModel", Runs)
    monkeypatch.setattr(command, "ROUNDS", 2)
    workload = cases.product("", 33, 48, 40, "bfloat16")
    found = command.sample(command.candidates(workload, TARGET), 2, random.Random(0))
    assert {timing.family for timing in found} == {"gemm", "gemm hopper"}
    one = [found[0]]
    timed, wrong = Emulated().timed(workload, one)
    assert [timing for timing, *_ in timed] == one and all(0 < least <= median for _, median, least in timed) and not wrong
    timed, wrong = Emulated().timed(replace(workload, reference=lambda x: np.ones((33, 40), "float32")), one)
    assert not timed and "above" in wrong[0] and found[0].schedule in wrong[0]
