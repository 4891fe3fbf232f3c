"""The learned cost model: gradient-boosted trees that correct the analytic prediction, chosen for at every compile.

Two stages, each a set of trees. The first sees features in closed form and orders the whole space; the second sees the emitted TIR of the few that lead and picks one.
Both predict log2(time / analytic time), so that what the trees have never seen falls back to what the analytic model says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from ..compiler.errors import UsageError
from . import features
from .cost_model import AnalyticModel, Candidate, CostModel, Machine, ResourceModel

PRETRAINED = Path(__file__).parent / "pretrained"
#: candidates of one kernel whose TIR is looked at
LEADERS = 8
#: microseconds; a kernel that is predicted to take less is chosen by the first stage alone: what the second gains there (0.1 % of its time) is not worth emitting candidates
SMALL_US = 5.0


@dataclass(frozen=True)
class Schema:
    """What a trained model expects: names of the features in their order, the version of their meaning, the families of kernels it was trained on.

    digest: SHA-256 of the trees by stage (or quantity), so that model and schema cannot be mixed up. quantities: of a resource model, which of learned and modelled answers,
    and the held-out errors that decided it.
    """

    version: int
    names: tuple[str, ...]
    families: tuple[str, ...]
    digest: dict[str, str]
    trained_on: dict[str, Any]
    quantities: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Schema:
        """Raises UsageError when the file is no schema."""
        try:
            data = json.loads(path.read_text())
            rest = data["digest"], data["trained_on"], data.get("quantities", {})
            return Schema(data["version"], tuple(data["names"]), tuple(data["families"]), *rest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not the schema of a cost model: {error}") from error

    def check(self, path: Path, version: int = features.VERSION, names: tuple[str, ...] = features.NAMES) -> None:
        """UsageError unless this build computes the very features that the model was trained on."""
        if self.version != version:
            raise UsageError(f"{path}: features of version {self.version}, this tcompile computes version {version}; train the model again")
        if self.names != names:
            differ = sorted(set(self.names) ^ set(names)) or ["their order"]
            raise UsageError(f"{path}: other features than this tcompile computes ({', '.join(differ[:5])}); train the model again")


def family(candidate: Candidate) -> str:
    """Template and kind of arithmetic: what a model must have been trained on to be asked."""
    kind = getattr(candidate.workload, "kind", "f32")
    return candidate.template if kind == "f32" else f"{candidate.template}:{kind}"


class LearnedModel:
    """See the module. Candidates of families that it was not trained on are judged by the analytic model."""

    name = "learned"

    def __init__(self, closed: Any, full: Any, schema: Schema):
        """closed, full: xgboost boosters over CLOSED_NAMES and NAMES."""
        self.closed, self.full, self.schema = closed, full, schema
        self._analytic = AnalyticModel()

    @staticmethod
    def load(folder: Path, target: str = "cpu") -> LearnedModel:
        """The model for a kind of target. Raises UsageError when it is missing, damaged or of another schema."""
        path = folder / f"{target}.json"
        schema = Schema.read(path)
        schema.check(path)
        boosters = []
        for stage in ("closed", "full"):
            file = folder / f"{target}-{stage}.ubj"
            boosters.append(read_booster(file, schema.digest.get(stage, "")))
        return LearnedModel(boosters[0], boosters[1], schema)

    def predict(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        """Latency in microseconds from all features; emits every candidate, where `choose` emits the leaders only."""
        rows = features.matrix([features.row(candidate, machine) for candidate in candidates])
        return self._latency(self.full, rows, candidates, machine)

    def shortlist(self, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        rows = features.matrix([features.closed_row(candidate, machine) for candidate in candidates])
        learned = self._latency(self.closed, rows, candidates, machine)
        known = [family(candidate) in self.schema.families for candidate in candidates]
        return [a if trained else b for a, b, trained in zip(learned, self._analytic.predict(candidates, machine), known, strict=True)]

    def choose(self, candidates: Sequence[Candidate], machine: Machine) -> tuple[Candidate, float]:
        known = [candidate for candidate in candidates if family(candidate) in self.schema.families]
        others = [candidate for candidate in candidates if family(candidate) not in self.schema.families]
        if not known:
            return self._analytic.choose(others, machine)
        best, latency = self._best(known, machine)
        if others:  # one yardstick for both sides: the analytic model's favourites, as it may think little of what the trees prefer
            rival, rival_us = self._analytic.choose(others, machine)
            if rival_us < self._analytic.choose(known, machine)[1]:
                return rival, rival_us
        return best, latency

    def _best(self, candidates: Sequence[Candidate], machine: Machine) -> tuple[Candidate, float]:
        """Among families that the trees know."""
        predicted = self.shortlist(candidates, machine)
        if min(predicted) >= SMALL_US:
            candidates = self._leaders(candidates, predicted, machine)
            predicted = self.predict(candidates, machine)
        index = min(range(len(candidates)), key=predicted.__getitem__)
        return candidates[index], predicted[index]

    def _leaders(self, candidates: Sequence[Candidate], first: Sequence[float], machine: Machine) -> list[Candidate]:
        """The candidates that the first stage, which predicted `first`, puts in front, the analytic model's favourite among them."""
        order = sorted(range(len(candidates)), key=first.__getitem__)[:LEADERS]
        favourite, _ = self._analytic.choose(candidates, machine)
        chosen = [candidates[index] for index in order]
        return chosen if any(candidate is favourite for candidate in chosen) else [*chosen[:-1], favourite]

    def _latency(self, booster: Any, rows: np.ndarray, candidates: Sequence[Candidate], machine: Machine) -> list[float]:
        analytic = np.asarray(self._analytic.predict(candidates, machine))
        return [float(value) for value in analytic * np.exp2(trees(booster, rows).astype(np.float64))]


def trees(booster: Any, rows: np.ndarray) -> np.ndarray:
    """What the trees say to each row, independent of the others."""
    return booster.inplace_predict(rows, validate_features=False)


def read_booster(file: Path, digest: str) -> Any:
    """The trees in a UBJ file. Raises UsageError when it is missing or has another digest."""
    import xgboost

    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; the cost model is part of the package, install it again or train it") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise UsageError(f"{file} does not belong to its schema: its SHA-256 is another one; train the model again")
    booster = xgboost.Booster()
    booster.load_model(bytearray(data))
    booster.set_param({"nthread": 1})
    return booster


@overload
def default_model(target: Literal["cpu"] = "cpu") -> CostModel: ...
@overload
def default_model(target: Literal["cuda", "fpga"]) -> ResourceModel: ...
@cache
def default_model(target: str = "cpu") -> CostModel | ResourceModel:
    """The model shipped with the package: of latency for a CPU, of what a design takes for CUDA and FPGAs."""
    if target == "cpu":
        return LearnedModel.load(PRETRAINED)
    from .resources import LearnedResources

    return LearnedResources.load(PRETRAINED, target)
