"""The matrix-vector stages of a plan in SystemVerilog, and the whole network where it has no others. Same tables, folding and arithmetic as the HLS project.

rtl_STAGE.sv          module tc_STAGE: a stage of library/tc_mvau.sv with its parameters
rtl_STAGE_*.hex       its tables
rtl_network.sv        module tc_top: all units and streams with their depths, for networks of matrix-vector stages alone
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np

from . import cost
from .emit_hls import stage_tables
from .network import MatVec
from .plan import DataflowPlan, Edge, Unit

LIBRARY = ("tc_mvau.sv", "tc_streams.sv")


def project(plan: DataflowPlan) -> dict[str, str]:
    """File name -> text; empty for a network without a matrix-vector stage."""
    stages = [unit for unit in plan.units if isinstance(unit.stage, MatVec)]
    if not stages:
        return {}
    sources = {name: library(name) for name in LIBRARY}
    for unit in stages:
        sources |= stage_files(unit)
    if whole(plan):
        sources["rtl_network.sv"] = _network(plan)
    return sources


def library(name: str) -> str:
    """Text of a file of modules."""
    return files(__package__).joinpath("library", name).read_text()


def whole(plan: DataflowPlan) -> bool:
    """True when every unit has a module."""
    return all(unit.kind == "convert" or isinstance(unit.stage, MatVec) for unit in plan.units)


def stage_files(unit: Unit) -> dict[str, str]:
    """The module of one matrix-vector stage and its tables."""
    stage = unit.stage
    assert isinstance(stage, MatVec)
    keep, of = stage.pattern or (1, 1)
    parameters: dict[str, object] = {"K": stage.k, "N": stage.n, "PE": unit.folding.pe, "SIMD": unit.folding.simd, "NZ": keep, "GROUP": of}
    parameters |= {"ENTRY": cost.entry_bits(stage), "ACC": stage.acc_bits, "RAW": int(stage.raw)}
    if stage.requant is not None:
        requant = stage.requant
        parameters |= {"SHIFT": requant.shift, "ZERO": requant.zero, "LOW": requant.low, "HIGH": requant.high}
    bits = {"table": cost.entry_bits(stage), "bias": stage.acc_bits, "multiplier": 17}
    names = {suffix: f"rtl_{unit.name}_{suffix}.hex" for suffix in bits}
    parameters |= {suffix.upper(): f'"{name}"' for suffix, name in names.items()}
    lanes_in, lanes_out = cost.lanes_in(stage, unit.folding) * 8, unit.folding.pe * (32 if stage.raw else 8)
    text = f"""// Printed by tcompile from the dataflow plan in plan.txt.
module tc_{unit.name} (
    input wire clk, input wire rst,
    input wire [{lanes_in - 1}:0] in_data, input wire in_valid, output wire in_ready,
    output wire [{lanes_out - 1}:0] out_data, output wire out_valid, input wire out_ready
);
    tc_mvau #({", ".join(f".{key}({value})" for key, value in parameters.items())}) stage (
        .clk(clk), .rst(rst), .in_data(in_data), .in_valid(in_valid), .in_ready(in_ready),
        .out_data(out_data), .out_valid(out_valid), .out_ready(out_ready));
endmodule
"""
    tables = {names[suffix]: _hex(values, bits[suffix]) for suffix, _, values in stage_tables(unit)}
    return {f"rtl_{unit.name}.sv": text, **tables}


def _hex(values: np.ndarray, bits: int) -> str:
    """One line per word, element 0 in the lowest bits."""
    lines = []
    for row in values.tolist():
        word = 0
        for place, value in enumerate(row):
            word |= (value & ((1 << bits) - 1)) << (place * bits)
        lines.append(f"{word:x}")
    return "\n".join(lines) + "\n"


def single(unit: Unit) -> str:
    """Module tc_top: one stage alone, for measurement."""
    return _shell(_width(unit.inputs[0]), _width(unit.outputs[0]), f"    tc_{unit.name} unit ({_ports('in_', 'out_')});")


def _network(plan: DataflowPlan) -> str:
    edges = {edge.name: edge for edge in plan.edges}
    body = []
    for edge in plan.edges:
        for side in ("from", "to"):
            if (edge.name, side) not in (("input", "from"), ("output", "to")):
                name = f"{edge.name}_{side}_"
                body.append(f"    wire [{_width(edge) - 1}:0] {name}data; wire {name}valid, {name}ready;")
        before = "in_" if edge.name == "input" else f"{edge.name}_from_"
        after = "out_" if edge.name == "output" else f"{edge.name}_to_"
        body.append(f"    tc_fifo #(.W({_width(edge)}), .DEPTH({edge.depth})) {edge.name}_fifo ({_ports(before, after)});")
    for unit in plan.units:
        source, result = unit.inputs[0], unit.outputs[0]
        module = f"tc_{unit.name}"
        if unit.kind == "convert":
            module = f"tc_convert #(.W({source.bits}), .LI({source.lanes}), .LO({result.lanes}))"
        body.append(f"    {module} {unit.name} ({_ports(f'{source.name}_to_', f'{result.name}_from_')});")
    return _shell(_width(edges["input"]), _width(edges["output"]), "\n".join(body))


def _shell(wide_in: int, wide_out: int, body: str) -> str:
    return f"""// Printed by tcompile from the dataflow plan in plan.txt.
module tc_top (
    input wire clk, input wire rst,
    input wire [{wide_in - 1}:0] in_data, input wire in_valid, output wire in_ready,
    output wire [{wide_out - 1}:0] out_data, output wire out_valid, input wire out_ready
);
{body}
endmodule
"""


def _width(edge: Edge) -> int:
    return edge.lanes * edge.bits


def _ports(before: str, after: str) -> str:
    sides = [f".{side}_{wire}({prefix}{wire})" for side, prefix in (("in", before), ("out", after)) for wire in ("data", "valid", "ready")]
    return ", ".join([".clk(clk)", ".rst(rst)", *sides])
