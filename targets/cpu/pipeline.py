"""Lowering for the CPU, top to bottom: guards, legalization, fusion, kernels, weights, memory, machine code."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...autotune.cost_model import AnalyticModel, CostModel
from ...autotune.database import Database
from ...autotune.learned import default_model
from ...autotune.tuner import TunedModel
from ...compiler.feeds import random_feeds
from ...compiler.progress import stage
from ...compiler.roofline import layers
from ...compiler.tvm import relax, tirx
from ...passes.denormals import FlushDenormals
from ...passes.factors import MergeFactors
from ...passes.fusion import FuseEpilogues
from ...passes.memory import PlanMemory
from ...passes.shortcuts import ShortShortcuts
from ...passes.siblings import MergeSiblings
from ..common import legalize as definitions
from ..common.float8 import held
from . import build as cpu_build
from . import determinant, ops_attention_codes, ops_attention_int8, ops_gelu, recurrent, selection
from . import guards as cpu_guards
from . import lower as cpu_lower
from .host import host_features
from .lower import PACKED
from .ops_attention import OWN, ReadInPlace
from .profile import profile
from .running import Running
from .work import add_work

if TYPE_CHECKING:
    from ...compiler.lowered import Lowered
    from ...compiler.program import Program
    from ...compiler.steps import Steps
    from ...passes.base import PassContext
    from ..base import Target


def lower(steps: Steps) -> Lowered:
    """From a graph of Relax operators to an executable. Raises UnsupportedModel when an operator has no lowering."""
    graph = fuse(steps)
    choices: list[cpu_lower.Choice] = []

    def kernels(current: Program, context: PassContext) -> Program:
        module, found = cpu_lower.schedule_kernels(current.module, steps.target, cost_model(steps))
        choices.extend(found)
        for choice in found:
            context.matched(**{choice.template: 1})
        return current.with_module(module)

    steps.step("kernels", kernels)
    scheduled, weights = steps.program, {}

    def lift(current: Program, context: PassContext) -> Program:
        module, arrays = cpu_build.lift_weights(current.module)
        weights.update(arrays)
        context.matched(weights=len(arrays))
        return current.with_module(module)

    steps.step("lift_weights", lift)
    (memory,) = steps.step("plan_memory", PlanMemory().run).tables["memory"]
    with stage("code generation") as generation:
        executable, sources = cpu_build.build(steps.program.module, steps.target, steps.program.origins)
    rows = [asdict(choice) for choice in choices]
    if steps.options.profile:
        _measure(steps, weights, rows, graph, scheduled)
    report = {
        "kernels": rows,
        "memory": memory,
        "weights_bytes": sum(array.nbytes for array in weights.values()),
        "code_generation": {"seconds": round(generation.seconds, 3)},
    }
    return steps.lowered(report=report, weights=weights, sources=sources, executable=executable)


def cost_model(steps: Steps) -> CostModel:
    """What chooses among candidates: the learned model, behind the winners of a tuning database where one was given; the analytic one where it has to be quick."""
    model, path = AnalyticModel() if steps.options.quick else default_model("cpu"), steps.options.tuning_db
    if path is None:
        return model
    from .tasks import hardware

    return TunedModel(Database(path, create=False), model, hardware=hardware(steps.target), threads=steps.target.cores)


def fuse(steps: Steps) -> Program:
    """Up to the module in which every kernel is one function that still has its choice of templates and schedules. Returns the graph of Relax operators that the kernels compute."""
    steps.step("flush_denormals", FlushDenormals().run)
    steps.step("merge_factors", MergeFactors().run)
    steps.step("merge_siblings", MergeSiblings().run)
    steps.step("short_shortcuts", ShortShortcuts().run)
    graph = steps.program
    steps.step("guard", cpu_guards.guard)
    steps.step("legalize", lambda p, _: p.with_module(_legalize(p, steps.target)))
    steps.step("fuse_epilogues", FuseEpilogues().run)
    return graph


def _measure(steps: Steps, weights: dict[str, Any], rows: list[dict[str, Any]], graph: Program, scheduled: Program) -> None:
    """Put the measured time and the work of every kernel into its row, where this machine can run the code."""
    if steps.target.features - host_features():
        return
    program, calls = steps.program, steps.accuracy.calibration if steps.accuracy is not None else ()
    feeds = calls[0] if calls else random_feeds(program.inputs, program.dims, seed=steps.options.seed)
    names = {
        variable.name_hint: variable.name_hint.removesuffix(PACKED)
        for variable, func in program.module.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    with stage("profiling"):
        spent = profile(program.module, steps.target, [feeds[spec.name] for spec in program.inputs], weights, frozenset(names))
    measured = {names[name]: time for name, time in spent.items()}
    for row in rows:
        row["measured_us"] = round(measured.get(row["kernel"], 0.0), 2)
    with stage("measuring the machine's peak rates"):
        sizes = {dim: size for spec in program.inputs for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True) if isinstance(dim, str)}
        add_work(rows, layers(replace(graph, origins={}), steps.target, sizes), scheduled, steps.target.cores, sizes)


def _legalize(program: Program, target: Target) -> Any:
    module = Running(relax.transform.DecomposeOpsForInference()(held(program.module, "bfloat16"))).apply()
    module = ReadInPlace(relax.backend.DispatchSortScan()(module)).apply()
    module = definitions.legalize(
        module,
        {**OWN, **ops_attention_codes.OWN, **ops_attention_int8.OWN, **selection.OWN, **determinant.OWN, **ops_gelu.OWN, **recurrent.own(target)},
    )
    return relax.transform.DeadCodeElimination()(relax.transform.EliminateCommonSubexpr()(module))
