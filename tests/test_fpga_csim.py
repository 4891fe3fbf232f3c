"""Emitted HLS projects compiled with g++: bit for bit the integer reference, with finite streams and back-pressure, and what must not pass."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from fpga_models import NETWORKS, planned, samples
from tcompile.compiler.errors import ToolchainError
from tcompile.targets.fpga import csim, emit_hls
from tcompile.targets.fpga.pipeline import vectors

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed (apt install g++)")


def project(name: str) -> dict[str, str]:
    plan = planned(name)
    return emit_hls.project(plan, vectors(plan.network, samples(name), 0))


@pytest.fixture(scope="module", params=NETWORKS)
def built(request):
    """(name, simulation) of each network, compiled once."""
    return request.param, csim.build(project(request.param), planned(request.param).network.stages[-1].n_out)


@needs_gxx
def test_simulation_equals_the_integer_reference(built):
    name, simulation = built
    for arguments in ([], ["--fifo"], ["--fifo", "--stall", "30", "--seed", "5"], ["--fifo", "--stall", "60", "--seed", "6"]):
        done = simulation.check(*arguments)
        assert done.returncode == 0, (arguments, done.stdout)
        assert "PASS: 0 of" in done.stdout
    levels = np.random.default_rng(3).integers(0, 256, (3, int(np.prod(NETWORKS[name][1]))))
    expected = np.stack([planned(name).network.run(row) for row in levels])
    np.testing.assert_array_equal(simulation(levels, "--fifo", "--stall", "20"), expected)


@needs_gxx
def test_streams_that_are_too_short_are_found(built):
    """Two words are enough for a chain; a residual connection must hold the whole tensor, and the simulation names who waits for what."""
    name, simulation = built
    done = simulation.check("--fifo", "--depth", "2")
    if name != "encoder":
        assert done.returncode == 0
        return
    assert done.returncode == 3
    assert "DEADLOCK" in done.stdout and "waits to write input" in done.stdout


@needs_gxx
@pytest.mark.parametrize("table, change", [("s0_linear_table", 1), ("s1_linear_multiplier", 90)])
def test_a_wrong_constant_is_found(table, change):
    """One constant of the middle of the network changed in the text of the project."""
    sources = project("mlp")
    start = sources["weights.h"].index("{", sources["weights.h"].index(f" {table}["))
    first = sources["weights.h"].index("{", start + 1) + 1
    end = sources["weights.h"].index(",", first)
    value = int(sources["weights.h"][first:end])
    sources["weights.h"] = (
        f"{sources['weights.h'][:first]}{(value + change) & 255 if 'table' in table else value + change}{sources['weights.h'][end:]}"
    )
    done = csim.build(sources, planned("mlp").network.stages[-1].n_out).check()
    assert done.returncode == 1 and "FAIL" in done.stdout


@needs_gxx
def test_the_vendor_headers_agree(tmp_path):
    """The same project with ap_int.h and hls_stream.h of Xilinx, as another package carries them."""
    spec = find_spec("hls4ml")
    if spec is None or spec.origin is None:
        pytest.skip("hls4ml is not installed (pip install --no-deps hls4ml==1.3.0)")
    headers = Path(spec.origin).parent / "templates" / "vivado" / "ap_types"
    done = csim.build(project("encoder"), 0, flags=(f"-I{headers}", "-Wno-unknown-pragmas")).check()
    assert done.returncode == 0, done.stdout


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToolchainError, match="apt install g\\+\\+"):
        csim.build(project("mlp"), 5)
