"""From programs to integer networks and plans, and what the command makes of bad requests."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx
import tcompile
from fpga_models import NETWORKS, module, planned, program, samples
from onnx import helper
from onnx_models import saved_mlp, small
from tcompile.compiler.artifact import read
from tcompile.compiler.errors import UnsupportedModel, UsageError, VerificationError
from tcompile.targets.fpga import emit_hls, emit_sv, integer, parts, plan
from tcompile.targets.fpga.calibrate import quantise
from tcompile.targets.fpga.graph import lower_to_nodes
from tcompile.targets.fpga.network import MatVec

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed (apt install g++)")
KINDS = {
    "mlp": ["MatVec"] * 4,
    "cnn": ["Window", "MatVec", "Pool", "Window", "MatVec", "Pool", "MatVec"],
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", NETWORKS)
def test_integer_network_is_near_the_float_one(name):
    """The whole of it in integers, weights and activations in 8 bits; the difference to torch is what the report says."""
    network, difference = quantise(lower_to_nodes(program(name)), samples(name), name)
    if name in KINDS:
        assert [type(stage).__name__ for stage in network.stages] == KINDS[name]
    expected = [module(name)(torch.from_numpy(x)).detach().numpy() for x in samples(name)]
    ours = [network(x) for x in samples(name)]
    assert ours[0].shape == expected[0].shape
    spread = max(float(np.max(y)) for y in expected) - min(float(np.min(y)) for y in expected)
    error = max(float(np.abs(a - b).max()) for a, b in zip(ours, expected, strict=True)) / spread
    assert error < 0.05
    assert error == pytest.approx(difference["max_error"], abs=2e-3)
    assert difference["cosine"] > 0.999


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_rounded_programs_keep_their_levels(name):
    """A program that the quantize pass has rounded: the same weights and the same levels, bit for bit what its codes are."""
    compiled = tcompile.compile(
        module(name), "fpga:xcu280", example_inputs=(torch.from_numpy(samples(name)[0]),), calibration=[(x,) for x in samples(name)], quantize="int8"
    )
    report = compiled.report()
    assert next(entry for entry in report["passes"] if entry["name"] == "quantize")["matches"]
    assert report["fpga"]["difference_to_float"]["cosine"] > 0.999
    loss = next(entry for entry in report["passes"] if entry["name"] == "integer_network")["loss"]
    assert set(loss) >= {"cosine", "relative", "top1"} and loss["cosine"] < 2e-3


def test_fixed_point_is_within_half_a_unit():
    for scale in (3e-7, 1e-3, 0.4999, 0.99999, 1.7, 700.0):
        multiplier, shift = integer.fixed_point(np.array(scale))
        assert 1 << 16 <= multiplier < 1 << 17
        assert abs(multiplier / 2**shift / scale - 1) < 2**-16
    acc = np.array([-5, -3, -1, 0, 1, 3, 5])
    assert integer.rounded_shift(acc, 1).tolist() == [-2, -1, 0, 0, 1, 2, 3]  # half up
    with pytest.raises(ValueError):
        integer.fixed_point(np.array(0.0))


def test_plan_balances_and_prints():
    """The shortest interval within the part, every stage near it, and each column of the plan."""
    text = planned("encoder").text()
    for word in ("PE", "SIMD", "II", "cycles", "FIFO", "numbers", "sparsity", "DSP", "BRAM36", "LUT", "FF", "modelled", "xcu280"):
        assert word in text
    fast, slow = planned("mlp"), planned("mlp", 256)
    assert fast.interval < 32 and slow.interval == 256
    assert slow.total.dsp < fast.total.dsp / 8
    assert not fast.total.over(fast.part.resources)


def test_late_operands_have_deep_streams():
    """Queries wait until all keys are read, a residual until its branch is through."""
    edges = {edge.name: edge for edge in planned("encoder").edges}
    for unit in planned("encoder").units:
        if type(unit.stage).__name__ in ("MatMul", "Add"):
            depths = [edge.depth * edge.lanes for edge in unit.inputs]
            assert max(depths) >= unit.stage.n_in(int(np.argmax(depths)))
    assert edges["input"].depth == plan.DEPTH


def test_zeros_in_weights_become_an_n_of_m_stage():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8)).eval()
    with torch.no_grad():
        weight = layers[0].weight
        weight *= torch.argsort(torch.rand(24, 8, 4), dim=2).reshape(24, 32) < 2
    x = [np.random.default_rng(i).standard_normal((1, 32), dtype=np.float32) for i in range(4)]
    compiled = tcompile.compile(layers, "fpga:xcu280", example_inputs=(torch.from_numpy(x[0]),), calibration=[(a,) for a in x])
    rows = compiled.report()["fpga"]["plan"]["units"]
    assert [row["sparsity"] for row in rows if row["unit"].endswith("linear")] == ["2:4", "dense"]
    if shutil.which("g++"):
        expected = layers(torch.from_numpy(x[0])).detach().numpy()
        np.testing.assert_allclose(compiled(x[0]), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("part, resource", [("xc7s6", "dsp"), ("xc7a35t", "bram36")])
def test_parts_that_are_too_small(part, resource):
    generator = np.random.default_rng(0)
    if resource == "dsp":
        network = planned("encoder").network
    else:
        weights = generator.integers(-127, 128, (512, 1024)).astype(np.int8)
        stage = MatVec("s0_linear", ("",), "big", 1, weights, np.zeros(512, np.int64), None)
        network = type(planned("mlp").network)("tc_big", (stage,), planned("mlp").network.input, planned("mlp").network.output)
    with pytest.raises(UnsupportedModel, match=rf"{part} is too small.*{resource} needed at the smallest folding, \d+ available"):
        plan.make(network, parts.part(part))


def test_names_from_models_stay_out_of_the_code():
    """A model, input and node names that would end a comment, a string or a command."""
    evil = 'x"; exec rm -rf /; # */ #include "/etc/passwd"\n[exit]{}$x\\'
    weights = {"w": np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)}
    model = small([helper.make_node("MatMul", [evil, "w"], ["y"], name=evil)], {evil: [1, 8]}, ["y"], weights)
    model.graph.name = evil
    x = np.random.default_rng(0).standard_normal((4, 1, 8)).astype(np.float32)
    compiled = tcompile.compile(model, "fpga:xcu280", calibration=[(a,) for a in x])
    for name, text in compiled.artifact.sources.items():
        for piece in ("exec rm", "rm -rf", "/etc/passwd", "[exit]", "$x"):
            assert piece not in text, name
    assert compiled.manifest["inputs"][0]["name"] == evil


def test_same_model_same_bytes(tmp_path):
    x = [(sample,) for sample in samples("cnn")]
    folders = []
    for run in range(2):
        compiled = tcompile.compile(module("cnn"), "fpga:xczu9eg", example_inputs=x[0], calibration=x)
        folders.append(compiled.save(tmp_path / f"{run}.tcm"))
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert {name.name for name in names} >= {
        "kernel.cpp",
        "kernel.h",
        "weights.h",
        "testbench.cpp",
        "vectors.h",
        "project.tcl",
        "plan.txt",
        "tc_mvau.sv",
    }
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@needs_gxx
def test_command_compiles_runs_and_verifies(tmp_path, monkeypatch):
    """Compile, run and verify through the command; the artifact's C simulation is what runs."""
    from tcompile.compiler.cli.main import main

    monkeypatch.chdir(tmp_path)
    model = saved_mlp(tmp_path, rows=1, layers=2, width=8)
    np.savez("data.npz", x=np.random.default_rng(0).standard_normal((16, 1, 4), dtype=np.float32))

    def command(*arguments: str) -> int:
        return main(list(arguments))

    assert command(str(model), "--target", "fpga:xczu3eg", "--quantize", "int8", "--calibration", "data.npz", "-o", "m.tcm") == 0
    assert command("run", "m.tcm", "--random", "--output", "y.npz") == 0
    assert np.load("y.npz")["y"].shape == (1, 8)
    assert command("verify", "m.tcm", "--model", str(model), "--rtol", "0.1", "--atol", "0.1") == 0
    assert command(str(model), "--target", "fpga:xczu3eg", "-o", "n.tcm") == 2  # no data
    assert command(str(model), "--target", "fpga:xc7", "--calibration", "data.npz") == 2  # no such part
    sources = read(tmp_path / "m.tcm").sources
    assert "tc_mlp" in sources["kernel.cpp"] and "xczu3eg-sbva484-1-e" in sources["project.tcl"]


