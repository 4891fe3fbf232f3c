"""`python -m tcompile.autotune.corpus`: make the corpus of measured kernels and train the cost model on it.

    build --work DIR      compile a sample of every workload's schedules for this machine (an hour), resuming where it stopped
    measure --work DIR    time what was built, on the same machine, idle (minutes), and put it into the corpus file beside what other machines measured
    train                 train on the corpus file, evaluate by held-out workload, write the model, its schema and docs/cost-model.md's table
    train --target cuda   the same of the model of what kernels take (or fpga), on its points (benchmarks/cuda_points.py, targets/fpga/measure.py)

The package carries the corpus file, so that `train` alone reproduces the model bit for bit.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compiler.tvm import tvm
from ..targets.base import Target
from ..targets.cpu.candidates import compile_kernels
from ..targets.cpu.tasks import Task, with_cores
from ..targets.cpu.template import machine
from . import features, resource_training
from .cost_model import AnalyticModel, Candidate
from .learned import PRETRAINED, family
from .measure import Memory, Operand, contestant, measure, steady
from .resources import QUANTITIES, read_points
from .training import publish, read_corpus

CORPUS = PRETRAINED / "cpu-corpus.jsonl.gz"
THREADS = (1, 2)
#: turns that a schedule has
ROUNDS = 11
#: kernels whose best schedule takes less or more, in microseconds, teach nothing about schedules or take too long to measure
SHORTEST, LONGEST = 1.0, 12000.0
#: templates whose schedules the analytic model picks no worse: 0.966 of the best, trained 0.960 (24 samples held out)
LEFT_OUT = ("attention",)
_ANALYTIC = AnalyticModel()


def sample(candidates: Sequence[Candidate], target: Target, count: int, seed: str) -> list[Candidate]:
    """Schedules to measure: the analytic model's favourites for one core and for all, the best two of every template, the rest at random, most of it from the better third."""
    generator = random.Random(seed)
    ranks = [[_ANALYTIC.latency_us(c.features, machine(with_cores(target, cores))) for c in candidates] for cores in (target.cores, 1)]
    if not SHORTEST <= min(ranks[1]) <= LONGEST:
        return []
    order = sorted(range(len(candidates)), key=ranks[0].__getitem__)
    chosen: dict[int, None] = {}
    for predicted in ranks:
        chosen |= dict.fromkeys(sorted(range(len(candidates)), key=predicted.__getitem__)[: count // 4])
    for template in sorted({candidate.template for candidate in candidates}):
        chosen |= dict.fromkeys([index for index in order if candidates[index].template == template][:2])
    better = order[: max(count, len(order) // 3)]
    rest = generator.sample(better, len(better))[: count * 2] + generator.sample(order, len(order))[: count * 2]
    generator.shuffle(rest)
    for index in rest:
        if len(chosen) >= count:
            break
        if ranks[1][index] < 2 * LONGEST:
            chosen[index] = None
    return [candidates[index] for index in sorted(chosen)]


def machines(host: Target, count: int) -> list[tuple[str, Target, int, int]]:
    """(name, target, schedules of a workload, of every how many workloads) of what this machine measures: its own code and, where that has 512 bits, some for AVX2."""
    if host.vector_bits != 512:
        return [(f"{host.mcpu}-avx2", host, count, 1)]
    narrow = Target.parse("cpu:haswell")
    avx2 = replace(host, name="host-avx2", mcpu=narrow.mcpu, features=host.features & narrow.features, vector_bits=256, vector_registers=16)
    return [(host.mcpu, host, count, 1), (f"{host.mcpu}-avx2", replace(avx2, fma_per_cycle=2.0, disabled=()), count * 3 // 5, 6)]


def build(work: Path, count: int, networks: Sequence[str]) -> None:
    """Compile the samples of all workloads into `work`, one library each."""
    from .corpus_workloads import workloads

    work.mkdir(parents=True, exist_ok=True)
    for name, target, size, every in machines(Target.parse("cpu"), count):
        for number, (network, task) in enumerate(workloads(target, networks)):
            path = work / f"{number:03d}-{name}"
            if number % every or path.with_suffix(".json").exists() or task.candidates[0].template in LEFT_OUT:
                continue
            chosen = sample(task.candidates, task.target, size, task.workload + name)
            if chosen:
                kernels = {f"k{index}": candidate.kernel for index, candidate in enumerate(chosen)}
                compile_kernels(kernels, task.target).export_library(f"{path}.so")
                path.with_suffix(".json").write_text(json.dumps(_record(network, task, name, chosen)))
                print(f"{number} {network} {task.candidates[0].workload} {name}: {len(chosen)}", flush=True)


def _record(network: str, task: Task, name: str, chosen: Sequence[Candidate]) -> dict[str, Any]:
    kernels = []
    for candidate in chosen:
        tir = features.tir_row(candidate.kernel.func)
        shapes = {packing.param: packing.shape for packing in candidate.kernel.packings}
        machines = {str(threads): machine(with_cores(task.target, threads)) for threads in THREADS}
        operands = [(list(shapes.get(index, entry.shape)), entry.dtype, entry.constant) for index, entry in enumerate(task.operands)]
        kernels.append(
            {
                "family": family(candidate),
                "schedule": str(candidate.schedule),
                "analytic_us": {threads: _digits(_ANALYTIC.latency_us(candidate.features, rates)) for threads, rates in machines.items()},
                "rows": {threads: [_digits(x) for x in [*features.closed_row(candidate, rates), *tir]] for threads, rates in machines.items()},
                "operands": operands,
            }
        )
    return {"workload": str(task.candidates[0].workload), "network": network, "machine": name, "kernels": kernels}


def _digits(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")


def measure_all(work: Path, seconds: float, output: Path) -> None:
    """Time every library in `work` that was not timed yet, as long as there are seconds left, and write the corpus of all that was."""
    start = time.monotonic()
    memory = Memory()
    for record in sorted(work.glob("*.json")):
        timed = record.with_suffix(".times")
        if timed.exists() or time.monotonic() - start > seconds:
            continue
        entries = _contestants(record.with_suffix(".so"), json.loads(record.read_text()), memory)
        times = {threads: measure(entries, threads=threads, rounds=ROUNDS) for threads in reversed(THREADS)}
        timed.write_text(
            json.dumps(
                {threads: [(m.median_us, m.min_us, us) for m, us in zip(found, steady(found), strict=True)] for threads, found in times.items()}
            )
        )
    _write(work, output)


def _contestants(library: Path, record: dict[str, Any], memory: Memory) -> list[Any]:
    module = tvm.runtime.load_module(str(library))
    operands = [[Operand(tuple(shape), dtype, constant) for shape, dtype, constant in kernel["operands"]] for kernel in record["kernels"]]
    return [contestant(module[f"k{index}"], entries, memory) for index, entries in enumerate(operands)]


def _write(work: Path, output: Path) -> None:
    """The corpus: a header with the schema, then one line per workload and machine. Records of other machines stay."""
    lines = [json.dumps({"version": features.VERSION, "names": features.NAMES}, separators=(",", ":"))]
    found = sorted(work.glob("*.times"))
    measured = {json.loads(timed.with_suffix(".json").read_text())["machine"] for timed in found}
    if output.exists():
        header, *others = gzip.decompress(output.read_bytes()).decode().splitlines()
        if header != lines[0]:
            raise SystemExit(f"{output} has other features than this version of the package")
        lines += [line for line in others if json.loads(line)["machine"] not in measured]
    for timed in found:
        record, times = json.loads(timed.with_suffix(".json").read_text()), json.loads(timed.read_text())
        for index, kernel in enumerate(record["kernels"]):
            del kernel["operands"]
            kernel["us"] = {threads: [_digits(value) for value in entries[index]] for threads, entries in times.items()}
        lines.append(json.dumps(record, separators=(",", ":")))
    with output.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        file.write("\n".join(lines).encode() + b"\n")
    print(f"{output}: {len(lines) - 1} records")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tcompile.autotune.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("build", help="compile samples of all workloads")
    one.add_argument("--schedules", type=int, default=20, help="per workload")
    one.add_argument("--networks", default="", help="comma-separated names of models/; default: all")
    two = verbs.add_parser("measure", help="time what was built; the machine should be idle")
    two.add_argument("--seconds", type=float, default=600.0, help="stop after this long; run again to go on")
    for verb in (one, two):
        verb.add_argument("--work", type=Path, required=True, help="folder for the libraries")
    three = verbs.add_parser("train", help="train, evaluate, write model and table")
    three.add_argument("--target", choices=("cpu", *QUANTITIES), default="cpu", help="kind of target")
    three.add_argument("--output", type=Path, default=PRETRAINED, help="folder of the model")
    three.add_argument("--docs", type=Path, help="Markdown page whose table is replaced")
    for verb in (two, three):
        verb.add_argument("--corpus", type=Path, default=CORPUS, help="corpus file")
    given = parser.parse_args(argv)
    if given.verb == "build":
        from ..models.zoo import ZOO

        build(given.work, given.schedules, given.networks.split(",") if given.networks else tuple(ZOO))
    elif given.verb == "measure":
        measure_all(given.work, given.seconds, given.corpus)
    elif given.target == "cpu":
        print(publish(read_corpus(given.corpus), given.output, given.docs))
    else:
        print(resource_training.publish(given.target, read_points(resource_training.points_file(given.target)), given.output, given.docs))


if __name__ == "__main__":
    sys.exit(main())
