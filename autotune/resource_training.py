"""Training of the resource models from the package's points, their evaluation by leaving one workload out, and the choice between learned and modelled; deterministic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .learned import PRETRAINED, trees
from .resources import PARAMETERS, QUANTITIES, ROUNDS, VERSION, Point, matrix
from .training import replace_between

#: "learned" has to be better than "modelled" by more than rounding
LEAST_GAIN = 1e-3


def points_file(kind: str) -> Path:
    return PRETRAINED / f"{kind}-points.jsonl.gz"


def target(points: Sequence[Point], quantity: str) -> np.ndarray:
    """What the trees learn: log2(measured / modelled)."""
    return np.log2([point.measured[quantity] / point.design.modelled[quantity] for point in points])


def train(points: Sequence[Point], quantity: str) -> Any:
    """The trees of one quantity; every workload weighs the same."""
    import xgboost

    names = [point.workload for point in points]
    weights = np.array([len(points) / len(set(names)) / names.count(name) for name in names])
    data = xgboost.DMatrix(matrix(points[0].design.kind, [point.design for point in points]), target(points, quantity), weight=weights)
    return xgboost.train(PARAMETERS, data, num_boost_round=ROUNDS)


def held_out(points: Sequence[Point], quantity: str) -> np.ndarray:
    """log2(predicted / modelled) of every point, by trees that have seen no point of its workload."""
    found = np.zeros(len(points))
    for workload in sorted({point.workload for point in points}):
        inside = np.array([point.workload == workload for point in points])
        booster = train([point for point, held in zip(points, inside, strict=True) if not held], quantity)
        found[inside] = trees(booster, matrix(points[0].design.kind, [point.design for point, held in zip(points, inside, strict=True) if held]))
    return found


def evaluate(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Per quantity: mean, median and largest relative error of learned and modelled, and which of them answers."""
    found = {}
    for quantity in QUANTITIES[points[0].design.kind]:
        truth = target(points, quantity)
        errors = {"modelled": np.abs(np.exp2(-truth) - 1), "learned": np.abs(np.exp2(held_out(points, quantity) - truth) - 1)}
        entry: dict[str, Any] = {
            name: {key: round(float(of(values)), 4) for key, of in (("mean", np.mean), ("median", np.median), ("largest", np.max))}
            for name, values in errors.items()
        }
        better = entry["learned"]["mean"] < entry["modelled"]["mean"] - LEAST_GAIN
        found[quantity] = entry | {"answers": "learned" if better else "modelled"}
    return found


def spills(points: Sequence[Point]) -> tuple[int, dict[str, tuple[int, int]]]:
    """Kernels that spill, and by model (found ones of them, false alarms), when more registers than a thread can have are taken for spills; held out."""
    limits = np.array([point.design.numbers["register_limit"] for point in points])
    modelled = np.array([point.design.modelled["registers"] for point in points])
    truth = np.array([point.measured["stack_bytes"] > 0 for point in points])
    wanted = {"modelled": modelled, "learned": modelled * np.exp2(held_out(points, "registers"))}
    said = {name: values > limits for name, values in wanted.items()}
    return int(truth.sum()), {name: (int((values & truth).sum()), int((values & ~truth).sum())) for name, values in said.items()}


def publish(kind: str, points: Sequence[Point], output: Path, docs: Path | None = None) -> str:
    """Train on everything, write the trees of the quantities that they are better at and the schema into `output`, the evaluation into `docs`; returns it as Markdown."""
    quantities = evaluate(points)
    text = report(kind, points, quantities)
    output.mkdir(parents=True, exist_ok=True)
    digest = {}
    for quantity, found in quantities.items():
        path = output / f"{kind}-{quantity}.ubj"
        path.unlink(missing_ok=True)
        if found["answers"] == "learned":
            data = bytes(train(points, quantity).save_raw("ubj"))
            digest[quantity] = hashlib.sha256(data).hexdigest()
            path.write_bytes(data)
    schema = {
        "version": VERSION,
        "names": list(points[0].design.numbers),
        "families": [kind],
        "digest": digest,
        "trained_on": {"points": len(points), "workloads": len({p.workload for p in points}), "parameters": PARAMETERS | {"rounds": ROUNDS}},
        "quantities": quantities,
    }
    (output / f"{kind}.json").write_text(json.dumps(schema, indent=1) + "\n")
    if docs is not None:
        replace_between(docs, (f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"), text)
    return text


def report(kind: str, points: Sequence[Point], quantities: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation as a Markdown table."""
    lines = [
        f"{len(points)} points, {len({point.workload for point in points})} workloads; each workload predicted by trees that have not seen it.",
        "",
        "| quantity | modelled: mean, median, largest error | learned: mean, median, largest error | answers |",
        "|---|---|---|---|",
    ]
    for quantity, found in quantities.items():
        cells = [", ".join(f"{found[name][key]:.1%}" for key in ("mean", "median", "largest")) for name in ("modelled", "learned")]
        reason = "" if found["answers"] == "learned" else " (learned is no better)"
        lines.append(f"| {quantity} | {cells[0]} | {cells[1]} | {found['answers']}{reason} |")
    if all("stack_bytes" in point.measured for point in points):
        total, by = spills(points)
        said = "; ".join(f"{name} {hit} found, {false} false alarms" for name, (hit, false) in by.items())
        lines += ["", f"{total} of the kernels spill. Predicted to spill (more registers than a thread can have), held out: {said}."]
    return "\n".join([*lines, ""])