def _compile(model, calibration, **options):
    return tcompile.compile(model, "fpga:xcu280", calibration=calibration, **options)


def test_what_no_stage_computes_is_refused_by_name():
    x = [(np.random.default_rng(i).standard_normal((1, 4, 4)).astype(np.float32),) for i in range(2)]
    nodes = [helper.make_node("Sqrt", ["x"], ["a"], name="root"), helper.make_node("CumSum", ["x", "axis"], ["b"], name="sums")]
    model = small([*nodes, helper.make_node("Add", ["a", "b"], ["y"], name="both")], {"x": [1, 4, 4]}, ["y"], {"axis": np.array(1)})
    with pytest.raises(UnsupportedModel) as refused:
        _compile(model, x)
    assert "cumsum" in str(refused.value)
    group = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4)).eval()
    with pytest.raises(UnsupportedModel, match="4 groups"):
        _compile(group, [(np.ones((1, 4, 5, 5), np.float32),)], example_inputs=(torch.ones(1, 4, 5, 5),))
    product = small([helper.make_node("Mul", ["x", "z"], ["y"], name="p")], {"x": [2], "z": [2]}, ["y"])
    with pytest.raises(UnsupportedModel, match="one input and one output"):
        _compile(product, [(np.ones(2, np.float32), np.ones(2, np.float32))])
    with pytest.raises(UnsupportedModel, match="open dims.*--shape x=1x4"):
        _compile(onnx_open(), [(np.ones((1, 4), np.float32),)])


