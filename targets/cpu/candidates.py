"""Every way that the templates offer to compute one fused PrimFunc, and machine code for trying some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...autotune.cost_model import Candidate
from ...compiler.tvm import tvm
from ..base import Target
from ..common.fused import Fused, Unfusable
from .template import Kernel, KernelTemplate


@dataclass(frozen=True)
class Offers:
    """candidates: all schedules of all templates that take the function; reasons: why the others do not."""

    candidates: list[Candidate]
    reasons: list[str]


def offers(fused: Fused, constants: frozenset[int], templates: Sequence[KernelTemplate], target: Target) -> Offers:
    """What the templates offer for a fused function; constants: positions of its parameters that are constant at every call site."""
    found, reasons = [], []
    for template in templates:
        try:
            workload = template.workload(fused, constants)
            found += [_candidate(template, fused, workload, schedule, target) for schedule in template.space(workload, target)]
        except Unfusable as reason:
            reasons.append(f"{template.name}: {reason}")
    return Offers(found, reasons)


def _candidate(template: KernelTemplate, fused: Fused, workload: Any, schedule: Any, target: Target) -> Candidate:
    emit = partial(template.build, fused, workload, schedule, target)
    return Candidate(template.name, workload, schedule, template.features(workload, schedule, target), emit)


def compile_kernels(kernels: Mapping[str, Kernel], target: Target) -> Any:
    """Machine code of several kernels in one module: `compiled[name](*tensors)`; `compiled.export_library(path)` links it."""
    from .lower import code_generation, tvm_target
    from .math_lowering import TIR_PIPELINE

    module = tvm.IRModule({name: kernel.func.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    with code_generation():
        return tvm.compile(module, target=tvm_target(target), tir_pipeline=TIR_PIPELINE)
