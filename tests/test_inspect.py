"""Counts of operations, bytes and parameters against those worked out by hand, and what is said of models that do not compile."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_models
import pytest
import tcompile
from onnx import TensorProto, helper
from tcompile.compiler import roofline
from tcompile.compiler.api import import_model
from tcompile.compiler.cli.main import main
from tcompile.passes.base import PassContext
from tcompile.passes.layout import ChannelsLast
from tcompile.targets.base import Target

small = onnx_models.small


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=op.lower(), **attributes)


def layers(model, **options) -> dict[str, dict]:
    return {layer["name"]: layer for layer in tcompile.inspect(model, **options)["layers"]}


def counts(model, name: str) -> tuple[int, int]:
    layer = layers(model)[name]
    return layer["flops"], layer["bytes"]


def test_products():
    a, b = 7 * 5 * 4, 5 * 11 * 4
    assert counts(small([node("MatMul", ["x", "w"], ["y"])], {"x": [7, 5], "w": [5, 11]}, ["y"]), "matmul") == (2 * 7 * 5 * 11, a + b + 7 * 11 * 4)
    weights = {"w": np.zeros((6, 2, 3, 3), "float32")}
    conv = small([node("Conv", ["x", "w"], ["y"], group=2)], {"x": [2, 4, 9, 8]}, ["y"], weights)
    out = 2 * 6 * 7 * 6
    assert counts(conv, "conv") == (2 * out * 2 * 9, 4 * (2 * 4 * 9 * 8 + 6 * 2 * 9 + out))
    assert tcompile.inspect(conv)["parameters"] == {"count": 108, "bytes": 432}
    transposed = small([node("ConvTranspose", ["x", "w"], ["y"])], {"x": [1, 6, 5, 5]}, ["y"], weights)
    assert layers(transposed)["convtranspose"]["flops"] == 2 * 6 * 25 * 2 * 9
    # as often as they are counted, whatever the layout has become
    target = Target.parse("cpu:haswell")
    program = import_model(conv)
    before, after = (
        sum(layer.flops for layer in roofline.layers(each, target) if "nn.conv2d" in layer.operators)
        for each in (program, ChannelsLast().run(program, PassContext(target)))
    )
    assert before == after == 2 * out * 2 * 9


def test_moving_data():
    model = small([node("Reshape", ["x", "s"], ["r"]), node("Transpose", ["r"], ["y"], perm=[1, 0])], {"x": [3, 5]}, ["y"], {"s": np.array([5, 3])})
    assert counts(model, "reshape") == (0, 0) and counts(model, "transpose") == (0, 120)
    gather = small([node("Gather", ["w", "i"], ["y"])], {"i": ([3], TensorProto.INT64)}, ["y"], {"w": np.zeros((1000, 7), "float32")})
    assert layers(gather)["gather"]["bytes"] < 1000


def test_groups_read_the_weights_of_rows_at_most():
    """Of 2 rows by 4 experts, two are counted."""
    weights = {"w1": np.zeros((4, 50, 30), "float32"), "w2": np.zeros((4, 30, 50), "float32")}
    experts = node("MoE", ["x", "r", "w1", "", "w2"], ["y"], domain="com.microsoft", k=1)
    model = small([experts], {"x": [2, 30], "r": [2, 4]}, ["y"], weights)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    flops, read = counts(model, "moe")
    assert 2 * 2 * 2 * 30 * 50 <= flops < 14000 and 4 * 2 * 2 * 30 * 50 < read < 4 * 2 * 2 * 30 * 50 + 1000


def test_dims_and_machine():
    model = onnx_models.mlp("N", layers=2)
    summary = tcompile.inspect(model, "cpu:haswell", shapes={"x": "1..8..32x4"})
    assert summary["dims"]["N"] | {"bytes_factor": 0} == {"range": "1..32", "size": 8, "flops_factor": 2.0, "bytes_factor": 0}
    assert 1 < summary["dims"]["N"]["bytes_factor"] < 2
    first, machine = summary["layers"][0], Target.parse("cpu:haswell")
    assert (first["name"], first["flops"], first["bytes"], first["bound"]) == ("matmul_0", 192, 272, "memory")
    assert first["milliseconds"] == pytest.approx(272 / (machine.bandwidth_gbs * machine.cores) / 1e6)
    assert summary["total"]["flops"] == sum(layer["flops"] for layer in summary["layers"])
    assert tcompile.inspect(model)["dims"]["N"]["size"] == 1
    big = small([node("MatMul", ["x", "w"], ["y"])], {"x": [2048, 2048], "w": [2048, 2048]}, ["y"])
    assert layers(big, target="cpu:haswell")["matmul"]["bound"] == "compute"
    assert layers(big, target="cpu:haswell")["matmul"]["milliseconds"] == pytest.approx(2 * 2048**3 / (machine.peak_gflops() * machine.cores) / 1e6)


def test_blockers_and_what_is_known(tmp_path, capsys):
    path = onnx_models.unsupported(tmp_path)
    summary = tcompile.inspect(path)
    assert [blocker["node"] for blocker in summary["blockers"]] == ["first", "second"]
    assert summary["inputs"] == [{"name": "x", "shape": [2], "dtype": "float"}] and summary["operators"] == {
        "acme::Frobnicate": 1,
        "acme::Twiddle": 1,
    }
    assert main(["inspect", str(path)]) == 3
    out, err = capsys.readouterr()
    assert "Frobnicate" in out and "first" in err and "second" in err


def test_command(tmp_path, capsys):
    path = onnx_models.saved_mlp(tmp_path, rows="N")
    assert main(["inspect", str(path), "--shape", "x=1..16..64x4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dims"]["N"]["size"] == 16
    assert main(["inspect", str(path), "--layers", "1", "--target", "cpu:haswell"]) == 0
    out = capsys.readouterr().out
    assert "matmul_0" in out and "relu_0" not in out and "cpu:haswell" in out
    assert main(["inspect", str(path), "--target", "cpu:pentium"]) == 2


def test_exported_program(tmp_path):
    torch = pytest.importorskip("torch")
    exported = torch.export.export(torch.nn.Linear(5, 3).eval(), (torch.zeros(2, 5),))
    torch.export.save(exported, tmp_path / "linear.pt2")
    summary = tcompile.inspect(tmp_path / "linear.pt2")
    assert summary["total"]["flops"] >= 2 * 2 * 5 * 3 and summary["parameters"]["count"] >= 18 and summary["blockers"] == []


def test_quantized_products_count_in_the_kernels_that_compute_them(tmp_path):
    """Quantising takes a node apart: its product, whose name gets a number, counts where it is computed, however similar the names of the nodes are."""
    names = ["x", "c", "c1", "c11", "y"]
    convs = [
        helper.make_node("Conv", [source, f"w{at}"], [result], name=f"conv{at}", pads=[1, 1, 1, 1])
        for at, (source, result) in enumerate(zip(names, names[1:], strict=False))
    ]
    rng = np.random.default_rng(7)
    channels = [16, 24, 32, 48, 64]
    weights = {f"w{at}": rng.standard_normal((channels[at + 1], channels[at], 3, 3)).astype("float32") for at in range(4)}
    model = small(convs, {"x": [1, 16, 13, 11]}, ["y"], weights)
    data = rng.standard_normal((1, 16, 13, 11)).astype("float32")
    compiled = tcompile.compile(model, quantize="int8", calibration=[data], report=str(tmp_path / "report.html"))
    counted = {row["workload"]: row for row in compiled.report()["kernels"] if row["workload"].startswith("conv2d u8s8")}
    assert len(counted) == 4
    for at in range(4):
        product = 2 * 13 * 11 * channels[at + 1] * channels[at] * 9
        (row,) = (row for workload, row in counted.items() if f"x{channels[at]} -> {channels[at + 1]}," in workload)
        assert product <= row["flops"] < 1.05 * product
        assert f"conv{at}" in row["nodes"]


def test_names_of_variables_leave_room_for_the_numbers_of_passes():
    chain = [node("Relu", ["x"], ["r"]), node("Neg", ["r"], ["r1"]), node("Abs", ["r1"], ["r11"])]
    program = import_model(small(chain, {"x": [3]}, ["r11"]))
    assert set(program.origins.values()) == {"relu", "neg", "abs"}
    for name, source in program.origins.items():
        assert program.node(name) == program.node(f"{name}1") == program.node(f"{name}12") == source
    assert program.node("other1") == "other1"
