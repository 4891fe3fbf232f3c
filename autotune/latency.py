"""The learned latency model of a GPU architecture: trees that correct the cycles which the templates' formulas predict, where kernels were timed; and the space of schedules, to time them.

Every template predicts the cycles of a schedule and passes them through `corrected`. Without a model of the architecture they come back as they are. With one they are multiplied by
measured / predicted: by trees for families of kernels that trees rank better on held-out workloads, by the family's usual ratio for the others, so that families can be compared.
The same place is where a tool sees what could be chosen (`listing`), and has one of it chosen (`forcing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.errors import UsageError
from .learned import PRETRAINED, Schema, read_booster, trees

#: raised whenever the meaning of a feature changes
VERSION = 1
#: templates whose schedules are predicted, as reports call them (a convolution is the product that it is computed as)
FAMILIES = (
    "gemm", "gemm blocks", "gemm hopper", "gemm hopper blocks", "gemm 2:4", "grouped_gemm", "weight only", "attention", "attention hopper", "depthwise", "weight only hopper",
)  # fmt: skip
#: products by number policy of include/tcompile.cuh
POLICIES = ("Fp32", "Tf32", "Fp16", "Bf16", "U8S8", "Fp16x2", "Bf16x2", "E4m3x4")
#: sizes, as log2: of attention m, k, n are queries, width and keys; of depthwise convolutions outputs, taps and channels
SIZES = ("batch", "m", "k", "n", "blocks", "cycles")
#: the rest as it is; what a template does not have is missing
NUMBERS = ("bits", "policy", "windows", "bm", "bn", "threads", "stages", "parts", "shares", "kept", "waves")
NAMES = ("family", *SIZES, *NUMBERS)


@dataclass(frozen=True)
class Timing:
    """A schedule that could be chosen: its family, its text in the report, what the trees see of it, and the cycles that the formulas predict."""

    family: str
    schedule: str
    row: tuple[float, ...]
    cycles: float


#: (timing -> cycles) in place of a model
_WATCH: ContextVar[Callable[[Timing], float] | None] = ContextVar("latency", default=None)
#: what is not forced is predicted to take so many times as long
_UNWANTED = 1e6


def corrected(target: Any, family: str, schedule: Any, cycles: float, **numbers: float) -> float:
    """The cycles that a schedule takes, from those that its template's formula says. numbers: of SIZES and NUMBERS, sizes not yet as log2."""
    watch, model = _WATCH.get(), latency_model(target.name)
    if (watch is None and model is None) or not cycles < math.inf:
        return cycles
    if numbers.get("blocks"):
        numbers["waves"] = numbers["blocks"] / target.cores
    given = {"family": FAMILIES.index(family), "cycles": cycles, **numbers}
    row = tuple(_feature(name, given.get(name)) for name in NAMES)
    if watch is not None:
        return watch(Timing(family, str(schedule), row, cycles))
    assert model is not None
    return cycles * 2.0 ** model.ratio(family, row)


def _feature(name: str, value: float | None) -> float:
    """As a corpus holds it, too."""
    if value is None:
        return math.nan
    return float(f"{math.log2(max(value, 1e-9)) if name in SIZES else value:.5g}")


@contextmanager
def listing() -> Iterator[dict[tuple[str, str], Timing]]:
    """Collects, by family and text, the schedules that are thought of meanwhile; choices are the formulas'."""
    found: dict[tuple[str, str], Timing] = {}

    def watch(timing: Timing) -> float:
        found.setdefault((timing.family, timing.schedule), timing)
        return timing.cycles

    token = _WATCH.set(watch)
    try:
        yield found
    finally:
        _WATCH.reset(token)


@contextmanager
def forcing(family: str, schedule: str) -> Iterator[None]:
    """This schedule is chosen wherever it may be."""
    token = _WATCH.set(lambda timing: timing.cycles * (1.0 if (timing.family, timing.schedule) == (family, schedule) else _UNWANTED))
    try:
        yield
    finally:
        _WATCH.reset(token)


class LatencyModel:
    """See the module. Its schema's `quantities`: family -> which of "learned" and "modelled" answers, and the usual log2(measured / predicted)."""

    name = "learned"

    def __init__(self, booster: Any, schema: Schema):
        self.booster, self.schema = booster, schema
        self._known = lru_cache(maxsize=1 << 16)(self._trees)

    @staticmethod
    def load(folder: Path, arch: str) -> LatencyModel:
        """Raises UsageError when it is missing, damaged, of another version or of another architecture."""
        path = folder / f"cuda-latency-{arch}.json"
        schema = Schema.read(path)
        schema.check(path, VERSION, NAMES)
        if schema.trained_on.get("machine") != arch:
            raise UsageError(f"{path}: trained on kernels of {schema.trained_on.get('machine')}, not of {arch}")
        return LatencyModel(read_booster(folder / f"cuda-latency-{arch}.ubj", schema.digest.get("latency", "")), schema)

    def ratio(self, family: str, row: tuple[float, ...]) -> float:
        """log2(measured / predicted)."""
        found = self.schema.quantities.get(family)
        if found is None:  # none of its kernels was timed
            return float(self.schema.quantities["all"]["usual"])
        return self._known(row) if found["answers"] == "learned" else float(found["usual"])

    def _trees(self, row: tuple[float, ...]) -> float:
        return float(trees(self.booster, np.asarray([row], np.float32))[0])


@cache
def latency_model(arch: str, folder: Path = PRETRAINED) -> LatencyModel | None:
    """The model of an architecture that the package carries, if it carries one."""
    return LatencyModel.load(folder, arch) if (folder / f"cuda-latency-{arch}.json").exists() else None
