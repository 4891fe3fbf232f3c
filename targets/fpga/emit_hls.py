"""A dataflow plan as a Vitis HLS project: kernel, weights, testbench with vectors, Tcl script. All names are made here; none comes from the model."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

import numpy as np

from .cost import entry_bits, lanes_in
from .network import Add, LayerNorm, MatMul, MatVec, Network, Pool, Reorder, Requant, Softmax, Spatial, Stage, Table, Window
from .plan import DataflowPlan, Edge, Unit, printable

CLOCK_NS = 5.0


def project(plan: DataflowPlan, vectors: np.ndarray) -> dict[str, str]:
    """File name -> text. vectors: u8 inputs [count, elements] of the testbench; the integer reference gives what it expects."""
    library = {name: files(__package__).joinpath("library", name).read_text() for name in ("tc_hls.h", "sim_ap_int.h", "sim_hls_stream.h")}
    return {
        **library,
        "plan.txt": plan.text(),
        "weights.h": _weights(plan),
        "kernel.h": _header(plan),
        "kernel.cpp": _kernel(plan),
        "vectors.h": _vectors(plan.network, vectors),
        "testbench.cpp": _testbench(plan),
        "project.tcl": _script(plan),
    }


# ---- stages


def stage_tables(unit: Unit) -> list[tuple[str, str, np.ndarray]]:
    """Constant arrays of a stage: (suffix, C type, values)."""
    stage, folding = unit.stage, unit.folding
    if isinstance(stage, MatVec):
        folds, pe = stage.n // folding.pe, folding.pe
        multiplier = np.zeros(stage.n, np.int64) if stage.requant is None else np.broadcast_to(stage.requant.multiplier, stage.n)
        return [
            ("table", f"ap_uint<{entry_bits(stage)}>", matvec_table(stage, pe, folding.simd)),
            ("bias", "ap_int<32>", stage.bias.reshape(folds, pe)),
            ("multiplier", "ap_uint<17>", multiplier.reshape(folds, pe)),
        ]
    if isinstance(stage, Table):
        return [("values", "tc_u8", stage.values)]
    if isinstance(stage, Softmax):
        return [("exponential", "ap_uint<16>", stage.table)]
    if isinstance(stage, LayerNorm):
        shape = (stage.length // folding.pe, folding.pe)
        return [("gamma", "ap_int<18>", stage.gamma.reshape(shape)), ("beta", "ap_int<42>", stage.beta.reshape(shape))]
    if isinstance(stage, Reorder):
        words = stage.index.reshape(-1, folding.pe)[:, 0] // folding.pe
        return [("index", f"ap_uint<{_index_bits(stage, folding.pe)}>", words)]
    return []


def matvec_table(stage: MatVec, pe: int, simd: int) -> np.ndarray:
    """[N / PE * steps, PE * SIMD] entries: a weight as an unsigned byte, and in N:M stages above it the place of its input in the group."""
    weights = stage.weights.astype(np.int64)
    places = np.zeros_like(weights)
    if stage.pattern is not None:
        keep, of = stage.pattern
        groups = weights.reshape(stage.n, stage.k // of, of)
        # the non-zero places in order, filled up with zeros
        places = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[:, :, :keep], axis=2)
        weights = np.take_along_axis(groups, places, axis=2).reshape(stage.n, -1)
        places = places.reshape(stage.n, -1)
    entries = (weights & 255) | (places << 8)
    steps = entries.shape[1] // simd
    return entries.reshape(stage.n // pe, pe, steps, simd).transpose(0, 2, 1, 3).reshape(-1, pe * simd)


def _index_bits(stage: Reorder, lanes: int) -> int:
    return max(1, (stage.count // lanes - 1).bit_length())


def _requant(requant: Requant | None) -> list[object]:
    """SHIFT, ZERO, LOW, HIGH"""
    return [1, 0, 0, 255] if requant is None else [requant.shift, requant.zero, requant.low, requant.high]


def _call(unit: Unit) -> str:
    """The call of the library's template that is this unit's body."""
    stage, pe, simd = unit.stage, unit.folding.pe, unit.folding.simd
    streams = [f"in{i}" for i in range(len(unit.inputs))] + ["out0"]
    tables = [f"{unit.name}_{suffix}" for suffix, _, _ in stage_tables(unit)]
    if unit.kind == "convert":
        source, result = unit.inputs[0], unit.outputs[0]
        return f"tc_convert<{_element(source)}, {source.count}, {source.lanes}, {result.lanes}>(in0, out0);"
    assert stage is not None
    if isinstance(stage, MatVec):
        keep, of = stage.pattern or (1, 1)
        result = _join("tc_result", [str(stage.raw).lower(), stage.acc_bits, *_requant(stage.requant)])
        name, arguments = "tc_matvec", [result, stage.rows, stage.k, stage.n, pe, simd, keep, of, entry_bits(stage), stage.acc_bits]
    elif isinstance(stage, Window):
        name, arguments = "tc_window", [*_image(stage), stage.zero, pe]
    elif isinstance(stage, Pool):
        multiplier = 0 if stage.requant is None else int(stage.requant.multiplier)
        arguments = [str(stage.requant is None).lower(), *_image(stage), pe, stage.bias, multiplier, *_requant(stage.requant)]
        name = "tc_pool"
    elif isinstance(stage, Add):
        name = "tc_add"
        arguments = [stage.count, pe, *stage.zeros, *stage.multipliers, stage.shift, stage.zero, stage.low, stage.high]
    elif isinstance(stage, Table):
        name, arguments = "tc_table", [stage.count, pe]
    elif isinstance(stage, MatMul):
        numbers = [*stage.zeros, int(stage.requant.multiplier), *_requant(stage.requant)]
        name, arguments = "tc_matmul", [stage.batch, stage.m, stage.n, stage.k, pe, simd, stage.acc_bits, *numbers]
    elif isinstance(stage, Softmax):
        name, arguments = "tc_softmax", [stage.rows, stage.length, pe]
    elif isinstance(stage, LayerNorm):
        name, arguments = "tc_norm", [stage.rows, stage.length, pe, stage.shift, stage.zero]
        tables.insert(0, f"{stage.epsilon}LL")
    else:
        assert isinstance(stage, Reorder)
        name, arguments = "tc_reorder", [stage.count, stage.n_out, pe, _index_bits(stage, pe)]
    return f"{_join(name, arguments)}({', '.join([*streams, *tables])});"


def _join(name: str, arguments: Iterable[object]) -> str:
    return f"{name}<{', '.join(str(argument) for argument in arguments)}>"


def _image(stage: Spatial) -> list[int]:
    """H, W, C, KH, KW, SH, SW, TOP, LEFT, HO, WO"""
    return [stage.height, stage.width, stage.channels, *stage.kernel, *stage.stride, *stage.pads[:2], *stage.out_hw]


# ---- files


def _element(edge: Edge) -> str:
    return "tc_u8" if edge.bits == 8 else "ap_int<32>"


def _stream(edge: Edge) -> str:
    return f"hls::stream<tc_word<{_element(edge)}, {edge.lanes}> >"


def _signature(unit: Unit) -> str:
    arguments = [f"{_stream(edge)}& in{i}" for i, edge in enumerate(unit.inputs)] + [
        f"{_stream(edge)}& out{i}" for i, edge in enumerate(unit.outputs)
    ]
    return f"void {unit.name}({', '.join(arguments)})"


def _header(plan: DataflowPlan) -> str:
    source, result = _ends(plan)
    lines = ["// The kernel and its stages.", "#ifndef TC_KERNEL_H", "#define TC_KERNEL_H", '#include "tc_hls.h"', ""]
    lines += [f"{_signature(unit)};" for unit in plan.units]
    lines += ["", f"void {plan.network.name}({_stream(source)}& input, {_stream(result)}& output);", "#endif", ""]
    return "\n".join(lines)


def _ends(plan: DataflowPlan) -> tuple[Edge, Edge]:
    edges = {edge.name: edge for edge in plan.edges}
    return edges["input"], edges["output"]


def _kernel(plan: DataflowPlan) -> str:
    source, result = _ends(plan)
    lines = ["// Printed by tcompile from the dataflow plan in plan.txt.", '#include "kernel.h"', "", '#include "weights.h"', ""]
    for unit in plan.units:
        if unit.stage is not None:
            lines.append(f"// {printable(unit.stage.source)}: PE {unit.folding.pe}, SIMD {unit.folding.simd}, {unit.cycles} cycles (modelled)")
        lines += [f"{_signature(unit)} {{", *_body(unit), "}", ""]
    lines += [f"void {plan.network.name}({_stream(source)}& input, {_stream(result)}& output) {{"]
    lines += ["#pragma HLS INTERFACE axis port=input", "#pragma HLS INTERFACE axis port=output", "#pragma HLS INTERFACE s_axilite port=return"]
    lines += ["#pragma HLS AGGREGATE variable=input compact=byte", "#pragma HLS AGGREGATE variable=output compact=byte", "#pragma HLS DATAFLOW"]
    for edge in plan.edges:
        if edge.name not in ("input", "output"):
            lines += [f'    {_stream(edge)} {edge.name}("{edge.name}");', f"#pragma HLS STREAM variable={edge.name} depth={edge.depth}"]
    lines += [f"    {unit.name}({', '.join(edge.name for edge in (*unit.inputs, *unit.outputs))});" for unit in plan.units]
    return "\n".join([*lines, "}", ""])


def _body(unit: Unit) -> list[str]:
    if unit.kind == "fork":
        edge = unit.inputs[0]
        writes = [f"        out{i}.write(x);" for i in range(len(unit.outputs))]
        word = f"tc_word<{_element(edge)}, {edge.lanes}>"
        loop = f"    for (int i = 0; i < {edge.count // edge.lanes}; ++i) {{"
        return [loop, "#pragma HLS PIPELINE II=1", f"        {word} x = in0.read();", *writes, "    }"]
    side_by_side = [
        f"#pragma HLS ARRAY_RESHAPE variable={unit.name}_{suffix} dim=2 complete" for suffix, _, values in stage_tables(unit) if values.ndim == 2
    ]
    return [*side_by_side, f"    {_call(unit)}"]


def _weights(plan: DataflowPlan) -> str:
    lines = ["// Constants of the stages: weights (in N:M stages with the place of their input), biases, multipliers, tables.", '#include "tc_hls.h"']
    for unit in plan.units:
        for suffix, kind, values in stage_tables(unit):
            dims = "".join(f"[{size}]" for size in values.shape)
            lines += ["", f"static const {kind} {unit.name}_{suffix}{dims} = {_braces(values)};"]
    return "\n".join([*lines, ""])


def _braces(values: np.ndarray) -> str:
    if values.ndim == 1:
        return "{" + ", ".join(str(int(value)) for value in values) + "}"
    return "{\n" + ",\n".join(_braces(row) for row in values) + "}"


def _vectors(network: Network, vectors: np.ndarray) -> str:
    inputs = np.asarray(vectors, np.int64)
    expected = np.stack([network.run(vector) for vector in inputs])
    lines = ["// Inputs and what the integer reference makes of them.", f"static const int tc_vectors = {len(inputs)};"]
    lines += [f"static const unsigned char tc_inputs[{len(inputs)}][{inputs.shape[1]}] = {_braces(inputs)};"]
    lines += [f"static const int tc_expected[{len(inputs)}][{expected.shape[1]}] = {_braces(expected)};", ""]
    return "\n".join(lines)


def _testbench(plan: DataflowPlan) -> str:
    source, result = _ends(plan)
    text = files(__package__).joinpath("library", "testbench.cpp").read_text()
    streams = [f'        {_stream(edge)} {edge.name}("{edge.name}", depth ? depth : {edge.depth});' for edge in plan.edges]
    stages = [
        f'        scheduler.add("{unit.name}", [&] {{ for (int i = 0; i < calls; ++i) {unit.name}({", ".join(e.name for e in (*unit.inputs, *unit.outputs))}); }});'
        for unit in plan.units
    ]
    values = {
        "TOP": plan.network.name,
        "IN_STREAM": _stream(source),
        "OUT_STREAM": _stream(result),
        "IN_LANES": source.lanes,
        "OUT_LANES": result.lanes,
        "IN_COUNT": source.count,
        "OUT_COUNT": result.count,
        "IN_TYPE": _element(source),
        "OUT_TYPE": _element(result),
        "STREAMS": "\n".join(streams).strip(),
        "STAGES": "\n".join(stages).strip(),
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def _script(plan: DataflowPlan) -> str:
    top = plan.network.name
    return f"""# vitis_hls -f project.tcl: C simulation, synthesis and an IP. Vitis prints its own cycles and resources; those in plan.txt are modelled.
open_project -reset {top}
set_top {top}
add_files kernel.cpp
add_files -tb testbench.cpp
open_solution -reset solution -flow_target vivado
set_part {plan.part.vendor}
create_clock -period {CLOCK_NS:g}
csim_design
csynth_design
cosim_design
export_design -format ip_catalog
exit
"""


def usable(stage: Stage) -> bool:
    """True for a stage that SystemVerilog is printed for as well."""
    return isinstance(stage, MatVec)


__all__ = ["lanes_in", "matvec_table", "project", "stage_tables", "usable"]