def onnx_open() -> onnx.ModelProto:
    weights = {"w": np.ones((4, 2), np.float32)}
    return small([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 4]}, ["y"], weights)


def test_loss_above_the_limit_stops():
    x = [(sample,) for sample in samples("encoder")]
    with pytest.raises(VerificationError, match="above --max-drop"):
        tcompile.compile(module("encoder"), "fpga", example_inputs=x[0], calibration=x, max_drop=1e-7)
    with pytest.raises(UsageError, match="--calibration"):
        tcompile.compile(module("encoder"), "fpga", example_inputs=x[0])


def test_emitters_print_from_the_same_plan():
    """The tables of both are the same numbers."""
    made = planned("mlp", 256)
    unit = next(unit for unit in made.units if unit.name == "s1_linear")
    table = emit_hls.stage_tables(unit)[0][2]
    lines = emit_sv.stage_files(unit)["rtl_s1_linear_table.hex"].split()
    assert len(lines) == len(table)
    for line, row in zip(lines, table.tolist(), strict=True):
        assert [int(line, 16) >> (8 * place) & 255 for place in range(len(row))] == row


@pytest.mark.parametrize("layout", ["BSHD", "BHSD,BSHD,BSHD,BHSD"])
def test_fused_attention_in_every_layout(layout):
    """Heads before or behind the tokens: the same products."""
    from tcompile.compiler.dialect.attention import attention
    from tcompile.compiler.program import Program, Provenance, TensorSpec
    from tcompile.compiler.tvm import relax
    from tcompile.targets.fpga.calibrate import observe

    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType([1, 5, 2, 8], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            queries = x if layout == "BSHD" else builder.emit(relax.op.permute_dims(x, [0, 2, 1, 3]))
            out = builder.emit(attention(queries, x, x, scale=0.3, layout=layout))
            if layout != "BSHD":
                out = builder.emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
            out = builder.emit_output(out)
        builder.emit_func_output(out)
    specs = tuple((TensorSpec(name, (1, 5, 2, 8), "float32"),) for name in ("x", "y"))
    sample = np.random.default_rng(0).standard_normal((1, 5, 2, 8), dtype=np.float32)
    _, (found,) = observe(lower_to_nodes(Program(builder.get(), *specs, Provenance("test", "onnx"))), [sample])
    heads = sample.transpose(0, 2, 1, 3).astype(np.float64)
    weights = np.exp(heads @ heads.transpose(0, 1, 3, 2) * 0.3)
    expected = (weights / weights.sum(-1, keepdims=True) @ heads).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-9)
