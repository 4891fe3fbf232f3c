"""Training and evaluation of the learned cost model on a corpus of measured kernels; deterministic: the same corpus gives the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import features
from .learned import LEADERS, trees

FOLDS = 8
SEED = 0
#: few and shallow trees on all columns: on held-out workloads deeper ones remember sizes
PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 5,
    "eta": 0.05,
    "min_child_weight": 4,
    "subsample": 0.7,
    "colsample_bytree": 0.5,
    "lambda": 2.0,
    "tree_method": "hist",
    "max_bin": 128,
    "nthread": 1,
    "seed": SEED,
}
ROUNDS = 600


@dataclass(frozen=True)
class Sample:
    """The schedules measured for one workload on one machine with one number of threads.

    rows: [n, features]; analytic_us, measured_us: [n]; templates: name of each schedule's family.
    """

    workload: str
    network: str
    machine: str
    threads: int
    templates: tuple[str, ...]
    schedules: tuple[str, ...]
    rows: np.ndarray
    analytic_us: np.ndarray
    measured_us: np.ndarray

    @property
    def target(self) -> np.ndarray:
        """What the trees learn: log2(measured / analytic)."""
        return np.log2(self.measured_us / self.analytic_us)


def read_corpus(path: Path, version: int = features.VERSION, names: Sequence[str] = features.NAMES) -> list[Sample]:
    """The samples of a corpus file of these features. Of a schedule's times the last one counts: `measure.steady`, or where a machine's speed was not expected to change, that of its fastest round:
    other work makes rounds slower, never faster."""
    with gzip.open(path, "rt") as file:
        header, *records = [json.loads(line) for line in file]
    if tuple(header["names"]) != tuple(names):
        raise ValueError(f"{path}: recorded with other features than this tcompile computes")
    if header["version"] != version:
        raise ValueError(f"{path}: features of version {header['version']}, this tcompile computes version {version}")
    samples = []
    for record in records:
        for threads in record["kernels"][0]["us"]:
            kernels = record["kernels"]
            samples.append(
                Sample(
                    record["workload"],
                    record["network"],
                    record["machine"],
                    int(threads),
                    tuple(kernel["family"] for kernel in kernels),
                    tuple(kernel["schedule"] for kernel in kernels),
                    features.matrix([[math.nan if x is None else x for x in kernel["rows"][threads]] for kernel in kernels]),
                    np.array([kernel["analytic_us"][threads] for kernel in kernels]),
                    np.array([kernel["us"][threads][-1] for kernel in kernels]),
                )
            )
    return samples


def train(samples: Sequence[Sample], columns: int, *, rounds: int = ROUNDS, parameters: dict[str, Any] | None = None) -> Any:
    """Trees over the first `columns` features. Every workload weighs the same, however many schedules it was measured with; among its schedules the fast ones weigh more."""
    import xgboost

    rows = np.concatenate([sample.rows[:, :columns] for sample in samples])
    weights = np.concatenate([16.0 / len(sample.rows) * sample.measured_us.min() / sample.measured_us for sample in samples])
    data = xgboost.DMatrix(rows, np.concatenate([sample.target for sample in samples]), weight=weights)
    return xgboost.train({**PARAMETERS, **(parameters or {})}, data, num_boost_round=rounds)


def folds(samples: Sequence[Sample], count: int = FOLDS) -> list[tuple[list[Sample], list[Sample]]]:
    """(train, held out) by workload: all samples of a workload are on the same side. Which fold a workload falls into is a matter of its name."""

    def fold(sample: Sample) -> int:
        return int.from_bytes(hashlib.sha256(sample.workload.encode()).digest()[:4], "big") % count

    return [([s for s in samples if fold(s) != index], [s for s in samples if fold(s) == index]) for index in range(count)]


@dataclass(frozen=True)
class Picks:
    """The share of the best measured speed that each way to choose reaches on one sample."""

    sample: Sample
    reached: dict[str, float]
    error: dict[str, float]


def evaluate(samples: Sequence[Sample]) -> list[Picks]:
    """Cross-validation by workload of the analytic model, of each stage, and of the two stages together as compilations use them."""
    found = []
    closed_count = len(features.CLOSED_NAMES)
    for training, held in folds(samples):
        if not held:
            continue
        closed, full = train(training, closed_count), train(training, len(features.NAMES))
        for sample in held:
            analytic = np.log2(sample.analytic_us)
            first = analytic + trees(closed, sample.rows[:, :closed_count])
            second = analytic + trees(full, sample.rows)
            leaders = np.argsort(first, kind="stable")[:LEADERS]
            if int(np.argmin(analytic)) not in leaders:
                leaders = np.append(leaders[:-1], np.argmin(analytic))
            picks = {"analytic": int(np.argmin(analytic)), "closed form": int(np.argmin(first)), "TIR": int(np.argmin(second))}
            picks["learned"] = int(leaders[np.argmin(second[leaders])])
            best = sample.measured_us.min()
            truth = np.log2(sample.measured_us)
            errors = {"analytic": analytic - truth, "closed form": first - truth, "TIR": second - truth}
            found.append(
                Picks(
                    sample,
                    {name: float(best / sample.measured_us[index]) for name, index in picks.items()},
                    {name: float(np.median(np.abs(np.exp2(error) - 1.0))) for name, error in errors.items()},
                )
            )
    return found


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(float(np.mean([math.log(value) for value in values])))


def table(picks: Sequence[Picks], key: Callable[[Picks], str]) -> list[tuple[str, int, dict[str, float]]]:
    """Per group: how many samples, and the geometric mean of what each way reaches."""
    groups: dict[str, list[Picks]] = {}
    for pick in picks:
        groups.setdefault(key(pick), []).append(pick)
    names = picks[0].reached
    return [
        (group, len(members), {name: geometric_mean(m.reached[name] for m in members) for name in names}) for group, members in sorted(groups.items())
    ]


MARKERS = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def publish(samples: Sequence[Sample], output: Path, docs: Path | None = None) -> str:
    """Train on everything, write the trees and their schema into `output`, the evaluation into `docs`; returns the evaluation as Markdown."""
    text = report(samples, evaluate(samples))
    output.mkdir(parents=True, exist_ok=True)
    digest = {}
    for stage, columns in (("closed", len(features.CLOSED_NAMES)), ("full", len(features.NAMES))):
        data = bytes(train(samples, columns).save_raw("ubj"))
        digest[stage] = hashlib.sha256(data).hexdigest()
        (output / f"cpu-{stage}.ubj").write_bytes(data)
    schema = {
        "version": features.VERSION,
        "names": features.NAMES,
        "families": sorted({family for sample in samples for family in sample.templates}),
        "digest": digest,
        "trained_on": {
            "points": sum(len(sample.rows) for sample in samples),
            "kernels": len({(s.workload, s.machine, schedule) for s in samples for schedule in s.schedules}),
            "workloads": len({sample.workload for sample in samples}),
            "parameters": PARAMETERS | {"rounds": ROUNDS},
        },
    }
    (output / "cpu.json").write_text(json.dumps(schema, indent=1) + "\n")
    if docs is not None:
        replace_between(docs, MARKERS, text)
    return text


def replace_between(page: Path, markers: tuple[str, str], text: str) -> None:
    """Put `text` between two lines of a page."""
    before, _, rest = page.read_text().partition(markers[0])
    _, _, after = rest.partition(markers[1])
    page.write_text(f"{before}{markers[0]}\n{text}{markers[1]}{after}")


def report(samples: Sequence[Sample], picks: Sequence[Picks]) -> str:
    """The evaluation as a Markdown table."""
    points = sum(len(sample.rows) for sample in samples)
    names = {"analytic": "analytic", "closed form": "closed form only", "TIR": "TIR features, all candidates", "learned": "learned, as used"}
    lines = [
        f"{points} points: {len({s.workload for s in samples})} workloads, {len(samples)} combinations of workload, machine and threads; "
        f"{FOLDS}-fold cross-validation by workload.",
        "",
        f"| held-out workloads | samples | {' | '.join(names.values())} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    groups: list[tuple[str, Callable[[Picks], str]]] = [
        ("all", lambda _: "**all**"),
        ("threads", lambda p: f"{p.sample.threads} thread{'s' * (p.sample.threads > 1)}, {'AVX2' if 'avx2' in p.sample.machine else 'AVX-512'}"),
        ("templates", lambda p: " or ".join(sorted(set(p.sample.templates)))),
    ]
    for _, key in groups:
        for group, count, reached in table(picks, key):
            lines.append(f"| {group} | {count} | " + " | ".join(f"{reached[name]:.3f}" for name in names) + " |")
    errors = {name: float(np.median([pick.error[name] for pick in picks])) for name in picks[0].error}
    lines += ["", "Median error of the predicted time: " + ", ".join(f"{names[name]} {value:.0%}" for name, value in errors.items()) + "."]
    worst = sorted(picks, key=lambda pick: pick.reached["learned"])[:3]
    listed = (f"{p.sample.workload}, {p.sample.threads} thread{'s' * (p.sample.threads > 1)}: {p.reached['learned']:.2f}" for p in worst)
    lines += ["", "Worst: " + "; ".join(listed) + ".", ""]
    return "\n".join(lines)
