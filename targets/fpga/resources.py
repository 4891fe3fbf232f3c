"""Matrix-vector stages as autotune's resource model sees them: cycles, DSP and LUT by closed-form features and the formulas of cost.py.

    python -m tcompile.targets.fpga.resources benchmarks/results/fpga_rtl.json benchmarks/results/fpga_rtl_unfitted.json autotune/pretrained/fpga-points.jsonl.gz

makes the model's points of what measure.py found. The planner keeps its formulas: they answer for every kind of stage, and the model was trained on this one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...autotune.cost_model import Design
from ...autotune.resources import write_points
from . import cost
from .cost import Folding
from .network import MatVec


def features(stage: MatVec, folding: Folding) -> dict[str, int]:
    """What measure.py records of a stage."""
    keep, of = stage.pattern or (1, 1)
    sizes = {"k": stage.k, "n": stage.n, "pe": folding.pe, "simd": folding.simd, "keep": keep, "of": of}
    return sizes | {"acc_bits": stage.acc_bits, "entry_bits": cost.entry_bits(stage)}


def design(stage: MatVec, folding: Folding) -> Design:
    """The design of a stage; cycles are those between two inferences (all its rows)."""
    found = cost.resources(stage, folding)
    return _design(features(stage, folding), {"cycles": cost.cycles(stage, folding), "dsp": found.dsp, "lut": found.lut})


def _design(known: Mapping[str, float], modelled: Mapping[str, float]) -> Design:
    pe, simd = known["pe"], known["simd"]
    steps, folds = known["k"] * known["keep"] / known["of"] / simd, known["n"] / pe
    numbers = {
        **{name: math.log2(known[name]) for name in ("k", "n", "pe", "simd", "of")},
        "density": known["keep"] / known["of"],
        "products": math.log2(pe * simd),
        "lanes": max(1, simd // known["keep"]) * known["of"] if known["of"] > 1 else simd,
        "words": math.log2(steps * folds),
        "padding": math.ceil(math.log2(steps * folds)) - math.log2(steps * folds),  # memories of other depths than powers of two are pieced together
        "in_lut": float(steps * folds <= cost.LUT_MEMORY),
        "acc_bits": known["acc_bits"],
        "entry_bits": known["entry_bits"],
    }
    return Design("fpga", {name: float(value) for name, value in numbers.items()}, {name: float(value) for name, value in modelled.items()})


def points(corpus: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `write_points` from what measure.py wrote."""
    rows = []
    for point in corpus["points"]:
        known, modelled, measured = point["features"], point["modelled"], point["measured"]
        pattern = f"{known['keep']}:{known['of']}" if known["of"] > 1 else "dense"
        rows.append(
            {
                "workload": f"{known['k']} -> {known['n']}, {pattern}",
                "schedule": f"pe {known['pe']}, simd {known['simd']}",
                "design": _design(known, {"cycles": modelled["cycles_per_row"], "dsp": modelled["dsp"], "lut": modelled["lut"]}),
                "measured": {"cycles": measured["cycles_per_row"], "dsp": measured["dsp"], "lut": measured["lut"]},
            }
        )
    return rows


if __name__ == "__main__":
    corpora = [json.loads(Path(name).read_text()) for name in sys.argv[1:-1]]
    write_points(Path(sys.argv[-1]), corpora[0]["versions"], [row for corpus in corpora for row in points(corpus)])
