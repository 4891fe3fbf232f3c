"""Lowering a program for an FPGA: nodes, integer network, plan, project; each a step that the report lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler.errors import UsageError, VerificationError
from ...compiler.metrics import METRICS, drop
from . import emit_hls, emit_sv, parts, plan
from .calibrate import quantise
from .graph import lower_to_nodes
from .network import Network, Port

if TYPE_CHECKING:
    from ...compiler.lowered import Lowered
    from ...compiler.steps import Steps

#: calibration samples that become vectors of the testbench, and random ones beside them
VECTORS, RANDOM = 4, 2


def lower(steps: Steps) -> Lowered:
    """See `backend.lower`."""
    accuracy = steps.accuracy
    if accuracy is None:
        raise UsageError("FPGA networks compute in integers, with ranges taken from data: give --calibration DATA.npz (Python: calibration=...)")
    name = steps.program.inputs[0].name if steps.program.inputs else ""
    samples = [np.asarray(feeds[name]) for feeds in accuracy.calibration]
    state: dict[str, Any] = {}

    def to_integers(program: Any, context: Any) -> Any:
        walk = lower_to_nodes(program)
        state["network"], state["difference"] = quantise(walk, samples, Path(steps.program.provenance.source).stem)
        for stage in state["network"].stages:
            context.matched(**{type(stage).__name__: 1})
        outputs = [(state["network"](sample),) for sample in samples]
        context.report.loss = {metric: round(drop(metric, outputs, accuracy.reference), 8) for metric in METRICS}
        found = context.report.loss[accuracy.metric]
        if accuracy.max_drop is not None and not found <= accuracy.max_drop:
            raise VerificationError(
                f"the integer network loses {found:.3g} ({accuracy.metric}) on the calibration data, above --max-drop {accuracy.max_drop:g}"
            )
        return program

    def to_plan(program: Any, context: Any) -> Any:
        state["plan"] = plan.make(state["network"], parts.part(steps.target.name))
        context.table("dataflow plan (modelled)", state["plan"].rows())
        return program

    def to_text(program: Any, context: Any) -> Any:
        state["sources"] = emit_hls.project(state["plan"], vectors(state["network"], samples, steps.options.seed))
        state["sources"] |= emit_sv.project(state["plan"])
        return program

    steps.step("integer_network", to_integers)
    steps.step("dataflow_plan", to_plan)
    steps.step("emit_project", to_text)
    network: Network = state["network"]
    report = {
        "fpga": {
            "plan": state["plan"].to_dict(),
            "input": _port(network.input),
            "output": _port(network.output),
            "difference_to_float": {key: round(value, 8) for key, value in state["difference"].items()},
            "top": network.name,
        }
    }
    return steps.lowered(report=report, weights={}, sources=state["sources"])


def vectors(network: Network, samples: list[np.ndarray], seed: int) -> np.ndarray:
    """u8 [VECTORS + RANDOM, elements]: quantised calibration samples, then random levels over the whole range."""
    levels = [network.input.quantise(sample) for sample in samples[:VECTORS]]
    random = np.random.default_rng(seed).integers(0, 256, (RANDOM, levels[0].size))
    return np.concatenate([np.stack(levels), random])


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "shape": list(port.shape), "scale": port.scale.tolist(), "zero": port.zero, "raw": port.raw}
