"""The row of numbers that a learned model sees for one candidate, in groups, each with a fixed list of names: the schema.

analytic.*   the template's closed-form features and the analytic prediction (log2 of cycles, bytes, microseconds; ratios)
schedule.*   the schedule's own numbers, by the names the templates give them
workload.*   sizes of what is computed
machine.*    the target manifest
tir.*        what the emitted loop nest executes, see tir_features
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from . import tir_features
from .cost_model import AnalyticModel, Candidate, KernelFeatures, Machine

#: raised whenever the meaning of a feature changes, so that a model trained on the old meaning is refused
VERSION = 1
MISSING = float("nan")

_CLOSED = tuple(entry.name for entry in fields(KernelFeatures))
_RATIOS = ("us", "load_share", "latency_share", "memory_share", "useful_share", "balance", "flops_per_byte")
#: what the templates call the numbers of their schedules; one that a template lacks is missing
_SCHEDULE = ("mr", "nv", "lanes", "mc", "pixels", "rows", "channels_outer", "m", "strip", "shared")
_WORKLOAD = ("rows", "columns", "depth", "batch", "taps", "stride", "padded", "groups", "packed", "epilogue")
_MACHINE = ("cores", "vector_bits", "vector_registers", "fma_per_cycle", "frequency_ghz", "dram_gbs", "l1_bytes", "l2_bytes")
#: counts are compared per multiply-add and in absolute terms
_PER_WORK = (
    "arithmetic",
    "selects",
    "transcendentals",
    "vector_loads",
    "scalar_loads",
    "vector_stores",
    "scalar_stores",
    "loop_steps",
    "loop_entries",
    "branches",
)

CLOSED_NAMES = (
    *(f"analytic.{name}" for name in (*_CLOSED, *_RATIOS)),
    *(f"schedule.{name}" for name in _SCHEDULE),
    *(f"workload.{name}" for name in _WORKLOAD),
    *(f"machine.{name}" for name in _MACHINE),
)
TIR_NAMES = (*(f"tir.{name}" for name in tir_features.NAMES), *(f"tir.{name}_per_multiply_add" for name in _PER_WORK))
NAMES = (*CLOSED_NAMES, *TIR_NAMES)

_ANALYTIC = AnalyticModel()


def closed_row(candidate: Candidate, machine: Machine) -> list[float]:
    """The features that need no TIR, in the order of CLOSED_NAMES."""
    features = candidate.features
    us = max(_ANALYTIC.latency_us(features, machine), 1e-3)
    cycles = us * machine.frequency_ghz * 1e3 * machine.cores
    memory = features.l2_bytes / machine.l2_bytes_per_cycle + features.l3_bytes / machine.l3_bytes_per_cycle
    memory += features.dram_bytes / machine.dram_gbs * machine.frequency_ghz
    fma = max(features.fma_cycles, 1e-3)
    rounds = -(-features.tasks // machine.cores)
    width = machine.vector_bits / 32 * 2 * machine.fma_per_cycle
    ratios = (
        math.log2(us),
        features.load_cycles / fma,
        features.latency_cycles / fma,
        memory / cycles,
        features.flops / width / fma,
        features.tasks / (rounds * machine.cores),
        features.flops / max(1.0, features.l2_bytes + features.l3_bytes + features.dram_bytes),
    )
    return [
        *(math.log2(1.0 + max(0.0, float(getattr(features, name)))) for name in _CLOSED),
        *ratios,
        *(_number(getattr(candidate.schedule, name, None)) for name in _SCHEDULE),
        *workload_row(candidate.workload),
        *(float(getattr(machine, name)) for name in _MACHINE),
    ]


def tir_row(func: Any) -> list[float]:
    """The features of an emitted PrimFunc, in the order of TIR_NAMES."""
    found = tir_features.tir_features(func)
    work = max(found.multiply_adds, 1.0)
    return [*tir_features.values(found), *(getattr(found, name) / work for name in _PER_WORK)]


def row(candidate: Candidate, machine: Machine) -> list[float]:
    """All features of a candidate, in the order of NAMES; emits its kernel."""
    return [*closed_row(candidate, machine), *tir_row(candidate.kernel.func)]


def matrix(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """[n, features] float32."""
    return np.asarray(rows, np.float32).reshape(len(rows), -1)


def workload_row(workload: Any) -> list[float]:
    """Sizes by the names that GEMM and convolution workloads give them, as log2; a workload of another kind has what it has."""
    if not is_dataclass(workload):
        return [MISSING] * len(_WORKLOAD)

    def get(name: str, default: Any = None) -> Any:
        return getattr(workload, name, default)

    if hasattr(workload, "kh"):
        n, height, width = workload.sizes()
        taps, depth = workload.kh * workload.kw, workload.kh * workload.kw * workload.ci_group
        rows, columns, batch = n * height * width, workload.co, 1
    else:
        taps, depth, rows, columns, batch = 1, get("k"), get("m"), get("n"), get("batch", 1)
    strides, padding = get("strides", (1, 1)), get("padding", (0, 0, 0, 0))
    sizes = [_log(size) for size in (rows, columns, depth, batch)]
    extra = [float(taps), float(strides[0] * strides[1]), float(any(padding)), _log(get("groups", 1)), _number(get("packed", True))]
    return [*sizes, *extra, float(len(str(get("epilogue", ""))))]


def _log(size: Any) -> float:
    return math.log2(1.0 + float(size)) if isinstance(size, int) else MISSING


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (bool, int, float)) else MISSING
