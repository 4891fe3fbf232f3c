"""The pipeline, top to bottom: graph passes, legalization, fusion, kernels, weights, memory, machine code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..autotune.cost_model import AnalyticModel
from ..passes.base import PassContext, PassReport
from ..passes.fusion import FuseEpilogues
from ..passes.memory import PlanMemory
from ..targets.base import Target
from ..targets.cpu import build as cpu_build
from ..targets.cpu import guards as cpu_guards
from ..targets.cpu import legalize as cpu_legalize
from ..targets.cpu import lower as cpu_lower
from .lowered import Lowered
from .options import CompileOptions
from .program import Program
from .progress import stage
from .recipe import Recipe
from .tvm import relax


class _Run:
    """One run: the program as it stands, the reports so far, and the dump directory."""

    def __init__(self, program: Program, target: Target, options: CompileOptions):
        self.program, self.target, self.options = program, target, options
        self.reports: list[PassReport] = []
        if options.dump_ir is not None:
            options.dump_ir.mkdir(parents=True, exist_ok=True)
        self._dump("imported")

    def step(self, name: str, work: Callable[[Program, PassContext], Program]) -> None:
        """Run one step, time it, report it, dump what it left."""
        context = PassContext(self.target, self.options.seed, PassReport(name))
        with stage(name) as current, cpu_lower.tvm_target(self.target):
            self.program = work(self.program, context)
        context.report.seconds = current.seconds
        self.reports.append(context.report)
        self._dump(name)

    def _dump(self, name: str) -> None:
        if self.options.dump_ir is not None:
            path = Path(self.options.dump_ir) / f"{len(self.reports):02d}_{name}.py"
            path.write_text(self.program.module.script(show_meta=False) + "\n")


def lower(program: Program, target: Target, options: CompileOptions) -> Lowered:
    """Lower a program for a target.

    Raises UnsupportedModel when an operator has no lowering, and whatever a pass raises.
    """
    recipe = Recipe.load(options.recipe) if options.recipe is not None else Recipe.default()
    run = _Run(program, target, options)
    for graph_pass in recipe.passes:
        run.step(graph_pass.name, graph_pass.run)
    run.step("guard", cpu_guards.guard)
    run.step("legalize", lambda p, _: p.with_module(_legalize(p)))
    run.step("fuse_epilogues", FuseEpilogues().run)
    choices: list[cpu_lower.Choice] = []

    def kernels(current: Program, context: PassContext) -> Program:
        module, found = cpu_lower.schedule_kernels(current.module, target, AnalyticModel())
        choices.extend(found)
        for choice in found:
            context.matched(**{choice.template: 1})
        return current.with_module(module)

    run.step("kernels", kernels)
    weights: dict[str, Any] = {}

    def lift(current: Program, context: PassContext) -> Program:
        module, arrays = cpu_build.lift_weights(current.module)
        weights.update(arrays)
        context.matched(weights=len(arrays))
        return current.with_module(module)

    run.step("lift_weights", lift)
    run.step("plan_memory", PlanMemory().run)
    with stage("code generation") as generation:
        executable, sources = cpu_build.build(run.program.module, target)
    report = {
        "passes": [entry.to_dict() for entry in run.reports],
        "kernels": [asdict(choice) for choice in choices],
        "weights_bytes": sum(array.nbytes for array in weights.values()),
        "code_generation": {"seconds": round(generation.seconds, 3)},
    }
    return Lowered(executable, weights, program.inputs, program.outputs, target, program.provenance, program.dims, recipe.to_dict(), report, sources)


def _legalize(program: Program) -> Any:
    module = relax.backend.DispatchSortScan()(relax.transform.DecomposeOpsForInference()(program.module))
    module = cpu_legalize.legalize(module)
    return relax.transform.DeadCodeElimination()(relax.transform.EliminateCommonSubexpr()(module))
