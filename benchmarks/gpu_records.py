"""`make gpu-records`: times schedules of the CUDA templates on this machine's GPU, adds them to the package's records, and trains the latency model of its architecture.

python benchmarks/gpu_records.py [PATTERN ...] [--seconds 900] [--schedules 10] [--random 40] [--seed 0] [--records FILE] [--model DIR] [--docs docs/cost-model.md]
                                 [--libraries DIR [--build TARGET]] [--rehearse]

For each workload (benchmarks/gpu_record_cases.py) the schedules that the compiler thinks of are listed; the formulas' favourites of each family and some at random are compiled (nvcc, on all CPUs), run,
compared with a reference, captured in CUDA graphs and replayed in turns between two events, behind a write of more bytes than the L2 cache holds. Wrong results are named and not recorded. Records are written after
every workload, and workloads are begun as long as `--seconds` last: an interrupted visit loses nothing, and the next one goes on with workloads that this GPU has no records of.

`--libraries DIR --build cuda:sm_90a` compiles ahead, on a machine without a GPU, what `--libraries DIR` then finds there (by the hash of the sources). Without a GPU it says so and ends with
exit code 0. `--rehearse` takes a simulated device instead of a GPU (its times say nothing about real ones), whose memory is slower than the formulas say and whose launches take time: for the
tests, and to see what the command does. It writes to the files that are named alone.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import Gpu
from gpu_record_cases import Workload, at_random, of_networks
from tcompile.autotune import gpu_records
from tcompile.autotune.latency import NAMES, Timing, forcing, listing
from tcompile.compiler.api import CompiledModel, build_artifact
from tcompile.compiler.artifact import Artifact
from tcompile.compiler.element_types import numpy_dtype
from tcompile.compiler.errors import TcompileError
from tcompile.compiler.options import CompileOptions
from tcompile.targets.base import Target
from tcompile.targets.cuda import toolchain

ROUNDS = 15


def candidates(workload: Workload, target: Target) -> list[Timing]:
    """Schedules that are thought of for a workload."""
    with listing() as found:
        _artifact(workload, target)
    return list(found.values())


def sample(found: Sequence[Timing], count: int, generator: random.Random) -> list[Timing]:
    """Of every family the formulas' favourite and some others, half of them from the better third."""
    chosen: list[Timing] = []
    for family in sorted({timing.family for timing in found}):
        order = sorted((timing for timing in found if timing.family == family), key=lambda timing: timing.cycles)
        best, better, rest = order[:2], order[2 : 2 + len(order) // 3], order[2 + len(order) // 3 :]
        half = max(0, count - len(best)) // 2
        taken = [*best, *generator.sample(better, min(half, len(better)))]
        chosen += [*taken, *generator.sample(rest, min(max(0, count - len(taken)), len(rest)))]
    return chosen


def _artifact(workload: Workload, target: Target) -> Artifact:
    return build_artifact(workload.program(), target, CompileOptions(precision=workload.precision, emit_only=True))


def forced(workload: Workload, target: Target, timing: Timing) -> Artifact | None:
    """The artifact, without a library, whose one kernel has this schedule; None where the template is not free to take it."""
    with forcing(timing.family, timing.schedule):
        made = _artifact(workload, target)
    family = timing.family.removeprefix("gemm")
    rows = [
        row for row in made.report["kernels"] if row["template"] in (timing.family, f"conv2d{family}") and timing.schedule in ("", row["schedule"])
    ]
    return made if rows else None


def library(made: Artifact, arch: str, folder: Path | None) -> bytes:
    """Compiled by nvcc, or found where it was before."""
    text = "\0".join([arch, *(f"{name}\0{source}" for name, source in sorted(made.sources.items()))])
    kept = None if folder is None else folder / f"{hashlib.sha256(text.encode()).hexdigest()}.so"
    if kept is not None and kept.exists():
        return kept.read_bytes()
    found = toolchain.build(made.sources, arch).library
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(found)
    return found


class Device(Gpu):
    """This machine's GPU."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.arch, self.folder = Target.parse("cuda"), folder

    def timed(self, workload: Workload, timings: Sequence[Timing]) -> tuple[list[tuple[Timing, float, float]], list[str]]:
        """(schedule, median, least microseconds) of those that are right, and what is wrong with the others."""
        arrays = workload.arrays()
        reference = torch.from_numpy(np.asarray(workload.reference(*arrays), "float64"))
        inputs = [_tensor(array).to(self.device) for array in arrays]
        replays, wrong, outputs = {}, [], {}
        with torch.inference_mode():
            for timing, made in self.compiled(workload, timings):
                model = CompiledModel(made)
                try:
                    replay, outputs[timing] = self.captured(lambda model=model: model(*inputs))
                    model.check()
                except (RuntimeError, TcompileError) as reason:
                    wrong.append(f"{timing.family}, {timing.schedule}: {str(reason).strip().partition(chr(10))[0]}")
                    continue
                error = _error(outputs[timing], reference)
                if error <= workload.tolerance:
                    replays[timing] = replay
                else:
                    wrong.append(f"{timing.family}, {timing.schedule}: error {error:.1e} above {workload.tolerance:.0e}")
            samples = self.times(replays, ROUNDS)
        return [(timing, statistics.median(values) * 1e6, min(values) * 1e6) for timing, values in samples.items()], wrong

    def compiled(self, workload: Workload, timings: Sequence[Timing]) -> list[tuple[Timing, Artifact]]:
        return built(workload, self.arch, timings, self.folder)


class Simulated:
    """No GPU: what the formulas say, but that every byte that blocks read comes at 0.7 of a rate which the formulas do not know, and that launches take 4 us; 2 % of noise."""

    arch = Target.parse("cuda:sm_90a")

    def __init__(self, seed: int = 0) -> None:
        self._noise = random.Random(seed)

    def facts(self) -> dict[str, Any]:
        return {"name": "simulated", "driver_version": "-", "clocks.max.sm": "-", "clocks.max.mem": "-"}

    def microseconds(self, timing: Timing) -> float:
        """The true time."""
        given = dict(zip(NAMES, timing.row, strict=True))
        batch, m, k, n = (2.0 ** given[name] for name in ("batch", "m", "k", "n"))
        high, wide = (max(1.0, size / given[tile]) if given[tile] == given[tile] else 1.0 for size, tile in ((m, "bm"), (n, "bn")))
        moved = 4.0 * batch * (m * k * math.ceil(wide) + k * n * math.ceil(high) + m * n)
        launches = 2 if max(given["parts"], given["shares"]) > 1 else 1
        return 4.0 * launches + timing.cycles / self.arch.frequency_ghz / 1e3 + moved / (0.7 * 4e6)

    def timed(self, workload: Workload, timings: Sequence[Timing]) -> tuple[list[tuple[Timing, float, float]], list[str]]:
        found = []
        for timing in timings:
            true = self.microseconds(timing)
            rounds = [true * (1 + abs(self._noise.gauss(0, 0.02))) for _ in range(ROUNDS)]
            found.append((timing, statistics.median(rounds), min(rounds)))
        return found, []


def built(workload: Workload, target: Target, timings: Sequence[Timing], folder: Path | None) -> list[tuple[Timing, Artifact]]:
    """Those that can be made, with their libraries."""
    made = [(timing, artifact) for timing in timings if (artifact := forced(workload, target, timing)) is not None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = pool.map(lambda entry: library(entry[1], target.name, folder), made)
        return [(timing, replace(artifact, library=code)) for (timing, artifact), code in zip(made, libraries, strict=True)]


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype in (numpy_dtype("bfloat16"), numpy_dtype("float8_e4m3fn")):
        return torch.from_numpy(array.view(f"u{array.dtype.itemsize}").copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(np.ascontiguousarray(array))


def _error(output: Any, reference: torch.Tensor) -> float:
    """Of the first result, over the norm; NaN is infinite."""
    first = output[0] if isinstance(output, tuple) else output
    error = float(torch.linalg.vector_norm(first.detach().cpu().double() - reference) / max(1e-30, float(torch.linalg.vector_norm(reference))))
    return error if error == error else math.inf


def collect(device: Device | Simulated, machine: str, workloads: Sequence[Workload], options: argparse.Namespace) -> None:
    """Time workloads until the seconds are over, and add each to the records at once."""
    start, generator = time.monotonic(), random.Random(options.seed)
    facts = {**device.facts(), "date": date.today().isoformat(), "torch": torch.__version__, "seed": options.seed}
    known = {sample.workload for sample in gpu_records.read(options.records) if sample.machine == machine} if options.records.exists() else set()
    for workload in workloads:
        chosen_from = random.Random(generator.random())
        if workload.name in known:
            continue
        if time.monotonic() - start > options.seconds:
            print(f"{options.seconds:g} seconds are over", flush=True)
            return
        try:
            found = sample(candidates(workload, device.arch), options.schedules, chosen_from)
            timed, wrong = device.timed(workload, found)
        except TcompileError as reason:
            print(f"{workload.name}: {reason}", flush=True)
            continue
        for line in wrong:
            print(f"{workload.name}: {line}", flush=True)
        if timed:
            gpu_records.append(
                options.records, [gpu_records.record(workload.name, workload.network, machine, device.arch.frequency_ghz, facts, timed)]
            )
            fastest = min(timed, key=lambda entry: entry[2])
            print(f"{workload.name}: {len(timed)} schedules, {fastest[2]:.4g} us by {fastest[0].family} {fastest[0].schedule}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of workloads, with * for any text")
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--schedules", type=int, default=10, help="of each family of a workload")
    parser.add_argument("--random", type=int, default=40, help="random workloads, besides those of networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, default=gpu_records.RECORDS)
    parser.add_argument("--model", type=Path, default=gpu_records.PRETRAINED)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--libraries", type=Path, help="folder of libraries that were compiled before")
    parser.add_argument("--build", metavar="TARGET", help="compile for a target, and time nothing")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    every = [*of_networks(), *at_random(options.seed, options.random)]
    workloads = [each for each in every if any(fnmatch(each.name, f"*{pattern}*") for pattern in options.patterns)]
    if options.build:
        if options.libraries is None:
            parser.error("--build needs --libraries")
        target, generator = Target.parse(options.build), random.Random(options.seed)
        for workload in workloads:
            found = sample(candidates(workload, target), options.schedules, random.Random(generator.random()))
            print(f"{workload.name}: {len(built(workload, target, found, options.libraries))} libraries", flush=True)
        return
    if options.rehearse:
        if gpu_records.RECORDS == options.records or gpu_records.PRETRAINED == options.model:
            parser.error("--rehearse needs --records and --model of its own")
        device, machine = Simulated(options.seed), Simulated.arch.name
    elif not torch.cuda.is_available():
        print(f"gpu-records: nothing measured: torch {torch.__version__} finds no CUDA device")
        return
    else:
        device = Device(options.libraries)
        machine = device.arch.name
    collect(device, machine, workloads, options)
    print(gpu_records.publish(gpu_records.read(options.records), machine, options.model, options.docs))


if __name__ == "__main__":
    sys.exit(main())
