"""The learned resource models: what a design takes on a target where space is as scarce as time, from few points that need no hardware.

CUDA: registers and shared memory of a kernel, as the compiler and its assembler report them. FPGA: cycles, DSP and LUT of a stage, as RTL simulation and synthesis do.
Every quantity has its own trees, which predict log2(measured / modelled) from closed-form features; where they are no better than the target's own formula on held-out
workloads, the schema says so and the formula answers.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.errors import UsageError
from .cost_model import Design
from .learned import PRETRAINED, Schema, read_booster, trees

#: raised whenever the meaning of a feature changes
VERSION = 1
#: quantities that a model predicts, by kind of target
QUANTITIES = {"cuda": ("registers", "shared_bytes"), "fpga": ("cycles", "dsp", "lut")}
#: few points: shallow trees, no subsampling
PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 3,
    "eta": 0.1,
    "min_child_weight": 2,
    "lambda": 1.0,
    "base_score": 0.0,
    "tree_method": "exact",
    "nthread": 1,
    "seed": 0,
}
ROUNDS = 120


@dataclass(frozen=True)
class Point:
    """A design that was compiled or synthesised, and what it took."""

    workload: str
    schedule: str
    design: Design
    measured: Mapping[str, float]


class LearnedResources:
    """See the module; a `ResourceModel`."""

    name = "learned"

    def __init__(self, kind: str, boosters: Mapping[str, Any], schema: Schema):
        """boosters: by quantity; a quantity without is the modelled one."""
        self.kind, self.boosters, self.schema = kind, boosters, schema

    @staticmethod
    def load(folder: Path, kind: str) -> LearnedResources:
        """The model of a kind of target. Raises UsageError when it is missing, damaged or of another version."""
        path = folder / f"{kind}.json"
        schema = Schema.read(path)
        schema.check(path, VERSION, schema.names)  # which names a target computes is known when it asks
        return LearnedResources(
            kind, {quantity: read_booster(folder / f"{kind}-{quantity}.ubj", sha) for quantity, sha in schema.digest.items()}, schema
        )

    def predict(self, designs: Sequence[Design]) -> list[dict[str, float]]:
        """Quantities by name, those of `QUANTITIES`. Raises UsageError when the designs have other features than the model was trained on."""
        for design in designs:
            if design.kind != self.kind:
                raise UsageError(f"a design for {design.kind}, and a resource model of {self.kind}")
            self.schema.check(PRETRAINED / f"{self.kind}.json", VERSION, tuple(design.numbers))
        found = [{quantity: float(design.modelled[quantity]) for quantity in QUANTITIES[self.kind]} for design in designs]
        if designs:
            rows = matrix(self.kind, designs)
            for quantity, booster in self.boosters.items():
                for result, ratio in zip(found, trees(booster, rows), strict=True):
                    result[quantity] *= 2.0 ** float(ratio)
        return found


def matrix(kind: str, designs: Sequence[Design]) -> np.ndarray:
    """[n, features] float32: the designs' numbers, and log2 of the modelled quantities."""
    rows = [[*design.numbers.values(), *(math.log2(design.modelled[quantity]) for quantity in QUANTITIES[kind])] for design in designs]
    return np.asarray(rows, np.float32)


def write_points(path: Path, tools: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """rows: workload, schedule, design and measured of each point. Features are lists in the order of the file's names."""
    first: Design = rows[0]["design"]
    lines = []
    for row in rows:
        design: Design = row["design"]
        if list(design.numbers) != list(first.numbers):
            raise ValueError("points of different features")
        numbers = [float(f"{value:.5g}") for value in design.numbers.values()]
        modelled = {name: float(f"{value:.6g}") for name, value in design.modelled.items()}
        entry = {"workload": row["workload"], "schedule": row["schedule"], "features": numbers, "modelled": modelled, "measured": row["measured"]}
        lines.append(json.dumps(entry))
    head = json.dumps({"kind": first.kind, "version": VERSION, "tools": tools, "names": list(first.numbers)})
    path.write_bytes(gzip.compress(("\n".join([head, *lines]) + "\n").encode(), mtime=0))


def read_points(path: Path) -> list[Point]:
    """The points of a file of `write_points`."""
    head, *rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    if head["version"] != VERSION:
        raise ValueError(f"{path}: recorded with other features than this tcompile computes")
    return [
        Point(
            row["workload"],
            row["schedule"],
            Design(head["kind"], dict(zip(head["names"], row["features"], strict=True)), row["modelled"]),
            row["measured"],
        )
        for row in rows
    ]
