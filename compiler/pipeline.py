"""The pipeline, top to bottom: the recipe's graph passes, then the target's own lowering."""

from __future__ import annotations

import math

from ..passes.base import PassReport
from ..passes.precision import FORMATS
from ..passes.registry import PASSES
from ..targets.base import Target
from ..targets.registry import BACKENDS
from .accuracy import Accuracy
from .control import drivers
from .errors import Blocker, UnsupportedModel, UsageError, VerificationError
from .lowered import Lowered
from .options import CompileOptions
from .program import Program
from .progress import stage
from .recipe import Recipe
from .steps import Steps


def lower(program: Program, target: Target, options: CompileOptions, accuracy: Accuracy | None = None) -> Lowered:
    """Lower a program for a target. accuracy: the data on which passes observe the program and its loss is measured.

    Raises UnsupportedModel when an operator has no lowering, VerificationError when the loss exceeds the limit, and whatever a pass raises.
    """
    return BACKENDS[target.kind].lower(graph_passes(program, target, options, accuracy))


def graph_passes(program: Program, target: Target, options: CompileOptions, accuracy: Accuracy | None = None) -> Steps:
    """The program after the recipe's passes, ready for the target's lowering; errors as in `lower`."""
    if target.kind != "cuda" and options.emit_only:
        raise UsageError(f"--emit-only is for CUDA targets; leave it out for {target.text}")
    if target.kind not in ("cpu", "cuda") and options.precision is not None:
        raise UsageError(f"--precision is for CPU and CUDA targets; leave it out for {target.text}")
    known = ("bfloat16",) if target.kind == "cuda" else ()
    carried = [spec for spec in (*program.inputs, *program.outputs) if spec.carrier is not None and spec.dtype not in known]
    if carried and target.kind != "cpu":
        raise UnsupportedModel([Blocker(spec.name, "graph boundary", f"elements of type {spec.dtype} are for CPU targets") for spec in carried])
    if target.kind != "cpu" and (found := sorted(drivers(program.module))):
        raise UnsupportedModel(
            [
                Blocker(node, operator, f"control flow that is decided while the model runs is for CPUs, not for {target.text}")
                for node, operator in found
            ]
        )
    recipe = Recipe.of(options)
    if options.precision is not None and options.precision in FORMATS:
        recipe = recipe.having(PASSES["precision"].from_flag(options.precision))
    elif options.precision is not None:
        target = BACKENDS[target.kind].having(target, options.precision)
    steps = Steps(program, target, options, BACKENDS[target.kind].scope, accuracy, recipe.to_dict())
    for graph_pass in recipe.passes:
        before = steps.program
        report = steps.step(graph_pass.name, graph_pass.run)
        report.lossy = graph_pass.lossy and steps.program is not before
        if report.lossy and accuracy is not None:
            _measure(steps.program, accuracy, report)
    return steps


def _measure(program: Program, accuracy: Accuracy, report: PassReport) -> None:
    """Record the loss of everything up to this pass, and hold the limit."""
    with stage(f"loss after {report.name}"):
        report.loss = {name: round(value, 8) for name, value in accuracy.all_drops(program).items()}
    found = report.loss[accuracy.metric]
    if accuracy.max_drop is not None and not (math.isfinite(found) and found <= accuracy.max_drop):
        raise VerificationError(
            f"after '{report.name}' the loss on the calibration data ({accuracy.metric}) is {found:.3g}, above --max-drop {accuracy.max_drop:g}; "
            "allow more, compress less, or give more calibration data"
        )
