"""Records of kernels that were timed on GPUs, in the package's file, and the latency models that are trained on them; deterministic.

The file is a corpus like the CPU's (training.py): a header with version and names of the features, then a line per workload and visit: workload, network, machine (the architecture), "run" (GPU, clocks, driver,
versions, date, seed) and its kernels, each with family, schedule, predicted microseconds, features, and measured ones (median, fastest round; "1" is the number of threads that a CPU's have).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.errors import UsageError
from .latency import NAMES, VERSION, Timing
from .learned import PRETRAINED, trees
from .training import Sample, folds, geometric_mean, read_corpus, replace_between, train

RECORDS = PRETRAINED / "cuda-records.jsonl.gz"
#: fewer workloads than a CPU's corpus has: shallower trees, fewer of them
PARAMETERS = {"max_depth": 4, "min_child_weight": 1, "colsample_bytree": 0.8}
ROUNDS = 300
#: trees answer for a family when what they pick is faster by more than this, or as fast and their times are closer
LEAST_GAIN = 1e-3
#: and it was timed on so many workloads
LEAST_SAMPLES = 5
_HEADER = {"version": VERSION, "names": list(NAMES)}


def record(
    workload: str, network: str, machine: str, ghz: float, run: Mapping[str, Any], timed: Sequence[tuple[Timing, float, float]]
) -> dict[str, Any]:
    """timed: (schedule, median, least microseconds). ghz: the clock that predicted cycles are counted at."""
    kernels = [
        {
            "family": timing.family,
            "schedule": timing.schedule,
            "analytic_us": {"1": float(f"{timing.cycles / ghz / 1e3:.5g}")},
            "rows": {"1": [None if value != value else value for value in timing.row]},
            "us": {"1": [float(f"{value:.5g}") for value in (median, least)]},
        }
        for timing, median, least in timed
    ]
    return {"workload": workload, "network": network, "machine": machine, "run": dict(run), "kernels": kernels}


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> int:
    """Put records behind those that the file has, which is made where there is none; returns how many it has then. Raises UsageError when it is of other features."""
    lines = [json.dumps(_HEADER, separators=(",", ":"))]
    if path.exists():
        read(path)
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines += [json.dumps(each, separators=(",", ":")) for each in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    return len(lines) - 1


def read(path: Path) -> list[Sample]:
    """A sample per record. Raises UsageError for a file that is none, or of other features."""
    try:
        return read_corpus(path, VERSION, NAMES)
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path} has no records of GPUs: {error}") from error


def _of_family(sample: Sample, family: str) -> Sample | None:
    """The part of a sample that one family has."""
    inside = [index for index, name in enumerate(sample.templates) if name == family]
    if not inside:
        return None
    schedules = tuple(sample.schedules[index] for index in inside)
    return replace(
        sample,
        templates=(family,) * len(inside),
        schedules=schedules,
        rows=sample.rows[inside],
        analytic_us=sample.analytic_us[inside],
        measured_us=sample.measured_us[inside],
    )


def _fit(samples: Sequence[Sample]) -> Any:
    return train(samples, len(NAMES), rounds=ROUNDS, parameters=PARAMETERS)


def _judged(held: Sequence[tuple[Sample, np.ndarray]]) -> dict[str, Any]:
    """Held-out samples with what trees say of each schedule -> the share of the best speed that either way to choose reaches, its median error, and which answers."""
    reached: dict[str, list[float]] = {"modelled": [], "learned": []}
    errors: dict[str, list[float]] = {"modelled": [], "learned": []}
    usual = float(np.median(np.concatenate([sample.target for sample, _ in held])))
    for sample, ratio in held:
        for name, says in (("modelled", np.full(len(ratio), usual)), ("learned", ratio)):
            predicted = sample.analytic_us * np.exp2(says)
            reached[name].append(float(sample.measured_us.min() / sample.measured_us[int(np.argmin(predicted))]))
            errors[name] += list(np.abs(predicted / sample.measured_us - 1))
    found = {name: {"reached": round(geometric_mean(reached[name]), 4), "error": round(float(np.median(errors[name])), 4)} for name in reached}
    gain = found["learned"]["reached"] - found["modelled"]["reached"]
    better = gain > LEAST_GAIN or (abs(gain) <= LEAST_GAIN and found["learned"]["error"] < found["modelled"]["error"] - LEAST_GAIN)
    return {**found, "samples": len(held), "usual": round(usual, 4), "answers": "learned" if better and len(held) >= LEAST_SAMPLES else "modelled"}


def evaluate(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Per family and for all: see `_judged`, every workload by trees that have not seen it."""
    held: dict[str, list[tuple[Sample, np.ndarray]]] = {}
    for training, out in folds(samples):
        if not out or not training:
            continue
        booster = _fit(training)
        for sample in out:
            for family in ("all", *sorted(set(sample.templates))):
                part = sample if family == "all" else _of_family(sample, family)
                assert part is not None
                held.setdefault(family, []).append((part, trees(booster, part.rows)))
    return {family: _judged(parts) for family, parts in sorted(held.items())}


def publish(samples: Sequence[Sample], arch: str, output: Path = PRETRAINED, docs: Path | None = None) -> str:
    """Train on an architecture's samples; write trees and schema into `output` and the evaluation into `docs`; returns it as Markdown. Raises UsageError for too few workloads."""
    own = [sample for sample in samples if sample.machine == arch]
    workloads = {sample.workload for sample in own}
    if len(workloads) < 8:
        raise UsageError(f"{len(workloads)} workloads were timed on {arch}; a model takes 8 at least")
    quantities = evaluate(own)
    data = bytes(_fit(own).save_raw("ubj"))
    text = report(arch, own, quantities)
    schema = {
        "version": VERSION,
        "names": NAMES,
        "families": sorted(set(quantities) - {"all"}),
        "digest": {"latency": hashlib.sha256(data).hexdigest()},
        "trained_on": {
            "machine": arch,
            "points": sum(len(sample.rows) for sample in own),
            "workloads": len(workloads),
            "parameters": PARAMETERS | {"rounds": ROUNDS},
        },
        "quantities": quantities,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / f"cuda-latency-{arch}.ubj").write_bytes(data)
    (output / f"cuda-latency-{arch}.json").write_text(json.dumps(schema, indent=1) + "\n")
    if docs is not None:
        replace_between(docs, ("<!-- cuda latency: begin -->", "<!-- cuda latency: end -->"), text)
    return text


def report(arch: str, samples: Sequence[Sample], quantities: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation as a Markdown table."""
    lines = [
        f"{arch}: {sum(len(sample.rows) for sample in samples)} points, {len({sample.workload for sample in samples})} workloads; each workload predicted by trees that have not seen it.",
        "",
        "| family | samples | analytic: share of the best speed, median error | learned | answers |",
        "|---|---|---|---|---|",
    ]
    for family, found in quantities.items():
        cells = [f"{found[name]['reached']:.3f}, {found[name]['error']:.0%}" for name in ("modelled", "learned")]
        lines.append(f"| {family} | {found['samples']} | {cells[0]} | {cells[1]} | {found['answers']} |")
    return "\n".join([*lines, ""])
