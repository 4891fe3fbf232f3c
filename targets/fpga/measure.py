"""Measured points of single matrix-vector stages: cycles by Verilator, counts by yosys, every result compared with the integer reference.

python -m tcompile.targets.fpga.measure OUT.json              # the points that cost.py's constants are fitted to
python -m tcompile.targets.fpga.measure OUT.json unfitted     # others
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.errors import VerificationError
from . import cost, emit_sv, integer, rtl
from .cost import Folding
from .network import MatVec, Requant
from .parts import Resources
from .plan import Edge, Unit
from .resources import features

#: rows that run through a stage when its cycles are counted
ROWS = 16


@dataclass(frozen=True)
class Config:
    """A stage y [rows, n] = x [rows, k] and its folding; pattern (n, m) or None for dense."""

    k: int
    n: int
    pe: int
    simd: int
    pattern: tuple[int, int] | None = None


_SAME = ((64, 32, 8, 1), (64, 32, 8, 2), (64, 32, 8, 4), (64, 32, 4, 8), (128, 64, 8, 8))
CONFIGS = (
    *(Config(*shape) for shape in (*_SAME, (16, 64, 8, 4), (256, 16, 4, 8), (64, 32, 1, 1), (64, 32, 16, 4), (72, 24, 6, 9))),
    *(Config(*shape, (2, 4)) for shape in _SAME),
    *(Config(64, 32, 8, simd, pattern) for simd, pattern in ((1, (1, 4)), (4, (1, 4)), (2, (2, 8)), (2, (1, 2)))),
)
#: other stages, to which no constant of cost.py was fitted: the resource model's points besides CONFIGS
UNFITTED = (
    *(
        Config(*shape)
        for shape in ((96, 48, 8, 4), (48, 96, 12, 2), (256, 64, 8, 4), (32, 32, 4, 4), (128, 16, 2, 8), (384, 32, 4, 2), (64, 64, 16, 1))
    ),
    *(Config(*shape) for shape in ((80, 40, 5, 8), (512, 16, 8, 2), (24, 24, 3, 6), (48, 96, 4, 12), (96, 48, 16, 8))),
    *(Config(*shape, (2, 4)) for shape in ((96, 48, 8, 2), (128, 64, 8, 4), (256, 32, 4, 4))),
    *(
        Config(48, 96, 8, 1, (1, 4)),
        Config(96, 48, 4, 2, (1, 2)),
        Config(64, 64, 4, 4, (2, 8)),
        Config(32, 32, 8, 2, (1, 2)),
        Config(128, 16, 4, 2, (1, 8)),
    ),
)


def stage_of(config: Config, seed: int = 0, rows: int = 1) -> MatVec:
    """A stage with random int8 weights of the pattern, and requantisation that spreads its results over all levels."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(-127, 128, (config.n, config.k)).astype(np.int8)
    if config.pattern is not None:
        keep, of = config.pattern
        order = np.argsort(generator.random((config.n, config.k // of, of)), axis=2)
        weights = np.where(order.reshape(config.n, config.k) < keep, weights, 0).astype(np.int8)
    bias = generator.integers(-20000, 20000, config.n) - 128 * weights.astype(np.int64).sum(axis=1)
    spread = 128 * 73 * np.sqrt(config.k * (config.pattern[0] / config.pattern[1] if config.pattern else 1.0))
    multiplier, shift = integer.fixed_point(generator.uniform(0.5, 1.0, config.n) * 100 / spread)
    return MatVec("s0_linear", ("",), "measured", rows, weights, bias, Requant(multiplier, shift, 128), config.pattern)


def unit_of(stage: MatVec, pe: int, simd: int) -> Unit:
    folding = Folding(pe, simd)
    source = Edge("input", cost.lanes_in(stage, folding), 8, stage.n_in(0), 0)
    result = Edge("output", pe, 32 if stage.raw else 8, stage.n_out, 0)
    return Unit(stage.name, "stage", (source,), (result,), cost.cycles(stage, folding), cost.resources(stage, folding), stage, folding)


def sources_of(unit: Unit) -> dict[str, str]:
    """SystemVerilog of one stage alone, as module tc_top."""
    library = {name: emit_sv.library(name) for name in emit_sv.LIBRARY}
    return {**library, **emit_sv.stage_files(unit), "rtl_top.sv": emit_sv.single(unit)}


def measure(config: Config, family: str | None = "xcup", seed: int = 0) -> dict[str, Any]:
    """One point: features, modelled and measured numbers. family None leaves yosys out. Raises VerificationError when the RTL differs from the reference."""
    stage = stage_of(config, seed)
    unit = unit_of(stage, config.pe, config.simd)
    sources = sources_of(unit)
    simulation = rtl.build(sources, unit.inputs[0], unit.outputs[0])
    inputs = np.random.default_rng(seed + 1).integers(0, 256, (ROWS, config.k))
    expected = np.stack([stage.reference(row) for row in inputs])
    one, many = simulation(inputs[:1]), simulation(inputs)
    if not (np.array_equal(one.outputs, expected[:1]) and np.array_equal(many.outputs, expected)):
        raise VerificationError(f"{config}: the RTL differs from the integer reference")
    point: dict[str, Any] = {
        "features": features(stage, Folding(config.pe, config.simd)),
        "measured": {"cycles_per_row": many.interval, "cycles_one_row": one.total, "source": "RTL simulation (Verilator)"},
        "modelled": {"cycles_per_row": unit.cycles, **unit.resources.to_dict()},
    }
    if family is not None:
        counted: Resources = rtl.synthesise(sources, family)
        point["measured"] |= {**counted.to_dict(), "resource_source": f"yosys synth_xilinx -family {family}, before placement"}
    return point


def corpus(configs: Sequence[Config] = CONFIGS) -> dict[str, Any]:
    """Their points, with the versions of the tools."""
    tools = {"verilator": [rtl.verilator(), "--version"], "yosys": [rtl.yosys(), "-V"]}
    versions = {name: subprocess.run(command, capture_output=True, text=True).stdout.strip() for name, command in tools.items()}
    points = []
    for config in configs:
        points.append(measure(config))
        print(json.dumps(points[-1]), file=sys.stderr)
    return {"rows": ROWS, "versions": versions, "points": points}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(corpus(UNFITTED if sys.argv[2:] == ["unfitted"] else CONFIGS), indent=1) + "\n")
